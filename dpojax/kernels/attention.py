"""Attention over packed, branching rows.

The rule, for a query q and a key k of one row: q sees k when both are of one comparison, k's
position is at most q's, and k is prompt or of q's own branch. A layer with a sliding window sees
only the last of these, counted in positions of the sequence, never in places of the row. A KV cache
follows the same rule: its keys carry the same three numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dpojax.kernels.precision import wide_of

KEPT = "attention"
"""The name of what forms of attention that are computed in blocks leave for their gradients."""


class TokenIds(NamedTuple):
  """What the rule needs to know of tokens, each [R, L] int32: see `data.packing.Rows`."""

  position: jax.Array
  comparison: jax.Array
  branch: jax.Array


def visible(query: TokenIds, key: TokenIds, *, window: int = 0) -> jax.Array:
  """Returns [..., Q, T] bool: whether each of Q queries sees each of T keys, from ids [..., Q], [..., T].

  A window further keeps a query from keys `window` or more positions before it; 0 is none.
  """
  q = jax.tree.map(lambda x: x[..., :, None], query)
  k = jax.tree.map(lambda x: x[..., None, :], key)
  seen = (
    (q.comparison == k.comparison) & (k.position <= q.position) & ((k.branch == 0) | (k.branch == q.branch))
  )
  return seen & (q.position - k.position < window) if window else seen


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_ids: TokenIds,
  key_ids: TokenIds,
  *,
  scale: float = 0.0,
  window: int = 0,
  soft_cap: float = 0.0,
) -> jax.Array:
  """Returns softmax(scale q k^T) v under the rule, scores and softmax in float32 at least.

  Args:
    q: [R, Q, N, H] queries.
    k: [R, T, M, H] keys of M key heads, M a divisor of N.
    v: [R, T, M, H] values.
    query_ids: ids of the queries, [R, Q].
    key_ids: ids of the keys, [R, T].
    scale: what scores are multiplied by; 0 is 1 / sqrt(H).
    window: see `visible`.
    soft_cap: scores become cap * tanh(score / cap); 0 leaves them.

  Returns:
    [R, Q, N, H] in the dtype of q. Every query must see at least one key, which holds when its
    own token is among them; padding (comparison 0) sees padding.
  """
  rows, length, heads, head_size = q.shape
  key_heads = k.shape[2]
  # Grouped queries: G query heads read one key head, so keys are never repeated.
  q = q.reshape(rows, length, key_heads, heads // key_heads, head_size)
  wide = wide_of(q.dtype)
  scores = jnp.einsum("rqmgh,rtmh->rmgqt", q, k, preferred_element_type=wide)
  scores = scores * (scale or head_size**-0.5)
  if soft_cap:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  mask = visible(query_ids, key_ids, window=window)[:, None, None]
  # The least finite number, not -inf: padding that sees padding alone still has a softmax.
  scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  # Rounded after the softmax and never before: the product with values is then of the compute dtype.
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  mixed = jnp.einsum("rmgqt,rtmh->rqmgh", weights, v)
  return mixed.reshape(rows, length, heads, head_size)


def kept(out: jax.Array, normaliser: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns both under a name, by which rematerialisation keeps them: all a backward pass reuses."""
  return checkpoint_name(out, KEPT), checkpoint_name(normaliser, KEPT)


class Keys(NamedTuple):
  """Keys and values of tokens already seen, `k` and `v` [R, M, T, H], and their `ids` [R, T].

  Heads come before tokens: then every product with them is one of matrices that lie as they are.
  """

  k: jax.Array
  v: jax.Array
  ids: TokenIds


def cached_attention(
  q: jax.Array,
  query_ids: TokenIds,
  parts: Sequence[Keys],
  *,
  scale: float = 0.0,
  window: int = 0,
  soft_cap: float = 0.0,
) -> jax.Array:
  """Returns `attention` over the keys of all parts, as if they stood in one row.

  Args:
    q: [R, Q, N, H] queries.
    query_ids: their ids, [R, Q].
    parts: each of R rows, or of R / n rows that n consecutive rows of queries share; a query must
      see at least one of their keys.
    scale, window, soft_cap: see `attention`.

  Returns:
    [R, Q, N, H] in the dtype of q.
  """
  rows, length, heads, head_size = q.shape
  key_heads = parts[0].k.shape[1]
  wide = wide_of(q.dtype)
  q = q.reshape(rows, length, key_heads, heads // key_heads, head_size)
  # All queries that read a key head become rows of one matrix: a step of decoding has one token a row, and
  # products of single vectors would be bound by reading the keys.
  q = jnp.moveaxis(q, 1, 3).reshape(rows, key_heads, -1, head_size)

  # Rows that share a part go through one product with it: its keys are read once for all samples.
  def together(x, part):  # [R, M, GQ, -] -> [R / n, M, n GQ, -]
    few = part.k.shape[0]
    x = x.reshape(few, rows // few, *x.shape[1:])
    return jnp.moveaxis(x, 1, 2).reshape(few, key_heads, -1, x.shape[-1])

  def apart(x):
    x = x.reshape(x.shape[0], key_heads, rows // x.shape[0], -1, x.shape[-1])
    return jnp.moveaxis(x, 2, 1).reshape(rows, key_heads, -1, x.shape[-1])

  def scores_of(part):
    scores = jnp.einsum("rmqh,rmth->rmqt", together(q, part), part.k, preferred_element_type=wide)
    scores = apart(scores) * (scale or head_size**-0.5)
    if soft_cap:
      scores = soft_cap * jnp.tanh(scores / soft_cap)
    ids = jax.tree.map(lambda x: jnp.repeat(x, rows // x.shape[0], axis=0), part.ids)
    # The heads of a group stand one behind the other, each with the queries of all tokens.
    mask = jnp.tile(visible(query_ids, ids, window=window), (1, heads // key_heads, 1))
    return jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)

  scores = jnp.concatenate([scores_of(part) for part in parts], -1)
  weights = jax.nn.softmax(scores.reshape(-1, scores.shape[-1]), axis=-1).reshape(scores.shape)
  # One softmax over all parts: their scores were put side by side, so no merging of normalisers.
  ends = np.cumsum([part.k.shape[2] for part in parts])[:-1]
  mixed = sum(
    apart(jnp.einsum("rmqt,rmth->rmqh", together(w.astype(part.v.dtype), part), part.v))
    for w, part in zip(jnp.split(weights, ends, axis=-1), parts)
  )
  mixed = mixed.reshape(rows, key_heads, heads // key_heads, length, head_size)
  return jnp.moveaxis(mixed, 3, 1).reshape(rows, length, heads, head_size)
