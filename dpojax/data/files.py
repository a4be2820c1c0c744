"""File to records: JSON lines, a JSON array, CSV or Parquet, plain or compressed, here or on the hub."""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from dpojax.data import hub
from dpojax.data.examples import DataError, RecordError
from dpojax.runtime import paths
from dpojax.runtime.disk import reached

Path = str | os.PathLike

_PARQUET, _GZIP, _ZSTD = b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COMPRESSED = (".gz", ".zst", ".zstd")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def local_files(path: Path | Sequence[Path], split: str = "train") -> list[str]:
  """Returns the files that `path` names: a file, several, comma-separated, a glob, or hub:NAME.

  `split` is that of the hub's data sets where the name gives none.

  Raises:
    DataError: a file is missing or a folder, a glob matches nothing, or the hub is out of reach.
  """
  if isinstance(path, (str, os.PathLike)):
    path = os.fspath(path)
    # A file whose own name has a comma is one file.
    names = [path] if _exists(path) else [part.strip() for part in path.split(",")]
  else:
    names = [os.fspath(name) for name in path]
  files = []
  for name in filter(None, names):
    files += hub.files(name, split) if name.startswith(hub.PREFIX) else _matches(os.path.expanduser(name))
  if not files:
    raise DataError(f"data.path is {path!r} and names no file; give a .jsonl or .jsonl.gz file")
  for name in files:
    if paths.of(name).is_dir():
      raise DataError(
        f"data.path {name} is a folder; name its files, such as {name}/*.jsonl, or "
        f"{hub.PREFIX}{name} if it is laid out as a data set on the hub"
      )
    if not (paths.is_remote(name) or os.access(name, os.R_OK)):
      raise DataError(f"data.path {name} cannot be read; check its permissions")
  return files


def read_records(path: str) -> Iterator[tuple[str, Any]]:
  """Yields the records of a file.

  What the file is shows its beginning and its name: Parquet, .csv and .tsv with a header, a JSON array
  ("[" first), else JSON lines, which end at "\\n" alone. All but Parquet may be gzip or zstd. Of
  Parquet's nested objects, which have all the same keys, those that are null are left out, but for a
  message's "content".

  Yields:
    "line N", "row N" or "element N", from 1, and the record, or a RecordError for what is not JSON,
    not UTF-8 or no whole row. Blank lines are passed over.

  Raises:
    DataError: the file cannot be read.
  """
  try:
    with _opened(path) as file:
      # By its beginning and not its name: files are renamed, and downloads have odd names.
      start = file.read(4)
      file.seek(0)
      if start == _PARQUET:
        yield from _rows(file)
        return
      with _decompressed(file, start, path) as text:
        yield from _records(text, path)
  except gzip.BadGzipFile as error:
    raise DataError(f"data.path {path} is not gzip ({error}); rename it or compress it") from error
  except (EOFError, zlib.error) as error:
    raise DataError(f"data.path {path} is cut off or damaged ({error}); fetch it again") from error
  except FileNotFoundError as error:
    raise DataError(f"data.path {path} does not exist; check the path") from error
  except OSError as error:
    if error.errno is None and not paths.is_remote(path):  # as pyarrow says that a stream is damaged
      raise DataError(f"data.path {path} is cut off or damaged ({error}); fetch it again") from error
    raise DataError(f"data.path {path} cannot be read ({error}); check the path") from error


def kind(path: str) -> str:
  """Returns what of a file's name decides how it is read: '.csv', '.tsv', '.json' or ''."""
  suffix = os.path.splitext(_without_compression(path))[1].lower()
  return suffix if suffix in (*_SEPARATORS, ".json") else ""


def count_rows(path: str) -> int:
  """Returns the number of rows of a Parquet file."""
  import pyarrow.parquet  # only Parquet files need it, and it is slow to import

  with _opened(path) as file:
    return pyarrow.parquet.read_metadata(file).num_rows


