"""Paths that a user gives: of this machine, or gs:// and s3:// of a bucket.

`of` is the one door. What is of this machine is a `pathlib.Path`; what is in a bucket is an `epath.Path`,
which has the same methods, over fsspec's gcsfs and s3fs: Orbax and jax's compilation cache read the same
objects. What the two do not share is below. Credentials and endpoints are those the stores' own libraries
find: `STORAGE_EMULATOR_HOST` and `AWS_ENDPOINT_URL` name a server other than the cloud's.

A bucket has no folders, no renaming and no appending: an object is put whole or is not there, which is what
`write_whole` rests on; for what grows there is `runtime.appending`.
"""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias
from urllib.parse import quote

from etils import epath

from dpojax.runtime.errors import UserError

Path: TypeAlias = pathlib.Path | epath.Path

STORES = {"gs://": ("gcsfs", "gcs"), "s3://": ("s3fs", "s3")}
"""Of each scheme: the package that speaks to the store, and the extra that installs it."""

_ATTEMPTS = 12  # of botocore, waiting twice as long after each: a minute; gcsfs makes six, over half a minute


class PathError(UserError, ValueError):
  """A path is of no kind that can be read here; the message says what to install or give."""


def is_remote(path: str | os.PathLike) -> bool:
  """Returns whether a path is in a bucket."""
  return os.fspath(path).startswith(tuple(STORES))


def is_url(name: str) -> bool:
  """Returns whether a name is a server's, and not that of a path."""
  return bool(re.match(r"(?i)[a-z]+://", name)) and not is_remote(name)


def of(path: str | os.PathLike) -> Path:
  """Returns a path as an object; `~` is the user's home.

  Raises:
    PathError: the store's package is not installed, or the scheme is unknown.
  """
  name = os.fspath(path)
  if is_remote(name):
    _prepare(name[:5])
    return epath.Path(name)
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
    raise PathError(f"{name} is on no store that is known; give a folder, or one of {', '.join(STORES)}")
  return pathlib.Path(path).expanduser()


def absolute(path: str | os.PathLike) -> Path:
  """Returns a path from the root of its machine or bucket."""
  return of(path) if is_remote(path) else of(path).absolute()


def make_folder(path: Path) -> None:
  """Makes a folder and those above it; a bucket has none."""
  if not is_remote(path):
    path.mkdir(parents=True, exist_ok=True)


def size(path: Path) -> int:
  """Returns the bytes of a file.

  Raises:
    OSError: it is not there.
  """
  found = path.stat()
  return found.length if is_remote(path) else found.st_size


def write_whole(path: Path, data: str | bytes) -> None:
  """Writes a file such that it is there whole, or as it was before, however the process ends."""
  data = data.encode() if isinstance(data, str) else data
  if is_remote(path):
    path.write_bytes(data)
    return
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write it too
  temporary.write_bytes(data)
  os.replace(temporary, path)


