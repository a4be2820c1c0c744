"""What the builders share: reading records, counting what cannot be used, writing ArrayRecord."""

import abc
import collections
import dataclasses
import gzip
import hashlib
import json
import zlib
from typing import Any, BinaryIO, Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from dpojax import digests
from dpojax.data.examples import DataError, Example, LeftOut, RecordError

_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"


@dataclasses.dataclass
class LocalFiles(tfds.core.BuilderConfig):
  """Comparisons from files at hand. `on_error` is 'skip' or 'raise'."""

  files: tuple[str, ...] = ()
  on_error: str = "skip"


class ComparisonBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Prepares comparisons as ArrayRecord, in the order of the source.

  A data set defines `urls` and `parse`. The counts of used and unusable records, the first unusable
  one and the digests of the source files stand in the prepared data's metadata, by split.
  """

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # TFDS would look for description and checksum files beside the code

  def urls(self) -> dict[str, list[str]]:
    """Returns the public files of each split of the chosen config; none unless a data set says so."""
    return {}

  def download(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[str]]:
    """Returns the downloaded files of each split."""
    return dl_manager.download(self.urls())

  @abc.abstractmethod
  def parse(self, record: Any) -> Iterable[Example | RecordError]:
    """Returns the comparisons of a record, or raises or returns what is wrong with it."""

  def records(self, split: str, paths: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields where a record of the split stands, and the record or what is wrong with it."""
    for path in paths:
      for number, record in read_records(path):
        yield f"{path} {number}", record

  def encode(self, example: Example) -> dict:
    """Returns the example as its features are: a conversation's prompt is JSON text."""
    conversational = not isinstance(example.prompt, str)
    prompt = json.dumps(example.prompt) if conversational else example.prompt
    return {"prompt": prompt, "responses": list(example.responses),
            "conversational": conversational}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        features=tfds.features.FeaturesDict({
            "prompt": tfds.features.Text(),
            "responses": tfds.features.Sequence(tfds.features.Text()),
            "conversational": np.bool_,
        }),
        metadata=tfds.core.MetadataDict(),
        disable_shuffling=True)

  def _download_and_prepare(self, dl_manager: tfds.download.DownloadManager, *args, **kwargs) -> None:
    """Adds digests of all files, before TFDS renames the folder to its place."""
    super()._download_and_prepare(dl_manager, *args, **kwargs)
    self.info.download_size = dl_manager.downloaded_size  # what TFDS writes after this, as it will be
    self.info.write_to_directory(self.data_dir)
    digests.write(self.data_dir)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
    local = isinstance(self.builder_config, LocalFiles)
    paths = {"train": self.builder_config.files} if local else self.download(dl_manager)
    return {split: self._generate_examples(split, [str(path) for path in of_split])
            for split, of_split in paths.items()}

  def _generate_examples(self, split: str, paths: list[str]) -> Iterator[tuple[int, dict]]:
    config = self.builder_config
    stop_at_first = isinstance(config, LocalFiles) and config.on_error == "raise"
    report, first_problem = collections.Counter(used=0), ""
    for where, record in self.records(split, paths):
      for result in self._results(record):
        if isinstance(result, Example):
          yield report["used"], self.encode(result)
          report["used"] += 1
          continue
        report[result.reason] += 1
        if not isinstance(result, LeftOut):
          first_problem = first_problem or f"{where}: {result}"
          if stop_at_first:
            raise DataError(f"data.path {first_problem}; {FIX}")
    if not report["used"]:
      counts = ", ".join(f"{reason} {count}" for reason, count in sorted(report.items()))
      first = f"; first: {first_problem}" if first_problem else ""
      raise DataError(
          f"no usable record in {', '.join(paths)} ({counts}{first}); check data.source and the files")
    self.info.metadata[split] = {
        "report": dict(report), "first_problem": first_problem, "files": [digest(p) for p in paths]}

  def _results(self, record: Any) -> Iterator[Example | RecordError]:
    if isinstance(record, RecordError):
      yield record
      return
    try:
      yield from self.parse(record)
    except RecordError as error:
      yield error


FIX = "drop the record or set data.on_error='skip'"


def read_records(path: str) -> Iterator[tuple[str, Any]]:
  """Yields the records of a file of JSON lines (plain or gzip) or a Parquet file.

  Yields:
    "line N" or "row N", from 1, and the record, or a RecordError for a line that is not JSON or
    not UTF-8. Blank lines are passed over.

  Raises:
    DataError: the file cannot be read.
  """
  try:
    with open(path, "rb") as file:
      start = file.read(4)
      file.seek(0)
      if start == _PARQUET:
        yield from _rows(file)
      elif start[:2] == _GZIP or path.endswith(".gz"):
        with gzip.open(file) as lines:
          yield from _lines(lines)
      else:
        yield from _lines(file)
  except gzip.BadGzipFile as error:
    raise DataError(f"data.path {path} is not gzip ({error}); rename it or compress it") from error
  except (EOFError, zlib.error) as error:
    raise DataError(f"data.path {path} is cut off or damaged ({error}); fetch it again") from error


def count_rows(path: str) -> int:
  """Returns the number of rows of a Parquet file."""
  import pyarrow.parquet  # only Parquet files need it, and it is slow to import

  return pyarrow.parquet.read_metadata(path).num_rows


def digest(path: str) -> str:
  """Returns the size and SHA-256 of a file."""
  with open(path, "rb") as file:
    sha = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{file.tell()}:{sha}"


def _lines(file: BinaryIO) -> Iterator[tuple[str, Any]]:
  for number, line in enumerate(file, 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
      record = RecordError("broken_utf8", f"not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
      record = RecordError("broken_json", f"not JSON ({error})")
    yield f"line {number}", record


def _rows(file: BinaryIO) -> Iterator[tuple[str, Any]]:
  import pyarrow.parquet

  number = 0
  try:
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
      for record in batch.to_pylist():
        number += 1
        yield f"row {number}", record
  except pyarrow.ArrowException as error:
    raise EOFError(str(error)) from error