def digest(path: str) -> str:
  """Returns the size and SHA-256 of a file, and its kind where that decides how it is read."""
  with _opened(path) as file:
    sha = hashlib.file_digest(file, "sha256").hexdigest()
    return ":".join(filter(None, (str(file.tell()), sha, kind(path))))


def _matches(name: str) -> list[str]:
  remote = paths.is_remote(name)
  found = lambda: paths.matching(name) if remote else sorted(glob.glob(name, recursive=True))
  matches = [name] if _exists(name) else found()
  if not matches:
    where = "the bucket" if remote else f"from {os.getcwd()}"
    raise DataError(f"data.path {name}: no such file; check the path ({where})")
  return matches


def _exists(name: str) -> bool:
  """Returns whether a name is that of a file or folder; several at once, comma-separated, are none."""
  if not paths.is_remote(name):
    return os.path.exists(name)
  with reached(name):
    return paths.of(name).exists()


def _opened(path: str) -> BinaryIO:
  return io.BufferedReader(paths.of(path).open("rb")) if paths.is_remote(path) else open(path, "rb")


def _without_compression(path: str) -> str:
  stem, suffix = os.path.splitext(path)
  return stem if suffix.lower() in _COMPRESSED else path


def _decompressed(file: BinaryIO, start: bytes, path: str) -> BinaryIO:
  if start == _ZSTD:
    import pyarrow

    return io.BufferedReader(_Readable(pyarrow.CompressedInputStream(file, "zstd")))
  if path.lower().endswith((".zst", ".zstd")):
    raise DataError(f"data.path {path} is not zstd; rename it or compress it")
  if start[:2] == _GZIP or path.lower().endswith(".gz"):
    return gzip.open(file)
  return file


class _Readable(io.RawIOBase):
  """A stream of pyarrow's as Python's: it yields lines."""

  def __init__(self, stream: Any):
    self._stream = stream

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    data = self._stream.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


def _records(file: BinaryIO, path: str) -> Iterator[tuple[str, Any]]:
  start = file.peek(64)[:64]
  if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise DataError(f"data.path {path} is UTF-16; save it as UTF-8")
  if start.startswith(_PARQUET):
    raise DataError(f"data.path {path} is Parquet inside another compression; unpack it")
  if kind(path) in _SEPARATORS:
    return _table(file, path)
  if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
    return _array(file.read(), path)
  return _lines(file)


