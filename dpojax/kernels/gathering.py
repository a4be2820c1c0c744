"""Weights of which each device holds a part, brought together where they are used."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.kernels.precision import wide_of

SMALL = 384 * 1024
"""Bytes of a device's part below which TPUs, asked to gather, sum zeros instead, at twice the bytes."""


class MeshAxis(NamedTuple):
  """The axis of a mesh that something is cut over.

  Attributes:
    name: of the axis.
    rings: how many chips stand along each direction of the torus that the axis covers, the slowest first; ()
      where it covers one, or no torus at all.
  """

  name: str
  rings: tuple[int, ...] = ()

  def groups(self) -> Iterator[list[list[int]]]:
    """Yields, for each direction, the places of the axis that stand in one ring together."""
    places = np.arange(np.prod(self.rings)).reshape(self.rings)
    for direction, size in enumerate(self.rings):
      yield np.moveaxis(places, direction, -1).reshape(-1, size).tolist()


def all_gather(part: jax.Array, over: MeshAxis, axis: int) -> jax.Array:
  """Returns the parts of all devices in a row along an axis, inside a `shard_map`."""
  # A TPU's compiler gathers in a plane, by all links at once, but not small parts, and not in three
  # directions: those it sums, with zeros in place of what is others'. Of one ring it never does.
  if len(over.rings) > 2 or (over.rings and part.nbytes < SMALL):
    for group in reversed(list(over.groups())):
      part = jax.lax.all_gather(part, over.name, axis=axis, tiled=True, axis_index_groups=group)
    return part
  return jax.lax.all_gather(part, over.name, axis=axis, tiled=True)


def scatter_sum(whole: jax.Array, over: MeshAxis, axis: int) -> jax.Array:
  """Returns the sum over devices of what each has whole, of which each keeps its part along an axis."""
  # In more than one direction at once a TPU's compiler sums the whole everywhere, and then cuts it; in one it
  # does so where there are axes of 1.
  axes_of_1 = tuple(i for i, size in enumerate(whole.shape) if size == 1 and i != axis)
  whole = jnp.squeeze(whole, axes_of_1)
  at = axis - sum(i < axis for i in axes_of_1)
  for group in over.groups() if over.rings else (None,):
    whole = jax.lax.psum_scatter(whole, over.name, scatter_dimension=at, tiled=True, axis_index_groups=group)
  return jnp.expand_dims(whole, axes_of_1)


def summed_products(x: jax.Array, matrix: jax.Array, over: MeshAxis) -> jax.Array:
  """Returns x [T, I] times a matrix of which each device holds some rows, [I / devices, O].

  Inside a `shard_map`. Each device multiplies its rows with those columns of the x of all; the products are
  summed in float32 at least.
  """
  columns = jax.lax.all_to_all(x, over.name, split_axis=1, concat_axis=0, tiled=True)
  return scatter_sum(jnp.matmul(columns, matrix, preferred_element_type=wide_of(x.dtype)), over, 0)


def gather(weight: jax.Array, over: MeshAxis, axis: int, dtype: Any) -> jax.Array:
  """Returns a weight whole, in a dtype, inside a `shard_map`.

  Its gradient is summed over the devices in float32 at least, each device its part of it.

  Args:
    weight: the part that a device holds.
    over: the axis of the mesh it is cut over.
    axis: of the weight that is cut, counted from the first.
    dtype: in which it travels and is returned.
  """
  return _gather(weight, over, axis, jnp.dtype(dtype), weight.dtype)


# jax's own derivative of all_gather sums in the dtype that has travelled: over many devices bfloat16 would
# round most of what each adds away.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(weight, over, axis, dtype, given):
  return all_gather(weight.astype(dtype), over, axis)


def _forward(weight, over, axis, dtype, given):
  return _gather(weight, over, axis, dtype, given), None


def _backward(over, axis, dtype, given, _, cotangent):
  return (scatter_sum(cotangent.astype(wide_of(given)), over, axis).astype(given),)


_gather.defvjp(_forward, _backward)
