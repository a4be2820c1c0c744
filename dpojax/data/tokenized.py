"""A data set in ids, in memory or mapped from a folder, and how such a folder is written.

Ten million comparisons are more than a host has memory for: their ids go to the disk as they are made, and
what is kept of each is a few numbers (lengths, an offset, its place and its prompt's digest).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dpojax.data.examples import DataError
from dpojax.runtime import digests

_ARRAYS = ("lengths", "ids", "offsets", "example")
_HEADER = 128
"""Bytes of a .npy header of one axis, whatever its length: NumPy leaves room for growing in place."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenized:
  """Comparisons in ids. With a cache directory the arrays are memory-mapped from it.

  Attributes:
    lengths: [N, 1 + K] int32, tokens of the prompt and of each response; 0 is an absent response.
    ids: int32, every comparison's prompt and responses one after another.
    offsets: [N + 1] int64, where in `ids` a comparison starts.
    example: [N] int32, index into the comparisons that were tokenized, ascending.
    report: counts of what was cut and dropped, the ids that end whole responses, length percentiles,
      and what the ids were made from.
    fingerprint: SHA-256 of the arrays.
    mask: bool, of `ids` which are scored; None where all of every response are.
    kept_prompts: [N] uint64 of `prompts`, where they were kept with the ids.
    knobs: by name [N] float32 knobs of losses that the records brought.
  """

  lengths: np.ndarray
  ids: np.ndarray
  offsets: np.ndarray
  example: np.ndarray
  report: dict
  fingerprint: str
  mask: np.ndarray | None = None
  kept_prompts: np.ndarray | None = None
  knobs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, i: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the prompt's ids and those of each of the K responses, none for an absent one."""
    prompt, *responses = self._parts(self.ids, i)
    return prompt, responses

  def scored(self, i: int) -> list[np.ndarray] | None:
    """Returns which ids of each of the K responses are scored, or None where all are."""
    return None if self.mask is None else self._parts(self.mask, i)[1:]

  def prompts(self) -> np.ndarray:
    """Returns [N] uint64, the first 8 bytes of each prompt's SHA-256, in the order of those bytes."""
    if self.kept_prompts is not None:
      return self.kept_prompts
    return prompt_digests(self[i][0] for i in range(len(self)))

  def _parts(self, values: np.ndarray, i: int) -> list[np.ndarray]:
    if not -len(self) <= i < len(self):
      raise IndexError(f"comparison {i} of {len(self)}")
    i %= len(self)
    values = np.asarray(values[self.offsets[i] : self.offsets[i + 1]])
    return np.split(values, np.cumsum(self.lengths[i])[:-1])


def prompt_digests(prompts: Iterable[np.ndarray]) -> np.ndarray:
  """Returns the first 8 bytes of the SHA-256 of each prompt's int32 ids, uint64 in the order of the bytes."""
  first = b"".join(hashlib.sha256(np.asarray(ids, np.int32).tobytes()).digest()[:8] for ids in prompts)
  return np.frombuffer(first, ">u8").astype(np.uint64)


class Growing:
  """A flat array that is appended to: in memory, or in a .npy file from the start."""

  def __init__(self, dtype: type, path: str | os.PathLike | None = None):
    self._dtype, self._path, self._pieces, self._size = np.dtype(dtype), path, [], 0
    self._file = None
    if path is not None:
      self._file = open(path, "wb")
      self._file.write(bytes(_HEADER))  # the length is not known yet

  def append(self, values: np.ndarray) -> None:
    """Adds values behind those that are there."""
    self._size += len(values)
    if self._file is None:
      self._pieces.append(values)
    else:
      self._file.write(np.ascontiguousarray(values, self._dtype).data)

  def finish(self) -> np.ndarray:
    """Returns the whole array, mapped where it is a file."""
    if self._file is None:
      return np.concatenate([np.zeros(0, self._dtype), *self._pieces])
    about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._size,)}
    self._file.seek(0)
    # Over the room that was left for it: the length is known only now.
    np.lib.format.write_array_header_1_0(self._file, about)
    if self._file.tell() != _HEADER:
      raise AssertionError(f"NumPy's header takes {self._file.tell()} bytes")
    self.close()
    return np.load(self._path, mmap_mode="r")

  def close(self) -> None:
    """Lets go of the file."""
    if self._file is not None:
      self._file.close()


