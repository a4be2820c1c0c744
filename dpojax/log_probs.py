"""Log-probs of scored tokens from hidden states, without the [rows, length, vocabulary] logits.

`token_log_probs` is the one primitive: every loss, metric, reference pass and evaluation uses it.
It walks over the scored tokens in chunks, keeps one float32 log-normaliser a token for the
backward pass, and recomputes a chunk's logits there.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK_ELEMENTS = 2**24
"""Logits held at once when no chunk size is given: 2**24 float32 values, 64 MiB."""


class SequenceLogProbs(NamedTuple):
  """Log-probs of responses: `sums` over tokens and `lengths` in tokens, both float32."""

  sums: jax.Array
  lengths: jax.Array


class Head(NamedTuple):
  """An output embedding whose logits have more to them; it stands wherever a `head` does.

  `weights` [V, D]; `bias` [V], added to the logits, or None; `soft_cap`, a constant scalar that
  makes a logit cap * tanh(logit / cap), or None.
  """

  weights: jax.Array
  bias: jax.Array | None = None
  soft_cap: jax.Array | float | None = None


def token_log_probs(
    hidden: jax.Array, head: jax.Array | Head, target: jax.Array, *,
    bias: jax.Array | None = None, soft_cap: jax.Array | float | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
  """Returns log softmax(hidden head^T)[target] for each token, in float32.

  Peak memory is chunk_size x V for each leading index, forward and backward, never S x V.

  Args:
    hidden: [..., S, D] hidden states that predict, in the compute dtype.
    head: [V, D] output embedding, the input embedding itself when tied; or a `Head`, which brings
      its own bias and soft cap.
    target: [..., S] int, the id each hidden state has to predict, in 0..V-1.
    bias: [V], added to the logits.
    soft_cap: a logit becomes cap * tanh(logit / cap); a constant, its gradient is 0.
    chunk_size: scored tokens a chunk, along S; by default as many as fit `CHUNK_ELEMENTS` logits.

  Returns:
    [..., S] log-probs, float32 (float64 for float64 inputs), differentiable in hidden, head and
    bias.

  Raises:
    ValueError: the shapes do not belong together.
  """
  head = head if isinstance(head, Head) else Head(head, bias, soft_cap)
  weights, bias, _ = head
  if hidden.ndim < 2 or hidden.shape[:-1] != target.shape or hidden.shape[-1] != weights.shape[-1]:
    raise ValueError(
        f"hidden [..., S, D] {hidden.shape}, head [V, D] {weights.shape} and target [..., S] "
        f"{target.shape} do not belong together")
  if bias is not None and bias.shape != weights.shape[:1]:
    raise ValueError(
        f"head [V, D] {weights.shape} and bias [V] {bias.shape} do not belong together")
  length = hidden.shape[-2]
  padded, chunks = _padded(hidden, head, chunk_size)
  pad = [(0, 0)] * (target.ndim - 1) + [(0, padded.shape[-2] - length)]
  return _chunked_log_probs(padded, head, jnp.pad(target, pad), chunks)[..., :length]


def token_log_collisions(
    hidden: jax.Array, head: jax.Array | Head, *, chunk_size: int | None = None
) -> jax.Array:
  """Returns log sum_v p(v)^2, p = softmax(hidden head^T), [..., S] float32: the log-probability
  that two draws of the token agree. Shapes and memory are those of `token_log_probs`; it is for
  weights, so nothing is kept for a gradient.
  """
  head = head if isinstance(head, Head) else Head(head)

  def one_chunk(hidden):
    logits = _logits(hidden, head)
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)

  length = hidden.shape[-2]
  padded, chunks = _padded(hidden, head, chunk_size)
  values = jax.lax.map(one_chunk, _to_chunks(padded, chunks, -2))
  return _from_chunks(values, -1)[..., :length]


def logits_of(hidden: jax.Array, head: jax.Array | Head) -> jax.Array:
  """Returns the logits [..., V] of hidden states [..., D], all at once; for a few tokens.

  The product is of the head with the states and not the other way round: on CPUs that reads the
  head as it lies, which is most of the work of a few tokens.
  """
  head = head if isinstance(head, Head) else Head(head)
  logits = jnp.einsum(
      "vd,...d->v...", head.weights.astype(hidden.dtype), hidden,
      preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))
  return _shaped(jnp.moveaxis(jax.lax.optimization_barrier(logits), 0, -1), head)


def log_probs(
    hidden: jax.Array, head: jax.Array | Head, source: jax.Array, target: jax.Array,
    slot: jax.Array, *, num_slots: int, chunk_size: int | None = None,
) -> SequenceLogProbs:
  """Returns the summed log-prob of every response of every row.

  The gather and the sum are those of one row, lifted by `vmap`; the head is applied to the scored
  tokens of all rows, chunk by chunk.

  Args:
    hidden: [R, L, D] hidden states.
    head: [V, D] output embedding, or a `Head`.
    source: [R, S] where in its row the hidden state that predicts stands.
    target: [R, S] the id to score.
    slot: [R, S] the response a token belongs to, 0..num_slots-1; num_slots is padding.
    num_slots: responses a row can hold, `P * K`.
    chunk_size: see `token_log_probs`.

  Returns:
    `sums` and `lengths`, [R, num_slots] float32; 0 where a row holds no such response.
  """
  values = token_log_probs(
      predicting_states(hidden, source), head, target, chunk_size=chunk_size)
  sums = sum_by_slots(values, slot, num_slots=num_slots)
  lengths = sum_by_slots(jnp.ones_like(values), slot, num_slots=num_slots)
  return SequenceLogProbs(sums, lengths)


def predicting_states(hidden: jax.Array, source: jax.Array) -> jax.Array:
  """Returns the hidden states [R, S, D] that predict the scored tokens, from [R, L, D] and [R, S]."""
  return jax.vmap(lambda row, index: row[index])(hidden, source)


def sum_by_slot(values: jax.Array, slot: jax.Array, *, num_slots: int) -> jax.Array:
  """Sums the [S] values of one row by slot into [num_slots]; slot num_slots is dropped."""
  return jax.ops.segment_sum(values, slot, num_segments=num_slots + 1)[:-1]


def sum_by_slots(values: jax.Array, slot: jax.Array, *, num_slots: int) -> jax.Array:
  """`sum_by_slot` of every row: [R, S] to [R, num_slots]."""
  return jax.vmap(partial(sum_by_slot, num_slots=num_slots))(values, slot)


def sequence_log_prob(logits: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the summed log-prob of the scored tokens of one sequence, from logits at hand.

  For models that only give logits; it needs all of them in memory. `jax.vmap` lifts it to a batch,
  as `sequence_log_probs` does.

  Args:
    logits: [T, V]; the logits at t predict the token at t + 1.
    tokens: [T] int ids of the whole sequence, prompt and response.
    mask: [T] bool, true where the token is scored. Token 0 has no prediction and is never scored.

  Returns:
    A float32 scalar.

  Raises:
    ValueError: the shapes do not belong together.
  """
  if logits.shape[:-1] != tokens.shape or tokens.shape != mask.shape:
    raise ValueError(
        f"logits [T, V] {logits.shape}, tokens [T] {tokens.shape} and mask [T] {mask.shape} "
        "do not belong together")
  logits = logits[:-1].astype(jnp.promote_types(logits.dtype, jnp.float32))
  chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
  values = chosen - jax.nn.logsumexp(logits, axis=-1)
  return jnp.sum(values, where=mask[1:].astype(bool))


