"""Log-probs of scored tokens from hidden states, without the [rows, length, vocabulary] logits.

`token_log_probs` is the one primitive: every loss, metric, reference pass and evaluation uses it. It
walks over the scored tokens in chunks, keeps one float32 log-normaliser a token for the backward pass,
and recomputes a chunk's logits there. Chunks of padding alone are not computed. That loop stands below as
it is meant; `dpojax.kernels.head_on_cpu` is the same for a CPU's cache, `dpojax.kernels.distributions`
what needs the whole next-token distribution.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpojax.kernels import cut_head, head_on_cpu
from dpojax.kernels.cut_head import CutHead
from dpojax.kernels.head import (
  Head,
  default_size,
  in_chunks,
  logits_of_chunk,
  target_logits,
  through_head,
  wide_zeros,
)
from dpojax.kernels.platform import arrays_are_cut, at_most, platform
from dpojax.kernels.precision import wide_of


class SequenceLogProbs(NamedTuple):
  """Log-probs of responses: `sums` over tokens and `lengths` in tokens, both float32."""

  sums: jax.Array
  lengths: jax.Array


def token_log_probs(
  hidden: jax.Array,
  head: jax.Array | Head | CutHead,
  target: jax.Array,
  *,
  where: jax.Array | None = None,
  bias: jax.Array | None = None,
  soft_cap: jax.Array | float | None = None,
  chunk_size: int | None = None,
) -> jax.Array:
  """Returns log softmax(hidden head^T)[target] for each token, in float32.

  Peak memory is chunk_size x V for each leading index, forward and backward, never S x V.

  Args:
    hidden: [..., S, D] hidden states that predict, in the compute dtype.
    head: [V, D] output embedding, the input embedding itself when tied; or a `Head`, which brings
      its own bias and soft cap; or a `CutHead`, inside a `shard_map` over its axis.
    target: [..., S] int, the id each hidden state has to predict, in 0..V-1.
    where: [..., S] bool, the tokens that count; the others give 0. They are put behind those that
      do, and chunks that hold nothing else are not computed.
    bias: [V], added to the logits.
    soft_cap: a logit becomes cap * tanh(logit / cap); a constant, its gradient is 0.
    chunk_size: scored tokens a chunk, along S; by default as many as fit `CHUNK_ELEMENTS` logits
      (`ACCELERATOR_CHUNK_ELEMENTS` on GPUs and TPUs).

  Returns:
    [..., S] log-probs, float32 (float64 for float64 inputs), differentiable in hidden, head and
    bias.

  Raises:
    ValueError: the shapes do not belong together.
  """
  head = head if isinstance(head, (Head, CutHead)) else Head(head, bias, soft_cap)
  weights, bias = head.weights, head.bias
  is_cut, width = False, weights.shape[-1]
  if isinstance(head, CutHead):  # of which a device holds some columns
    is_cut, width = True, width * jax.lax.axis_size(head.over.name)
  if hidden.ndim < 2 or hidden.shape[:-1] != target.shape or hidden.shape[-1] != width:
    raise ValueError(
      f"hidden [..., S, D] {hidden.shape}, head [V, D] {weights.shape} and target [..., S] "
      f"{target.shape} do not belong together"
    )
  if bias is not None and bias.shape != weights.shape[:1]:
    raise ValueError(f"head [V, D] {weights.shape} and bias [V] {bias.shape} do not belong together")
  if where is not None and where.shape != target.shape:
    raise ValueError(
      f"where [..., S] {where.shape} and target [..., S] {target.shape} do not belong together"
    )
  # As jax's arrays: NumPy's cannot be read at the number of a chunk, which is traced.
  hidden, head, target, where = jax.tree.map(jnp.asarray, (hidden, head, target, where))
  # Not where arrays are cut: its blocks are slices of a head that lies whole on one device.
  on_cpu = platform() == "cpu" and not arrays_are_cut() and not is_cut
  tokens = cut_head.chunk_tokens if is_cut else head_on_cpu.chunk_tokens if on_cpu else default_size
  size = chunk_size or tokens(weights.shape[0])
  chunks = in_chunks(target.shape, where, size=size, per_index=chunk_size is not None)
  split = chunks.split(hidden, tail=1), head, chunks.split(target)
  if on_cpu:
    values = head_on_cpu.chunked_log_probs(*split, chunks.count, chunks.cuts)
  else:
    chunked: Callable = cut_head.chunked_log_probs if is_cut else _chunked_log_probs
    # These loops know whole chunks only, so pieces are rounded up.
    values = chunked(*split, -(-chunks.count // chunks.cuts))
  values = chunks.join(values, target.shape)
  # Chunks that were left out hold a target's logit and no normaliser: that is no log-prob.
  return values if where is None else jnp.where(where, values, 0)


# The number of rounds is traced, and jax differentiates no such loop backwards. It would keep every chunk's
# logits besides, which is all that the chunks are there to avoid.
@jax.custom_vjp
def _chunked_log_probs(hidden, head, target, count):
  """Log-probs [C, t] of the targets [C, t] of hidden states [C, t, D]; of the first `count` chunks only."""
  return _forward(hidden, head, target, count)[0]


def _forward(hidden, head, target, count):
  def one_chunk(c, normaliser):
    return normaliser.at[c].set(jax.nn.logsumexp(logits_of_chunk(hidden[c], head), axis=-1))

  with at_most(target.shape[0]):
    normaliser = jax.lax.fori_loop(0, count, one_chunk, jnp.zeros(target.shape, wide_of(hidden.dtype)))
  # A target's own logit is one dot product, which is cheaper than to look it up among a chunk's logits.
  values = target_logits(hidden, head, target) - normaliser
  return values, (hidden, head, target, count, normaliser)


def _backward(residuals, cotangent):
  hidden, head, target, count, normaliser = residuals
  weights = head.weights.astype(hidden.dtype)

  def one_chunk(c, grads):
    hidden_grad, head_grad = grads
    logits = logits_of_chunk(hidden[c], head)
    probs = jnp.exp(logits - normaliser[c][:, None])
    # A comparison with ids rather than one_hot or a scatter: XLA fuses it into the subtraction.
    chosen = target[c][:, None] == jax.lax.broadcasted_iota(target.dtype, probs.shape, 1)
    logits_grad = (chosen - probs) * cotangent[c][:, None]
    gradient, head_grad = through_head(logits_grad, logits, hidden[c], head, weights, head_grad)
    return hidden_grad.at[c].set(gradient), head_grad

  # The head's gradient is summed over all chunks in float32: in bfloat16 late chunks would be rounded away.
  zeros = jnp.zeros(hidden.shape, wide_of(hidden.dtype)), jax.tree.map(wide_zeros, head)
  with at_most(target.shape[0]):
    hidden_grad, head_grad = jax.lax.fori_loop(0, count, one_chunk, zeros)
  head_grad = jax.tree.map(lambda grad, x: grad.astype(jnp.result_type(x)), head_grad, head)
  return hidden_grad.astype(hidden.dtype), head_grad, None, None


_chunked_log_probs.defvjp(_forward, _backward)


def log_probs(
  hidden: jax.Array,
  head: jax.Array | Head | CutHead,
  source: jax.Array,
  target: jax.Array,
  slot: jax.Array,
  *,
  num_slots: int,
  chunk_size: int | None = None,
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
    predicting_states(hidden, source), head, target, where=slot < num_slots, chunk_size=chunk_size
  )
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
      "do not belong together"
    )
  # The last logits predict a token that is not there.
  logits = logits[:-1].astype(wide_of(logits.dtype))
  chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
  values = chosen - jax.nn.logsumexp(logits, axis=-1)
  return jnp.sum(values, where=mask[1:].astype(bool))


sequence_log_probs = jax.vmap(sequence_log_prob)
"""`sequence_log_prob` of a batch: [B, T, V], [B, T], [B, T] -> [B]."""
