"""Digests of files, written beside them and checked when they are read back.

XXH3 sees every flipped bit that a disk, a copy or a memory brings about, at the speed the files are
read with. It is no signature: who can write the files can write their digests.
"""

import concurrent.futures
import json
import os
import sys
from collections.abc import Iterable

import xxhash

from dpojax.runtime import paths
from dpojax.runtime.disk import reached
from dpojax.runtime.errors import UserError

FILE = "digests.json"
"""Where the digests of a folder's files stand, in the folder."""

# A block is a thread's work, and of a bucket one request; within it reads stay in a core's cache.
_BLOCK, _READ = 2**24, 2**18
_WORKERS = min(16, os.cpu_count() or 1)


class DamageError(UserError, RuntimeError):
  """A file is not as it was written; the message names it."""


def of_bytes(data: bytes) -> str:
  """Returns the digest of some bytes."""
  return xxhash.xxh3_128_hexdigest(data)


def of_files(folder: str | os.PathLike, names: Iterable[str]) -> dict[str, str]:
  """Returns the size and digest of files by their names in a folder, read by several threads.

  Raises:
    OSError: one cannot be read.
  """
  files = {name: paths.of(folder) / name for name in names}
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    sizes = dict(zip(files, pool.map(paths.size, files.values())))
    blocks = {
      name: [pool.submit(_of_block, path, start, sizes[name]) for start in range(0, sizes[name], _BLOCK)]
      for name, path in files.items()
    }
    return {
      name: f"{sizes[name]}:{of_bytes(b''.join(block.result() for block in of_file))}"
      for name, of_file in blocks.items()
    }


def write(
  folder: str | os.PathLike, *, known: dict[str, str] | None = None, leave_out: Iterable[str] = ()
) -> None:
  """Writes the digests of all files under a folder into it.

  Args:
    folder: the folder.
    known: digests of files that need not be read again.
    leave_out: names of files that are yet to change.
  """
  folder = paths.of(folder)
  names = paths.files_under(folder) - {FILE, *leave_out}
  # What was written and has gone since is no file of the folder.
  known = {name: value for name, value in (known or {}).items() if name in names}
  found = dict(sorted((known | of_files(folder, names - known.keys())).items()))
  paths.write_whole(folder / FILE, json.dumps({"files": found, "digest": _of_digests(found)}, indent=1))


def read(folder: str | os.PathLike) -> dict[str, str] | None:
  """Returns the digests of a folder's files by name, or None where there are none.

  Raises:
    DamageError: the file of digests is itself damaged.
  """
  path = paths.of(folder) / FILE
  try:
    with reached(path):
      found = json.loads(path.read_bytes())
    if found["digest"] != _of_digests(found["files"]):
      raise ValueError("its own digest is another")
    return found["files"]
  except FileNotFoundError:
    return None
  except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
    raise DamageError(f"{path} is damaged ({error})") from error


def check(folder: str | os.PathLike, digests: dict[str, str]) -> None:
  """Checks files of a folder against their digests.

  Raises:
    DamageError: one is missing, cannot be read or is not as it was written.
  """
  folder = paths.of(folder)
  for name, want in {} if paths.is_remote(folder) else digests.items():  # sizes first: they cost nothing here
    path, written = folder / name, want.partition(":")[0]
    try:
      size = path.stat().st_size
    except OSError as error:
      raise DamageError(f"{path} is missing") from error
    if str(size) != written:
      raise DamageError(f"{path} is damaged ({written} bytes were written, {size} are there)")
  try:
    with reached(folder):
      found = of_files(folder, digests)
  except FileNotFoundError as error:
    raise DamageError(f"a file of {folder} is missing ({error})") from error
  except OSError as error:
    raise DamageError(f"{folder} cannot be read ({error})") from error
  for name, want in digests.items():
    if found[name] != want:
      raise DamageError(f"{folder / name} is damaged (its digest is {found[name]}, written was {want})")


def is_sound(folder: str | os.PathLike, *, without: bool) -> bool:
  """Returns whether the folder of a cache is there and as it was written; if not it is removed, aloud.

  Args:
    folder: the folder.
    without: whether one without digests, which an earlier version has written, is believed, aloud.
  """
  folder = paths.of(folder)
  if not folder.exists():
    return False
  try:
    digests = read(folder)
    if digests is None and not without:
      raise DamageError(f"{folder} has no digests")
    check(folder, digests or {})
  except DamageError as error:
    print(f"{error}: it is made again", file=sys.stderr)
    paths.remove(folder)
    return False
  if digests is None:
    print(f"{folder} was written without digests: it is read unchecked", file=sys.stderr)
  return True


def _of_digests(files: dict[str, str]) -> str:
  return of_bytes(json.dumps(files, sort_keys=True).encode())


def _of_block(path: paths.Path, start: int, size: int) -> bytes:
  """The digest of a part of a file; read and not mapped: a bad sector is an error then, no signal."""
  if paths.is_remote(path):
    (data,) = paths.read_ranges(path, [(start, min(start + _BLOCK, size))])
    return xxhash.xxh3_128_digest(data)
  state, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ))
  with open(path, "rb", buffering=0) as file:
    file.seek(start)
    # One buffer for all reads: new ones would cost page faults.
    for _ in range(_BLOCK // _READ):
      count = file.readinto(buffer)
      state.update(buffer[:count])
      if not count:
        break
  return state.digest()
