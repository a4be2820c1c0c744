"""What a step of PPO aims at, and the two objectives that get there.

Rows are those of `rollouts`: a prompt each, `[R, K, T]` the tokens of its samples.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax import losses
from dpojax.data.packing import Rows
from dpojax.ppo import losses as ppo_losses
from dpojax.sample import rollouts
from dpojax.training import step as step_lib
from dpojax.training.objectives import Apply, Objective, mean_where
from dpojax.training.step import TrainState


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
    optimizers = tuple(name for name in step_lib.OPTIMIZERS if name not in step_lib.AVERAGES)
    for name, allowed in (("optimizer", optimizers), ("schedule", step_lib.SCHEDULES)):
      _refuse(name, getattr(self, name), getattr(self, name) in allowed, f"it must be one of {allowed}")
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


class Control(NamedTuple):
  """What a rollout changes besides the networks: the price of a nat, and the scores' moments."""

  beta: jax.Array
  moments: ppo_losses.Moments


class PPOState(NamedTuple):
  """All that PPO changes. The critic has the policy's architecture and a scalar head."""

  policy: TrainState
  critic: TrainState
  control: Control


class Targets(NamedTuple):
  """What an update aims at, each [R, K T] float32."""

  log_probs: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array


class Experience(NamedTuple):
  """A rollout, or some rows of it."""

  rows: Rows
  targets: Targets

  @property
  def example(self) -> jax.Array:
    return self.rows.example


def make_targets(settings: Settings) -> Callable:
  """Returns `targets(control, scored, scores, counts) -> (control after it, Targets, metrics)`.

  Args of it: `rollouts.Scored`, the score of each sample [R, K] and its tokens [R, K].
  """

  def targets(control, scored, scores, counts):
    log_probs, reference, values = (x.reshape(*counts.shape, -1) for x in scored)
    # Scores by the moments of all so far, this rollout's included: the first one has a deviation too.
    moments, shown = control.moments, scores
    if settings.normalize_rewards:
      moments = ppo_losses.add_moments(moments, scores)
      shown = (scores - moments.mean) / moments.deviation()
    rewards = _each(partial(ppo_losses.token_rewards, beta=control.beta))(shown, log_probs, reference, counts)
    advantages = _each(partial(ppo_losses.gae, gamma=settings.gamma, lam=settings.lam))(
      rewards, values, counts
    )
    there = jax.lax.broadcasted_iota(jnp.int32, values.shape, 2) < counts[:, :, None]
    # Before whitening: the critic learns returns in the units of rewards, only the policy's advantages are
    # whitened.
    returns = jnp.where(there, advantages + values, 0.0)
    metrics = _rollout_metrics(log_probs, reference, scores, shown, counts, control.beta)
    metrics["val/explained_variance"] = 1 - jnp.var(advantages, where=there) / jnp.maximum(
      jnp.var(returns, where=there), 1e-8
    )
    if settings.whiten_advantages:
      advantages = ppo_losses.whiten(advantages, there)
    beta = control.beta
    if settings.target_kl:
      beta = ppo_losses.adapted_beta(
        beta, metrics["objective/kl"], target=settings.target_kl, gain=settings.kl_gain
      )
    flat = lambda x: x.reshape(x.shape[0], -1)
    aims = Targets(*map(flat, (log_probs, values, advantages, returns)))
    return Control(beta, moments), aims, metrics

  return targets


def _each(function: Callable) -> Callable:
  return jax.vmap(jax.vmap(function))


def _rollout_metrics(log_probs, reference, scores, shown, counts, beta) -> dict[str, jax.Array]:
  """Means over samples, under the names the field plots; `shown` are the scores that count."""
  kl = jnp.mean(jnp.sum(losses.kl_k1(log_probs, reference), axis=-1))
  return {
    "objective/kl": kl,
    "objective/scores": jnp.mean(scores),
    "objective/scores_std": jnp.std(scores),
    "objective/non_score_reward": -beta * kl,
    "objective/rlhf_reward": jnp.mean(shown) - beta * kl,
    "objective/entropy": -jnp.mean(jnp.sum(log_probs, axis=-1)),
    "objective/beta": beta,
    "objective/length": jnp.mean(counts.astype(jnp.float32)),
  }


def policy_objective(apply: Apply, settings: Settings) -> Objective:
  """The clipped surrogate, averaged over tokens of `Experience`."""

  def evaluate(params, reference, experience):
    rows, targets = experience
    where = rows.slot < settings.num_samples
    log_probs = rollouts.scored_log_probs(
      apply(params, rows), rows, where, chunk_size=settings.chunk_size or None
    )
    loss = ppo_losses.ppo_policy_loss(log_probs, targets.log_probs, targets.advantages, clip=settings.clip)
    moved = log_probs - targets.log_probs
    # Where the clipped surrogate is the larger loss, its gradient is 0: those tokens have gone far enough.
    clipped = loss > -jnp.exp(moved) * targets.advantages
    mean = lambda values: mean_where(values.astype(jnp.float32), where)
    return mean(loss), {
      "loss": mean(loss),
      "policy/clipfrac": mean(clipped),
      "policy/ratio": mean(jnp.exp(moved)),
      "policy/approxkl": mean(losses.kl_k2(targets.log_probs, log_probs)),
      "policy/moved": mean(jnp.abs(moved)),
    }

  return Objective(evaluate, settings.num_samples, needs_reference=False)


def critic_objective(apply: Apply, settings: Settings) -> Objective:
  """The clipped error of values, averaged over tokens of `Experience`."""

  def evaluate(params, reference, experience):
    rows, targets = experience
    where = rows.slot < settings.num_samples
    values = rollouts.scored_values(apply(params, rows), rows)
    loss = ppo_losses.ppo_value_loss(values, targets.values, targets.returns, clip=settings.value_clip)
    far = jnp.abs(values - targets.values) > settings.value_clip
    return mean_where(loss, where), {
      "loss": mean_where(loss, where),
      "val/clipfrac": mean_where(far.astype(jnp.float32), where),
    }

  return Objective(evaluate, settings.num_samples, needs_reference=False)


def make_optimizer(settings: Settings, learning_rate: float):
  """Returns the schedule and the optimizer of one network."""
  schedule = step_lib.make_schedule(
    settings.schedule,
    learning_rate=learning_rate,
    warmup_steps=settings.warmup_steps,
    steps=settings.steps * settings.epochs * settings.minibatches,
  )
  return schedule, step_lib.make_optimizer(
    settings.optimizer, schedule, max_grad_norm=settings.max_grad_norm, weight_decay=settings.weight_decay
  )
