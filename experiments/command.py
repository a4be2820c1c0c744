"""What the command of every experiment does around its work."""

import contextlib
import pathlib
import sys
from typing import Iterator

from dpojax import train
from dpojax.disk import disk_errors
from dpojax.parallel import keep_compiled, keep_freed_memory


@contextlib.contextmanager
def command(folder: pathlib.Path) -> Iterator[None]:
  """Keeps compiled programs in the folder, and turns what a user can mend into one line and exit 1."""
  keep_freed_memory()
  keep_compiled(folder / "compiled")
  try:
    with disk_errors(folder):
      yield
  except (*train.USER_ERRORS, train.TrainingError, FloatingPointError) as error:
    sys.exit(f"error: {error}")