def _lines(file: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
  for number, line in enumerate(file, 1):
    if line.strip():
      yield f"line {number}", _parsed(line, first=number == 1)


def _parsed(line: bytes, first: bool) -> Any:
  try:
    return json.loads(line.decode("utf-8-sig" if first else "utf-8"), object_pairs_hook=_object)
  except RecordError as error:
    return error
  except UnicodeDecodeError as error:
    return RecordError("broken_utf8", f"not UTF-8 at byte {error.start} of the line")
  except (ValueError, RecursionError) as error:
    return RecordError("broken_json", f"not JSON ({error})")


def _object(pairs: list[tuple[str, Any]]) -> dict:
  """Returns an object of which no key stands twice: all but the last value would be lost."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise RecordError("duplicate_key", f'"{twice}" stands twice in one object; keep one of them')
  return found


def _array(whole: bytes, path: str) -> Iterator[tuple[str, Any]]:
  """Yields the elements of a JSON array; what is none after all is read as lines."""
  found = []

  def object_or_error(pairs):
    try:
      return _object(pairs)
    except RecordError as error:
      found.append(error)
      return error

  try:
    elements = json.loads(whole.decode("utf-8-sig"), object_pairs_hook=object_or_error)
  except (ValueError, RecursionError) as error:
    if kind(path) == ".json" and not str(error).startswith("Extra data"):
      raise DataError(
        f"data.path {path} is no JSON array ({error}); correct it, or write one record a line"
      ) from error
    yield from _lines(io.BytesIO(whole))
    return
  for number, element in enumerate(elements, 1):
    yield f"element {number}", (_error_in(element) if found else None) or element


def _error_in(value: Any) -> RecordError | None:
  if isinstance(value, RecordError):
    return value
  inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
  return next(filter(None, map(_error_in, inside)), None)


def _table(file: BinaryIO, path: str) -> Iterator[tuple[str, Any]]:
  """Yields the rows of a table with a header, by the header's names."""
  # Python's own limit is 128 KiB a field, less than a long conversation.
  csv.field_size_limit(sys.maxsize)
  # Bytes that are no UTF-8 come through as surrogates, so that one row is refused and not the file.
  text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
  rows = csv.reader(text, delimiter=_SEPARATORS[kind(path)], strict=True)
  try:
    names = next(rows, [])
    if len(set(names)) < len(names):
      raise DataError(f"data.path {path} has two columns of one name ({', '.join(names)}); rename one")
    for number, row in enumerate(filter(None, rows), 1):
      yield f"row {number}", _row(names, row)
  except csv.Error as error:
    raise DataError(f"data.path {path} line {rows.line_num} is no CSV ({error}); correct it") from error
  finally:
    text.detach()  # `file` is closed by who opened it


def _row(names: list[str], row: list[str]) -> dict | RecordError:
  try:
    "".join(row).encode()
  except UnicodeEncodeError:  # what was decoded is no text
    return RecordError("broken_utf8", "not UTF-8; save it as UTF-8")
  if len(row) != len(names):
    return RecordError(
      "wrong_columns", f"{len(row)} fields under {len(names)} names; quote those with commas"
    )
  return dict(zip(names, row))


def _rows(file: BinaryIO) -> Iterator[tuple[str, Any]]:
  import pyarrow.parquet

  numbers = itertools.count(1)
  try:
    parquet = pyarrow.parquet.ParquetFile(file)
    # Nanoseconds and zones are no part of a comparison, and Python would refuse the record for them.
    schema = pyarrow.schema([_in_microseconds(field) for field in parquet.schema_arrow])
    # Some rows at a time: a file may be larger than memory.
    for batch in parquet.iter_batches(batch_size=1024):
      for record in _values(pyarrow.Table.from_batches([batch]).cast(schema, safe=False)):
        yield f"row {next(numbers)}", record
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise EOFError(str(error)) from error


def _in_microseconds(field: Any) -> Any:
  """Returns a field of Parquet's whose times are such as Python has: without nanoseconds and zones."""
  import pyarrow
  from pyarrow import types

  kind = field.type
  if types.is_timestamp(kind):
    return field.with_type(pyarrow.timestamp("us"))
  if types.is_time64(kind):
    return field.with_type(pyarrow.time64("us"))
  if types.is_duration(kind):
    return field.with_type(pyarrow.duration("us"))
  if types.is_struct(kind):
    return field.with_type(pyarrow.struct([_in_microseconds(each) for each in kind]))
  if types.is_list(kind):
    return field.with_type(pyarrow.list_(_in_microseconds(kind.value_field)))
  if types.is_large_list(kind):
    return field.with_type(pyarrow.large_list(_in_microseconds(kind.value_field)))
  return field


def _values(table: Any) -> Iterator[dict | RecordError]:
  """Yields the rows of a part of Parquet, one by one where one of them holds what Python cannot."""
  try:
    rows = table.to_pylist()
  except (ValueError, OverflowError) as error:
    if len(table) > 1:
      for i in range(len(table)):
        yield from _values(table.slice(i, 1))
    else:
      yield RecordError("unreadable_value", f"a value cannot be read ({error}); drop the row or its column")
    return
  for row in rows:
    yield {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
  if isinstance(value, list):
    return [_without_nulls(each) for each in value]
  if isinstance(value, dict):
    return {key: _without_nulls(each) for key, each in value.items() if each is not None or key == "content"}
  return value
