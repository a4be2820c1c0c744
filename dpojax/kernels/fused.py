"""Attention as kernels for GPUs and TPUs: the numbers of `attention.attention`, in Pallas.

FlashAttention-2 (Dao 2023) over packed rows. A program holds one block of queries (for keys and their
gradients: one of keys), and walks over those blocks of the other side that `blockwise.visible_blocks`
says may meet it, row by row, so that a packed row costs what its comparisons cost. One body serves
Triton on GPUs and Mosaic on TPUs. cuDNN's kernel (`jax.nn.dot_product_attention`) cannot stand in: the
rule would be two calls of it merged by their log-sum-exp, through which it passes no gradient, and it
knows no soft cap.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.sharding import PartitionSpec

from dpojax.kernels import platform as platform_lib
from dpojax.kernels.attention import TokenIds, kept, visible
from dpojax.kernels.blockwise import NEVER, visible_blocks, visits
from dpojax.kernels.precision import wide_of

try:
  from jax.experimental.pallas import triton
except ImportError:  # deprecated since jax 0.12, which says that it will go
  triton = None

PLATFORMS = ("gpu", "tpu") if triton else ("tpu",)
"""What the kernels run on, under the jax that is installed."""


class Form(NamedTuple):
  """The static choices: see `fused_attention`."""

  scale: float
  window: int
  soft_cap: float
  block: int
  platform: str
  interpret: bool


def fused_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: TokenIds,
  *,
  scale: float = 0.0,
  window: int = 0,
  soft_cap: float = 0.0,
  block: int = 0,
  platform: str = "",
  interpret: bool = False,
) -> jax.Array:
  """Returns `attention.attention` of tokens among themselves; 0 for padding.

  Where a mesh is set, each device computes the rows and heads it holds.

  Args:
    q, k, v, ids, scale, window, soft_cap: see `blockwise.blockwise_attention`.
    block: tokens a block, of queries and of keys; 0 is what suits the platform.
    platform: of `PLATFORMS`, whose kernel it is; '' is what is built for, see `platform.built_for`.
    interpret: runs the kernel as plain JAX, on any backend.

  Returns:
    [R, L, N, H] in the dtype of q.
  """
  platform = platform or platform_lib.platform()
  block = block or _block(platform, q.shape[-1], q.dtype.itemsize)
  form = Form(scale or q.shape[-1] ** -0.5, window, soft_cap, block, platform, interpret)
  return _over_devices(partial(_whole_blocks, form=form), q.shape[0], k.shape[2])(q, k, v, ids)


def fits(q: jax.Array, k: jax.Array, platform: str) -> bool:
  """Returns whether a processor's memory holds what a program needs of q and k at once.

  A TPU's is that of the mesh that the caller has set, or of the machine's own.
  """
  _, length, heads, head_size = q.shape
  if platform != "tpu":
    return True
  rows = _row_bytes(heads // k.shape[2], length, head_size, q.dtype)
  return rows + 4 * 2**20 <= mosaic.get_tpu_info().vmem_capacity_bytes


def _row_bytes(group: int, length: int, head_size: int, dtype: jnp.dtype) -> int:
  """Bytes of the queries of a key head, their cotangents and two numbers each, in lanes of 128."""
  lanes = head_size + -head_size % 128
  return group * length * (2 * lanes * jnp.dtype(dtype).itemsize + 8)


def _block(platform: str, head_size: int, itemsize: int) -> int:
  """Tokens a block: as wide as a TPU's registers; on GPUs what does not spill from theirs."""
  if platform == "tpu":
    return 128
  return min(64, max(16, 2**15 // (pl.next_power_of_2(head_size) * itemsize**2)))


def _over_devices(function: Callable, rows: int, key_heads: int) -> Callable:
  """Returns the function over q, k, v and ids, cut over the mesh that the caller has set."""
  axes = platform_lib.cut_axes()

  def cut(size, *names):
    # What does not divide evenly is computed by every device, rather than refused.
    names = tuple(name for name in names if name in axes)
    return names if names and size % math.prod(axes[name] for name in names) == 0 else None

  at_rows, at_heads = cut(rows, "data", "fsdp"), cut(key_heads, "tensor")
  if not (at_rows or at_heads):
    return function
  tokens, heads = PartitionSpec(at_rows), PartitionSpec(at_rows, None, at_heads)
  # A kernel does not say over which axes its outputs vary, which jax would else have it say.
  return jax.shard_map(function, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False)


def _whole_blocks(q, k, v, ids, form):
  """Attention of rows padded to whole blocks and heads to whole tiles, heads before tokens."""
  rows, length, heads, head_size = q.shape
  key_heads, padding = k.shape[2], -length % form.block
  # Triton's blocks are powers of two; Mosaic pads lanes itself.
  tile = pl.next_power_of_2(head_size) if form.platform == "gpu" else head_size

  def first(x):  # [R, L, -, H] -> [R, -, L, H]
    x = jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, tile - head_size)])
    return jnp.swapaxes(x, 1, 2)

  # Heads before tokens: a program's block is then one stretch of memory.
  q = first(q).reshape(rows, key_heads, heads // key_heads, length + padding, tile)
  ids = jnp.pad(jnp.stack(ids, axis=1), [(0, 0), (0, 0), (0, padding)])
  out = _attend(q, first(k), first(v), ids, form).reshape(rows, heads, length + padding, tile)
  return jnp.swapaxes(out, 1, 2)[:, :length, :, :head_size]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, ids, form):
  """Attention of q [R, M, G, L, H], k, v [R, M, L, H] and ids [R, 3, L]; the output is like q."""
  return _forward(q, k, v, ids, form)[0]


