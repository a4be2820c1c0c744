"""Attention in blocks: the same numbers as `attention.attention`, without its [L, L] scores.

The online softmax of FlashAttention (Dao et al. 2022) in plain XLA, with its own VJP. A block of
queries visits only the blocks of keys that some query of it may see, so in packed rows the work is
that of the comparisons, not of the row, and memory is linear in the row length.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.kernels.attention import TokenIds, kept, visible
from dpojax.kernels.platform import ROWS, arrays_are_cut, at_most, cut_axes, platform
from dpojax.kernels.precision import wide_of

BLOCK = 64
"""Tokens of a block. Half a comparison of HH: smaller blocks skip more, larger ones multiply better."""

CPU_HEADS = 4
"""Query heads that go through the blocks together on CPUs: more are spread over cores at a loss."""

NEVER = -1e30
"""A score below all others, still finite so that two of them have a difference."""


class Form(NamedTuple):
  """The static choices: see `blockwise_attention`."""

  scale: float
  window: int
  soft_cap: float


def blockwise_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: TokenIds,
  *,
  scale: float = 0.0,
  window: int = 0,
  soft_cap: float = 0.0,
  block: int = BLOCK,
  rows_at_once: int = 0,
  heads_at_once: int = 0,
) -> jax.Array:
  """Returns `attention.attention` of tokens among themselves; 0 for padding.

  Args:
    q: [R, L, N, H] queries.
    k: [R, L, M, H] keys of M key heads, M a divisor of N.
    v: [R, L, M, H] values.
    ids: ids of the tokens, [R, L].
    scale, window, soft_cap: see `attention.attention`.
    block: tokens a block, of queries and of keys.
    rows_at_once: rows that go through the blocks together, and visit those that any of them needs;
      a divisor of R. 0 is one a device on CPUs, whose caches hold one, and all elsewhere.
    heads_at_once: key heads that do so; a divisor of M. 0 is as many as suit a core on CPUs, and all
      elsewhere and where rows or heads are cut over devices.

  Returns:
    [R, L, N, H] in the dtype of q.
  """
  rows, length, heads, head_size = q.shape
  key_heads = k.shape[2]
  on_cpu, shards = platform() == "cpu", _row_shards()
  if not rows_at_once:
    rows_at_once = shards if on_cpu and rows % shards == 0 else rows
  if not heads_at_once:
    # Query heads are counted, key heads are cut.
    few = CPU_HEADS * key_heads // heads if on_cpu and not arrays_are_cut() else key_heads
    heads_at_once = max(n for n in range(1, max(few, 1) + 1) if key_heads % n == 0)
  padding = -length % block

  # Rows are cut over devices in whole runs: taking one of each run leaves every device its own.
  def cut(x, *heads):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(rows_at_once, rows // rows_at_once, -1, block, *heads)

  groups = key_heads // heads_at_once, heads_at_once
  out = _attend(
    cut(q, *groups, heads // key_heads, head_size),
    cut(k, *groups, head_size),
    cut(v, *groups, head_size),
    jax.tree.map(cut, ids),
    Form(scale or head_size**-0.5, window, soft_cap),
  )
  return out.reshape(rows, length + padding, heads, head_size)[:, :length]


def _row_shards() -> int:
  """Devices that the rows are cut over, where the caller has set a mesh."""
  axes = cut_axes()
  return math.prod(axes.get(name, 1) for name in ROWS)


def visible_blocks(ids: TokenIds, *, window: int = 0) -> jax.Array:
  """Returns [..., B, B] bool, of ids [..., B, T]: whether queries of a block may see keys of another.

  Never false where one does: blocks are compared by the ranges of their numbers.
  """
  # Padding is in no range: it must not widen its block's, which would visit blocks for nothing.
  there = ids.comparison > 0
  least = jax.tree.map(lambda x: jnp.where(there, x, jnp.iinfo(x.dtype).max).min(-1), ids)
  most = jax.tree.map(lambda x: jnp.where(there, x, -1).max(-1), ids)
  q_least, q_most = (jax.tree.map(lambda x: x[..., :, None], ends) for ends in (least, most))
  k_least, k_most = (jax.tree.map(lambda x: x[..., None, :], ends) for ends in (least, most))
  meets = lambda name: (
    (getattr(q_least, name) <= getattr(k_most, name)) & (getattr(k_least, name) <= getattr(q_most, name))
  )
  seen = meets("comparison") & (k_least.position <= q_most.position)
  seen &= (k_least.branch == 0) | meets("branch")
  if window:
    seen &= q_least.position - k_most.position < window
  return seen


def visits(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns for each block those it may see, first of all blocks, and how many: [..., B, B], [..., B]."""
  # A stable sort brings those that are seen to the front and keeps their order: keys are read as they lie.
  return jnp.argsort(~seen, axis=-1, stable=True), jnp.sum(seen, axis=-1)