sequence_log_probs = jax.vmap(sequence_log_prob)
"""`sequence_log_prob` of a batch: [B, T, V], [B, T], [B, T] -> [B]."""


def _padded(hidden: jax.Array, head: Head, chunk_size: int | None) -> tuple[jax.Array, int]:
  """Pads the token axis to whole chunks; returns that and the number of chunks."""
  *leading, length, _ = hidden.shape
  if chunk_size is None:
    chunk_size = CHUNK_ELEMENTS // max(1, math.prod(leading) * head.weights.shape[0])
  chunk_size = min(max(1, chunk_size), max(1, length))
  chunks = -(-length // chunk_size)
  pad = [(0, 0)] * len(leading) + [(0, chunks * chunk_size - length), (0, 0)]
  return jnp.pad(hidden, pad), chunks


def _to_chunks(x: jax.Array, chunks: int, axis: int) -> jax.Array:
  """Splits the token axis and brings the chunks to the front: [..., S, :] -> [C, ..., S/C, :]."""
  axis %= x.ndim
  split = x.reshape(*x.shape[:axis], chunks, x.shape[axis] // chunks, *x.shape[axis + 1:])
  return jnp.moveaxis(split, axis, 0)


def _from_chunks(x: jax.Array, axis: int) -> jax.Array:
  axis %= x.ndim - 1
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2:])


