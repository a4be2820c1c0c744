"""Weights of which each device holds a part, brought together where they are used."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dpojax.kernels.precision import wide_of


def gather(weight: jax.Array, mesh_axis: str, axis: int, dtype: Any) -> jax.Array:
  """Returns a weight whole, in a dtype, inside a `shard_map`.

  Its gradient is summed over the devices in float32 at least, each device its part of it.

  Args:
    weight: the part that a device holds.
    mesh_axis: of the mesh, over which it is cut.
    axis: of the weight that is cut, counted from the first.
    dtype: in which it travels and is returned.
  """
  return _gather(weight, mesh_axis, axis, jnp.dtype(dtype), weight.dtype)


# jax's own derivative of all_gather sums in the dtype that has travelled: over many devices bfloat16 would
# round most of what each adds away.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(weight, mesh_axis, axis, dtype, given):
  return jax.lax.all_gather(weight.astype(dtype), mesh_axis, axis=axis, tiled=True)


def _forward(weight, mesh_axis, axis, dtype, given):
  return _gather(weight, mesh_axis, axis, dtype, given), None


def _backward(mesh_axis, axis, dtype, given, _, cotangent):
  wide = cotangent.astype(wide_of(given))
  return (jax.lax.psum_scatter(wide, mesh_axis, scatter_dimension=axis, tiled=True).astype(given),)


_gather.defvjp(_forward, _backward)