class _Place(NamedTuple):
  """Which rows, tokens and key heads are computed together: an index each, traced."""

  row: jax.Array
  block: jax.Array
  group: jax.Array


def _start(x: jax.Array, at: _Place) -> tuple:
  return (0, at.row, at.block, 0, at.group, *[0] * x.ndim)[: x.ndim]


def _part(x: jax.Array, at: _Place, order: str) -> jax.Array:
  """Returns what is at a place, in another order, which is told as in einsum.

  Of x [A, N, B, T, C, ...] that is [A, T, ...]. Arrays stay as they come, tokens before heads: what is
  rearranged is never more than a part.
  """
  places = (1, 2, 4)[: x.ndim - 2]
  sizes = [1 if i in places else size for i, size in enumerate(x.shape)]
  part = _slice(x, _start(x, at), sizes)
  return jnp.einsum(order, jnp.squeeze(part, places))


def _ids_at(ids: TokenIds, at: _Place) -> TokenIds:
  return jax.tree.map(lambda x: _part(x, at, "rt->rt"), ids)


def _with_part(x: jax.Array, part: jax.Array, at: _Place, order: str, *, add: bool = False) -> jax.Array:
  """Returns x [A, N, B, T, C, ...] with the part in its place, or added to what is there."""
  part = jnp.expand_dims(jnp.einsum(order, part), (1, 2, 4)).astype(x.dtype)
  if add:
    part += _slice(x, _start(x, at), part.shape)
  return jax.lax.dynamic_update_slice(x, part, _start(x, at), allow_negative_indices=False)


def _entry(x: jax.Array, *index: jax.Array) -> jax.Array:
  return _slice(x, index, (1,) * x.ndim).reshape(())


# An index that might count from the end is compared and chosen in kernels of its own, at every visit.
_slice = partial(jax.lax.dynamic_slice, allow_negative_indices=False)


def _over_queries(q: jax.Array, step: Callable[[_Place, Any], Any], carry: Any) -> Any:
  """Carries something through `step` at every place of q."""
  _, rows, blocks, _, groups = q.shape[:5]

  def at(i, carry):
    # Blocks vary fastest: the keys of a row and head stay in the cache while its queries go by.
    rest, block = jax.lax.div(i, blocks), jax.lax.rem(i, blocks)
    return step(_Place(jax.lax.div(rest, groups), block, jax.lax.rem(rest, groups)), carry)

  return jax.lax.fori_loop(0, rows * groups * blocks, at, carry)


def _visits(ids: TokenIds, form: Form) -> tuple[jax.Array, jax.Array]:
  """Returns `visits` of blocks that any of A rows needs: [N, B, B] and [N, B]."""
  return visits(jnp.any(visible_blocks(ids, window=form.window), axis=0))


# How many blocks are visited is data, and jax differentiates no loop of such a length backwards: both passes
# are written out, after FlashAttention 2 (Dao 2023, Algorithms 1 and 2).
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, ids, form):
  return _forward(q, k, v, ids, form)[0]


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=wide_of(a.dtype))


def _scores(q: jax.Array, k: jax.Array, form: Form) -> jax.Array:
  """Returns the scores [A, M, T, G, Q]: queries last, so that a reduction over keys is of whole vectors."""
  scores = form.scale * _einsum("rmth,rmhgq->rmtgq", k, q)
  return form.soft_cap * jnp.tanh(scores / form.soft_cap) if form.soft_cap else scores


def _added(query_ids: TokenIds, key_ids: TokenIds, form: Form) -> jax.Array:
  """Returns what to add to the scores of such queries and keys [A, T]: 0, or `NEVER`."""
  seen = visible(query_ids, key_ids, window=form.window) & (query_ids.comparison[:, :, None] > 0)
  return jnp.where(jnp.swapaxes(seen, 1, 2), 0.0, NEVER)[:, None, :, None, :]


