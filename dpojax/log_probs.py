"""Log-probs of scored tokens from hidden states, without the [rows, length, vocabulary] logits.

`token_log_probs` is the one primitive: every loss, metric, reference pass and evaluation uses it.
It walks over the scored tokens in chunks (on CPUs also over the vocabulary in blocks, so that
logits never leave the cache), keeps one float32 log-normaliser a token for the backward pass, and
recomputes a chunk's logits there. Chunks of padding alone are not computed.
"""

import math
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

CHUNK_ELEMENTS = 2**24
"""Logits held at once when no chunk size is given: 2**24 float32 values, 64 MiB."""

ACCELERATOR_CHUNK_ELEMENTS = 2**27
"""The same on GPUs and TPUs, 512 MiB: each chunk reads and writes the head's whole gradient once, which
takes longer than the products of the few tokens that a smaller one holds."""

_LANES = 128

CPU_TOKENS, CPU_BLOCK = 256, 19 * _LANES
"""Tokens and vocabulary of the logits held at once on CPUs, 2.4 MiB: about a core's cache.

An odd multiple of `_LANES`: rows a power of two apart meet in the same few places of a cache.
"""

CPU_CUTS = 4
"""Pieces the last chunk of a row is cut into on CPUs, where those of padding alone are left out."""

