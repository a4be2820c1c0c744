"""A machine that is about to be taken away asks to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
  """Yields `asked(step)`: whether SIGTERM has come, as a machine about to be taken away sends it.

  With several processes jax agrees on the step at which all of them stop.
  """
  if jax.process_count() > 1:
    # One process may hear of it a step before the others: all must save the same step.
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():  # no handler can be set here
    yield lambda step: False
    return
  flag = threading.Event()
  # A flag and no exception: the step under way ends, and is what is saved.
  before = signal.signal(signal.SIGTERM, lambda *_: flag.set())
  try:
    yield lambda step: flag.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
