"""What a kernel asks of where it runs."""

import contextlib

import jax

_platform = jax.make_user_context("")
"""What programs are built for, where that is not the machine they are traced on; a part of jit's keys."""


def platform() -> str:
  """Returns what the program that is being traced will run on: 'cpu', 'gpu' or 'tpu'."""
  return _platform.value or jax.default_backend()


def built_for(platform: str) -> contextlib.AbstractContextManager:
  """Returns a context in which programs are traced for 'cpu', 'gpu' or 'tpu', whatever is here.

  What a TPU's kernels further ask, its memory, they ask of the mesh that the caller has set.
  """
  return _platform(platform)


def at_most(rounds: int) -> contextlib.AbstractContextManager:
  """Returns a context for a loop whose rounds are counted as it runs: what there can be of them.

  It is a name in the compiled program, for whoever reads there what a step costs.
  """
  return jax.named_scope(f"{AT_MOST}{rounds}")


AT_MOST = "at_most_"


def cut_axes() -> dict[str, int]:
  """Returns the axes, with their sizes, that arrays are cut over where the caller is.

  Those of a mesh that is set, but for those that the caller is inside of, in a `shard_map`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  # An axis of one device cuts nothing; inside a `shard_map` over an axis the caller has its part already.
  return {
    name: size
    for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    if size > 1 and kind is not jax.sharding.AxisType.Manual
  }


def arrays_are_cut() -> bool:
  """Whether the caller has set a mesh that arrays are cut over: what lies together here does not there."""
  return bool(cut_axes())


def row_axes() -> tuple[str, ...]:
  """Returns the axes that rows are cut over and that the caller is inside of: it sees those of one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return () if mesh.empty else tuple(name for name in ROWS if name in mesh.manual_axes)


ROWS = ("data", "fsdp")
"""Axes of a mesh that rows are cut over."""