_LEAST = -1e30


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
    where: jax.Array | None = None, bias: jax.Array | None = None,
    soft_cap: jax.Array | float | None = None, chunk_size: int | None = None,
) -> jax.Array:
  """Returns log softmax(hidden head^T)[target] for each token, in float32.

  Peak memory is chunk_size x V for each leading index, forward and backward, never S x V.

  Args:
    hidden: [..., S, D] hidden states that predict, in the compute dtype.
    head: [V, D] output embedding, the input embedding itself when tied; or a `Head`, which brings
      its own bias and soft cap.
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
  head = head if isinstance(head, Head) else Head(head, bias, soft_cap)
  weights, bias, _ = head
  if hidden.ndim < 2 or hidden.shape[:-1] != target.shape or hidden.shape[-1] != weights.shape[-1]:
    raise ValueError(
        f"hidden [..., S, D] {hidden.shape}, head [V, D] {weights.shape} and target [..., S] "
        f"{target.shape} do not belong together")
  if bias is not None and bias.shape != weights.shape[:1]:
    raise ValueError(
        f"head [V, D] {weights.shape} and bias [V] {bias.shape} do not belong together")
  if where is not None and where.shape != target.shape:
    raise ValueError(
        f"where [..., S] {where.shape} and target [..., S] {target.shape} do not belong together")
  hidden, head, target, where = jax.tree.map(jnp.asarray, (hidden, head, target, where))
  chunked = _in_chunks(target.shape, weights.shape[0], where, chunk_size)
  values = _chunked_log_probs(
      chunked.split(hidden, tail=1), head, chunked.split(target), chunked.count, chunked.cuts,
      chunked.block)
  values = chunked.join(values, target.shape)
  return values if where is None else jnp.where(where, values, 0)


def token_log_collisions(
    hidden: jax.Array, head: jax.Array | Head, *, chunk_size: int | None = None
) -> jax.Array:
  """Returns log sum_v p(v)^2, p = softmax(hidden head^T), [..., S] float32: the log-probability
  that two draws of the token agree. Shapes and memory are those of `token_log_probs`; it is for
  weights, so nothing is kept for a gradient.
  """
  head = head if isinstance(head, Head) else Head(head)
  chunked = _in_chunks(hidden.shape[:-1], head.weights.shape[0], None, chunk_size)

  def one_chunk(hidden):
    logits = _logits(hidden, head)
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)

  return chunked.join(jax.lax.map(one_chunk, chunked.split(hidden, tail=1)), hidden.shape[:-1])


def token_kl_from(
    hidden: jax.Array, head: jax.Array | Head, reference_hidden: jax.Array,
    reference_head: jax.Array | Head, *, where: jax.Array | None = None,
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
  head, reference_head = (h if isinstance(h, Head) else Head(h) for h in (head, reference_head))
  shape, vocabulary = hidden.shape[:-1], head.weights.shape[0]
  if reference_hidden.shape[:-1] != shape or reference_head.weights.shape[0] != vocabulary:
    raise ValueError(
        f"hidden [..., S, D] {hidden.shape} and head [V, D] {head.weights.shape} of the policy and "
        f"{reference_hidden.shape} and {reference_head.weights.shape} of the reference do not belong "
        "together")
  frozen = jax.lax.stop_gradient((reference_hidden, reference_head))
  chunked = _in_chunks(shape, vocabulary, where, chunk_size)
  values = chunked.join(_chunked_kl(
      chunked.split(hidden, tail=1), head, chunked.split(frozen[0], tail=1), frozen[1],
      chunked.count, chunked.cuts), shape)
  return values if where is None else jnp.where(where, values, 0)


def token_mixed_log_probs(
    hidden: jax.Array, head: jax.Array | Head, reference_hidden: jax.Array,
    reference_head: jax.Array | Head, target: jax.Array, *, share: jax.Array | float,
    chunk_size: int | None = None,
) -> jax.Array:
  """Returns log softmax((1 - share) logits + share reference logits)[target], [..., S] float32.

  A policy moved by a share towards the reference, or away from it where the share is negative. Shapes
  and memory are those of `token_kl_from`; nothing is kept for a gradient.
  """
  head, reference_head = (h if isinstance(h, Head) else Head(h) for h in (head, reference_head))
  chunked = _in_chunks(hidden.shape[:-1], head.weights.shape[0], None, chunk_size)

  def one_chunk(each):
    hidden, reference, target = each
    logits = (1 - share) * _logits(hidden, head) + share * _logits(reference, reference_head)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  parts = (chunked.split(hidden, tail=1), chunked.split(reference_hidden, tail=1),
           chunked.split(target))
  return jax.lax.stop_gradient(chunked.join(jax.lax.map(one_chunk, parts), target.shape))


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
      predicting_states(hidden, source), head, target, where=slot < num_slots,
      chunk_size=chunk_size)
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


class _Chunks(NamedTuple):
  """How tokens are cut into C chunks of t, and the vocabulary into blocks.

  `order` [T] puts the tokens that count first; without it chunks run along S and hold tokens of
  every leading index. `count` is the number of chunks to compute, counted in `cuts` pieces a chunk;
  `block` is the vocabulary of a block.
  """

  order: jax.Array | None
  size: int
  number: int
  count: jax.Array | int
  cuts: int
  block: int

  def split(self, x: jax.Array, *, tail: int = 0) -> jax.Array:
    """[..., S] with `tail` more axes -> [C, t] with them."""
    leading = x.ndim - 1 - tail
    rest = x.shape[leading + 1:]
    if self.order is not None:
      x = x.reshape(-1, *rest)[self.order]
      leading = 0
    padding = self.number * self.size - x.shape[leading]
    x = jnp.pad(x, [(0, 0)] * leading + [(0, padding)] + [(0, 0)] * tail)
    x = x.reshape(*x.shape[:leading], self.number, self.size, *rest)
    return jnp.moveaxis(x, leading, 0).reshape(self.number, -1, *rest)

  def join(self, x: jax.Array, shape: tuple[int, ...], *, tail: int = 0) -> jax.Array:
    """The inverse: [C, t] -> `shape`, [..., S]."""
    rest = x.shape[2:]
    if self.order is not None:
      flat = x.reshape(-1, *rest)[:self.order.size]
      return jnp.zeros_like(flat).at[self.order].set(flat, unique_indices=True).reshape(*shape, *rest)
    *leading, length = shape
    x = x.reshape(self.number, *leading, self.size, *rest)
    x = jnp.moveaxis(x, 0, len(leading)).reshape(*leading, -1, *rest)
    return jax.lax.slice_in_dim(x, 0, length, axis=len(leading))


def _in_chunks(shape, vocabulary: int, where: jax.Array | None, chunk_size: int | None) -> _Chunks:
  """Returns how tokens of a shape [..., S] are cut."""
  *leading, length = shape
  per_index, tokens = math.prod(leading), math.prod(shape)
  on_cpu = jax.default_backend() == "cpu"
  cut_over_devices = arrays_are_cut()
  block = vocabulary
  if on_cpu and not cut_over_devices and vocabulary > 2 * CPU_BLOCK:
    block = CPU_BLOCK
  if chunk_size is not None:
    size = chunk_size * per_index
  else:
    elements = CHUNK_ELEMENTS if on_cpu else ACCELERATOR_CHUNK_ELEMENTS
    size = CPU_TOKENS if block < vocabulary else elements // vocabulary
  if where is None or cut_over_devices:
    size = min(max(1, size // max(1, per_index)), max(1, length))
    number = -(-length // size)
    count = number
    if where is not None:  # up to the last token that counts of any index
      last = jnp.max(jnp.where(where, jnp.arange(1, length + 1), 0), initial=0)
      count = -(-last // size)
    return _Chunks(None, size, number, count, 1, block)
  size = min(max(1, size), max(1, tokens))
  cuts = CPU_CUTS if on_cpu and size % CPU_CUTS == 0 else 1
  where = where.reshape(-1)
  count = -(-jnp.sum(where) // (size // cuts))
  return _Chunks(jnp.argsort(~where, stable=True), size, -(-tokens // size), count, cuts, block)


def arrays_are_cut() -> bool:
  """Whether the caller has set a mesh that arrays are cut over: what lies together here does not there."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and any(
      size > 1 and kind is not jax.sharding.AxisType.Manual
      for size, kind in zip(mesh.axis_sizes, mesh.axis_types))