def _forward(q, k, v, ids, form):
  """Of q [A, N, B, T, C, M, G, H], k and v [A, N, B, T, C, M, H] and ids [A, N, B, T].

  A rows of N, T tokens of B blocks and M key heads of C groups are computed at once. Queries that see
  nothing, padding, give 0. Products are all of two matrices as they lie, an m x k by a k x n: what lies
  otherwise is copied first on CPUs.
  """
  wide = wide_of(q.dtype)
  order, count = visited = _visits(ids, form)

  def of_queries(at, carry):
    out, normaliser = carry
    q_part, query_ids = _part(q, at, "rtmgh->rmhgt"), _ids_at(ids, at)

    def visit(carry):
      j, most, total, mixed = carry
      key = at._replace(block=_entry(order, at.row, at.block, j))
      scores = _scores(q_part, _part(k, key, "rtmh->rmth"), form)
      scores += jnp.broadcast_to(_added(query_ids, _ids_at(ids, key), form), scores.shape)
      new = jnp.maximum(most, jnp.max(scores, axis=2))
      # A query that has seen no key yet weighs keys it does not see; its first key makes that 0.
      weights = jnp.exp(scores - new[:, :, None])
      old = jnp.exp(most - new)
      mixed = mixed * old[:, :, None] + _einsum(
        "rmht,rmtgq->rmhgq", _part(v, key, "rtmh->rmht"), weights.astype(v.dtype)
      )
      return j + 1, new, total * old + jnp.sum(weights, axis=2), mixed

    numbers = q_part.shape[:2] + q_part.shape[3:]
    with at_most(q.shape[2]):
      _, most, total, mixed = jax.lax.while_loop(
        lambda carry: carry[0] < _entry(count, at.row, at.block),
        visit,
        (0, jnp.full(numbers, NEVER, wide), jnp.zeros(numbers, wide), jnp.zeros(q_part.shape, wide)),
      )
    # Padding sees nothing: its sum is 0 and must not be divided by, nor its normaliser be -1e30.
    sees = most > NEVER / 2
    total = jnp.where(sees, total, 1)
    mixed = jnp.where(sees[:, :, None], mixed / total[:, :, None], 0)
    return (
      _with_part(out, mixed, at, "rmhgt->rtmgh"),
      _with_part(normaliser, jnp.where(sees, most + jnp.log(total), 0), at, "rmgt->rtmg"),
    )

  out, normaliser = kept(*_over_queries(q, of_queries, (jnp.zeros_like(q), jnp.zeros(q.shape[:-1], wide))))
  return out, (q, k, v, ids, visited, out, normaliser)


def _backward(form, residuals, cotangent):
  q, k, v, ids, (order, count), out, normaliser = residuals
  wide = wide_of(q.dtype)

  def of_queries(at, carry):
    q_grad, *grads = carry
    query_ids = _ids_at(ids, at)
    # Both orders of a part are made here, once: rearranged at every visit they were a quarter of the time.
    q_part, cotangent_part = (_part(x, at, "rtmgh->rmgth") for x in (q, cotangent))
    q_across, cotangent_across, out_across = (_part(x, at, "rtmgh->rmhgt") for x in (q, cotangent, out))
    normaliser_part = _part(normaliser, at, "rtmg->rmgt")[:, :, None]
    # D of FlashAttention: the softmax's gradient needs only this sum of each query, not its weights.
    inner = jnp.sum(cotangent_across.astype(wide) * out_across.astype(wide), axis=2)[:, :, None]

    def visit(carry):
      j, query_grad, k_grad, v_grad = carry
      key = at._replace(block=_entry(order, at.row, at.block, j))
      k_part, v_part = (_part(x, key, "rtmh->rmth") for x in (k, v))
      scores = _scores(q_across, k_part, form)
      added = jnp.broadcast_to(_added(query_ids, _ids_at(ids, key), form), scores.shape)
      # The normaliser of the forward pass gives the weights at once, without a second online softmax.
      weights = jnp.exp(scores + added - normaliser_part)
      weights_grad = _einsum("rmth,rmhgq->rmtgq", v_part, cotangent_across)
      scores_grad = weights * (weights_grad - inner) * form.scale
      # Of cap * tanh(s / cap), in terms of what came out of it.
      if form.soft_cap:
        scores_grad *= 1 - jnp.square(scores / form.soft_cap)
      scores_grad = scores_grad.astype(q.dtype)
      query_grad += _einsum("rmht,rmtgq->rmhgq", _part(k, key, "rtmh->rmht"), scores_grad)
      # Keys gather from every query block that sees them, hence in float32 and added in place.
      add = lambda grad, part: _with_part(grad, part, key, "rmth->rtmh", add=True)
      k_grad = add(k_grad, _einsum("rmtgq,rmgqh->rmth", scores_grad, q_part))
      v_grad = add(v_grad, _einsum("rmtgq,rmgqh->rmth", weights.astype(cotangent.dtype), cotangent_part))
      return j + 1, query_grad, k_grad, v_grad

    with at_most(q.shape[2]):
      _, query_grad, *grads = jax.lax.while_loop(
        lambda carry: carry[0] < _entry(count, at.row, at.block),
        visit,
        (0, jnp.zeros(q_across.shape, wide), *grads),
      )
    return _with_part(q_grad, query_grad, at, "rmhgt->rtmgh"), *grads

  q_grad, k_grad, v_grad = _over_queries(
    q, of_queries, (jnp.zeros_like(q), jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
  )
  return q_grad, k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
