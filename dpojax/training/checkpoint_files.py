"""The files of a checkpoint: digests are taken as they are written, and checked before they are read.

A process digests the arrays it has written itself, and checks those again that it is likely to read.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from dpojax.runtime import digests, paths
from dpojax.runtime.digests import DamageError
from dpojax.runtime.disk import reached

MARK = {"digests": "xxh3_128"}
"""What a checkpoint says of itself if its files have digests: losing these is damage too."""

_COMMITTED = "commit_success.txt"
"""What makes a step whole in a bucket, where no folder can be renamed."""

_CHANGING = ("_CHECKPOINT_METADATA", _COMMITTED)
"""Files of a step that Orbax writes last, and restores nothing from."""


def steps(folder: paths.Path) -> list[int]:
  """Returns the steps under a folder that are whole, ascending."""
  return sorted(
    int(path.name)
    for path in folder.glob("*")
    if path.name.isdecimal() and (not paths.is_remote(folder) or (path / _COMMITTED).exists())
  )


def half_written(folder: paths.Path) -> list[paths.Path]:
  """Returns what stands under a folder and was not brought to its end."""
  if not paths.is_remote(folder):
    # Orbax writes under this name and renames at the end; what still has it was never whole.
    return sorted(folder.glob("*.orbax-checkpoint-tmp*"))
  return sorted(path for path in folder.glob("*") if not (path / _COMMITTED).exists())


def let_orbax_write_to_buckets() -> None:
  """Lets Orbax write to s3:// as it does to gs://: where it names a place to TensorStore, both are known.

  In a bucket a step, and each of its items, is whole once its commit file is there. Tried on Orbax 0.12.8.
  """
  # There is no public way: replaced is where orbax asks whether a path is gs://, and what TensorStore
  # is told.
  gcs_utils._GCS_PATH_PREFIX = tuple(paths.STORES)
  tensorstore_utils._use_gcs_driver = paths.is_remote
  tensorstore_utils._normalize_path = lambda path: re.sub(r"^(gs|s3):/+", r"\1://", os.path.normpath(path))
  gcs_utils.get_kvstore_for_gcs = _store_of


def _store_of(path: str) -> dict[str, Any]:
  """Returns what TensorStore calls a place in a bucket."""
  scheme, _, name = path.partition("://")
  bucket, _, key = name.partition("/")
  place: dict[str, Any] = {"bucket": bucket, "path": key}
  if scheme == "gs":
    return {"driver": "gcs", **place}
  if server := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
    place |= {"endpoint": server, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
  if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it looks for them in files and asks the machine
    place["aws_credentials"] = {"type": "environment"}
  return {"driver": "s3", **place}


class Arrays(ocp.PyTreeCheckpointHandler):
  """Writes and reads a tree of arrays, and writes the digests of this process's files beside them."""

  async def async_save(self, directory: Any, *args, **kwargs) -> list:
    """Starts writing; the digests are there when the futures are done."""
    futures = await super().async_save(directory, *args, **kwargs)
    return [_Then(futures, lambda: _write_own(paths.of(getattr(directory, "path", directory))))]


@ocp.args.register_with_handler(Arrays, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.PyTreeSave):
  """A tree to be written by `Arrays`."""


@ocp.args.register_with_handler(Arrays, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.PyTreeRestore):
  """What `Arrays` is to read a tree into."""


def tree_of(folder: paths.Path) -> Any:
  """Returns the metadata of the arrays of an item, as a tree."""
  return Arrays().metadata(epath.Path(folder)).tree


class _Then:
  """Futures, and what is done after them by the thread that waits for them."""

  def __init__(self, futures: list, then: Callable[[], None]):
    self._futures, self._then = futures, then

  def result(self, timeout: float | None = None) -> None:
    for future in self._futures:
      future.result(timeout=timeout)
    self._then()

  def cancel(self) -> None:
    for future in self._futures:
      future.cancel()


def _write_own(folder: paths.Path) -> None:
  """Writes the digests of what this process has written of an item."""
  process = jax.process_index()
  names = {name for name in paths.files_under(folder) if _writer(name) == process}
  (folder / f"digests_{process}.json").write_text(json.dumps(digests.of_files(folder, names)))


def seal(folder: paths.Path, step: int) -> None:
  """Writes the digests of all files of a step that is written but not yet in its place."""
  # The step still has orbax's name for what is not finished, which begins with the step.
  unfinished = next(path for path in folder.iterdir() if path.name.split(".")[0] == str(step))
  known: dict[str, Any] = {}
  for path in sorted(unfinished.glob("*/digests_*.json")):
    known |= {f"{path.parent.name}/{name}": value for name, value in json.loads(path.read_text()).items()}
    path.unlink()
  digests.write(unfinished, known=known, leave_out=_CHANGING)


def check(folder: paths.Path, items: Iterable[str], *, together: bool) -> bool:
  """Checks the files of some items of a step; returns False where it was written without digests.

  Args:
    folder: of the step.
    items: names of the items.
    together: whether all processes check at once, each its part; then all of them raise, or none.

  Raises:
    DamageError: a file is missing, or is not as it was written.
  """
  problem, found = "", None
  share = (jax.process_index(), jax.process_count()) if together else (0, 1)
  try:
    found = digests.read(folder)
    if found is None and _is_marked(folder / "about" / "metadata"):
      raise DamageError(f"{folder / digests.FILE} is missing")
    digests.check(
      folder,
      {
        name: value
        for name, value in (found or {}).items()
        # Each process checks what the process of its number has written, which it is about to read; after a
        # change of their number the rest are shared out.
        if name.split("/")[0] in items and (_writer(name) or 0) % share[1] == share[0]
      },
    )
  except DamageError as error:
    problem = str(error)
  if together:
    problem = _first_of_all(problem)
  if problem:
    raise DamageError(problem)
  return found is not None


def _writer(name: str) -> int | None:
  """The process that has written a file of arrays; None of a file the first one adds in the end."""
  found = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
  return int(found[1]) if found else None


def _is_marked(about: paths.Path) -> bool:
  try:
    with reached(about):
      return "digests" in json.loads(about.read_bytes())
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise DamageError(f"{about} is damaged or missing ({error})") from error


def _first_of_all(problem: str) -> str:
  """Returns the first problem that any process has."""
  if jax.process_count() == 1:
    return problem
  # Of one length everywhere, as a collective has it.
  text = np.zeros(2048, np.uint8)
  raw = np.frombuffer(problem.encode()[: len(text)], np.uint8)
  text[: len(raw)] = raw
  told = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(text))
  return next(filter(None, told), "")