def arrays(
  lengths: np.ndarray,
  ids: np.ndarray,
  scored: np.ndarray,
  example: np.ndarray,
  report: dict,
  *,
  scored_count: int | None = None,
  prompts: np.ndarray | None = None,
  knobs: dict[str, np.ndarray] | None = None,
) -> Tokenized:
  """Returns a data set of its arrays.

  Args:
    lengths, ids, example, report: see `Tokenized`.
    scored: bool, of `ids` which are scored.
    scored_count: how many are, if that is known.
    prompts: see `Tokenized.kept_prompts`.
    knobs: see `Tokenized`.
  """
  offsets = np.concatenate([np.zeros(1, np.int64), lengths.sum(axis=1, dtype=np.int64).cumsum()])
  # Where all is scored no mask is kept: a byte a token, for nothing.
  count = int(scored.sum()) if scored_count is None else scored_count
  mask = None if count == lengths[:, 1:].sum(dtype=np.int64) else scored
  knobs = knobs or {}
  names = sorted(knobs)
  fingerprint = _fingerprint(lengths, ids, example, mask, *(knobs[name] for name in names), names=names)
  return Tokenized(lengths, ids, offsets, example, report, fingerprint, mask, prompts, knobs)


def of_ids(
  comparisons: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]] | tuple],
  num_responses: int,
  report: dict,
) -> Tokenized:
  """Returns comparisons whose ids are at hand.

  Args:
    comparisons: of each the prompt's ids and those of its responses, at most `num_responses`; which ids of
      each response are scored may come third, None where all are.
    num_responses: `K`.
    report: see `Tokenized`.
  """
  lengths = np.zeros((len(comparisons), 1 + num_responses), np.int32)
  ids, scored = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
  for row, (prompt, responses, *which) in zip(lengths, comparisons):
    row[: 1 + len(responses)] = [len(prompt), *map(len, responses)]
    ids += [np.asarray(each, np.int32) for each in (prompt, *responses)]
    every = [np.ones(len(each), bool) for each in responses]
    scored += [np.zeros(len(prompt), bool), *(which[0] if which and which[0] is not None else every)]
  example = np.arange(len(comparisons), dtype=np.int32)
  return arrays(lengths, np.concatenate(ids), np.concatenate(scored), example, report)


def _fingerprint(*arrays: np.ndarray | None, names: Sequence[str] = ()) -> str:
  digest = hashlib.sha256(" ".join(names).encode())
  for array in arrays:
    if array is not None:
      digest.update(f"{array.dtype.str}{array.shape}".encode())
      for start in range(0, max(len(array), 1), 2**22):  # of a file that is mapped: not all of it at once
        digest.update(np.ascontiguousarray(array[start : start + 2**22]).data)
  return digest.hexdigest()


def load(folder: pathlib.Path) -> Tokenized:
  """Returns what `write` has left in a folder, mapped."""
  read = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
  perhaps = lambda name: read(name) if (folder / f"{name}.npy").exists() else None
  about = json.loads((folder / "report.json").read_text())
  return Tokenized(
    *map(read, _ARRAYS),
    about["report"],
    about["fingerprint"],
    perhaps("mask"),
    perhaps("prompts"),
    {name: read(f"knob-{name}") for name in about.get("knobs", ())},
  )


@contextlib.contextmanager
def unfinished(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder beside the one that is to be; it is gone in the end unless `write` gave it its name.

  What a process that was killed left of the same entry is removed: for the owner of the entry to call.

  Raises:
    DataError: the disk is full or cannot be written.
  """
  path, prefix = None, f"unfinished-{folder.name[:16]}-"
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{prefix}*"):
      print(f"removed {left}, which a process that was stopped left half written", file=sys.stderr)
      shutil.rmtree(left, ignore_errors=True)
    path = tempfile.mkdtemp(dir=folder.parent, prefix=prefix)
    yield pathlib.Path(path)
  except OSError as error:
    if not folder.exists():  # else another process was faster
      raise DataError(
        f"could not write tokenized data to {folder.parent} ({error}); free space there, or set "
        "data.cache_dir to a folder with room"
      ) from error
  finally:
    if path:
      shutil.rmtree(path, ignore_errors=True)


def write(tokenized: Tokenized, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes what is not in an unfinished folder yet, and renames it: a folder in the cache is complete."""
  named = {name: getattr(tokenized, name) for name in _ARRAYS}
  named |= {f"knob-{name}": values for name, values in tokenized.knobs.items()}
  for name, array in {**named, "mask": tokenized.mask, "prompts": tokenized.kept_prompts}.items():
    file = path / f"{name}.npy"
    if array is None:
      file.unlink(missing_ok=True)
    elif not file.exists():
      np.save(file, array)
  about = {"report": tokenized.report, "fingerprint": tokenized.fingerprint, "knobs": sorted(tokenized.knobs)}
  (path / "report.json").write_text(json.dumps(about))
  digests.write(path)
  # The last thing: under this name a folder is whole, with its digests in it.
  os.rename(path, folder)
