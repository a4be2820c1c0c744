"""Attention in blocks gives the dense rule's numbers, in memory linear in the row length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.kernels import blockwise
from dpojax.kernels.attention import TokenIds, attention, visible
from tests import worlds


def packed_ids(rng, row_length, *, longest=40):
  rows = worlds.packed(worlds.comparisons(rng, 24, 2, longest=longest), row_length)
  return TokenIds(*map(jnp.asarray, (rows.positions, rows.comparison, rows.branch)))


def inputs(rng, ids, dtype=jnp.float32):
  rows, length = ids.comparison.shape
  draw = lambda heads: jnp.asarray(rng.normal(size=(rows, length, heads, 8)), dtype)
  return draw(4), draw(2), draw(2)


@pytest.mark.parametrize(
  "form",
  [{}, {"window": 7}, {"soft_cap": 1.5}, {"scale": 0.9, "window": 12, "soft_cap": 3.0}],
  ids=["plain", "window", "cap", "all"],
)
@pytest.mark.parametrize("rows_at_once, heads_at_once", [(1, 0), (0, 1)])
def test_blocks_give_the_dense_values_and_gradients(form, rows_at_once, heads_at_once, rng):
  with jax.enable_x64(True):
    ids = packed_ids(rng, 200)
    q, k, v = inputs(rng, ids, jnp.float64)
    there = (ids.comparison > 0)[..., None, None]
    weights = jnp.where(there, jnp.asarray(rng.normal(size=q.shape)), 0)

    def score(function):
      def total(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * weights), jnp.where(there, out, 0)

      return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, want), want_grads = score(lambda q, k, v: attention(q, k, v, ids, ids, **form))
    (_, got), got_grads = score(
      lambda q, k, v: blockwise.blockwise_attention(
        q, k, v, ids, block=32, rows_at_once=rows_at_once or q.shape[0], heads_at_once=heads_at_once, **form
      )
    )
    np.testing.assert_allclose(got, want, atol=1e-12)
    for got_grad, want_grad in zip(got_grads, want_grads):
      np.testing.assert_allclose(got_grad, want_grad, atol=1e-12)


def test_bfloat16_stays_within_its_rounding(rng):
  ids = packed_ids(rng, 200)
  q, k, v = inputs(rng, ids, jnp.bfloat16)
  there = (ids.comparison > 0)[..., None, None]
  want, got = (
    jnp.where(there, out, 0).astype(jnp.float32)
    for out in (attention(q, k, v, ids, ids), blockwise.blockwise_attention(q, k, v, ids, block=32))
  )
  np.testing.assert_allclose(got, want, atol=0.03)


@pytest.mark.parametrize("window", [0, 9])
def test_no_block_is_passed_over_that_holds_a_visible_key(window, rng):
  ids = packed_ids(rng, 192)
  padding = ids.comparison == 0
  seen = visible(ids, ids, window=window) & ~padding[:, :, None]
  rows, length = padding.shape
  any_seen = seen.reshape(rows, length // 32, 32, length // 32, 32).any((2, 4))
  blocks = blockwise.visible_blocks(jax.tree.map(lambda x: x.reshape(rows, -1, 32), ids), window=window)
  assert not np.any(any_seen & ~blocks)
  assert blocks.sum() < 2 * any_seen.sum() < 0.9 * blocks.size


def test_a_row_of_padding_alone_is_zero_and_has_no_gradient(rng):
  zero = jnp.zeros((2, 128), jnp.int32)
  q, k, v = inputs(rng, TokenIds(zero, zero, zero))
  total = lambda *x: jnp.sum(blockwise.blockwise_attention(*x, TokenIds(zero, zero, zero), block=32) + 1.0)
  value, grads = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
  assert value == q.size and not any(np.any(grad) for grad in grads)


def test_memory_is_linear_in_the_row_length():
  def temporary(length):
    ids = TokenIds(*[jax.ShapeDtypeStruct((2, length), jnp.int32)] * 3)
    x = jax.ShapeDtypeStruct((2, length, 4, 8), jnp.float32)
    step = jax.jit(
      jax.grad(lambda q, k, v, ids: jnp.sum(blockwise.blockwise_attention(q, k, v, ids)), argnums=(0, 1, 2))
    )
    return step.lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes

  short, long = temporary(1024), temporary(8192)
  assert long < 10 * short and long < 8192**2 * 4
