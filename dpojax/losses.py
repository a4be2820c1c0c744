"""Preference losses, elementwise over comparisons and unreduced.

`policy` and `reference` are `Pair`s of summed log-probs of the chosen and the rejected response,
arrays of any equal shape. Everything is computed in float32 or wider.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pair(NamedTuple):
  """A value of the chosen and of the rejected response; arrays of equal shape [...]."""

  chosen: jax.Array
  rejected: jax.Array


def implicit_reward(policy: jax.Array, reference: jax.Array, *, beta: float | jax.Array) -> jax.Array:
  """Returns beta (log pi - log pi_ref), the reward a policy is optimal for (Rafailov et al. 2023, Eq. 5).

  It is the reward up to a term that depends on the prompt alone.
  """
  return beta * (_wide(policy) - _wide(reference))


def bradley_terry_loss(chosen_rewards: jax.Array, rejected_rewards: jax.Array) -> jax.Array:
  """Returns -log sigmoid(r_chosen - r_rejected) (Rafailov et al. 2023, Eq. 2), [...] like the rewards."""
  return -jax.nn.log_sigmoid(_wide(chosen_rewards) - _wide(rejected_rewards))


def dpo_loss(
    policy: Pair, reference: Pair, *, beta: float | jax.Array, label_smoothing: float | jax.Array = 0.0
) -> jax.Array:
  """Returns the DPO loss of each pair (Rafailov et al. 2023, Eq. 7).

  -log sigmoid(beta [log pi/pi_ref(chosen) - log pi/pi_ref(rejected)]). With label_smoothing e it is
  conservative DPO: (1 - e) times that plus e times the loss of the pair the other way round.

  Args:
    policy: summed log-probs under the policy, [...].
    reference: summed log-probs under the reference, [...].
    beta: strength of the pull to the reference.
    label_smoothing: probability that a label is wrong, in [0, 0.5).
  """
  chosen = implicit_reward(policy.chosen, reference.chosen, beta=beta)
  rejected = implicit_reward(policy.rejected, reference.rejected, beta=beta)
  return ((1 - label_smoothing) * bradley_terry_loss(chosen, rejected)
          + label_smoothing * bradley_terry_loss(rejected, chosen))


def _wide(x: jax.Array) -> jax.Array:
  return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


PAIRWISE_LOSSES = {"dpo": dpo_loss}
"""What `config.loss` names: (policy, reference, *, beta, ...) -> loss of each pair."""
