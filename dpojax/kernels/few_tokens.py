"""Products of a few tokens with a large matrix: they take as long as the matrix takes to be read.

A step of decoding is made of them. CPUs read a matrix of one vector an output, each vector in one piece, up
to twice as fast as its transpose, which their matrix products first copy into blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpojax.kernels.platform import arrays_are_cut, platform

_TOKENS = 64
"""Of more of them the arithmetic takes longer than the reading."""

_ROUNDS = 16
"""Products after which a transposition has paid for itself, twice."""

_BYTES = 2**31
"""Of weights whose matrices are held a second time, transposed: of larger ones memory counts for more."""


def product(x: jax.Array, rows: jax.Array, *, dtype: Any = None) -> jax.Array:
  """Returns x [..., D] times the transpose of rows [V, D]: [..., V], in `dtype` where one is given.

  The product is of the rows with the tokens and not the other way round: on CPUs that reads the rows as they
  lie.
  """
  y = jnp.einsum("vd,...d->v...", rows, x, preferred_element_type=dtype)
  # Without the barrier XLA moves the transposition into the product, and copies the rows for it.
  return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)


def are_worth_turning(weights: Any, tokens: int, rounds: int) -> bool:
  """Whether so many products of so many tokens pay for a transposition of all matrices before them.

  Of one token a CPU reads a matrix as it lies, either way.
  """
  if platform() != "cpu" or arrays_are_cut() or not 1 < tokens <= _TOKENS or rounds < _ROUNDS:
    return False
  leaves = jax.tree.leaves(weights)
  return (
    all(x.dtype == jnp.float32 for x in leaves) and sum(x.size * x.dtype.itemsize for x in leaves) <= _BYTES
  )
