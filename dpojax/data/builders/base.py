"""What the builders share: reading records, counting what cannot be used, writing ArrayRecord."""

import abc
import collections
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from dpojax.data import knobs as knobs_lib
from dpojax.data.comparisons import encode
from dpojax.data.examples import DataError, Example, LeftOut, RecordError
from dpojax.data.files import digest, read_records
from dpojax.data.records import Reading
from dpojax.runtime import digests


@dataclasses.dataclass
class LocalFiles(tfds.core.BuilderConfig):
  """Comparisons from files at hand. `on_error` is 'skip' or 'raise', `form` a form of records or ''.

  `columns` are (knob of a loss, key of the records that has its value).
  """

  files: tuple[str, ...] = ()
  on_error: str = "skip"
  form: str = ""
  columns: tuple[tuple[str, str], ...] = ()


SHARD = 2**17
"""Comparisons in a file of prepared ones: each read takes ArrayRecord time and memory that grow with it."""


class ComparisonBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Prepares comparisons as ArrayRecord, in the order of the source.

  A data set defines `urls` and `parse`. The counts of used and unusable records, the first unusable
  one of each reason, what was changed and ignored, and the digests of the source files stand in the
  prepared data's metadata, by split.
  """

  VERSION = tfds.core.Version("2.0.0")
  code_path = None  # TFDS would look for description and checksum files beside the code

  def urls(self) -> dict[str, list[str]]:
    """Returns the public files of each split of the chosen config; none unless a data set says so."""
    return {}

  def download(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[str]]:
    """Returns the downloaded files of each split."""
    return dl_manager.download(self.urls())

  @abc.abstractmethod
  def parse(self, record: Any) -> Iterable[Example | Reading | RecordError]:
    """Returns the comparisons of a record, or raises or returns what is wrong with it."""

  def _columns(self) -> dict[str, str]:
    return dict(getattr(self.builder_config, "columns", ()))

  def records(self, split: str, paths: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields where a record of the split stands, and the record or what is wrong with it."""
    for path in paths:
      for number, record in read_records(path):
        yield f"{path} {number}", record

  def _info(self) -> tfds.core.DatasetInfo:
    # Conversations are kept as JSON text: their keys differ from record to record, which no feature's may.
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          "prompt": tfds.features.Text(),
          "responses": tfds.features.Sequence(tfds.features.Text()),
          "conversational": np.bool_,
          "tools": tfds.features.Text(),
          "arguments": tfds.features.Text(),
        }
        | ({"knobs": tfds.features.Text()} if self._columns() else {})  # else data prepared before hold
      ),
      metadata=tfds.core.MetadataDict(),
      # By their place in the source records are named, in errors and reports.
      disable_shuffling=True,
    )

  def _download_and_prepare(self, dl_manager: tfds.download.DownloadManager, *args, **kwargs) -> None:
    """Adds digests of all files, before TFDS renames the folder to its place."""
    super()._download_and_prepare(dl_manager, *args, **kwargs)
    self.info.download_size = dl_manager.downloaded_size  # what TFDS writes after this, as it will be
    self.info.write_to_directory(self.data_dir)
    digests.write(self.data_dir)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
    local = isinstance(self.builder_config, LocalFiles)
    paths = {"train": self.builder_config.files} if local else self.download(dl_manager)
    return {
      split: self._generate_examples(split, [str(path) for path in of_split])
      for split, of_split in paths.items()
    }

  def _generate_splits(self, dl_manager: tfds.download.DownloadManager, *args) -> list[tfds.core.SplitInfo]:
    """Writes each split as its examples come.

    TFDS's own writer puts them aside first, and then reads all of a split into memory to sort it, in the
    order that it had.
    """
    return [self._write(*each) for each in self._split_generators(dl_manager).items()]

  def _write(self, split: str, examples: Iterable[tuple[int, dict]]) -> tfds.core.SplitInfo:
    features, template = self.info.features, self._get_filename_template(split_name=split)
    serialize = example_serializer.ExampleSerializer(features.get_serialized_info()).serialize_example
    bar = tqdm.tqdm(examples, desc=f"preparing {split}", unit="comparisons", disable=not sys.stderr.isatty())
    unfinished, lengths, size = [], [], 0
    with contextlib.ExitStack() as stack:
      for _, example in bar:
        if not lengths or lengths[-1] == SHARD:
          stack.close()
          unfinished.append(os.path.join(template.data_dir, f"unfinished-{split}-{len(lengths)}"))
          writer = array_record_module.ArrayRecordWriter(unfinished[-1], "group_size:1")
          stack.callback(writer.close)
          lengths.append(0)
        data = serialize(features.encode_example(example))
        writer.write(data)
        lengths[-1] += 1
        size += len(data)
    # The name of a file says of how many it is one, which is known only now.
    for i, path in enumerate(unfinished):
      os.rename(path, template.sharded_filepath(shard_index=i, num_shards=len(unfinished)))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)

  def _generate_examples(self, split: str, paths: list[str]) -> Iterator[tuple[int, dict]]:
    config = self.builder_config
    stop_at_first = isinstance(config, LocalFiles) and config.on_error == "raise"
    columns = self._columns()
    report, problems = Report(ignoring=columns.values()), {}
    for where, record in self.records(split, paths):
      for result in self._results(record):
        if not isinstance(result, RecordError):
          example = report.add(result)
          if columns:
            example = example._replace(knobs=_knobs(where, record, columns))
          yield report.counts["used"], encode(example)
          report.counts["used"] += 1
          continue
        report.counts[result.reason] += 1
        if not isinstance(result, LeftOut):
          problems.setdefault(result.reason, f"{where}: {result}")
          if stop_at_first:
            raise DataError(f"data.path {problems[result.reason]}; {FIX}")
    first_problem = next(iter(problems.values()), "")
    if not report.counts["used"]:
      counts = ", ".join(f"{reason} {count}" for reason, count in sorted(report.counts.items()))
      first = f"; first: {first_problem}" if first_problem else ""
      raise DataError(
        f"no usable record in {', '.join(paths)} ({counts}{first}); check data.source, data.form and the "
        "files"
      )
    self.info.metadata[split] = {
      "report": report.as_dict(),
      "first_problem": first_problem,
      "problems": problems,
      "files": [digest(path) for path in paths],
    }

  def _results(self, record: Any) -> Iterator[Example | Reading | RecordError]:
    if isinstance(record, RecordError):
      yield record
      return
    try:
      yield from self.parse(record)
    except RecordError as error:
      yield error


