"""Losses of `dpojax.losses` over packed rows: the table a config names, and their weighted sum.

A function of `dpojax.losses` knows log-probs; a `Loss` says how they are read from rows: summed or
mean, against a reference or not, as pairs, as rankings, each response alone, or all pairs of the
step at once. A response that is not there, of length 0, counts nothing.
"""

import inspect
from functools import partial
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp

from dpojax import losses
from dpojax.data.packing import Rows
from dpojax.log_probs import (
    predicting_states, sum_by_slots, token_log_collisions, token_log_probs)
from dpojax.losses import Pair
from dpojax.objectives import (
    Apply, Mean, Objective, mean_where, pair_of, reward_metrics)


class Responses(NamedTuple):
  """What losses read of the rows of a step.

  Attributes:
    policy: [R, P, K] float32 log-probs under the policy, summed.
    reference: [R, P, K] the same under the reference; 0 where there is none.
    lengths: [R, P, K] float32 tokens scored; 0 is a response that is not there.
    shared: the log-probs of both as LD-DPO reads them, or None.
    weights: [R, P] WPO's weight of each pair; 1 unless asked for.
    kl: KTO's reference point, a scalar without gradient, or None.
    axis_name: the mapped axis that the step's rows are spread over, or None.
  """

  policy: jax.Array
  reference: jax.Array
  lengths: jax.Array
  shared: tuple[jax.Array, jax.Array] | None
  weights: jax.Array
  kl: jax.Array | None
  axis_name: str | None

  @property
  def there(self) -> jax.Array:
    """[R, P, K] bool."""
    return self.lengths > 0

  @property
  def pairs(self) -> jax.Array:
    """[R, P] bool: chosen and rejected are both there."""
    return self.there[..., 0] & self.there[..., 1]


class Reading(NamedTuple):
  """How a loss is given log-probs: divided by their lengths, or LD-DPO's; else plain sums."""

  mean: bool = False
  shared: bool = False

  def __call__(self, responses: Responses) -> tuple[jax.Array, jax.Array]:
    """Returns log-probs [R, P, K] under the policy and the reference."""
    values = responses.policy, responses.reference
    if self.shared:
      values = responses.shared
    if self.mean:
      values = tuple(losses.length_normalize(v, responses.lengths) for v in values)
    return values


# Forms: (function, responses, reading, knobs) -> [R, P] values that add up to the step's sum.


