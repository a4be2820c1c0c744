"""What is minimised: (params, reference, rows) -> loss and metrics, as sums with their counts.

An objective returns `Mean`s, a total and the count it is over. Totals and counts add over devices
and parts of a step before the one division, so a device with fewer comparisons weighs less.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax import losses
from dpojax.data.packing import Rows
from dpojax.log_probs import SequenceLogProbs, log_probs
from dpojax.models import lora
from dpojax.models.transformer import Outputs

Apply = Callable[[Any, Rows], Outputs]


class Mean(NamedTuple):
  """A mean in two parts that add: `total` / `count`, float32 scalars."""

  total: jax.Array
  count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a mean

  def value(self) -> jax.Array:
    """Returns the mean; nan where there is nothing it is a mean of."""
    return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1), jnp.nan)


class Objective(NamedTuple):
  """A loss over packed rows.

  Attributes:
    evaluate: (params, reference, rows) -> (loss, metrics), a `Mean` and a dict of them. Its
      gradient is taken with respect to `loss.total` and params.
    num_responses: `K`, responses of each comparison in the rows.
    needs_reference: whether the loss reads `reference`, a param tree.
    moves: whether the loss depends on the step besides; `evaluate` then takes it last, and is that of
      step 0 without it.
    memory: what training remembers from step to step, arrays as they are before the first; None: nothing.
      `evaluate` then takes `memory` too; without it, as in an evaluation, nothing is remembered.
    remember: (memory, metrics of a step) -> memory after it; metrics are summed over the whole step.
  """

  evaluate: Callable[..., tuple[Mean, dict[str, Mean]]]
  num_responses: int
  needs_reference: bool
  moves: bool = False
  memory: Any = None
  remember: Callable[[Any, dict[str, Mean]], Any] | None = None

  def at(
    self, step: jax.Array | int, memory: Any = None
  ) -> Callable[[Any, Any, Rows], tuple[Mean, dict[str, Mean]]]:
    """Returns `evaluate` at a step, with what is remembered there."""
    known = ({"step": step} if self.moves else {}) | ({} if memory is None else {"memory": memory})
    return partial(self.evaluate, **known) if known else self.evaluate


def of_adapter(objective: Objective) -> Objective:
  """The objective of a low-rank adapter: `params` is the adapter, `reference` the base it is on.

  The base is the reference as well, so there is one whether the loss reads it or not. The apply of
  the objective that is given is that of `models.lora`.
  """

  def evaluate(adapter, base, rows, **at):
    return objective.evaluate(lora.Adapted(base, adapter), base, rows, **at)

  return objective._replace(evaluate=evaluate)


def response_log_probs(
  outputs: Outputs, rows: Rows, *, num_responses: int, chunk_size: int | None = None
) -> SequenceLogProbs:
  """Returns the log-prob of each response and its length, [R, P, K] each."""
  comparisons = rows.example.shape[-1]
  flat = log_probs(
    outputs.hidden,
    outputs.head,
    rows.source,
    rows.target,
    rows.slot,
    num_slots=comparisons * num_responses,
    chunk_size=chunk_size,
  )
  return jax.tree.map(lambda x: x.reshape(-1, comparisons, num_responses), flat)


def response_rewards(outputs: Outputs, rows: Rows, *, num_responses: int) -> jax.Array:
  """Returns [R, P, K] float32 rewards: the reward head on the last token of each response."""
  if outputs.reward_head is None:
    raise ValueError("the model has no reward head")
  comparisons = rows.example.shape[-1]
  num_slots = comparisons * num_responses

  def one_row(hidden, comparison, branch):
    slot = (comparison - 1) * num_responses + branch - 1
    # Prompts and padding go to a slot of their own, which is dropped.
    slot = jnp.where((comparison > 0) & (branch > 0), slot, num_slots)
    # The last place of each branch is the largest; an absent response gives a negative one, read as 0 and
    # masked later.
    last = jax.ops.segment_max(jnp.arange(slot.shape[0]), slot, num_segments=num_slots + 1)
    return hidden[jnp.maximum(last[:-1], 0)]

  last_hidden = jax.vmap(one_row)(outputs.hidden, rows.comparison, rows.branch)
  rewards = jnp.einsum("rsd,d->rs", last_hidden.astype(outputs.reward_head.dtype), outputs.reward_head)
  return rewards.reshape(-1, comparisons, num_responses)


def mean_of_comparisons(values: jax.Array, rows: Rows) -> Mean:
  """Returns the mean of [R, P] values over the comparisons that are there."""
  return mean_where(values, rows.example >= 0)


def mean_where(values: jax.Array, where: jax.Array) -> Mean:
  """Returns the mean of values [...] where a mask of the same shape is true."""
  return Mean(jnp.sum(values, where=where), jnp.sum(where, dtype=jnp.float32))


def sft_objective(apply: Apply, *, chunk_size: int | None = None) -> Objective:
  """Minus the summed log-prob of each best response, averaged over comparisons.

  The form of the reference implementation: a comparison weighs as much as its response is long.
  """
  return _sft(apply, chunk_size, lambda scores, rows: mean_of_comparisons(-scores.sums[..., 0], rows))


def token_mean_sft_objective(apply: Apply, *, chunk_size: int | None = None) -> Objective:
  """Minus the log-prob of the best responses, averaged over all their tokens in the step."""
  return _sft(apply, chunk_size, lambda scores, rows: _token_mean(scores))


def _token_mean(scores) -> Mean:
  # The count is of tokens: a long response weighs as many as it has.
  return Mean(-scores.sums[..., 0].sum(), scores.lengths[..., 0].sum())


def _sft(apply: Apply, chunk_size: int | None, reduce: Callable) -> Objective:
  def evaluate(params, reference, rows):
    scores = response_log_probs(apply(params, rows), rows, num_responses=1, chunk_size=chunk_size)
    loss = reduce(scores, rows)
    metrics = {
      "loss": loss,
      "logps/chosen": mean_of_comparisons(scores.sums[..., 0], rows),
      "nll_per_token": _token_mean(scores),
    }
    return loss, metrics

  return Objective(evaluate, num_responses=1, needs_reference=False)


def reward_objective(apply: Apply) -> Objective:
  """The Bradley-Terry reward model (Rafailov et al. 2023, Eq. 2): a scalar head on last tokens.

  Rows may carry a `margin` by which each chosen response is to be ahead.
  """

  def evaluate(params, reference, rows):
    rewards = pair_of(response_rewards(apply(params, rows), rows, num_responses=2))
    margin = (rows.knobs or {}).get("margin", 0.0)
    values = losses.bradley_terry_loss(rewards.chosen, rewards.rejected, margin=margin)
    loss = mean_of_comparisons(values, rows)
    there = losses.Pair(rows.example >= 0, rows.example >= 0)
    return loss, {"loss": loss} | reward_metrics(rewards, there)

  return Objective(evaluate, num_responses=2, needs_reference=False)


def pair_of(values: jax.Array) -> losses.Pair:
  """Returns chosen and rejected of [..., K]."""
  return losses.Pair(values[..., 0], values[..., 1])


def reward_metrics(rewards: losses.Pair, there: losses.Pair) -> dict[str, Mean]:
  """Returns what the field plots of rewards [R, P] of pairs, over the responses that are there."""
  margins = rewards.chosen - rewards.rejected
  both = there.chosen & there.rejected
  return {
    "rewards/chosen": mean_where(rewards.chosen, there.chosen),
    "rewards/rejected": mean_where(rewards.rejected, there.rejected),
    "rewards/accuracies": mean_where((margins > 0).astype(margins.dtype), both),
    "rewards/margins": mean_where(margins, both),
  }
