"""What is read of a folder that anybody may have written: JSON and safetensors, believed after a check.

The safetensors package says whether a header is one: that dtypes, shapes and offsets agree, and that
the tensors fill the file without a hole. Its reader copies what it reads; here files are mapped, so that
a tensor can be read in parts and transposed. Those of a bucket are read by ranges.
"""

import json
import math
import mmap
import os
import tempfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from dpojax.models.families import DTYPES, HuggingFaceError, shown
from dpojax.models.ranges import Ranges
from dpojax.runtime import paths
from dpojax.runtime.disk import reached

LARGEST_JSON = 2**24
"""Bytes of a JSON file; the index of a model of 405 billion parameters has 2**17."""

LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, as the package has it."""


class Entry(NamedTuple):
  """Where a tensor lies in its file; `dtype` is a NumPy name where there is one, else the file's."""

  dtype: str
  shape: tuple[int, ...]
  start: int
  file: paths.Path
  mapped: mmap.mmap
  ranges: Ranges | None = None

  def array(self, name: str) -> np.ndarray:
    """Returns the tensor, of which only what is looked at is read; of a bucket what was fetched before.

    Raises:
      HuggingFaceError: its dtype is not supported.
    """
    if self.dtype not in DTYPES:
      raise HuggingFaceError(
        f"{self.file}: tensor {name} is of dtype {self.dtype}, which is not supported; supported are "
        f"{', '.join(DTYPES)}"
      )
    count = math.prod(self.shape)
    return np.frombuffer(self.mapped, jnp.dtype(self.dtype), count, self.start).reshape(self.shape)

  def fetch(self, view: np.ndarray) -> np.ndarray:
    """Returns a view of the tensor, with what it needs of a bucket's file in memory.

    Raises:
      DiskError: the store does not answer.
    """
    if self.ranges is not None:
      with reached(self.file):
        self.ranges.fetch(view)
    return view

  def forget(self) -> None:
    """Lets the system take back the memory of the tensor; what was fetched of a bucket stays a while."""
    if self.ranges is not None:
      return
    # madvise takes whole pages. A neighbour's that goes along is read from the file again if it is wanted.
    first = self.start - self.start % mmap.PAGESIZE
    size = math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
    self.mapped.madvise(mmap.MADV_DONTNEED, first, self.start - first + size)


def open_tensors(path: paths.Path) -> dict[str, Entry]:
  """Returns the tensors of a safetensors file by name.

  Raises:
    HuggingFaceError: the file is missing, or is no such file, whole and sound.
  """
  size, header, ranges = 0, b"", None
  try:
    if paths.is_remote(path):
      with reached(path):
        size, length, header = _head(path)
      ranges = _checked(path, size, length, header)
      mapped = ranges.memory
    else:
      with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        # The length is the file's own word, and not believed beyond what a header can have.
        header = file.read(length) if length <= min(LARGEST_HEADER, size - 8) else b""
        with safetensors.safe_open(path, framework="numpy"):
          mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    entries = json.loads(header, object_pairs_hook=_once)
  except FileNotFoundError as error:
    raise HuggingFaceError(
      f"{path} does not exist; weights are read from safetensors: load a model of another "
      "format with transformers and save it again"
    ) from error
  except safetensors.SafetensorError as error:
    why = _what_is_wrong(header, size) or f"{error}; it has {size} bytes"
    raise HuggingFaceError(f"{path} is damaged ({why}); fetch it again") from error
  except (OSError, ValueError) as error:
    raise HuggingFaceError(f"{path} cannot be read ({error}); fetch it again") from error
  entries.pop("__metadata__", None)
  dtypes = {stored: name for name, stored in DTYPES.items()}
  return {
    name: Entry(
      dtypes.get(entry["dtype"], entry["dtype"]),
      tuple(entry["shape"]),
      8 + len(header) + entry["data_offsets"][0],
      path,
      mapped,
      ranges,
    )
    for name, entry in entries.items()
  }


