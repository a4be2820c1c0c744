"""What the command of every experiment does around its work."""

import contextlib
import pathlib
from collections.abc import Iterator

from dpojax.runtime import command as package
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.memory import keep_compiled


@contextlib.contextmanager
def command(folder: pathlib.Path) -> Iterator[None]:
  """`dpojax.runtime.command` that keeps compiled programs in the folder, which may be on a full disk."""
  with package.command():
    keep_compiled(folder / "compiled")
    with disk_errors(folder):
      yield