def _logits(hidden: jax.Array, head: Head) -> jax.Array:
  """Logits [..., V] of the head in the dtype of the hidden states, accumulated in float32."""
  logits = jnp.einsum(
      "...d,vd->...v", hidden, head.weights.astype(hidden.dtype),
      preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))
  return _shaped(logits, head)


def _shaped(logits: jax.Array, head: Head) -> jax.Array:
  """Logits with the bias and the soft cap of the head."""
  if head.bias is not None:
    logits += jnp.broadcast_to(head.bias.astype(logits.dtype), logits.shape)
  if head.soft_cap is not None:
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
  return logits


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_log_probs(hidden, head, target, chunks):
  return _forward(hidden, head, target, chunks)[0]


def _forward(hidden, head, target, chunks):
  def one_chunk(chunk):
    hidden, target = chunk
    logits = _logits(hidden, head)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return chosen - normaliser, normaliser

  values, normaliser = jax.lax.map(
      one_chunk, (_to_chunks(hidden, chunks, -2), _to_chunks(target, chunks, -1)))
  return _from_chunks(values, -1), (hidden, head, target, _from_chunks(normaliser, -1))


def _backward(chunks, residuals, cotangent):
  hidden, head, target, normaliser = residuals
  weights = head.weights.astype(hidden.dtype)

  def one_chunk(grads, chunk):
    hidden, target, normaliser, cotangent = chunk
    logits = _logits(hidden, head)
    probs = jnp.exp(logits - normaliser[..., None])
    ids = jax.lax.broadcasted_iota(target.dtype, probs.shape, probs.ndim - 1)
    hit = (ids == target[..., None]).astype(probs.dtype)
    logits_grad = (hit - probs) * cotangent[..., None]
    if head.soft_cap is not None:
      logits_grad *= 1.0 - jnp.square(logits / head.soft_cap)
    bias_grad = grads.bias
    if bias_grad is not None:
      bias_grad += jnp.sum(logits_grad.reshape(-1, logits_grad.shape[-1]), axis=0)
    logits_grad = logits_grad.astype(hidden.dtype)
    hidden_grad = jnp.einsum("...v,vd->...d", logits_grad, weights)
    flat_grad = logits_grad.reshape(-1, logits_grad.shape[-1])
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    head_grad = grads.weights + jnp.einsum(
        "tv,td->vd", flat_grad, flat_hidden, preferred_element_type=grads.weights.dtype)
    return Head(head_grad, bias_grad, grads.soft_cap), hidden_grad

  zeros = jax.tree.map(
      lambda x: jnp.zeros(jnp.shape(x), jnp.promote_types(jnp.result_type(x), jnp.float32)), head)
  grads, hidden_grad = jax.lax.scan(one_chunk, zeros, (
      _to_chunks(hidden, chunks, -2), _to_chunks(target, chunks, -1),
      _to_chunks(normaliser, chunks, -1), _to_chunks(cotangent, chunks, -1)))
  head_grad = jax.tree.map(lambda grad, x: grad.astype(jnp.result_type(x)), grads, head)
  return _from_chunks(hidden_grad, -2), head_grad, None


_chunked_log_probs.defvjp(_forward, _backward)
