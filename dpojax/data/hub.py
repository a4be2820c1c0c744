"""Data sets of the Hugging Face hub as Parquet files: which of a repository's files are a split's.

A data set's card may name the files of each split; otherwise their names do, as in
data/train-00000-of-00002.parquet, train.parquet or train/0000.parquet. What has no Parquet files is
read as the hub converts it, from the branch refs/convert/parquet. See the hub's documentation,
"File names and splits" and "Manual Configuration".
"""

import contextlib
import fnmatch
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dpojax.data.examples import DataError
from dpojax.runtime import paths

PREFIX = "hub:"
CONVERTED = "refs/convert/parquet"
UNSPLIT = "train"
"""The split of a data set that has none."""


class Repository(NamedTuple):
  """A data set's file names, and what gives the local path of one."""

  names: list[str]
  fetch: Callable[[str], str]


def files(name: str, default: str) -> list[str]:
  """Returns the local paths of the Parquet files of hub:ORG/NAME, hub:ORG/NAME:SPLIT or a folder.

  SPLIT is `default` unless given, or CONFIG/SPLIT where a data set has several configs.

  Raises:
    DataError: there is no such data set or split, several fit, or the hub is out of reach.
  """
  scheme, where = re.fullmatch(r"(gs://|s3://)?(.*)", name.removeprefix(PREFIX), re.DOTALL).groups(default="")
  where, _, split = where.partition(":")
  folder = paths.of(scheme + where)
  if folder.is_dir():
    repositories = [Repository(sorted(paths.files_under(folder)), lambda each: os.fspath(folder / each))]
  else:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
      raise DataError(
        f"data.path is {name!r}, neither a folder nor a name on the hub; give hub:ORG/NAME or "
        "hub:ORG/NAME:SPLIT"
      )
    repositories = _of_hub(name, where)
  for repository in repositories:
    splits = _splits(repository)
    if splits:
      return [repository.fetch(each) for each in _chosen(name, splits, split or default)]
  raise DataError(f"data.path {name} has no Parquet files; download its files and name them in data.path")


def _of_hub(name: str, repository: str) -> Iterator[Repository]:
  """Yields the data set as it is and as it was converted, or what of it was fetched before."""
  import huggingface_hub

  for revision in ("main", CONVERTED):
    given = dict(repo_id=repository, repo_type="dataset", revision=revision)
    try:
      names = sorted(huggingface_hub.HfApi().list_repo_files(**given))
    except Exception as error:  # huggingface_hub and what carries it raise many kinds
      # Without a network what was fetched before still serves.
      with contextlib.suppress(Exception):
        folder = pathlib.Path(huggingface_hub.snapshot_download(**given, local_files_only=True))
        yield Repository(sorted(paths.files_under(folder)), lambda each: str(folder / each))
        continue
      if revision == CONVERTED:
        return
      raise _unreachable(name, error) from error

    def fetch(each):
      try:
        return huggingface_hub.hf_hub_download(filename=each, **given)
      except Exception as error:
        raise _unreachable(name, error) from error

    yield Repository(names, fetch)


def _unreachable(name: str, error: Exception) -> DataError:
  reason = str(error).strip().partition("\n")[0]
  return DataError(
    f"data.path {name} cannot be fetched from the hub ({reason}); check the name, log in with "
    "`hf auth login` if it is not public, or without a network fetch it elsewhere and name its "
    f"folder: {PREFIX}FOLDER"
  )


def _splits(repository: Repository) -> dict[str, list[str]]:
  """Returns the Parquet files of each CONFIG/SPLIT, as the card says or else by their names."""
  parquet = [each for each in repository.names if each.endswith(".parquet")]
  found = _of_card(repository, parquet)
  if not found:
    for each in parquet:
      found.setdefault(_split_of(each), []).append(each)
  return found


def _of_card(repository: Repository, parquet: list[str]) -> dict[str, list[str]]:
  if "README.md" not in repository.names or not parquet:
    return {}
  import huggingface_hub

  try:
    about = huggingface_hub.metadata_load(paths.fetched(repository.fetch("README.md"))) or {}
    found = {}
    for config in about.get("configs") or []:
      of_config = config.get("data_files") or []
      of_config = [{"split": UNSPLIT, "path": of_config}] if isinstance(of_config, str) else of_config
      for entry in of_config:
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        names = [each for each in parquet if any(fnmatch.fnmatch(each, path) for path in patterns)]
        if names:
          found.setdefault(f"{config['config_name']}/{entry['split']}", []).extend(names)
    return found
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(
      f"the card {repository.fetch('README.md')} cannot be read ({error}); correct its `configs`, or "
      "name the Parquet files themselves in data.path"
    ) from error


def _split_of(name: str) -> str:
  """Returns CONFIG/SPLIT of data/SPLIT-00000-of-00001.parquet, CONFIG/SPLIT/0000.parquet and the like."""
  *folders, stem = name.removesuffix(".parquet").split("/")
  if sharded := re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", stem):
    split = sharded[1]
  elif stem.isdecimal() and folders:
    *folders, split = folders
  elif keyword := _KEYWORD.search(stem):
    split = stem if re.fullmatch(r"\w+", stem) else keyword[1]
  elif folders and _KEYWORD.fullmatch(folders[-1]):
    *folders, split = folders
  else:
    split = UNSPLIT  # a data set that is not split
  return "/".join([each for each in folders if each != "data"] or ["default"]) + f"/{split}"


_KEYWORD = re.compile(r"(?<![A-Za-z])(train|test|validation|valid|dev|eval)(?![A-Za-z])")


def _check_whole(name: str, of_split: list[str]):
  """Refuses a split of which only some of the files are there, as their names tell."""
  for each in of_split:
    if shard := re.search(r"-\d{5}(-of-(\d{5}))", each):
      there, whole = sum(shard[1] in other for other in of_split), int(shard[2])
      if there < whole:
        raise DataError(
          f"data.path {name} has {there} of the {whole} files that {each} is one of; fetch the others"
        )


def _chosen(name: str, splits: dict[str, list[str]], wanted: str) -> list[str]:
  fitting = [each for each in splits if wanted in (each, each.rpartition("/")[2])]
  # Several would be a choice that nobody has made.
  if len(fitting) == 1:
    _check_whole(name, splits[fitting[0]])
    return splits[fitting[0]]
  shown = lambda names: ", ".join(sorted(each.removeprefix("default/") for each in names))
  where = PREFIX + name.removeprefix(PREFIX).partition(":")[0]
  if not fitting:
    raise DataError(f"data.path {name} has no split {wanted!r}; it has {shown(splits)}: give {where}:SPLIT")
  raise DataError(
    f"data.path {name}: {wanted!r} is a split of several configs, {shown(fitting)}; give {where}:CONFIG/SPLIT"
  )
