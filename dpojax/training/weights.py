"""Where a run starts: the workdir of another run, a Hugging Face folder, or a name on the hub."""

import dataclasses
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpojax.models import hf, transformer
from dpojax.models.config import ModelConfig
from dpojax.models.families import HuggingFaceError
from dpojax.runtime.errors import ConfigError
from dpojax.training import checkpoint
from dpojax.training.config import flatten


def read(
  config: ml_collections.ConfigDict,
  key: str,
  *,
  place: hf.Place | None = None,
  like: ModelConfig | None = None,
) -> checkpoint.Policy | hf.Model:
  """Returns what a key such as 'model.checkpoint' names: a `config` and `params`.

  A run's params come as NumPy arrays, those of a Hugging Face model as `place` keeps them. Layers are
  stacked or not as those of the model `like` are; without it a run's as they were, others by
  `model.scan_layers`.

  Raises:
    ConfigError: it names a Hugging Face model that cannot be fetched or is not supported.
    CheckpointError: it names a folder that is neither a model nor a run's workdir.
  """
  name = flatten(config)[key]
  try:
    loaded = checkpoint.load_weights(
      name, place=place, dtype=config.model.param_dtype, scan_layers=(like or config.model).scan_layers
    )
  except HuggingFaceError as error:
    raise ConfigError(f"config.{key} is {name!r}: {error}") from error
  if like is None or like.scan_layers == loaded.config.scan_layers:
    return loaded
  return loaded._replace(
    config=dataclasses.replace(loaded.config, scan_layers=like.scan_layers),
    params=transformer.laid_out(loaded.config, loaded.params, like.scan_layers),
  )


def read_model_config(config: ml_collections.ConfigDict, key: str) -> ModelConfig:
  """Returns the dimensions of the model that a key such as 'model.checkpoint' names; see `read`."""
  name = os.path.expanduser(flatten(config)[key])
  if not hf.is_model(name):
    return checkpoint.load_model_config(name)
  try:
    return dataclasses.replace(hf.read_config(name), scan_layers=config.model.scan_layers)
  except HuggingFaceError as error:
    raise ConfigError(f"config.{key} is {name!r}: {error}") from error


class Loaded(NamedTuple):
  """A model by itself: `settings` are those of its run, None of a Hugging Face model.

  `tokenizer` is a folder or hub name, `name` what the model is called, `params` NumPy arrays,
  `ended_by` the ids that ended a response in its run.
  """

  config: ModelConfig
  params: Any
  tokenizer: str
  name: str
  settings: ml_collections.ConfigDict | None = None
  ended_by: tuple[int, ...] = ()

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """The ids that end a text: those of its run, and the published model's; a chat has its own."""
    return tuple(dict.fromkeys((*self.ended_by, *published_stop_ids(self.config))))


def published_stop_ids(config: ModelConfig) -> tuple[int, ...]:
  """Returns the ids that a published model's generation_config.json, or else its config.json, ends with."""
  published = json.loads(config.published or "{}")
  ids = None
  # The later one wins where both are there, as in transformers.
  for name in ("config", "generation_config"):
    ids = published.get(name, {}).get("eos_token_id", ids)
  return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def load(name: str, step: int | None = None, *, dtype: str = "") -> Loaded:
  """Returns the model of a run's workdir, a Hugging Face folder or a hub name.

  Args:
    name: where it is.
    step: of a run's checkpoint; None is the last.
    dtype: compute dtype; '' is the run's, or float32.

  Raises:
    ConfigError: a Hugging Face model cannot be fetched or is not supported, or has no steps.
    CheckpointError: there is neither a model nor a run, or no such checkpoint.
  """
  path = os.path.expanduser(name)
  changes: dict[str, Any] = {"dtype": dtype} if dtype else {}
  if not hf.is_model(path):
    policy = checkpoint.load_policy(path, step)
    config = dataclasses.replace(policy.config, **changes)
    return Loaded(
      config,
      policy.params,
      policy.settings.tokenizer,
      f"{name} step {policy.step}",
      policy.settings,
      policy.stop_ids,
    )
  if step is not None:
    raise ConfigError(f"{name} is a Hugging Face model, which has no step {step}; leave it out")
  try:
    model = hf.load(path)
  except HuggingFaceError as error:
    raise ConfigError(f"{name}: {error}") from error
  return Loaded(dataclasses.replace(model.config, **changes), model.params, name, name)


def load_reference(policy: Loaded) -> Loaded | None:
  """Returns what a run's policy is held against: the weights it started from, or its reference's.

  Returns:
    None for a Hugging Face model, a run with reference.mode='none', and one other than DPO that
    started from random weights.

  Raises:
    ConfigError, CheckpointError: the reference is no longer there.
  """
  settings = policy.settings
  if settings is None or settings.reference.mode == "none":
    return None
  name = settings.reference.checkpoint or settings.model.checkpoint
  if name:
    reference = load(name, dtype=policy.config.dtype)
    rounded = jnp.dtype(settings.model.get("param_dtype", "float32"))  # as the run has held it
    return reference._replace(params=jax.tree.map(lambda x: np.asarray(x, rounded), reference.params))
  if settings.objective != "dpo":
    return None
  # Weights that were never saved: the seed makes them again, as the run did.
  params = transformer.init_params(policy.config, jax.random.key(settings.seed))
  return policy._replace(params=params, name=f"random weights of seed {settings.seed}")


def with_tokenizer(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config with the tokenizer of `model.checkpoint` where it has none of its own.

  Raises:
    CheckpointError: `model.checkpoint` is neither a model nor a run's workdir.
  """
  name = config.model.checkpoint
  if config.tokenizer or not name:
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.tokenizer = tokenizer_of(name)
  return config


def tokenizer_of(name: str) -> str:
  """Returns the tokenizer of a run's workdir, a Hugging Face folder or a hub name: a folder or hub name.

  Raises:
    CheckpointError: there is neither a model nor a run.
  """
  path = os.path.expanduser(name)
  return name if hf.is_model(path) else checkpoint.load_settings(path).tokenizer
