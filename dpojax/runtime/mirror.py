"""Entries of a cache that stands in a bucket, used from a copy on this machine.

Prepared records and token ids are mapped into memory and read at random, which a bucket is not for. An
entry is made here, sealed by its digests, and put there, the digests last; another machine copies it and
holds it to them. The copies stand under `$DPOJAX_MIRROR`, or ~/.cache/dpojax/mirror, and may be deleted at
any time.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile

from dpojax.runtime import digests, paths


def local(path: paths.Path) -> pathlib.Path:
  """Returns where a path of a bucket is copied to on this machine; one of this machine is its own."""
  if not paths.is_remote(path):
    return path
  top = pathlib.Path(os.environ.get("DPOJAX_MIRROR", "~/.cache/dpojax/mirror")).expanduser()
  return top / os.fspath(path).replace("://", "/")


def is_sound(folder: paths.Path, *, without: bool) -> bool:
  """Returns whether an entry is there, on this machine too, as it was written; see `digests.is_sound`."""
  here = local(folder)
  if digests.is_sound(here, without=without):
    return True
  if not paths.is_remote(folder) or not (folder / digests.FILE).exists():
    return False
  here.parent.mkdir(parents=True, exist_ok=True)
  unfinished = pathlib.Path(tempfile.mkdtemp(dir=here.parent, prefix="unfinished-"))
  try:
    paths.download(folder, unfinished)
    with contextlib.suppress(OSError):  # another process was faster
      os.rename(unfinished, here)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return digests.is_sound(here, without=without)


def push(folder: paths.Path) -> None:
  """Puts an entry that was made on this machine into its bucket, if it is to be in one."""
  if paths.is_remote(folder):
    paths.remove(folder / digests.FILE)  # of an entry that was damaged: it is whole once they are there
    paths.upload(local(folder), folder, last=digests.FILE)
