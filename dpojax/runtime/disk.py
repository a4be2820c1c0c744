"""What a full or read-only disk or a store out of reach raises, as one error with the place and the fix."""

import contextlib
import errno
import os

from dpojax.runtime import paths
from dpojax.runtime.errors import UserError


class DiskError(UserError, RuntimeError):
  """Something could not be written; the message names the folder and says what to do."""


@contextlib.contextmanager
def disk_errors(folder: str | os.PathLike):
  """Turns the errors of a full or read-only disk under `folder`, or of its store, into a `DiskError`."""
  try:
    yield
  except Exception as error:  # tensorstore raises its own kinds, with the system's words in them
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
      words in text for words in ("No space left", "quota exceeded", "File too large")
    ):
      raise DiskError(
        f"the disk of {folder} is full; earlier checkpoints are intact: free some space and start "
        "the same command again to continue from the last one"
      ) from error
    # EEXIST and ENOTDIR: a file stands where a folder is to be.
    if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
      raise DiskError(f"{folder} cannot be written ({error}); check the path and its permissions") from error
    if paths.is_remote(folder) and _is_of_a_store(error):
      raise DiskError(
        f"{folder} cannot be reached or written ({_reason(error)}); what is saved there is intact: check the "
        "bucket's name, its permissions and the network, and start the same command again"
      ) from error
    raise


@contextlib.contextmanager
def reached(folder: str | os.PathLike):
  """Turns what a store raises that does not answer into a `DiskError`, but not that a file is missing."""
  try:
    with disk_errors(folder) if paths.is_remote(folder) else contextlib.nullcontext():
      yield
  except DiskError as error:
    if isinstance(error.__cause__, FileNotFoundError):
      raise error.__cause__ from None
    raise


_OF_STORES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")


def _is_of_a_store(error: Exception) -> bool:
  """Returns whether an error is of the packages that speak to a store."""
  return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OF_STORES


def _reason(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
