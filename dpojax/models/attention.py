"""Attention over packed, branching rows.

The rule, for a query q and a key k of one row: q sees k when both are of one comparison, k's
position is at most q's, and k is prompt or of q's own branch. A KV cache follows the same rule:
its keys carry the same three numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenIds(NamedTuple):
  """What the rule needs to know of tokens, each [R, L] int32: see `data.packing.Rows`."""

  position: jax.Array
  comparison: jax.Array
  branch: jax.Array


def visible(query: TokenIds, key: TokenIds) -> jax.Array:
  """Returns [R, Q, T] bool: whether each of Q queries sees each of T keys."""
  q = jax.tree.map(lambda x: x[:, :, None], query)
  k = jax.tree.map(lambda x: x[:, None, :], key)
  return ((q.comparison == k.comparison) & (k.position <= q.position)
          & ((k.branch == 0) | (k.branch == q.branch)))


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, query_ids: TokenIds, key_ids: TokenIds
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(H)) v under the rule, softmax in float32.

  Args:
    q: [R, Q, N, H] queries.
    k: [R, T, M, H] keys of M key heads, M a divisor of N.
    v: [R, T, M, H] values.
    query_ids: ids of the queries, [R, Q].
    key_ids: ids of the keys, [R, T].

  Returns:
    [R, Q, N, H] in the dtype of q. Every query must see at least one key, which holds when its
    own token is among them; padding (comparison 0) sees padding.
  """
  rows, length, heads, head_size = q.shape
  key_heads = k.shape[2]
  q = q.reshape(rows, length, key_heads, heads // key_heads, head_size)
  scores = jnp.einsum("rqmgh,rtmh->rmgqt", q, k, preferred_element_type=jnp.float32)
  mask = visible(query_ids, key_ids)[:, None, None]
  scores = jnp.where(mask, scores * head_size**-0.5, jnp.finfo(scores.dtype).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  mixed = jnp.einsum("rmgqt,rtmh->rqmgh", weights, v)
  return mixed.reshape(rows, length, heads, head_size)
