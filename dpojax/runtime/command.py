"""What every command line does around its work."""

import contextlib
import sys
from collections.abc import Iterator

import jax

from dpojax.runtime import processes, xla
from dpojax.runtime.errors import UserError
from dpojax.runtime.memory import keep_freed_memory


def settle() -> None:
  """Settles how the process holds memory and how XLA adds; before any use of jax."""
  keep_freed_memory()
  xla.keep_sums_right()


@contextlib.contextmanager
def command() -> Iterator[None]:
  """Settles the process, and makes of what a user can mend one line and exit 1.

  Of several processes all end when one does. To be entered before any use of jax.
  """
  settle()
  try:
    yield
    processes.leave()
  except UserError as error:
    processes.end(error)
    sys.exit(f"error: {error}")
  except (Exception, KeyboardInterrupt) as error:  # of several processes the others would wait for this one
    processes.end(error)
    raise


def say(text: str) -> None:
  """Prints a line from the first process."""
  if is_main():
    print(text, flush=True)


def is_main() -> bool:
  """Returns whether this is the first of the run's processes, which speaks and writes."""
  return jax.process_index() == 0