def _head(path: paths.Path) -> tuple[int, int, bytes]:
  """Returns the size of a bucket's file, that of its header, and the header where it can be one."""
  size = paths.size(path)
  length = int.from_bytes(paths.read_ranges(path, [(0, min(8, size))])[0], "little") if size else 0
  if size < 8 or length > min(LARGEST_HEADER, size - 8):
    return size, length, b""
  return size, length, paths.read_ranges(path, [(8, 8 + length)])[0]


def _checked(path: paths.Path, size: int, length: int, header: bytes) -> Ranges:
  """Lets the package check a bucket's file: a file of its header and size, with a hole for the tensors."""
  with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    file.write(length.to_bytes(8, "little") + header)
    # The package checks files, not headers: one of the right size, in which the tensors take no room.
    file.truncate(size)
    file.flush()
    with safetensors.safe_open(file.name, framework="numpy"):
      return Ranges(path, size)


def read_json(path: paths.Path) -> dict[str, Any]:
  """Returns what a JSON file holds, an object.

  Raises:
    HuggingFaceError: the file is missing, or is no such file, or is larger than any is.
  """
  try:
    with reached(path):
      if paths.size(path) > LARGEST_JSON:
        raise HuggingFaceError(f"{path} is larger than {LARGEST_JSON} bytes, as none is; fetch it again")
      values = json.loads(path.read_bytes())
  except FileNotFoundError as error:
    raise HuggingFaceError(f"{path} does not exist; give a Hugging Face model folder") from error
  except (OSError, ValueError, RecursionError) as error:
    raise HuggingFaceError(f"{path} is not JSON ({shown(error)})") from error
  if not isinstance(values, dict):
    raise HuggingFaceError(f"{path} holds {shown(values)}, not an object; fetch it again")
  return values


def shards(index: paths.Path) -> dict[str, list[str]]:
  """Returns the files that an index names, and the tensors it says are in each.

  Raises:
    HuggingFaceError: it is no index, or names what is no file of its own folder.
  """
  files = {}
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise HuggingFaceError(
      f'{index} has "weight_map": {shown(weight_map)}; it must give the file of each tensor'
    )
  for tensor, name in weight_map.items():
    # The name is what counts: in the hub's cache the file is a link that leads out of the folder.
    if (
      not isinstance(name, str)
      or name != os.path.basename(name)
      or not name.endswith(".safetensors")
      or "\\" in name
      or "\0" in name
    ):
      raise HuggingFaceError(
        f"{index} says that tensor {shown(tensor)} is in {shown(name)}, which is no safetensors file "
        "of that folder"
      )
    files.setdefault(name, []).append(tensor)
  return files


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"{shown(twice)} stands there twice")
  return values


def _what_is_wrong(header: bytes, size: int) -> str:
  """Says which tensor of a header that was refused is wrong, and its values, where one is."""
  if not header or len(header) > LARGEST_JSON:
    return ""
  try:
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    spans = []
    for name, entry in entries.items():
      told = f"tensor {shown(name)} of {shown(entry['dtype'])} and shape {shown(entry['shape'])}"
      start, stop = entry["data_offsets"]
      spans.append((start, stop, f"{told}, at {start} to {stop}"))
      if _bytes_of(entry) not in (stop - start, None) or not 0 <= start <= stop:
        return f"{spans[-1][-1]}"
    end = 0
    for start, stop, told in sorted(spans):
      if start != end:
        return f"{told}, does not begin where the one before ends, at {end}"
      end = stop
  except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
    return ""
  there = size - 8 - len(header)
  return f"{end} bytes of tensors were written and {there} are there" if end != there else ""


def _bytes_of(entry: dict) -> int | None:
  name = {stored: name for name, stored in DTYPES.items()}.get(entry["dtype"])
  return name and math.prod(entry["shape"]) * jnp.dtype(name).itemsize