def pairwise(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(policy, reference, **knobs) -> loss of each pair, elementwise."""
  policy, reference = map(pair_of, reading(responses))
  values = function(policy, reference, **knobs) * responses.weights
  return jnp.where(responses.pairs, values, 0)


def reference_free(
    function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(policy, **knobs) -> loss of each pair, elementwise."""
  policy = pair_of(reading(responses)[0])
  return jnp.where(responses.pairs, function(policy, **knobs) * responses.weights, 0)


def ranking(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(policy, reference, *, where, **knobs) -> loss of each ranking of [..., K], best first."""
  return function(*reading(responses), where=responses.there, **knobs)


def sorted_pairs(
    function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(policy, reference, *, where, **knobs) -> losses over the sorted last axis: all pairs of the step."""
  policy, reference = map(pair_of, reading(responses))
  everything = partial(_whole_step, axis_name=responses.axis_name)
  values = function(
      *jax.tree.map(everything, (policy, reference)), where=everything(responses.pairs), **knobs)
  # Every device holds all pairs of the step: each answers for its share of their sum.
  devices = values.size // responses.pairs.size
  return jnp.sum(values.reshape(devices, *responses.pairs.shape), axis=0) / devices


def single(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(log_ratios, desirable, **knobs) -> loss of each response; the mean over those that are there."""
  policy, reference = reading(responses)
  first = jnp.arange(policy.shape[-1]) == 0
  desirable = jnp.broadcast_to(first, policy.shape)
  values = function(policy - reference, desirable, **knobs)[..., :2]
  there = responses.there[..., :2]
  return jnp.sum(values, axis=-1, where=there) / jnp.maximum(jnp.sum(there, axis=-1), 1)


def kto(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """`single` with the step's reference point."""
  return single(function, responses, reading, {"kl": responses.kl} | knobs)


def bco(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """`single` with the step's mean reward as delta, unless delta is given."""
  policy, reference = reading(responses)
  mean = step_mean(policy - reference, responses.there, axis_name=responses.axis_name)
  return single(function, responses, reading, {"delta": knobs["beta"] * mean} | knobs)


def best(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(log_probs) -> loss of the chosen response."""
  values = function(reading(responses)[0][..., 0], **knobs)
  return jnp.where(responses.there[..., 0], values, 0)


class Loss(NamedTuple):
  """An entry of the table.

  Attributes:
    function: of `dpojax.losses`, or alike.
    form: how it is fed.
    reads_reference: whether it compares with a reference.
    mean: whether its definition reads mean log-probs.
    options: of 'length_normalize', 'ld_alpha' and 'wpo', those it can be combined with.
    whole_step: whether responses of different comparisons meet in it, so that a step cannot be
      computed in parts.
  """

  function: Callable
  form: Callable = pairwise
  reads_reference: bool = True
  mean: bool = False
  options: tuple[str, ...] = ("length_normalize", "ld_alpha", "wpo")
  whole_step: bool = False

  def knobs(self) -> dict[str, inspect.Parameter]:
    """Returns the keywords it takes besides beta, with their defaults."""
    given = ("beta", "where", "divergence", "kl")
    return {name: parameter for name, parameter in self.signature().items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in given}

  @property
  def single(self) -> bool:
    """Whether it reads each response alone, so that a comparison may have only one."""
    return self.form in (kto, bco, best)

  def takes_beta(self) -> bool:
    return "beta" in self.signature()

  def signature(self):
    return inspect.signature(self.function).parameters


LOSSES = {name: Loss(function) for name, function in losses.PAIRWISE_LOSSES.items()} | {
    "dpo_plackett_luce": Loss(
        losses.dpo_plackett_luce_loss, ranking, options=("length_normalize",)),
    "aot": Loss(
        losses.aot_loss, sorted_pairs, options=("length_normalize", "ld_alpha"), whole_step=True),
    "aot_unpaired": Loss(
        losses.aot_unpaired_loss, sorted_pairs, options=("length_normalize", "ld_alpha"),
        whole_step=True),
    "kto": Loss(losses.kto_loss, kto, options=(), whole_step=True),
    "bco": Loss(losses.bco_loss, bco, options=("length_normalize",), whole_step=True),
    "simpo": Loss(
        losses.simpo_loss, reference_free, reads_reference=False, mean=True, options=("wpo",)),
    "cpo": Loss(losses.cpo_loss, reference_free, reads_reference=False),
    "orpo": Loss(
        losses.orpo_loss, reference_free, reads_reference=False, mean=True, options=("wpo",)),
    "unlikelihood": Loss(losses.unlikelihood_loss, reference_free, reads_reference=False),
    "nll": Loss(losses.nll_loss, best, reads_reference=False, options=()),
    "nll_mean": Loss(losses.nll_loss, best, reads_reference=False, mean=True, options=()),
}
"""Names `config.loss` takes. 'nll' is of summed log-probs, 'nll_mean' of each response's mean."""


class Term(NamedTuple):
  """A loss of a sum: its name in the metrics, the loss, its weight and its knobs."""

  name: str
  loss: Loss
  weight: float | jax.Array = 1.0
  knobs: dict[str, Any] = {}


def make_terms(
    names: Sequence[str], weights: Sequence[float] = (), knobs: dict[str, Any] | None = None
) -> list[Term]:
  """Returns the losses of the table with these names; each gets the knobs that it takes."""
  weights = weights or [1.0] * len(names)
  return [
      Term(name, LOSSES[name], weight,
           {knob: value for knob, value in (knobs or {}).items() if knob in LOSSES[name].knobs()})
      for name, weight in zip(names, weights, strict=True)]


def preference_objective(
    apply: Apply, terms: Sequence[Term], *, beta: float | jax.Array, num_responses: int = 2,
    length_normalize: bool = False, ld_alpha: float | None = None, wpo: bool = False,
    with_reference: bool = True, chunk_size: int | None = None, axis_name: str | None = None,
) -> Objective:
  """The weighted sum of losses between the responses of each comparison, chosen first.

  Metrics: `rewards/*` are beta (log pi - log pi_ref) of the log-probs the first loss reads, without
  a reference beta log pi, with beta 1 for a loss that has none.

  Args:
    apply: the model; it is applied to the policy's params, and to the reference's unless the rows
      carry stored log-probs.
    terms: the losses; see `make_terms`.
    beta: strength of the pull to the reference.
    num_responses: responses of a comparison that are compared. KTO's rows hold one more, a response
      to another prompt: see `dpojax.data.loader.Mismatched`.
    length_normalize: the losses that can read mean log-probs instead of sums.
    ld_alpha: LD-DPO's alpha, for the losses that can.
    wpo: weigh pairs by how likely the policy is to sample them, in the losses that can.
    with_reference: false sets every reference log-prob to 0, a uniform reference.
    chunk_size: see `dpojax.log_probs.token_log_probs`.
    axis_name: the mapped axis that rows are spread over, under `pmap`.
  """
  forms = {term.loss.form for term in terms}
  rows_hold = num_responses + (kto in forms)
  needs_reference = with_reference and any(term.loss.reads_reference for term in terms)
  asked = dict(length_normalize=length_normalize, ld_alpha=ld_alpha is not None, wpo=wpo)
  reading_of = lambda loss: Reading(
      mean=loss.mean or (asked["length_normalize"] and "length_normalize" in loss.options),
      shared=asked["ld_alpha"] and "ld_alpha" in loss.options)

  def score(outputs, rows):
    tokens = token_log_probs(
        predicting_states(outputs.hidden, rows.source), outputs.head, rows.target,
        where=rows.slot < rows.example.shape[-1] * rows_hold, chunk_size=chunk_size)
    sums = _by_response(tokens, rows, rows_hold)
    shared = None
    if ld_alpha is not None:
      mask = _pair_masks(rows, rows_hold)
      token_pair = jax.tree.map(lambda m: jnp.broadcast_to(tokens[:, None], m.shape), mask)
      shared = jnp.stack(losses.ld_dpo_log_probs(token_pair, mask, alpha=ld_alpha), axis=-1)
    return tokens, sums, shared

  def read(params, reference, rows) -> Responses:
    outputs = apply(params, rows)
    tokens, policy, shared = score(outputs, rows)
    frozen, frozen_shared = jax.tree.map(jnp.zeros_like, (policy, shared))
    if needs_reference and rows.reference is not None:
      frozen = rows.reference
    elif needs_reference:
      _, frozen, frozen_shared = jax.lax.stop_gradient(score(apply(reference, rows), rows))
    lengths = _by_response(jnp.ones_like(tokens), rows, rows_hold)
    kl = None
    if kto in forms:
      mismatched = policy[..., -1] - frozen[..., -1]
      kl = jnp.maximum(step_mean(mismatched, lengths[..., -1] > 0, axis_name=axis_name), 0)
    weights = jnp.ones(policy.shape[:-1])
    if wpo:
      weights = _wpo_weights(outputs, rows, tokens, lengths, chunk_size)
    cut = lambda x: x[..., :num_responses]
    return Responses(
        cut(policy), cut(frozen), cut(lengths), None if shared is None else (shared, frozen_shared),
        weights, kl, axis_name)

  def evaluate(params, reference, rows):
    responses = read(params, reference, rows)
    count = jnp.sum(rows.example >= 0, dtype=jnp.float32)
    loss, parts = Mean(0.0, count), {}
    for term in terms:
      knobs = term.knobs | ({"beta": beta} if term.loss.takes_beta() else {})
      values = term.loss.form(term.loss.function, responses, reading_of(term.loss), knobs)
      parts[f"loss/{term.name}"] = Mean(jnp.sum(values), count)
      loss = loss._replace(total=loss.total + term.weight * jnp.sum(values))
    metrics = {"loss": loss} | (parts if len(terms) > 1 else {})
    first = terms[0].loss
    metrics |= _metrics(
        responses, reading_of(first), beta if first.takes_beta() else 1.0, needs_reference)
    if responses.kl is not None:
      metrics["kl"] = Mean(responses.kl * count, count)
    return loss, metrics

  return Objective(evaluate, num_responses=rows_hold, needs_reference=needs_reference)


def _metrics(responses: Responses, reading: Reading, beta, needs_reference: bool) -> dict[str, Mean]:
  policy, reference = reading(responses)
  rewards = pair_of(beta * (policy - reference))
  there = pair_of(responses.there)
  sums = pair_of(responses.policy)
  metrics = reward_metrics(rewards, there) | {
      "logps/chosen": mean_where(sums.chosen, there.chosen),
      "logps/rejected": mean_where(sums.rejected, there.rejected),
  }
  if needs_reference:
    ratios = responses.policy - responses.reference
    both = pair_of(ratios)
    metrics |= {
        "log_ratios/chosen": mean_where(both.chosen, there.chosen),
        "log_ratios/rejected": mean_where(both.rejected, there.rejected),
        "log_ratios/abs": mean_where(jnp.abs(ratios), responses.there),
    }
  return metrics


def step_mean(values: jax.Array, where: jax.Array, *, axis_name: str | None) -> jax.Array:
  """Returns the mean over the whole step, without gradient."""
  mean = jax.lax.stop_gradient(mean_where(values, where))
  if axis_name is not None:
    mean = jax.lax.psum(mean, axis_name)
  return mean.total / jnp.maximum(mean.count, 1)


def _whole_step(values: jax.Array, *, axis_name: str | None) -> jax.Array:
  """[R, P] -> [R * P] of all devices that a mapped axis spreads rows over."""
  values = values.reshape(-1)
  if axis_name is None:
    return values
  return jax.lax.all_gather(values, axis_name, tiled=True)


def _by_response(values: jax.Array, rows: Rows, num_responses: int) -> jax.Array:
  """[R, S] values of scored tokens -> their sums over each response, [R, P, K]."""
  comparisons = rows.example.shape[-1]
  sums = sum_by_slots(values, rows.slot, num_slots=comparisons * num_responses)
  return sums.reshape(-1, comparisons, num_responses)


def _pair_masks(rows: Rows, num_responses: int) -> Pair:
  """Returns where the scored tokens of chosen and rejected stand, bool [R, P, S] each."""
  comparisons = rows.example.shape[-1]
  first = num_responses * jnp.arange(comparisons)[None, :, None]
  slot = jnp.asarray(rows.slot)[:, None, :]
  return Pair(slot == first, slot == first + 1)


def _wpo_weights(outputs, rows: Rows, tokens, lengths, chunk_size) -> jax.Array:
  outputs = jax.lax.stop_gradient(outputs)
  collisions = token_log_collisions(
      predicting_states(outputs.hidden, rows.source), outputs.head, chunk_size=chunk_size)
  alignment = _by_response(tokens - collisions, rows, lengths.shape[-1])
  return losses.wpo_weights(pair_of(losses.length_normalize(alignment, lengths)))
