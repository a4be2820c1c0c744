"""Attention in blocks: the same numbers as `attention.attention`, without its [L, L] scores.

The online softmax of FlashAttention (Dao et al. 2022) in plain XLA, with its own VJP. A block of
queries visits only the blocks of keys that some query of it may see, so in packed rows the work is
that of the comparisons, not of the row, and memory is linear in the row length.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpojax.log_probs import arrays_are_cut
from dpojax.models.attention import TokenIds, kept, visible

BLOCK = 64
"""Tokens of a block. Half a comparison of HH: smaller blocks skip more, larger ones multiply better."""

CPU_HEADS = 4
"""Query heads that go through the blocks together on CPUs: more are spread over cores at a loss."""

NEVER = -1e30
"""A score below all others, still finite so that two of them have a difference."""


class Form(NamedTuple):
  """The static choices: see `attention.attention`."""

  scale: float
  window: int
  soft_cap: float
  block: int


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: TokenIds, *, scale: float = 0.0,
    window: int = 0, soft_cap: float = 0.0, block: int = BLOCK, rows_at_once: int = 0,
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
  on_cpu, shards = jax.default_backend() == "cpu", _row_shards()
  if not rows_at_once:
    rows_at_once = shards if on_cpu and rows % shards == 0 else rows
  if not heads_at_once:
    few = CPU_HEADS * key_heads // heads if on_cpu and not arrays_are_cut() else key_heads
    heads_at_once = max(n for n in range(1, max(few, 1) + 1) if key_heads % n == 0)
  padding = -length % block
  pad = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
  q, k, v, *ids = map(pad, (q, k, v, *ids))
  q = jnp.moveaxis(q.reshape(*q.shape[:2], key_heads, heads // key_heads, head_size), 1, 3)
  k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
  form = Form(scale or head_size**-0.5, window, soft_cap, block)

  # Rows are cut over devices in whole runs: taking one of each run leaves every device its own.
  apart = lambda x: jnp.swapaxes(
      x.reshape(rows_at_once, rows // rows_at_once, *x.shape[1:]), 0, 1)
  by_heads = lambda x: jnp.moveaxis(
      x.reshape(rows_at_once, key_heads // heads_at_once, heads_at_once, *x.shape[2:]), 1, 0)

  def of_rows(x):
    q, k, v, *ids = x
    ids = TokenIds(*ids)
    visited = visits(jnp.any(visible_blocks(ids, block=block, window=window), axis=0))
    out = jax.lax.map(lambda x: _attend(*x, ids, visited, form), tuple(map(by_heads, (q, k, v))))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)

  out = jax.lax.map(of_rows, tuple(map(apart, (q, k, v, *ids))))
  out = jnp.swapaxes(out, 0, 1).reshape(rows, *q.shape[1:])
  return jnp.moveaxis(out, 3, 1).reshape(rows, length + padding, heads, head_size)[:, :length]


def _row_shards() -> int:
  """Devices that the rows are cut over, where the caller has set a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)


def visible_blocks(ids: TokenIds, *, block: int, window: int = 0) -> jax.Array:
  """Returns [R, B, B] bool: whether queries of a block may see keys of another.

  Never false where one does: blocks are compared by the ranges of their numbers.
  """
  there = ids.comparison > 0
  cut = lambda x: x.reshape(x.shape[0], -1, block)
  least = jax.tree.map(lambda x: cut(jnp.where(there, x, jnp.iinfo(x.dtype).max)).min(-1), ids)
  most = jax.tree.map(lambda x: cut(jnp.where(there, x, -1)).max(-1), ids)
  q_least, q_most = (jax.tree.map(lambda x: x[:, :, None], ends) for ends in (least, most))
  k_least, k_most = (jax.tree.map(lambda x: x[:, None, :], ends) for ends in (least, most))
  meets = lambda name: ((getattr(q_least, name) <= getattr(k_most, name))
                        & (getattr(k_least, name) <= getattr(q_most, name)))
  seen = meets("comparison") & (k_least.position <= q_most.position)
  seen &= (k_least.branch == 0) | meets("branch")
  if window:
    seen &= q_least.position - k_most.position < window
  return seen


