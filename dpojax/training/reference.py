"""Reference log-probs computed once and kept, so that training needs no reference model.

A store is a folder named by the digest of all that decides the numbers: weights, model, data,
tokenizer and truncation. In it are ArrayRecord files, each complete or not there at all, one record
a comparison: its number, and the summed log-prob of each response. A later run, of another beta
say, finds them; one that was killed goes on where it was.
"""

import contextlib
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm
from array_record.python import array_record_module
from jax.experimental import multihost_utils

from dpojax.data import loader
from dpojax.runtime import digests, paths
from dpojax.runtime.disk import disk_errors, reached
from dpojax.runtime.errors import UserError
from dpojax.runtime.ownership import owned
from dpojax.training.micro_batches import MicroBatches
from dpojax.training.objectives import Apply, response_log_probs

_VERSION = 1
_FLUSH = 64


class StoreError(UserError, RuntimeError):
  """A store of reference log-probs cannot be used; the message names it and says what to do."""


def make_score_step(
  apply: Apply, *, num_responses: int, chunk_size: int | None, micro_batches: MicroBatches = MicroBatches()
) -> Callable:
  """Returns `score(params, rows) -> (log-probs [R, P, K], example [R, P])`, to be lifted."""

  def score(params, rows):
    sums = lambda part: (
      response_log_probs(apply(params, part), part, num_responses=num_responses, chunk_size=chunk_size).sums
    )
    return micro_batches.map(sums, rows), rows.example

  return score


def stored_log_probs(
  subset: loader.Subset,
  identity: dict[str, Any],
  folder: str | os.PathLike,
  score: Callable[[loader.Batch], tuple[np.ndarray, np.ndarray]],
  make_loader: Callable[[loader.Subset], loader.Loader],
) -> np.ndarray:
  """Returns the reference's summed log-prob of every response of a data set, computed if need be.

  Args:
    subset: comparisons of the data set; those of the whole set are stored.
    identity: JSON values that decide the numbers, besides the data.
    folder: where stores are kept.
    score: a batch -> log-probs [R, P, K] and examples [R, P] of all its rows, on every process.
    make_loader: a subset -> the loader that packs it.

  Returns:
    [N, K] float32 by position in the data set.

  Raises:
    StoreError: the store tells of something else than its name.
    DiskError: the disk is full or cannot be written.
  """
  data = subset.data
  identity = identity | {"version": _VERSION, "data": data.fingerprint}
  digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
  folder = paths.of(folder) / digest
  is_main, several = jax.process_index() == 0, jax.process_count() > 1
  shape = (len(data), data.lengths.shape[1] - 1)
  # nan marks what is not stored yet; a log-prob is never nan, or the run would have stopped at it.
  values = np.full(shape, np.nan, np.float32)
  with contextlib.ExitStack() as held:
    if is_main:
      # Looked at without the lock first: the usual case is that all is there, and nobody needs to wait.
      _prepare(folder, identity)
      _read(folder, values)
      if np.isnan(values).any():
        held.enter_context(owned(folder, f"the stored reference {folder}", wait=True))
        _read(folder, values)  # what another process has made while this one waited
    if several:
      values = np.array(multihost_utils.broadcast_one_to_all(values))
    _compute(folder, data, values, score, make_loader, is_main)
  return values


def _compute(folder, data, values, score, make_loader, is_main: bool) -> None:
  """Fills in what is not stored yet, and stores it."""
  batches = make_loader(loader.all_of(data))
  missing = [
    step
    for step, index in enumerate(batches.plan_in_order().index)
    if np.isnan(values[index[index >= 0]]).any()
  ]
  fresh = []
  bar = tqdm.tqdm(missing, "reference log-probs", disable=not (is_main and sys.stderr.isatty()))
  for count, step in enumerate(bar, 1):
    for batch in batches.evaluation(step, step + 1):
      log_probs, examples = score(batch)
      for where in zip(*np.nonzero(examples >= 0)):
        # Examples ascend in a data set: a row tells their numbers, the store wants their places.
        i = int(np.searchsorted(data.example, examples[where]))
        values[i] = log_probs[where]
        fresh.append(i)
    # Now and then, so that a kill loses a minute and not an epoch.
    if is_main and (count % _FLUSH == 0 or count == len(missing)):
      _write(folder, fresh, values)
      fresh = []


def _prepare(folder: paths.Path, identity: dict[str, Any]) -> None:
  with disk_errors(folder):
    paths.make_folder(folder)
    about = folder / "about.json"
    was = _told(about)
    if was is None:
      text = json.dumps(identity, indent=1, sort_keys=True)
      if paths.is_remote(folder):
        about.write_text(text)
      else:
        # Under another name first: a kill between two writes must not leave half a file that is believed.
        temporary = folder / f"about.{uuid.uuid4().hex}.tmp"
        temporary.write_text(text)
        os.replace(temporary, about)
  if was not in (None, json.loads(json.dumps(identity))):
    raise StoreError(
      f"{about} tells of other weights, data or truncation than its folder's name; delete {folder}"
    )


def _told(about: paths.Path) -> dict | None:
  """What a store tells of itself; None where it tells nothing that can be read."""
  try:
    return json.loads(about.read_bytes())
  except FileNotFoundError:
    return None
  except (ValueError, RecursionError) as error:
    print(f"{about} is damaged ({error}): it is written again", file=sys.stderr)
    return None


def _record(shape: tuple[int, ...]) -> np.dtype:
  return np.dtype([("position", "<i8"), ("log_probs", "<f4", shape)])


def _read(folder: paths.Path, values: np.ndarray) -> None:
  """Fills in what is stored; a file that is not as it was written is removed, aloud."""
  kind = _record(values.shape[1:])
  for path in sorted(folder.glob("*.array_record")):
    # A digest in the name is there with the rename: no second file could be missing.
    _, *digest, _ = path.name.split(".")  # files of earlier versions have none in their names
    with reached(path):
      here = paths.fetched(path)
    try:
      reader = array_record_module.ArrayRecordReader(here)
      raw = b"".join(reader.read_all())
      reader.close()
      if digest and digest != [_digest(folder, raw)]:
        raise ValueError("its digest is another")
      records = np.frombuffer(raw, kind)
      # By position and not in order: runs of other seeds and batches have written them.
      values[records["position"]] = records["log_probs"]
    except (ValueError, IndexError, RuntimeError) as error:
      print(f"{path} is damaged ({error}): what was in it is computed again", file=sys.stderr)
      path.unlink()


def _digest(folder: paths.Path, raw: bytes) -> str:
  """Of a file's records, and of the store it belongs to."""
  return digests.of_bytes(folder.name.encode() + raw)


def _write(folder: paths.Path, positions: list[int], values: np.ndarray) -> None:
  """Writes a file under another name and renames it: what stands there is complete."""
  records = np.empty(len(positions), _record(values.shape[1:]))
  records["position"], records["log_probs"] = positions, values[positions]
  remote = paths.is_remote(folder)
  temporary = (paths.scratch() if remote else folder) / f"{uuid.uuid4().hex}.tmp"
  with disk_errors(folder):
    try:
      writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:256")
      for record in records:
        writer.write(record.tobytes())
      writer.close()
      digest = _digest(folder, records.tobytes())
      path = folder / f"{min(positions):09d}-{max(positions):09d}.{digest}.array_record"
      if remote:
        path.write_bytes(temporary.read_bytes())
      else:
        os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