def _wide(x: jax.Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)


def _logits(hidden: jax.Array, head: Head) -> jax.Array:
  """Logits [..., V] of the head in the dtype of the hidden states, accumulated in float32."""
  logits = jnp.einsum(
      "...d,vd->...v", hidden, head.weights.astype(hidden.dtype),
      preferred_element_type=_wide(hidden))
  return _shaped(logits, head)


def _shaped(logits: jax.Array, head: Head) -> jax.Array:
  """Logits with the bias and the soft cap of the head."""
  if head.bias is not None:
    logits += jnp.broadcast_to(head.bias.astype(logits.dtype), logits.shape)
  if head.soft_cap is not None:
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
  return logits


def _target_logits(hidden: jax.Array, head: Head, target: jax.Array) -> jax.Array:
  """The logit [C, t] of each token's own target."""
  weights = head.weights.at[target].get(mode="promise_in_bounds").astype(hidden.dtype)
  bias = None if head.bias is None else head.bias[target]
  logits = jnp.einsum("ctd,ctd->ct", hidden, weights, preferred_element_type=_wide(hidden))
  return _shaped(logits, Head(weights, bias, head.soft_cap))


def _over_lanes(reduce: Callable, x: jax.Array) -> jax.Array:
  """Reduces the last axis, first into lanes: reductions of single rows do not vectorise on CPUs."""
  if x.shape[-1] % _LANES:
    return reduce(x, axis=-1)
  return reduce(reduce(x.reshape(*x.shape[:-1], -1, _LANES), axis=-2), axis=-1)