def _forward(q, k, v, ids, form):
  numbers = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), wide_of(q.dtype))
  part = _parts(q, form)
  out, normaliser = _call(
    _forward_kernel,
    (*q.shape[:3], q.shape[3] // form.block),
    _visits(ids, form),
    [(ids, part.ids), (ids, part.row_ids), (q, part.queries), (k, part.row_keys), (v, part.row_keys)],
    [(q, part.queries), (numbers, part.numbers)],
    part,
    form,
  )
  out, normaliser = kept(out, normaliser)
  return out, (q, k, v, ids, out, normaliser)


def _backward(form, residuals, cotangent):
  q, k, v, ids, out, normaliser = residuals
  wide = wide_of(q.dtype)
  # Taken once outside: both kernels of the backward pass need it of every query they meet.
  inner = jnp.sum(cotangent.astype(wide) * out.astype(wide), axis=-1)[..., None, :]
  rows, key_heads, group, length, _ = q.shape
  part = _parts(q, form)
  # Two kernels rather than one with atomic additions: each sum has one writer, and the same bits every time.
  (q_grad,) = _call(
    _query_kernel,
    (rows, key_heads, group, length // form.block),
    _visits(ids, form),
    [
      (ids, part.ids),
      (ids, part.row_ids),
      (q, part.queries),
      (k, part.row_keys),
      (v, part.row_keys),
      (cotangent, part.queries),
      (normaliser, part.numbers),
      (inner, part.numbers),
    ],
    [(q, part.queries)],
    part,
    form,
  )
  k_grad, v_grad = _call(
    _key_kernel,
    (rows, key_heads, length // form.block),
    _visits(ids, form, by_keys=True),
    [
      (ids, part.row_ids),
      (ids, part.ids),
      (q, part.row_queries),
      (k, part.keys),
      (v, part.keys),
      (cotangent, part.row_queries),
      (normaliser, part.row_numbers),
      (inner, part.row_numbers),
    ],
    [(k, part.keys), (v, part.keys)],
    part,
    form,
  )
  return q_grad, k_grad, v_grad, None


_attend.defvjp(_forward, _backward)


class _Parts(NamedTuple):
  """What a program sees of each kind of array: its own block, or all of its row.

  Programs stand at (row, key head, query head of its group, block of queries), or at (row, key head,
  block of keys). `room` is what they may take of a TPU's vector memory, in bytes.
  """

  room: int
  visits: tuple[pl.BlockSpec, pl.BlockSpec]
  ids: pl.BlockSpec
  row_ids: pl.BlockSpec
  queries: pl.BlockSpec
  row_queries: pl.BlockSpec
  numbers: pl.BlockSpec
  row_numbers: pl.BlockSpec
  keys: pl.BlockSpec
  row_keys: pl.BlockSpec


def _parts(q: jax.Array, form: Form) -> _Parts:
  """Returns the parts for queries [R, M, G, L, H]."""
  _, _, group, length, size = q.shape
  block = form.block
  steering, whole = {}, {}
  if form.platform == "tpu":
    # Scalars have a memory of their own. A whole row is not worth a second buffer for the next one.
    steering, whole = dict(memory_space=mosaic.SMEM), dict(pipeline_mode=pl.Buffered(1))
  return _Parts(
    room=16 * 2**20 + _row_bytes(group, length, size, q.dtype),
    visits=tuple(
      pl.BlockSpec((None, None, 1, count), lambda r, *at: (r, at[-1], 0, 0), **steering)
      for count in (1, length // block)
    ),
    ids=pl.BlockSpec((None, 3, block), lambda r, *at: (r, 0, at[-1])),
    row_ids=pl.BlockSpec((None, 3, length), lambda r, *at: (r, 0, 0), **whole),
    queries=pl.BlockSpec((None, None, None, block, size), lambda r, m, g, i: (r, m, g, i, 0)),
    row_queries=pl.BlockSpec((None, None, group, length, size), lambda r, m, i: (r, m, 0, 0, 0), **whole),
    numbers=pl.BlockSpec((None, None, None, 1, block), lambda r, m, g, i: (r, m, g, 0, i)),
    row_numbers=pl.BlockSpec((None, None, group, 1, length), lambda r, m, i: (r, m, 0, 0, 0), **whole),
    keys=pl.BlockSpec((None, None, block, size), lambda r, m, i: (r, m, i, 0)),
    row_keys=pl.BlockSpec((None, None, length, size), lambda r, m, *at: (r, m, 0, 0), **whole),
  )


def _call(
  kernel: Callable,
  grid: Sequence[int],
  steering: tuple[jax.Array, jax.Array],
  inputs: Sequence[Any],
  outputs: Sequence[Any],
  part: _Parts,
  form: Form,
) -> Sequence[jax.Array]:
  """Returns the outputs that a kernel makes of its inputs, each an array, or its like, and its part."""
  if form.platform == "tpu":
    # No program reads what another has written: their order is free.
    params = mosaic.CompilerParams(dimension_semantics=("parallel",) * len(grid), vmem_limit_bytes=part.room)
  else:
    params = triton.CompilerParams(num_warps=4, num_stages=2)
  arrays, parts = zip(*inputs)
  return pl.pallas_call(
    partial(kernel, form=form),
    grid=grid,
    in_specs=(*part.visits, *parts),
    out_specs=[part for _, part in outputs],
    out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs],
    compiler_params=params,
    interpret=form.interpret,
  )(*steering, *arrays)


def _visits(ids: jax.Array, form: Form, *, by_keys: bool = False) -> tuple[jax.Array, jax.Array]:
  """Returns how many blocks each block visits, [R, B, 1, 1], and those first, [R, B, 1, B]."""
  blocks = jnp.moveaxis(ids, 1, 0).reshape(3, ids.shape[0], -1, form.block)
  seen = visible_blocks(TokenIds(*blocks), window=form.window)
  order, count = visits(jnp.swapaxes(seen, 1, 2) if by_keys else seen)
  return count[..., None, None].astype(jnp.int32), order[..., None, :].astype(jnp.int32)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """The product of two matrices over an axis of each, summed in float32 at least."""
  return jax.lax.dot_general(
    a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=wide_of(a.dtype)
  )


def _tokens(block: jax.Array, form: Form) -> pl.Slice:
  return pl.ds(pl.multiple_of(block * form.block, form.block), form.block)


def _ids(ref, at=slice(None)) -> TokenIds:
  return TokenIds(*(ref[i, at] for i in range(3)))


def _scores(q, k, q_ids, k_ids, form):
  """Returns the scores [Q, T] of queries [Q, H] and keys [T, H], and which of them count."""
  scores = form.scale * _dot(q, k, 1, 1)
  if form.soft_cap:
    scores = form.soft_cap * jnp.tanh(scores / form.soft_cap)
  seen = visible(q_ids, k_ids, window=form.window) & (q_ids.comparison[:, None] > 0)
  return scores, seen


class _Queries(NamedTuple):
  """A block of queries and what their gradients need: [Q, H] or [Q], see `_backward`."""

  q: jax.Array
  ids: TokenIds
  cotangent: jax.Array
  normaliser: jax.Array
  inner: jax.Array


def _gradients(queries: _Queries, k, v, k_ids, form):
  """Returns the weights [Q, T] and the gradient of the products q k^T."""
  scores, seen = _scores(queries.q, k, queries.ids, k_ids, form)
  # Masked after the exponential too: a query that sees nothing has a normaliser of no meaning.
  weights = jnp.where(seen, jnp.exp(scores - queries.normaliser[:, None]), 0.0)
  grad = weights * (_dot(queries.cotangent, v, 1, 1) - queries.inner[:, None]) * form.scale
  if form.soft_cap:
    grad *= 1 - jnp.square(scores / form.soft_cap)
  return weights, grad


def _forward_kernel(count, order, q_ids, k_ids, q, k, v, out, normaliser, *, form):
  """Mixes values for a block of queries, visiting blocks of keys: the online softmax."""
  queries, query_ids = q[...], _ids(q_ids)
  wide = wide_of(q.dtype)

  def visit(j, carry):
    most, total, mixed = carry
    # The blocks to visit are data: what a packed row skips differs from row to row.
    at = _tokens(order[0, j], form)
    scores, seen = _scores(queries, k[at, :], query_ids, _ids(k_ids, at), form)
    new = jnp.maximum(most, jnp.max(jnp.where(seen, scores, NEVER), axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
    old = jnp.exp(most - new)
    mixed = mixed * old + _dot(weights.astype(v.dtype), v[at, :], 1, 0)
    return new, total * old + jnp.sum(weights, axis=1, keepdims=True), mixed

  zero = jnp.zeros((form.block, 1), wide)
  most, total, mixed = jax.lax.fori_loop(
    0, count[0, 0], visit, (zero + NEVER, zero, jnp.zeros(q.shape, wide))
  )
  # A block of padding has visited nothing.
  total = jnp.where(total > 0, total, 1.0)
  out[...] = (mixed / total).astype(out.dtype)
  normaliser[...] = (most + jnp.log(total)).T


def _query_kernel(count, order, q_ids, k_ids, q, k, v, cotangent, normaliser, inner, q_grad, *, form):
  """Sums the gradient of a block of queries, visiting blocks of keys."""
  queries = _Queries(q[...], _ids(q_ids), cotangent[...], normaliser[0, :], inner[0, :])

  def visit(j, total):
    at = _tokens(order[0, j], form)
    keys = k[at, :]
    _, grad = _gradients(queries, keys, v[at, :], _ids(k_ids, at), form)
    return total + _dot(grad.astype(keys.dtype), keys, 1, 0)

  total = jnp.zeros(q.shape, wide_of(q.dtype))
  q_grad[...] = jax.lax.fori_loop(0, count[0, 0], visit, total).astype(q_grad.dtype)


def _key_kernel(count, order, q_ids, k_ids, q, k, v, cotangent, normaliser, inner, k_grad, v_grad, *, form):
  """Sums the gradients of a block of keys, visiting blocks of queries in each head of the group."""
  keys, values, key_ids, blocks = k[...], v[...], _ids(k_ids), count[0, 0]

  def visit(j, carry):
    k_total, v_total = carry
    # One loop over heads and blocks together: the two sums are carried through one loop alone.
    head, at = jax.lax.div(j, blocks), _tokens(order[0, jax.lax.rem(j, blocks)], form)
    queries = _Queries(
      q[head, at, :], _ids(q_ids, at), cotangent[head, at, :], normaliser[head, 0, at], inner[head, 0, at]
    )
    weights, grad = _gradients(queries, keys, values, key_ids, form)
    k_total += _dot(grad.astype(keys.dtype), queries.q, 0, 0)
    v_total += _dot(weights.astype(keys.dtype), queries.cotangent, 0, 0)
    return k_total, v_total

  zero = jnp.zeros(k.shape, wide_of(k.dtype))
  k_total, v_total = jax.lax.fori_loop(0, q.shape[0] * blocks, visit, (zero, zero))
  k_grad[...], v_grad[...] = k_total.astype(k_grad.dtype), v_total.astype(v_grad.dtype)
