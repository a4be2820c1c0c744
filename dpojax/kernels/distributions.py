"""What is computed of the whole next-token distribution, of one model or of two: KL, mixtures, collisions.

Chunk by chunk as in `dpojax.log_probs`, never with all logits at once.
"""

from functools import partial

import jax
import jax.numpy as jnp

from dpojax.kernels.head import (
  Chunks,
  Head,
  as_head,
  default_size,
  in_chunks,
  logits_of_chunk,
  over_chunks,
  through_head,
  wide_zeros,
)
from dpojax.kernels.precision import wide_of


def _chunks(shape: tuple[int, ...], head: Head, where: jax.Array | None, chunk_size: int | None) -> Chunks:
  size = chunk_size or default_size(head.weights.shape[0])
  return in_chunks(shape, where, size=size, per_index=chunk_size is not None)


def token_log_collisions(
  hidden: jax.Array, head: jax.Array | Head, *, chunk_size: int | None = None
) -> jax.Array:
  """Returns log sum_v p(v)^2, p = softmax(hidden head^T), [..., S] float32: the log-probability
  that two draws of the token agree. Shapes and memory are those of `token_log_probs`; it is for
  weights, so nothing is kept for a gradient.
  """
  head = as_head(head)
  chunked = _chunks(hidden.shape[:-1], head, None, chunk_size)

  def one_chunk(hidden):
    logits = logits_of_chunk(hidden, head)
    # From logits and not from probabilities: squares of small ones are below what float32 holds.
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)

  return chunked.join(jax.lax.map(one_chunk, chunked.split(hidden, tail=1)), hidden.shape[:-1])


def token_kl_from(
  hidden: jax.Array,
  head: jax.Array | Head,
  reference_hidden: jax.Array,
  reference_head: jax.Array | Head,
  *,
  where: jax.Array | None = None,
  chunk_size: int | None = None,
) -> jax.Array:
  """Returns the exact KL(reference || policy) of the next token at each place, in float32.

  sum_v p_ref(v) (log p_ref(v) - log p(v)), p = softmax(hidden head^T). Peak memory is that of
  `token_log_probs`, of both models' logits; gradients are the policy's, p - p_ref to its logits.

  Args:
    hidden, head: of the policy, as `token_log_probs` takes them.
    reference_hidden, reference_head: of the reference, of the same vocabulary; constants.
    where: [..., S] bool, the places that count; the others give 0 and are not computed.
    chunk_size: see `token_log_probs`.

  Raises:
    ValueError: the shapes do not belong together.
  """
  head, reference_head = map(as_head, (head, reference_head))
  shape, vocabulary = hidden.shape[:-1], head.weights.shape[0]
  if reference_hidden.shape[:-1] != shape or reference_head.weights.shape[0] != vocabulary:
    raise ValueError(
      f"hidden [..., S, D] {hidden.shape} and head [V, D] {head.weights.shape} of the policy and "
      f"{reference_hidden.shape} and {reference_head.weights.shape} of the reference do not belong "
      "together"
    )
  # The reference is a constant here as everywhere: nothing flows into it, and nothing is kept for it.
  frozen = jax.lax.stop_gradient((reference_hidden, reference_head))
  chunked = _chunks(shape, head, where, chunk_size)
  values = chunked.join(
    _chunked_kl(
      chunked.split(hidden, tail=1),
      head,
      chunked.split(frozen[0], tail=1),
      frozen[1],
      chunked.count,
      chunked.cuts,
    ),
    shape,
  )
  return values if where is None else jnp.where(where, values, 0)


def token_mixed_log_probs(
  hidden: jax.Array,
  head: jax.Array | Head,
  reference_hidden: jax.Array,
  reference_head: jax.Array | Head,
  target: jax.Array,
  *,
  share: jax.Array | float,
  chunk_size: int | None = None,
) -> jax.Array:
  """Returns log softmax((1 - share) logits + share reference logits)[target], [..., S] float32.

  A policy moved by a share towards the reference, or away from it where the share is negative. Shapes
  and memory are those of `token_kl_from`; nothing is kept for a gradient.
  """
  head, reference_head = map(as_head, (head, reference_head))
  chunked = _chunks(hidden.shape[:-1], head, None, chunk_size)

  def one_chunk(each):
    hidden, reference, target = each
    logits = (1 - share) * logits_of_chunk(hidden, head) + share * logits_of_chunk(reference, reference_head)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  parts = (chunked.split(hidden, tail=1), chunked.split(reference_hidden, tail=1), chunked.split(target))
  return jax.lax.stop_gradient(chunked.join(jax.lax.map(one_chunk, parts), target.shape))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked_kl(hidden, head, reference, reference_head, count, cuts):
  return _kl_forward(hidden, head, reference, reference_head, count, cuts)[0]


def _kl_forward(hidden, head, reference, reference_head, count, cuts):
  dtype = wide_of(hidden.dtype)

  def one_chunk(c, read, written, carry):
    kl, ours, theirs = written
    logits, frozen = logits_of_chunk(read[0][c], head), logits_of_chunk(read[1][c], reference_head)
    our, their = (jax.nn.logsumexp(x, axis=-1) for x in (logits, frozen))
    log_probs, frozen = logits - our[:, None], frozen - their[:, None]
    value = jnp.sum(jnp.exp(frozen) * (frozen - log_probs), axis=-1)
    return (kl.at[c].set(value), ours.at[c].set(our), theirs.at[c].set(their)), carry

  zeros = jnp.zeros(hidden.shape[:-1], dtype)
  (kl, ours, theirs), _ = over_chunks(count, cuts, one_chunk, (hidden, reference), (zeros, zeros, zeros), ())
  return kl, (hidden, head, reference, reference_head, count, ours, theirs)


def _kl_backward(cuts, residuals, cotangent):
  hidden, head, reference, reference_head, count, ours, theirs = residuals
  dtype, weights = wide_of(hidden.dtype), head.weights.astype(hidden.dtype)

  def one_chunk(c, read, hidden_grad, head_grad):
    hidden, reference, our, their, cotangent = (x[c] for x in read)
    logits = logits_of_chunk(hidden, head)
    frozen = logits_of_chunk(reference, reference_head)
    probs, frozen = jnp.exp(logits - our[:, None]), jnp.exp(frozen - their[:, None])
    # The gradient of KL(ref || policy) to the policy's logits is p - p_ref: no derivative of the KL itself.
    logits_grad = (probs - frozen) * cotangent[:, None]
    gradients = through_head(logits_grad, logits, hidden, head, weights, head_grad)
    return hidden_grad.at[c].add(gradients[0]), gradients[1]

  zeros = jnp.zeros(hidden.shape, dtype), jax.tree.map(wide_zeros, head)
  hidden_grad, head_grad = over_chunks(
    count, cuts, one_chunk, (hidden, reference, ours, theirs, cotangent), *zeros
  )
  head_grad = jax.tree.map(lambda grad, x: grad.astype(jnp.result_type(x)), head_grad, head)
  return hidden_grad.astype(hidden.dtype), head_grad, None, None, None


_chunked_kl.defvjp(_kl_forward, _kl_backward)