def visits(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns for each block those it may see, first of all blocks, and how many: [..., B, B], [..., B]."""
  return jnp.argsort(~seen, axis=-1, stable=True), jnp.sum(seen, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, ids, visited, form):
  return _forward(q, k, v, ids, visited, form)[0]


def wide_of(dtype) -> jnp.dtype:
  """Returns what products of a dtype are summed in: float32 at least."""
  return jnp.promote_types(dtype, jnp.float32)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=wide_of(a.dtype))


def _part(x: jax.Array, i: jax.Array, form: Form, axis: int = -2) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, i * form.block, form.block, axis)


def _scores(q: jax.Array, k: jax.Array, form: Form) -> jax.Array:
  """Returns the scores [R, M, T, G, Q]: queries last, so that a reduction over keys is of whole vectors."""
  scores = form.scale * _einsum("rmth,rmgqh->rmtgq", k, q)
  return form.soft_cap * jnp.tanh(scores / form.soft_cap) if form.soft_cap else scores


def _added(ids: TokenIds, i: jax.Array, at: jax.Array, form: Form) -> jax.Array:
  """Returns what to add to scores of queries of block i and keys of block `at`: 0, or `NEVER`."""
  query_ids, key_ids = (jax.tree.map(lambda x: _part(x, n, form, axis=1), ids) for n in (i, at))
  seen = visible(query_ids, key_ids, window=form.window) & (query_ids.comparison[:, :, None] > 0)
  return jnp.where(jnp.swapaxes(seen, 1, 2), 0.0, NEVER)[:, None, :, None, :]


def _forward(q, k, v, ids, visited, form):
  """Of q [R, M, G, L, H], k and v [R, M, L, H]; queries that see nothing, padding, give 0."""
  *leading, length, head_size = q.shape
  order, count = visited
  wide = wide_of(q.dtype)

  def of_queries(i):
    q_part = _part(q, i, form)

    def visit(carry):
      j, most, total, mixed = carry
      at = order[i, j]
      scores = _scores(q_part, _part(k, at, form), form)
      scores += jnp.broadcast_to(_added(ids, i, at, form), scores.shape)
      new = jnp.maximum(most, jnp.max(scores, axis=2))
      # A query that has seen no key yet weighs keys it does not see; its first key makes that 0.
      weights = jnp.exp(scores - new[:, :, None])
      old = jnp.exp(most - new)
      mixed = mixed * old[..., None] + _einsum(
          "rmtgq,rmth->rmgqh", weights.astype(v.dtype), _part(v, at, form))
      return j + 1, new, total * old + jnp.sum(weights, axis=2), mixed

    shape = (*leading, form.block)
    _, most, total, mixed = jax.lax.while_loop(
        lambda carry: carry[0] < count[i], visit,
        (0, jnp.full(shape, NEVER, wide), jnp.zeros(shape, wide),
         jnp.zeros((*shape, head_size), wide)))
    sees = most > NEVER / 2
    total = jnp.where(sees, total, 1)
    return (jnp.where(sees[..., None], mixed / total[..., None], 0).astype(q.dtype),
            jnp.where(sees, most + jnp.log(total), 0))

  out, normaliser = jax.lax.map(of_queries, jnp.arange(length // form.block))
  out, normaliser = kept(jnp.moveaxis(out, 0, 3).reshape(q.shape), normaliser)
  return out, (q, k, v, ids, visited, out, normaliser)


def _backward(form, residuals, cotangent):
  q, k, v, ids, (order, count), out, normaliser = residuals
  wide = wide_of(q.dtype)
  inner = jnp.sum(cotangent.astype(wide) * out.astype(wide), axis=-1)

  def of_queries(grads, i):
    q_part, cotangent_part = _part(q, i, form), _part(cotangent, i, form)
    inner_part = _part(inner, i, form, axis=-1)[:, :, None]

    def visit(carry):
      j, q_grad, (k_grad, v_grad) = carry
      at = order[i, j]
      k_part, v_part = _part(k, at, form), _part(v, at, form)
      scores = _scores(q_part, k_part, form)
      added = jnp.broadcast_to(_added(ids, i, at, form), scores.shape)
      weights = jnp.exp(scores + added - normaliser[i][:, :, None])
      weights_grad = _einsum("rmth,rmgqh->rmtgq", v_part, cotangent_part)
      scores_grad = weights * (weights_grad - inner_part) * form.scale
      if form.soft_cap:
        scores_grad *= 1 - jnp.square(scores / form.soft_cap)
      scores_grad = scores_grad.astype(q.dtype)
      q_grad += _einsum("rmtgq,rmth->rmgqh", scores_grad, k_part)
      add = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(
          whole, _part(whole, at, form) + part, at * form.block, axis=2)
      k_grad = add(k_grad, _einsum("rmtgq,rmgqh->rmth", scores_grad, q_part))
      v_grad = add(v_grad, _einsum(
          "rmtgq,rmgqh->rmth", weights.astype(cotangent.dtype), cotangent_part))
      return j + 1, q_grad, (k_grad, v_grad)

    _, q_grad, grads = jax.lax.while_loop(
        lambda carry: carry[0] < count[i], visit, (0, jnp.zeros(q_part.shape, wide), grads))
    return grads, q_grad.astype(q.dtype)

  (k_grad, v_grad), q_grad = jax.lax.scan(
      of_queries, (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)), jnp.arange(order.shape[0]))
  q_grad = jnp.moveaxis(q_grad, 0, 3).reshape(q.shape)
  return q_grad, k_grad.astype(k.dtype), v_grad.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
