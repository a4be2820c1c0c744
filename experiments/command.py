"""What the command of every experiment does around its work."""

import argparse
import contextlib
import os
import pathlib
from collections.abc import Iterator

from dpojax.runtime import command as package
from dpojax.runtime import paths
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import ConfigError
from dpojax.runtime.memory import keep_compiled


@contextlib.contextmanager
def command(folder: pathlib.Path) -> Iterator[None]:
  """`dpojax.runtime.command` that keeps compiled programs in the folder, which may be on a full disk."""
  with package.command():
    keep_compiled(folder / "compiled")
    with disk_errors(folder):
      yield


def local_folder(name: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of an experiment.

  Raises:
    ConfigError: it is in a bucket; figures and tables are written to folders of this machine.
  """
  if paths.is_remote(name):
    raise ConfigError(
      f"--workdir is {name}, and an experiment writes to a folder of this machine; give one, then copy it"
    )
  return pathlib.Path(name)


def folder_argument(name: str) -> pathlib.Path:
  """Returns `local_folder` for a parser's `type`, which tells why it is refused."""
  try:
    return local_folder(name)
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from error
