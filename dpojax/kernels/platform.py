"""What a kernel asks of where it runs."""

import jax


def platform() -> str:
  """Returns what the program that is being traced will run on: 'cpu', 'gpu' or 'tpu'."""
  return jax.default_backend()


def arrays_are_cut() -> bool:
  """Whether the caller has set a mesh that arrays are cut over: what lies together here does not there."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and any(
    size > 1 and kind is not jax.sharding.AxisType.Manual
    for size, kind in zip(mesh.axis_sizes, mesh.axis_types)
  )
