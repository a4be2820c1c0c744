"""What a step of PPO aims at, and the two objectives that get there.

Rows are those of `rollouts`: a prompt each, `[R, K, T]` the tokens of its samples.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpojax import losses
from dpojax.data.packing import Rows
from dpojax.ppo import losses as ppo_losses
from dpojax.ppo.config import Settings
from dpojax.sample import rollouts
from dpojax.training import step as step_lib
from dpojax.training.objectives import Apply, Objective, mean_where
from dpojax.training.step import TrainState


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
  # Of whole responses, which is what the target KL is of.
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
    # The schedule counts updates, of which a rollout has many.
    steps=settings.steps * settings.epochs * settings.minibatches,
  )
  return schedule, step_lib.make_optimizer(
    settings.optimizer, schedule, max_grad_norm=settings.max_grad_norm, weight_decay=settings.weight_decay
  )
