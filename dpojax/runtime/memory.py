"""How a process holds host memory, and keeps the programs it compiles."""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import jax

from dpojax.runtime import paths

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
  if hasattr(libc, "malloc_trim"):
    libc.malloc_trim(0)
  if sum(x.nbytes for x in jax.tree.leaves(state)) >= _LARGE:
    _set_malloc(_MAPPED)


def _set_malloc(settings: Sequence[tuple[int, int]]) -> None:
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    for parameter, value in settings:
      libc.mallopt(parameter, value)


def keep_compiled(folder: str | os.PathLike) -> None:
  """Lets this process find there what an earlier one compiled, and keep there what it compiles."""
  paths.make_folder(paths.of(folder))
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if paths.is_remote(folder):  # beside jax's own files XLA would keep some of its own, and knows no buckets
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
