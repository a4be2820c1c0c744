"""What a full or read-only disk raises, as one error that names the folder and the fix."""

import contextlib
import errno
import os

from dpojax.runtime.errors import UserError


class DiskError(UserError, RuntimeError):
  """Something could not be written; the message names the folder and says what to do."""


@contextlib.contextmanager
def disk_errors(folder: str | os.PathLike):
  """Turns the errors of a full or read-only disk under `folder` into a `DiskError`."""
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
    if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
      raise DiskError(f"{folder} cannot be written ({error}); check the path and its permissions") from error
    raise
