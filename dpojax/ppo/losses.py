"""What PPO computes, as pure functions (Schulman et al. 2017; Ziegler et al. 2019).

`[T]` are the tokens of one response, lifted by `jax.vmap`; functions of `[...]` are elementwise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpojax.losses import kl_penalized_reward


class Moments(NamedTuple):
  """Of all values seen so far, float32 scalars: how many, their mean, and the sum of squares off it."""

  count: jax.Array
  mean: jax.Array
  squares: jax.Array

  def deviation(self) -> jax.Array:
    """Returns the standard deviation; 1 where there is none yet."""
    variance = self.squares / jnp.maximum(self.count, 1)
    return jnp.where(variance > 0, jnp.sqrt(variance), 1.0)


def no_moments() -> Moments:
  """Returns the moments of nothing."""
  return Moments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def add_moments(moments: Moments, values: jax.Array) -> Moments:
  """Returns the moments with the values [...] added (Chan et al. 1979)."""
  added = jnp.asarray(values.size, jnp.float32)
  mean = jnp.mean(values)
  # The parallel form: a sum of squares of raw values would cancel in float32.
  count, apart = moments.count + added, mean - moments.mean
  squares = jnp.sum(jnp.square(values - mean)) + apart**2 * moments.count * added / count
  return Moments(count, moments.mean + apart * added / count, moments.squares + squares)


def token_rewards(
  score: jax.Array,
  log_probs: jax.Array,
  reference_log_probs: jax.Array,
  length: jax.Array,
  *,
  beta: float | jax.Array,
) -> jax.Array:
  """Returns the reward of each token of a response (Ziegler et al. 2019, Eq. 2), [T].

  Every token pays beta (log pi - log pi_ref); the last one earns the response's score as well.

  Args:
    score: scalar.
    log_probs, reference_log_probs: [T].
    length: scalar, tokens of the response; those behind it get 0.
    beta: what a nat costs.
  """
  place = jnp.arange(log_probs.shape[0])
  scores = jnp.where(place == length - 1, score, 0.0)
  rewards = kl_penalized_reward(scores, log_probs, reference_log_probs, beta=beta)
  return jnp.where(place < length, rewards, 0.0)


def gae(rewards: jax.Array, values: jax.Array, length: jax.Array, *, gamma: float, lam: float) -> jax.Array:
  """Returns generalised advantages (Schulman et al. 2016, Eq. 16; 2017, Eq. 11) of a response, [T].

  Args:
    rewards: [T] of each token.
    values: [T] expected return before each token.
    length: scalar, tokens of the response: nothing follows the last; those behind it get 0.
    gamma: discount.
    lam: 1 takes whole returns, 0 one step and the value after it.
  """
  there = jnp.arange(rewards.shape[0]) < length
  # Nothing follows the last token: a response that was cut off counts as ended, as its score is of what is
  # there.
  following = jnp.where(jnp.roll(there, -1).at[-1].set(False), jnp.roll(values, -1), 0.0)
  errors = jnp.where(there, rewards + gamma * following - values, 0.0)

  def back(advantage, error):
    # Behind the response errors are 0, so the sum begins at its last token.
    advantage = error + gamma * lam * advantage
    return advantage, advantage

  return jnp.where(there, jax.lax.scan(back, jnp.zeros_like(errors[0]), errors, reverse=True)[1], 0.0)


def whiten(values: jax.Array, where: jax.Array) -> jax.Array:
  """Returns values [...] of mean 0 and deviation 1 over those that `where` [...] marks, others 0."""
  mean = jnp.mean(values, where=where)
  variance = jnp.mean(jnp.square(values - mean), where=where)
  return jnp.where(where, (values - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def ppo_policy_loss(
  log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, *, clip: float
) -> jax.Array:
  """Returns minus the clipped surrogate of each token (Schulman et al. 2017, Eq. 7), [...]."""
  ratios = jnp.exp(log_probs - old_log_probs)
  # The lesser of the two is a bound from below: clipping takes away the gain of moving far, never the loss.
  return -jnp.minimum(ratios * advantages, jnp.clip(ratios, 1 - clip, 1 + clip) * advantages)


def ppo_value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float) -> jax.Array:
  """Returns half the squared error of each value, [...], or that `clip` away from the old one, if more."""
  clipped = jnp.clip(values, old_values - clip, old_values + clip)
  # The larger error, a bound from above: a value gains nothing by moving beyond the clip.
  return jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns)) / 2


def adapted_beta(beta: jax.Array, kl: jax.Array, *, target: float, gain: float = 0.1) -> jax.Array:
  """Returns the price of a nat after a step whose KL was `kl` (Ziegler et al. 2019, Sec. 2.2).

  Args:
    beta: the price in that step.
    kl: mean log pi - log pi_ref of whole responses, nats.
    target: what it should be.
    gain: a KL off by 20 % or more moves beta by a fifth of it.
  """
  return beta * (1 + gain * jnp.clip(kl / target - 1, -0.2, 0.2))