def _blocks(head: Head, block: int) -> tuple[int, Callable]:
  """Returns the number of blocks, and b -> (start, whether a column is new [block], their head).

  The last block ends where the vocabulary does, so that some of its columns were there before.
  """
  vocabulary = head.weights.shape[0]
  if block >= vocabulary:
    return 1, lambda b: (0, None, head)

  def of(b):
    start = jnp.minimum(b * block, vocabulary - block)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block)
    bias = None if head.bias is None else cut(head.bias)
    new = start + jnp.arange(block) >= b * block
    return start, new, Head(cut(head.weights), bias, head.soft_cap)

  return -(-vocabulary // block), of


def _over_chunks(count, cuts: int, step: Callable, read: Any, written: Any, carry: Any):
  """Returns what `step(c, read, written, carry) -> (written, carry)` makes of the chunks c that count.

  `read` and `written` are trees of [C, t, ...], of the last chunk only the pieces that count; `count`
  is of pieces, see `_Chunks`.
  """
  def loop(first, last, read, written, carry):
    return jax.lax.fori_loop(first, last, lambda c, both: step(c, read, *both), (written, carry))

  if cuts == 1:
    return loop(0, count, read, written, carry)
  whole = count // cuts
  in_pieces = partial(jax.tree.map, lambda x: x.reshape(-1, x.shape[1] // cuts, *x.shape[2:]))
  written, carry = loop(0, whole, read, written, carry)
  pieces, carry = loop(whole * cuts, count, in_pieces(read), in_pieces(written), carry)
  return jax.tree.map(lambda x, like: x.reshape(like.shape), pieces, written), carry


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked_log_probs(hidden, head, target, count, cuts, block):
  return _forward(hidden, head, target, count, cuts, block)[0]


def _forward(hidden, head, target, count, cuts, block):
  number, block_of = _blocks(head, block)
  wide = _wide(hidden)

  def one_block(b, sums):
    _, new, part = block_of(b)

    def one_chunk(c, hidden, sums, carry):
      most, total = sums
      logits = _logits(hidden[c], part)
      if new is not None:
        logits = jnp.where(new[None], logits, _LEAST)
      larger = jnp.maximum(most[c], _over_lanes(jnp.max, logits))
      added = _over_lanes(jnp.sum, jnp.exp(logits - larger[:, None]))
      return (most.at[c].set(larger),
              total.at[c].set(total[c] * jnp.exp(most[c] - larger) + added)), carry

    return _over_chunks(count, cuts, one_chunk, hidden, sums, ())[0]

  most, total = jax.lax.fori_loop(
      0, number, one_block, (jnp.full(target.shape, _LEAST, wide), jnp.zeros(target.shape, wide)))
  normaliser = most + jnp.log(jnp.where(total > 0, total, 1))
  values = _target_logits(hidden, head, target) - normaliser
  return values, (hidden, head, target, count, normaliser)


def _wide_zeros(x) -> jax.Array:
  return jnp.zeros(jnp.shape(x), jnp.promote_types(jnp.result_type(x), jnp.float32))


def _through_head(logits_grad, logits, hidden, head, weights, head_grad) -> tuple[jax.Array, Head]:
  """Returns the gradient [t, D] of hidden states from that of their logits, and the head's, added to it."""
  if head.soft_cap is not None:
    logits_grad *= 1.0 - jnp.square(logits / head.soft_cap)
  bias_grad = head_grad.bias
  if bias_grad is not None:
    bias_grad += jnp.sum(logits_grad, axis=0)
  logits_grad = logits_grad.astype(hidden.dtype)
  weights_grad = head_grad.weights + jnp.einsum(
      "tv,td->vd", logits_grad, hidden, preferred_element_type=head_grad.weights.dtype)
  hidden_grad = jnp.einsum("tv,vd->td", logits_grad, weights, preferred_element_type=_wide(hidden))
  return hidden_grad, Head(weights_grad, bias_grad, head_grad.soft_cap)


def _backward(cuts, block, residuals, cotangent):
  hidden, head, target, count, normaliser = residuals
  number, block_of = _blocks(head, block)
  wide = _wide(hidden)

  def one_block(b, carry):
    hidden_grad, head_grad = carry
    start, new, part = block_of(b)
    weights = part.weights.astype(hidden.dtype)

    def one_chunk(c, read, hidden_grad, part_grad):
      hidden, target, normaliser, cotangent = (x[c] for x in read)
      logits = _logits(hidden, part)
      probs = jnp.exp(logits - normaliser[:, None])
      ids = start + jax.lax.broadcasted_iota(target.dtype, probs.shape, 1)
      logits_grad = ((ids == target[:, None]) - probs) * cotangent[:, None]
      if new is not None:
        logits_grad = jnp.where(new[None], logits_grad, 0)
      gradient, part_grad = _through_head(logits_grad, logits, hidden, part, weights, part_grad)
      return hidden_grad.at[c].add(gradient), part_grad

    part_grad = jax.tree.map(_wide_zeros, part)
    hidden_grad, part_grad = _over_chunks(
        count, cuts, one_chunk, (hidden, target, normaliser, cotangent), hidden_grad, part_grad)
    if number == 1:
      return hidden_grad, part_grad

    def add(whole, piece):
      before = jax.lax.dynamic_slice_in_dim(whole, start, block)
      return jax.lax.dynamic_update_slice_in_dim(whole, before + piece, start, axis=0)

    bias_grad = head_grad.bias if head.bias is None else add(head_grad.bias, part_grad.bias)
    return hidden_grad, Head(
        add(head_grad.weights, part_grad.weights), bias_grad, head_grad.soft_cap)

  zeros = jnp.zeros(hidden.shape, wide), jax.tree.map(_wide_zeros, head)
  hidden_grad, head_grad = (
      one_block(0, zeros) if number == 1 else jax.lax.fori_loop(0, number, one_block, zeros))
  head_grad = jax.tree.map(lambda grad, x: grad.astype(jnp.result_type(x)), head_grad, head)
  return hidden_grad.astype(hidden.dtype), head_grad, None, None


_chunked_log_probs.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked_kl(hidden, head, reference, reference_head, count, cuts):
  return _kl_forward(hidden, head, reference, reference_head, count, cuts)[0]


def _kl_forward(hidden, head, reference, reference_head, count, cuts):
  wide = _wide(hidden)

  def one_chunk(c, read, written, carry):
    kl, ours, theirs = written
    logits, frozen = _logits(read[0][c], head), _logits(read[1][c], reference_head)
    our, their = (jax.nn.logsumexp(x, axis=-1) for x in (logits, frozen))
    log_probs, frozen = logits - our[:, None], frozen - their[:, None]
    value = jnp.sum(jnp.exp(frozen) * (frozen - log_probs), axis=-1)
    return (kl.at[c].set(value), ours.at[c].set(our), theirs.at[c].set(their)), carry

  zeros = jnp.zeros(hidden.shape[:-1], wide)
  (kl, ours, theirs), _ = _over_chunks(
      count, cuts, one_chunk, (hidden, reference), (zeros, zeros, zeros), ())
  return kl, (hidden, head, reference, reference_head, count, ours, theirs)


def _kl_backward(cuts, residuals, cotangent):
  hidden, head, reference, reference_head, count, ours, theirs = residuals
  wide, weights = _wide(hidden), head.weights.astype(hidden.dtype)

  def one_chunk(c, read, hidden_grad, head_grad):
    hidden, reference, our, their, cotangent = (x[c] for x in read)
    logits = _logits(hidden, head)
    frozen = _logits(reference, reference_head)
    probs, frozen = jnp.exp(logits - our[:, None]), jnp.exp(frozen - their[:, None])
    logits_grad = (probs - frozen) * cotangent[:, None]
    gradients = _through_head(logits_grad, logits, hidden, head, weights, head_grad)
    return hidden_grad.at[c].add(gradients[0]), gradients[1]

  zeros = jnp.zeros(hidden.shape, wide), jax.tree.map(_wide_zeros, head)
  hidden_grad, head_grad = _over_chunks(
      count, cuts, one_chunk, (hidden, reference, ours, theirs, cotangent), *zeros)
  head_grad = jax.tree.map(lambda grad, x: grad.astype(jnp.result_type(x)), head_grad, head)
  return hidden_grad.astype(hidden.dtype), head_grad, None, None, None


_chunked_kl.defvjp(_kl_forward, _kl_backward)