def files_under(folder: Path) -> set[str]:
  """Returns the names of all files under a folder, with / between the parts."""
  if not is_remote(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
  # fsspec tells names with their bucket and without a scheme.
  top = os.fspath(folder).partition("://")[2].rstrip("/") + "/"
  return {name.removeprefix(top) for name in filesystem(folder).find(os.fspath(folder))} - {""}


def is_empty(folder: Path) -> bool:
  """Returns whether nothing is at a path, or a folder with nothing in it."""
  return not (folder.exists() and any(folder.iterdir()))


def matching(pattern: str) -> list[str]:
  """Returns the paths of files of a bucket that a glob names, sorted."""
  scheme = pattern[:5]
  of(pattern)
  return sorted(scheme + name for name in filesystem(pattern).glob(pattern))


def remove(path: Path) -> None:
  """Removes a file, or a folder with all that is in it; nothing where there is none."""
  if is_remote(path):
    if path.exists():
      filesystem(path).rm(os.fspath(path), recursive=True)
  elif path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
  """Moves a folder; in a bucket each file is copied there, then removed here."""
  if is_remote(source):
    names = sorted(files_under(source))
    filesystem(source).copy([f"{source}/{name}" for name in names], [f"{target}/{name}" for name in names])
    remove(source)
  else:
    os.rename(source, target)


def read_ranges(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
  """Returns parts of a file of a bucket, all asked for at once.

  Raises:
    OSError: one cannot be read whole.
  """
  starts, stops = zip(*ranges)
  parts = filesystem(path).cat_ranges([os.fspath(path)] * len(ranges), list(starts), list(stops))
  for (start, stop), part in zip(ranges, parts):
    # A store cuts a range that goes beyond the end, without an error.
    if len(part) != stop - start:
      raise OSError(f"{path} ends at byte {start + len(part)}, and was to be read to {stop}")
  return parts


def put_over(path: Path, data: bytes, version: str | None) -> None:
  """Puts a small file of a bucket over the version that is named, or where there is none.

  A version is GCS's generation or S3's ETag. A server that knows no conditions puts it in any case.

  Raises:
    FileExistsError: another version is there, or any where none was named.
  """
  store, name = filesystem(path), os.fspath(path)
  if version is None:
    store.pipe_file(name, data, mode="create")
  elif name.startswith("gs://"):
    bucket, key, _ = store.split_path(name)
    place = f"{store._location}/upload/storage/v1/b/{quote(bucket, safe='')}/o"
    store.call("POST", place, uploadType="media", name=key, ifGenerationMatch=version, data=data)
  else:
    bucket, key, _ = store.split_path(name)
    try:
      store.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=version)
    except FileNotFoundError as error:
      raise FileExistsError(name) from error
    except OSError as error:
      if "PreconditionFailed" in f"{error!r}{error.__cause__!r}" or "pre-conditions" in str(error):
        raise FileExistsError(name) from error
      raise


def download(source: Path, target: pathlib.Path, names: Iterable[str] | None = None) -> None:
  """Copies files of a folder of a bucket to this machine, all of them unless some are named."""
  names = sorted(files_under(source) if names is None else names)
  for name in names:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
  if names:
    filesystem(source).get(
      [f"{os.fspath(source)}/{name}" for name in names], [str(target / name) for name in names]
    )


def upload(source: pathlib.Path, target: Path, last: str = "") -> None:
  """Copies all files under a folder of this machine to a bucket; what is named `last` after all others."""
  names = files_under(source)
  # What makes a folder count is put when all else is there: a kill before leaves nothing that is believed.
  for group in (names - {last}, names & {last}):
    if group:
      filesystem(target).put(
        [str(source / name) for name in sorted(group)], [f"{target}/{name}" for name in sorted(group)]
      )


@functools.cache
def fetched(path: str | os.PathLike) -> str:
  """Returns a file as one of this machine, for who reads no other; a bucket's is copied, once a process."""
  if not is_remote(path):
    return os.fspath(path)
  target = pathlib.Path(tempfile.mkdtemp(dir=scratch()), os.path.basename(os.fspath(path)))
  target.write_bytes(of(path).read_bytes())
  return str(target)


@functools.cache
def scratch() -> pathlib.Path:
  """Returns a folder of this machine that is removed when the process ends."""
  global _scratch
  _scratch = tempfile.TemporaryDirectory(prefix="dpojax-")
  return pathlib.Path(_scratch.name)


_scratch: Any = None


def filesystem(path: str | os.PathLike) -> Any:
  """Returns fsspec's file system of a bucket, the one that `epath` uses."""
  of(path)
  return epath.backend.fsspec_backend.fs(os.fspath(path))


@functools.cache
def _prepare(scheme: str) -> None:
  """Checks that the package of a store is there, and sets it up before its first use."""
  package, extra = STORES[scheme]
  if importlib.util.find_spec(package) is None:
    raise PathError(f"{scheme} paths need {package}, which is not installed: pip install 'dpojax[{extra}]'")
  import fsspec

  os.environ.setdefault("EPATH_USE_TF", "0")  # where TensorFlow is installed, it would be loaded
  # What another process has written is there at once: nothing is remembered of a listing.
  settings = fsspec.config.conf.setdefault(extra, {})
  settings.setdefault("use_listings_cache", False)
  if scheme == "s3://":
    settings.setdefault("config_kwargs", {"retries": {"mode": "standard", "max_attempts": _ATTEMPTS}})
  elif server := os.environ.get("STORAGE_EMULATOR_HOST"):
    # TensorStore is C++ and has a name of its own for the same server.
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", server)
    # gcsfs would ask the cloud, and not that server, for the bucket's kind.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "0")
