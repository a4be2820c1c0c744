"""What is gathered and summed along the rings of a torus is what is gathered and summed in one go."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dpojax.kernels.gathering import MeshAxis, gather
from dpojax.training import parallel


@pytest.mark.parametrize("rings", [(), (2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize(("shape", "axis"), [((16, 3), 0), ((1, 3, 8), 2), ((2, 24, 1), 1)])
def test_a_weight_is_whole_and_its_gradient_is_the_sum_of_which_each_has_its_part(rings, shape, axis, rng):
  weight, cotangents = rng.normal(size=shape), rng.normal(size=(8, *shape))
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  cut = PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))

  def of_device(part, cotangent):
    whole, back = jax.vjp(lambda part: gather(part, MeshAxis("fsdp", rings), axis, part.dtype), part)
    return whole[None], back(cotangent[0])[0]

  with jax.enable_x64(True):
    wholes, gradient = jax.jit(
      jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(cut, PartitionSpec("fsdp")),
        out_specs=(PartitionSpec("fsdp"), cut),
        check_vma=False,
      )
    )(jnp.asarray(weight), jnp.asarray(cotangents))
  np.testing.assert_array_equal(wholes, np.broadcast_to(weight, (8, *shape)))
  np.testing.assert_allclose(gradient, cotangents.sum(0), rtol=1e-12)


def row_by_row(*sizes):
  """Places of chips in a torus, the last direction the fastest."""
  return [tuple(int(i) for i in place) for place in np.ndindex(*sizes)]


@pytest.mark.parametrize(
  ("places", "rings"),
  [
    (row_by_row(8, 8, 1), (8, 8)),
    (row_by_row(4, 4, 4), (4, 4, 4)),
    ([(y, x, 0) for x, y in np.ndindex(2, 8)], (2, 8)),  # the other direction first
    (row_by_row(1, 8, 1), ()),  # one direction
    ([(0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0)], ()),  # around, as on one host
    (row_by_row(3, 2, 1)[:5], ()),
    (sorted(row_by_row(4, 4, 1), key=lambda place: hash(place) % 7), ()),
  ],
)
def test_rings_are_read_in_where_the_chips_of_an_axis_stand(places, rings):
  chips = np.array([types.SimpleNamespace(coords=place) for place in places])
  mesh = types.SimpleNamespace(devices=chips.reshape(1, -1, 1), axis_names=("data", "fsdp", "tensor"))
  assert parallel._rings(mesh) == rings


def test_slices_are_a_direction_of_their_own_and_without_places_there_is_none():
  places = [(0, 0, 0), (0, 1, 0)]
  chips = np.array([types.SimpleNamespace(coords=at, slice_index=i) for i in range(2) for at in places])
  mesh = types.SimpleNamespace(devices=chips.reshape(1, -1, 1), axis_names=("data", "fsdp", "tensor"))
  assert parallel._rings(mesh) == (2, 2)
  assert parallel._rings(parallel.Mesh(fsdp=8).mesh) == ()
