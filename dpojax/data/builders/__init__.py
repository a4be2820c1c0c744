"""Prepared comparisons of a data set: downloaded or local, parsed once, read at random.

A builder is a TFDS `GeneratorBasedBuilder` on ArrayRecord. TensorFlow is never imported.
"""

import contextlib
import hashlib
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence

import requests
import tensorflow_datasets as tfds
from absl import logging

from dpojax.data import knobs as knobs_lib
from dpojax.data import records as records_lib
from dpojax.data.builders import base, hh, imdb, jsonl, shp, stack_exchange, tldr
from dpojax.data.comparisons import Comparisons
from dpojax.data.examples import DataError
from dpojax.data.files import Path, digest, local_files
from dpojax.runtime import mirror, paths
from dpojax.runtime.disk import DiskError
from dpojax.runtime.ownership import owned

BUILDERS = {
  builder.name: builder
  for builder in (hh.HH, imdb.IMDb, jsonl.Jsonl, shp.SHP, stack_exchange.StackExchange, tldr.TLDR)
}
"""Names that `data.source` takes."""

DATA_DIR = "~/.cache/dpojax/prepared"
"""Where prepared data stand unless told otherwise."""


def prepare(
  source: str,
  *,
  path: Path | Sequence[Path] = "",
  config: str = "",
  data_dir: Path = DATA_DIR,
  on_error: str = "skip",
  split: str = "train",
  form: str = "",
  columns: Mapping[str, str] | None = None,
) -> Comparisons:
  """Returns a data set's comparisons, prepared on the first call and read from disk afterwards.

  Local files are known by their contents: a changed file is prepared again, an unchanged one is
  not. Preparing writes to a temporary folder that is renamed at the end, so that what a killed
  process leaves behind is never read.

  Args:
    source: a name in `BUILDERS`.
    path: local files of the data set's published form, instead of downloading: one, several,
      comma-separated, a glob, or hub:ORG/NAME[:SPLIT] for a split of the hub's Parquet files. All their
      records are taken; `config` and `split` choose none.
    config: the builder's config, such as hh's "harmless-base"; empty: its first.
    data_dir: where prepared data are kept.
    on_error: "skip" counts unusable records of local files by reason; "raise" stops at the first.
    split: "train" or "test" of a downloaded data set.
    form: of the records of local files, a name in `records.FORMS`; empty: recognised by their keys.
    columns: of knobs that local files bring, names in `knobs.KNOBS`, the keys that have their values.

  Raises:
    DataError: the source, a file or every record is unusable, a column of a used one has no value that
      makes sense, the network is out of reach, or data_dir cannot be written.
  """
  if source not in BUILDERS:
    raise DataError(f"data.source is {source!r}; it is one of {', '.join(sorted(BUILDERS))}")
  if on_error not in ("skip", "raise"):
    raise DataError(f"data.on_error is {on_error!r}; it is 'skip' or 'raise'")
  if form and (source != jsonl.Jsonl.name or form not in records_lib.FORMS):
    raise DataError(
      f"data.form is {form!r} and data.source {source!r}; with 'jsonl' it is one of "
      f"{', '.join(records_lib.FORMS)}, else empty"
    )
  columns = dict(columns or {})
  if columns and not path:
    raise DataError(
      f"data.columns.{next(iter(columns))} is set but data.path is empty; columns are read of local files: "
      f"fetch those of {source} and name them"
    )
  root = paths.of(data_dir or DATA_DIR)
  builder_class = BUILDERS[source]
  made_otherwise = [form] * bool(form) + knobs_lib.columns_text(columns)
  if path:
    files = local_files(path, split)
    version = [digest(file) for file in files] + made_otherwise
    chosen = base.LocalFiles(
      name=f"files-{_sha256(version)[:16]}",
      files=tuple(files),
      on_error=on_error,
      form=form,
      columns=tuple(sorted(columns.items())),
    )
    split = "train"
  else:
    chosen = _published(builder_class, config)
  with _quiet():
    builder = _build(builder_class, chosen, root)
  found = builder.info.metadata
  if split not in found:
    raise DataError(f"{source} has no split {split!r}; it has {', '.join(sorted(found))}")
  # Prepared before with 'skip', the same data are on disk; what was wrong with them is too.
  if on_error == "raise" and path and found[split]["first_problem"]:
    raise DataError(f"data.path {found[split]['first_problem']}; {base.FIX}")
  with _quiet():
    records = builder.as_data_source(split=split)
  return Comparisons(
    records,
    source=source,
    report=found[split]["report"],
    problems=found[split]["problems"],
    fingerprint=_sha256([source, str(builder.version), split, found[split]["files"]] + made_otherwise),
  )


def _published(builder_class: type, name: str) -> tfds.core.BuilderConfig:
  configs = {config.name: config for config in builder_class.BUILDER_CONFIGS}
  if not configs:
    raise DataError(f"data.source={builder_class.name!r} reads local files; set data.path to .jsonl files")
  name = name or next(iter(configs))
  if name not in configs:
    raise DataError(f"data.config is {name!r}; {builder_class.name} has {', '.join(configs)}")
  return configs[name]


def _build(builder_class: type, config: tfds.core.BuilderConfig, root: paths.Path):
  """Returns the builder with its data on disk, whichever process has put them there."""
  here = mirror.local(root)
  make = lambda: builder_class(config=config, data_dir=here, file_format="array_record")
  # Before TFDS reads what is there.
  folder = root / builder_class.name / config.name / str(builder_class.VERSION)
  is_there = lambda: mirror.is_sound(folder, without=not isinstance(config, base.LocalFiles))
  if is_there():
    return make()
  builder = make()
  try:
    with owned(folder, f"the prepared data {folder}", wait=True):
      if is_there():  # another process has made it while this one waited
        return make()
      if not isinstance(config, base.LocalFiles):
        _check_reachable(builder)
      # Statistics would read every record once more.
      builder.download_and_prepare(
        download_dir=here / "downloads", download_config=tfds.download.DownloadConfig(compute_stats="skip")
      )
      mirror.push(folder)
  except DataError:
    raise
  except (requests.exceptions.RequestException, tfds.download.DownloadError) as error:
    raise _unreachable(builder, error) from error
  except Exception as error:
    if builder.data_path.exists():  # another process was faster
      return make()
    if isinstance(error, (OSError, DiskError)) or "() failed: " in str(error):  # as ArrayRecord says it
      raise DataError(
        f"could not write prepared data to {root} ({error}); free space there, or set "
        "data.cache_dir to a folder with room"
      ) from error
    raise
  return builder


def _check_reachable(builder: base.ComparisonBuilder):
  """Asks for the first file's headers: without a network TFDS would try for minutes."""
  url = next(iter(builder.urls().values()))[0]
  try:
    urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20).close()
  except urllib.error.HTTPError as answer:  # whatever it says, there is a network
    answer.close()
  except OSError as error:
    raise _unreachable(builder, error) from error


def _unreachable(builder: base.ComparisonBuilder, error: Exception) -> DataError:
  urls = [url for of_split in builder.urls().values() for url in of_split]
  return DataError(
    f"{builder.name} cannot be downloaded ({error}); without a network, fetch its files "
    f"elsewhere ({urls[0]}{' and others' if len(urls) > 1 else ''}) and set data.path to them"
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS from printing, and from drawing progress bars where no one watches."""
  level = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(level)


def _sha256(value: object) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()
