"""How a process holds host memory, and keeps the programs it compiles."""

import ctypes
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax

from dpojax.runtime import digests, paths

_KEPT = ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**28))
"""Of glibc's mallopt: one arena for all threads, no buffer mapped alone, none given back at the top, and
256 MiB asked for at once."""

_MAPPED = ((-4, 2**16), (-3, 2**25))
"""Of the same: buffers of 32 MiB and more are mapped alone."""

_LARGE = 2**30
"""Bytes of a state whose steps are too long for page faults to count."""


def keep_freed_memory() -> None:
  """Lets this process keep large host buffers that it frees: on CPUs those of every step.

  glibc gives them back to the system, and pays a page fault for each 4 KiB when it asks again: in a
  small model's step up to a third of the time. To be called before any use of jax; elsewhere than
  under glibc it does nothing.
  """
  _set_malloc(_KEPT)


def fit_memory_to(state: Any) -> None:
  """Fits how this process keeps memory to a state that is in place; before the first step.

  Copies of weights that were only read go back to the system. Under a state of `_LARGE` bytes so do from
  then on the buffers of a step: kept, they leave holes that the next step's do not fit into, up to a
  step's memory again, and page faults are nothing beside the seconds of such a step. Elsewhere than under
  glibc it does nothing.
  """
  libc = ctypes.CDLL(None)
  # What was read to be placed lies in the heap still, which by then has been told to give nothing back.
  if hasattr(libc, "malloc_trim"):
    libc.malloc_trim(0)
  if sum(x.nbytes for x in jax.tree.leaves(state)) >= _LARGE:
    _set_malloc(_MAPPED)


def _set_malloc(settings: Sequence[tuple[int, int]]) -> None:
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    for parameter, value in settings:
      libc.mallopt(parameter, value)


_OF_JAX, _SHORTEST = 1.0, 0.1
"""Seconds from which on a program is kept: by default of jax, and in a folder of this machine's. The small
programs of a start come to seconds together, and a local file costs next to nothing."""


def compile_folder(root: paths.Path) -> paths.Path | None:
  """Returns where this process's compiled programs are kept by default, in a folder that machines may share.

  None where a folder is set already (JAX_COMPILATION_CACHE_DIR), and where a CPU does not say what it is.
  A program for a CPU may use any instruction of the one it was compiled on, and jax's own key does not
  hold which: each kind of CPU, by its model and its instructions, has a folder of its own.
  """
  if jax.config.jax_compilation_cache_dir:
    return None
  if jax.default_backend() != "cpu":
    return root / "compiled"
  kind = cpu_kind()
  return root / "compiled" / f"cpu-{digests.of_bytes(kind.encode())[:16]}" if kind else None


def cpu_kind(path: str | os.PathLike = "/proc/cpuinfo") -> str:
  """Returns the architecture, model and instructions of the CPU as Linux tells them, or an empty string."""
  try:
    first = paths.of(path).read_text().split("\n\n")[0]
  except OSError:
    return ""
  told = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
  told = {name.strip(): value.split() for name, value in told.items()}
  flags = told.get("flags") or told.get("Features")
  if not flags:
    return ""
  # x86 and Arm tell it by different names: those that are there.
  names = ("vendor_id", "model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
  return " ".join(
    [platform.machine(), *(word for name in names for word in told.get(name, ())), *sorted(flags)]
  )


def keep_compiled(folder: str | os.PathLike) -> None:
  """Lets this process find there what an earlier one compiled, and keep there what it compiles."""
  paths.make_folder(paths.of(folder))
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if paths.is_remote(folder):  # beside jax's own files XLA would keep some of its own, and knows no buckets
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  elif jax.config.jax_persistent_cache_min_compile_time_secs == _OF_JAX:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
