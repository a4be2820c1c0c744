"""A step's rows computed some at a time, in one compiled loop: memory is that of a part.

Rows stand so that each shard has the rows of its parts one after another, and parts that hold no
comparison come last; those are not computed, so one compiled shape serves steps of any size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.kernels.platform import at_most, row_axes


class MicroBatches(NamedTuple):
  """How rows [R, ...] are taken.

  Attributes:
    rows_at_once: rows of a shard in a part; 0 takes all rows at once.
    shards: runs of R / shards rows that stand on different devices, for a global array; 1 where
      each device sees its own rows only, as inside of a `shard_map` over the axes of rows.
  """

  rows_at_once: int = 0
  shards: int = 1

  def _shards(self) -> int:
    return 1 if row_axes() else self.shards

  def split(self, rows: Any) -> Any:
    """[R, ...] -> [parts, shards * rows_at_once, ...].

    Raises:
      ValueError: the rows of a shard are no multiple of `rows_at_once`.
    """

    shards = self._shards()

    def one(x):
      if x.shape[0] % (shards * self.rows_at_once):
        raise ValueError(f"{x.shape[0]} rows on {shards} shards cannot be taken {self.rows_at_once} at once")
      # Rows of one shard lie together; the k-th part takes the k-th run of each, so nothing moves between
      # devices.
      x = x.reshape(shards, -1, self.rows_at_once, *x.shape[1:])
      return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    return jax.tree.map(one, rows)

  def join(self, values: Any) -> Any:
    """The inverse of `split`."""

    shards = self._shards()

    def one(x):
      x = x.reshape(x.shape[0], shards, self.rows_at_once, *x.shape[2:])
      return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

    return jax.tree.map(one, values)

  def sum(self, function: Callable[[Any], Any], rows: Any) -> Any:
    """Returns the sum of function(part) over the parts that hold a comparison, or of the only one."""
    if not self.rows_at_once:
      return function(rows)
    parts = self.split(rows)
    # A TPU's compiler begins the next round of a loop before it knows that there is one: with a single part
    # it would compute the forward pass twice.
    if parts.example.shape[0] == 1:
      return function(jax.tree.map(lambda x: x[0], parts))
    # Traced once, for its shapes and for the loop.
    function = jax.jit(function, inline=True)
    # Sums start from zeros of the right shapes: parts that hold nothing must not run even once.
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda i, sums: jax.tree.map(jnp.add, sums, function(jax.tree.map(lambda x: x[i], parts)))
    # A traced bound: steps with fewer rows run fewer rounds of the same program.
    with at_most(parts.example.shape[0]):
      return jax.lax.fori_loop(0, _filled(parts), add, zeros)

  def map(self, function: Callable[[Any], Any], rows: Any) -> Any:
    """Returns function(part), values of each row, for all rows [R, ...]."""
    if not self.rows_at_once:
      return function(rows)
    # All parts, filled or not: values are asked of every row.
    return self.join(jax.lax.map(function, self.split(rows)))


def _filled(parts: Any) -> jax.Array:
  """The number of parts up to the last that holds a comparison."""
  holds = jnp.any(parts.example >= 0, axis=tuple(range(1, parts.example.ndim)))
  filled = jnp.max(jnp.where(holds, jnp.arange(1, holds.size + 1), 0))
  # Inside of a mesh each device sees its own; what they exchange in a part they must all come to.
  return jax.lax.pmax(filled, row_axes()) if row_axes() else filled
