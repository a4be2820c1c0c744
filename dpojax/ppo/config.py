"""The keys of a PPO run, those of every run and a group of its own, and the checks before any work."""

import dataclasses
import math
import re
from typing import Any

import ml_collections

from dpojax.runtime.errors import ConfigError
from dpojax.training import config as config_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """How PPO runs.

  Attributes:
    steps: rollouts.
    prompts_per_step, num_samples: prompts of a rollout and samples of each, together 1024.
    max_new_tokens: of a sample.
    epochs, minibatches: passes over a rollout, and the updates of each.
    beta: what a nat of log pi - log pi_ref costs, in units of the (normalised) score; with
      `target_kl` where it starts.
    target_kl: nats of a whole response that beta is steered towards; 0 leaves beta alone.
    kl_gain: how fast, see `ppo_losses.adapted_beta`.
    normalize_rewards: scores less their mean over their deviation, both of all seen so far.
    whiten_advantages: mean 0 and deviation 1 over the tokens of a rollout.
    gamma, lam: discount, and the decay of generalised advantages.
    clip, value_clip: how far ratios and values count, see `ppo_losses`.
    optimizer: a name in `step.OPTIMIZERS` that averages no params.
    learning_rate, critic_learning_rate: of the two networks.
    warmup_steps: updates over which they rise.
    schedule: a name in `step.SCHEDULES`.
    max_grad_norm: gradients are clipped to it; 0 is none.
    weight_decay: of adamw.
    rows_at_once: prompts, with their samples, a device computes at once; 0 is all.
    prompts_at_once: prompts that are sampled to at once; 0 is all of a rollout.
    chunk_size: see `log_probs.token_log_probs`; 0 goes by memory.
    seed: of samples, the order of prompts, and minibatches.
  """

  steps: int = 100
  prompts_per_step: int = 128
  num_samples: int = 8
  max_new_tokens: int = 64
  epochs: int = 4
  minibatches: int = 4
  beta: float = 0.1
  target_kl: float = 0.0
  kl_gain: float = 0.1
  normalize_rewards: bool = True
  whiten_advantages: bool = True
  gamma: float = 1.0
  lam: float = 0.95
  clip: float = 0.2
  value_clip: float = 0.2
  optimizer: str = "adamw"
  learning_rate: float = 1e-5
  critic_learning_rate: float = 1e-5
  warmup_steps: int = 0
  schedule: str = "constant"
  max_grad_norm: float = 1.0
  weight_decay: float = 0.0
  rows_at_once: int = 0
  prompts_at_once: int = 0
  chunk_size: int = 0
  seed: int = 0

  def check(self) -> None:
    """Refuses values that cannot run.

    Raises:
      ValueError: naming the setting, its value and the fix.
    """
    self.check_numbers()
    from dpojax.training import step as step_lib  # here, for numbers are checked without jax

    optimizers = tuple(name for name in step_lib.OPTIMIZERS if name not in step_lib.AVERAGES)
    for name, allowed in (("optimizer", optimizers), ("schedule", step_lib.SCHEDULES)):
      _refuse(name, getattr(self, name), getattr(self, name) in allowed, f"it must be one of {allowed}")

  def check_numbers(self) -> None:
    """Refuses numbers that cannot run; see `check`."""
    for name in ("steps", "prompts_per_step", "num_samples", "max_new_tokens", "epochs", "minibatches"):
      _refuse(name, getattr(self, name), getattr(self, name) >= 1, "it must be at least 1")
    for name in (
      "beta",
      "target_kl",
      "kl_gain",
      "warmup_steps",
      "max_grad_norm",
      "weight_decay",
      "rows_at_once",
      "prompts_at_once",
      "chunk_size",
      "seed",
    ):
      _refuse(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "it must be at least 0")
    for name in ("clip", "value_clip", "learning_rate", "critic_learning_rate"):
      _refuse(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "it must be positive")
    for name in ("gamma", "lam"):
      _refuse(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "it must be in [0, 1]")
    if self.target_kl and not self.beta:
      raise ValueError("beta is 0 and target_kl set, but beta is steered by factors; give it a start")
    for name in ("minibatches", "prompts_at_once"):
      parts = getattr(self, name)
      if parts and self.prompts_per_step % parts:
        raise ValueError(
          f"{name} is {parts} and prompts_per_step {self.prompts_per_step}; the one must divide the other"
        )


def _refuse(name: str, value: Any, sound: bool, rule: str) -> None:
  if not sound:
    raise ValueError(f"{name} is {value!r}; {rule}")


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
"""The config key of each of `Settings`."""


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
  settings = check_values(config)
  config_lib.validate(data_config(config))
  in_keys(settings.check)
  return settings


def check_values(config: ml_collections.ConfigDict) -> Settings:
  """Refuses what needs no jax to be refused, the part of `validate` that a command line does first.

  Raises:
    ConfigError: naming the key, the value and the fix.
  """
  if config.objective != "ppo":
    raise ConfigError(
      f"config.objective is {config.objective!r}; dpojax.ppo runs objective='ppo', the others are "
      "python -m dpojax.train's"
    )
  config_lib.check_group(config, "ppo", defaults())
  config_lib.check_values(data_config(config))
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
  in_keys(settings.check_numbers)
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
