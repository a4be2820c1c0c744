"""`dpojax.log_probs` on CPUs: the vocabulary is walked over in blocks too, so that logits stay in the cache.

The same numbers as the plain loop to rounding. What is different is all for the cache and the vector units:
blocks of the head that a core's cache holds beside their logits, a running maximum over blocks, reductions in
lanes, and a last chunk cut in pieces.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dpojax.kernels.head import (
  Head,
  default_size,
  logits_of_chunk,
  over_chunks,
  target_logits,
  through_head,
  wide_zeros,
)
from dpojax.kernels.precision import wide_of

_LANES = 128

CPU_TOKENS, CPU_BLOCK = 256, 19 * _LANES
"""Tokens and vocabulary of the logits held at once on CPUs, 2.4 MiB: about a core's cache.

An odd multiple of `_LANES`: rows a power of two apart meet in the same few places of a cache.
"""

# Finite, so that two of them differ by 0 and not by nan.
_LEAST = -1e30


def chunk_tokens(vocabulary: int) -> int:
  """Returns the tokens of a chunk."""
  return CPU_TOKENS if _block(vocabulary) < vocabulary else default_size(vocabulary)


def _block(vocabulary: int) -> int:
  return CPU_BLOCK if vocabulary > 2 * CPU_BLOCK else vocabulary  # blocks must be worth their loop


def _blocks(head: Head) -> tuple[int, int, Callable]:
  """Returns the number of blocks, their size, and b -> (start, whether a column is new [block], their head).

  The last block ends where the vocabulary does, so that some of its columns were there before.
  """
  vocabulary = head.weights.shape[0]
  block = _block(vocabulary)
  if block == vocabulary:
    return 1, block, lambda b: (0, None, head)

  def of(b):
    start = jnp.minimum(b * block, vocabulary - block)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block)
    bias = None if head.bias is None else cut(head.bias)
    new = start + jnp.arange(block) >= b * block
    return start, new, Head(cut(head.weights), bias, head.soft_cap)

  return -(-vocabulary // block), block, of


def _over_lanes(reduce: Callable, x: jax.Array) -> jax.Array:
  """Reduces the last axis, first into lanes: reductions of single rows do not vectorise on CPUs."""
  if x.shape[-1] % _LANES:
    return reduce(x, axis=-1)
  return reduce(reduce(x.reshape(*x.shape[:-1], -1, _LANES), axis=-2), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_log_probs(hidden, head, target, count, cuts):
  """Log-probs [C, t] of the targets [C, t] of hidden states [C, t, D], `count` and `cuts` as of `Chunks`."""
  return _forward(hidden, head, target, count, cuts)[0]


def _forward(hidden, head, target, count, cuts):
  number, _, block_of = _blocks(head)
  dtype = wide_of(hidden.dtype)

  def one_block(b, sums):
    _, new, part = block_of(b)

    # Blocks outside, chunks inside: a block of the head stays in the cache while all tokens pass by it.
    def one_chunk(c, hidden, sums, carry):
      most, total = sums
      logits = logits_of_chunk(hidden[c], part)
      if new is not None:  # columns that the block before had as well must not be summed twice
        logits = jnp.where(new[None], logits, _LEAST)
      larger = jnp.maximum(most[c], _over_lanes(jnp.max, logits))
      added = _over_lanes(jnp.sum, jnp.exp(logits - larger[:, None]))
      return (most.at[c].set(larger), total.at[c].set(total[c] * jnp.exp(most[c] - larger) + added)), carry

    return over_chunks(count, cuts, one_chunk, hidden, sums, ())[0]

  most, total = jax.lax.fori_loop(
    0, number, one_block, (jnp.full(target.shape, _LEAST, dtype), jnp.zeros(target.shape, dtype))
  )
  normaliser = most + jnp.log(jnp.where(total > 0, total, 1))  # 0 where a chunk was not computed
  values = target_logits(hidden, head, target) - normaliser
  return values, (hidden, head, target, count, normaliser)


def _backward(cuts, residuals, cotangent):
  hidden, head, target, count, normaliser = residuals
  number, block, block_of = _blocks(head)
  dtype = wide_of(hidden.dtype)

  def one_block(b, carry):
    hidden_grad, head_grad = carry
    start, new, part = block_of(b)
    weights = part.weights.astype(hidden.dtype)

    def one_chunk(c, read, hidden_grad, part_grad):
      hidden, target, normaliser, cotangent = (x[c] for x in read)
      logits = logits_of_chunk(hidden, part)
      probs = jnp.exp(logits - normaliser[:, None])
      ids = start + jax.lax.broadcasted_iota(target.dtype, probs.shape, 1)
      logits_grad = ((ids == target[:, None]) - probs) * cotangent[:, None]
      if new is not None:
        logits_grad = jnp.where(new[None], logits_grad, 0)
      gradient, part_grad = through_head(logits_grad, logits, hidden, part, weights, part_grad)
      return hidden_grad.at[c].add(gradient), part_grad

    part_grad = jax.tree.map(wide_zeros, part)
    hidden_grad, part_grad = over_chunks(
      count, cuts, one_chunk, (hidden, target, normaliser, cotangent), hidden_grad, part_grad
    )
    if number == 1:
      return hidden_grad, part_grad

    def add(whole, piece):
      before = jax.lax.dynamic_slice_in_dim(whole, start, block)
      return jax.lax.dynamic_update_slice_in_dim(whole, before + piece, start, axis=0)

    bias_grad = head_grad.bias if head.bias is None else add(head_grad.bias, part_grad.bias)
    return hidden_grad, Head(add(head_grad.weights, part_grad.weights), bias_grad, head_grad.soft_cap)

  zeros = jnp.zeros(hidden.shape, dtype), jax.tree.map(wide_zeros, head)
  hidden_grad, head_grad = (
    one_block(0, zeros) if number == 1 else jax.lax.fori_loop(0, number, one_block, zeros)
  )
  head_grad = jax.tree.map(lambda grad, x: grad.astype(jnp.result_type(x)), head_grad, head)
  return hidden_grad.astype(hidden.dtype), head_grad, None, None


chunked_log_probs.defvjp(_forward, _backward)
