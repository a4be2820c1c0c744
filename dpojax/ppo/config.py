"""The keys of a PPO run, those of every run and a group of its own, and the checks before any work."""

import re

import ml_collections

from dpojax.ppo.step import Settings
from dpojax.runtime.errors import ConfigError
from dpojax.training import config as config_lib

KEYS = {
  "steps": "steps",
  "prompts_per_step": "batch_size",
  "beta": "beta",
  "seed": "seed",
  "rows_at_once": "rows_at_once",
  "chunk_size": "chunk_size",
  "optimizer": "optimizer.name",
  **{
    name: f"optimizer.{name}"
    for name in ("learning_rate", "warmup_steps", "schedule", "max_grad_norm", "weight_decay")
  },
  **{
    name: f"ppo.{name}"
    for name in (
      "num_samples",
      "max_new_tokens",
      "epochs",
      "minibatches",
      "target_kl",
      "kl_gain",
      "normalize_rewards",
      "whiten_advantages",
      "gamma",
      "lam",
      "clip",
      "value_clip",
      "critic_learning_rate",
      "prompts_at_once",
    )
  },
}
"""The config key of each of `ppo_step.Settings`."""


def defaults() -> ml_collections.ConfigDict:
  """Returns every key of a PPO run: those of `config.defaults()` and the group `ppo`."""
  config, settings = config_lib.defaults(), Settings()
  config.objective = "ppo"
  config.loss = ""
  config.reference.mode = "inline"
  config.parallel.strategy = "mesh"
  config.ppo = ml_collections.ConfigDict()
  config.ppo.reward = ""  # workdir of a run with objective=reward, or module:function(prompt, response)
  config.ppo.critic = ""  # workdir of a reward model the critic starts from; empty: the policy
  for name, key in KEYS.items():
    group, _, key = key.rpartition(".")
    (config[group] if group else config)[key] = getattr(settings, name)
  config.log_every = 1
  config.eval_every = 10
  config.checkpoint_every = 50
  return config


def validate(config: ml_collections.ConfigDict) -> Settings:
  """Refuses what cannot run, and returns the settings.

  Raises:
    ConfigError: naming the key, the value and the fix.
  """
  if config.objective != "ppo":
    raise ConfigError(
      f"config.objective is {config.objective!r}; dpojax.ppo runs objective='ppo', the others are "
      "python -m dpojax.train's"
    )
  config_lib.check_group(config, "ppo", defaults())
  config_lib.validate(data_config(config))
  flat = config_lib.flatten(config)
  for key, value, why in (
    ("model.checkpoint", "", "PPO starts from a trained model: name a workdir or a Hugging Face folder"),
    ("ppo.reward", "", "name the workdir of a reward model's run, or module:function"),
  ):
    if flat[key] == value:
      raise ConfigError(f"config.{key} is empty; {why}")
  for key, value in (
    ("lora.rank", 0),
    ("reference.mode", "inline"),
    ("reference.checkpoint", ""),
    ("reference.sync_every", 0),
    ("parallel.strategy", "mesh"),
    ("parallel.coordinator", ""),
    ("checkpoint_best", ""),
    ("loss", ""),
    ("beta_schedule.steps", ()),
    ("beta_schedule.factors", ()),
    ("optimizer.ema", 0.0),
    ("sample_every", 0),
  ):
    if flat[key] != value:
      raise ConfigError(f"config.{key} is {flat[key]!r}, which PPO does not take; set {value!r}")
  settings = Settings(**{name: flat[key] for name, key in KEYS.items()})
  in_keys(settings.check)
  return settings


def in_keys(check, *args):
  """Calls check(*args); a ValueError that names settings becomes a ConfigError that names keys."""
  try:
    return check(*args)
  except ValueError as error:
    name = re.compile(r"\b(" + "|".join(sorted(KEYS, key=len, reverse=True)) + r")\b(?= is|=| /| \d)")
    text = name.sub(lambda match: KEYS[match[0]], str(error))
    raise ConfigError(f"config.{text}") from error


def data_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config of the SFT run whose prompts these are."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    del config["ppo"]
    config.objective, config.loss = "sft", "token_mean"
  return config
