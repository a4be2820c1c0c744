"""Where a run starts: the workdir of another run, a Hugging Face folder, or a name on the hub."""

import os
import pathlib
import re

import ml_collections

from dpojax import checkpoint
from dpojax.config import ConfigError, flatten
from dpojax.models import hf
from dpojax.models.families import HuggingFaceError


def read(
    config: ml_collections.ConfigDict, key: str, *, place: hf.Place | None = None
) -> checkpoint.Policy | hf.Model:
  """Returns what a key such as 'model.checkpoint' names: a `config` and `params`.

  A run's params come as NumPy arrays, those of a Hugging Face model as `place` keeps them.

  Raises:
    ConfigError: it names a Hugging Face model that cannot be fetched or is not supported.
    CheckpointError: it names a folder that is neither a model nor a run's workdir.
  """
  name = os.path.expanduser(flatten(config)[key])
  if not (hf.is_model_folder(name) or _is_hub_name(name)):
    return checkpoint.load_policy(name)
  try:
    return hf.load(name, place=place, scan_layers=config.model.scan_layers)
  except HuggingFaceError as error:
    raise ConfigError(f"config.{key} is {name!r}: {error}") from error


def with_tokenizer(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config with the tokenizer of `model.checkpoint` where it has none of its own.

  Raises:
    CheckpointError: `model.checkpoint` is neither a model nor a run's workdir.
  """
  name = config.model.checkpoint
  if config.tokenizer or not name:
    return config
  path = os.path.expanduser(name)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.tokenizer = name if hf.is_model_folder(path) or _is_hub_name(path) else (
        checkpoint.load_settings(path).tokenizer)
  return config


def _is_hub_name(name: str) -> bool:
  return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not pathlib.Path(name).exists()