def _knobs(where: str, record: Any, columns: dict[str, str]) -> dict[str, float]:
  """Returns the knobs of a record that is used; without them it would count as another pair than it is."""
  try:
    return knobs_lib.read(record, columns)
  except DataError as error:
    raise DataError(f"data.path {where}: {error}; correct the record or drop it") from error


class Report:
  """What became of records: how many were used, or why not, and what was changed and ignored in them.

  Keys of `ignoring` were read by others.
  """

  def __init__(self, ignoring: Iterable[str] = ()):
    self.counts = collections.Counter(used=0)
    self._read_by_others = frozenset(ignoring)
    self._parts = collections.defaultdict(collections.Counter)

  def add(self, result: Example | Reading) -> Example:
    """Counts how an example was read, where that is known, and returns it."""
    if isinstance(result, Example):
      return result
    self._parts["forms"][result.form] += 1
    self._parts["ignored_keys"].update(set(result.ignored) - self._read_by_others)
    for kind, what in result.notes:
      self._parts[kind][what] += 1
    return result.example

  def as_dict(self) -> dict[str, Any]:
    """Returns counts by reason, and by kind the counts of records in which something was so."""
    parts = {kind: dict(counts) for kind, counts in self._parts.items() if counts}
    return dict(self.counts) | parts


FIX = "drop the record or set data.on_error='skip'"
