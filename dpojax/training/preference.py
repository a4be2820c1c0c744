"""Losses of `dpojax.losses` over packed rows: the table a config names, and their weighted sum.

A function of `dpojax.losses` knows log-probs; a `Loss` says how they are read from rows: summed or
mean, against a reference or not, as pairs, as rankings, each response alone, or all pairs of the
step at once. A response that is not there, of length 0, counts nothing.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from dpojax import losses
from dpojax.data.packing import Rows
from dpojax.kernels.cut_head import whole_head
from dpojax.kernels.distributions import token_kl_from, token_log_collisions, token_mixed_log_probs
from dpojax.kernels.platform import row_axes
from dpojax.log_probs import predicting_states, sum_by_slots, token_log_probs
from dpojax.losses import Pair
from dpojax.training.objectives import (
  Apply,
  Mean,
  Objective,
  mean_of_comparisons,
  mean_where,
  pair_of,
  reward_metrics,
)


class Responses(NamedTuple):
  """What losses read of the rows of a step.

  Attributes:
    policy: [R, P, K] float32 log-probs under the policy, summed.
    reference: [R, P, K] the same under the reference; 0 where there is none.
    lengths: [R, P, K] float32 tokens scored; 0 is a response that is not there.
    shared: the log-probs of both as LD-DPO or SamPO reads them, or None.
    weights: [R, P] WPO's weight of each pair; 1 unless asked for.
    kl: KTO's reference point, a scalar without gradient, or None.
    token_kl: [R, P, K] TDPO's KL(reference || policy) summed over a response's places, or None.
    mixed: epsilon-DPO's log-probs [R, P, K] of the policy moved to the reference and away, or None.
    running: beta-DPO's running mean and deviation of margins, those of this step included, or None.
    noise: [R, P] beta-DPO's uniform draws, or None.
    axis_name: the mapped axis, or axes, that the step's rows are spread over, or None.
  """

  policy: jax.Array
  reference: jax.Array
  lengths: jax.Array
  shared: tuple[jax.Array, jax.Array] | None
  weights: jax.Array
  kl: jax.Array | None
  token_kl: jax.Array | None
  mixed: tuple[jax.Array, jax.Array] | None
  running: losses.RunningMargins | None
  noise: jax.Array | None
  axis_name: str | tuple[str, ...] | None

  @property
  def there(self) -> jax.Array:
    """[R, P, K] bool."""
    return self.lengths > 0

  @property
  def pairs(self) -> jax.Array:
    """[R, P] bool: chosen and rejected are both there."""
    return self.there[..., 0] & self.there[..., 1]

  @property
  def margins(self) -> jax.Array:
    """[R, P] log-ratios of chosen less those of rejected."""
    ratios = pair_of(self.policy - self.reference)
    return ratios.chosen - ratios.rejected

  def everything(self, values: jax.Array) -> jax.Array:
    """[R, P] -> [R * P] of all devices that a mapped axis spreads rows over."""
    values = values.reshape(-1)
    if self.axis_name is None:
      return values
    return jax.lax.all_gather(values, self.axis_name, tiled=True)

  def ours(self, values: jax.Array) -> jax.Array:
    """[R * P] of all devices -> this device's [R, P]."""
    if self.axis_name is not None:
      first = jax.lax.axis_index(self.axis_name) * self.pairs.size
      values = jax.lax.dynamic_slice_in_dim(values, first, self.pairs.size)
    return values.reshape(self.pairs.shape)


class Reading(NamedTuple):
  """How a loss is given log-probs: divided by their lengths, or LD-DPO's or SamPO's; else sums."""

  mean: bool = False
  shared: bool = False

  def __call__(self, responses: Responses) -> tuple[jax.Array, jax.Array]:
    """Returns log-probs [R, P, K] under the policy and the reference."""
    policy, reference = responses.policy, responses.reference
    if self.shared:
      policy, reference = _made(responses.shared)
    if self.mean:
      policy, reference = (losses.length_normalize(v, responses.lengths) for v in (policy, reference))
    return policy, reference


_Value = TypeVar("_Value")


def _made(value: _Value | None) -> _Value:
  """Returns what is made for a loss that reads it, see `preference_objective`: it is there."""
  assert value is not None
  return value


# Forms: (function, responses, reading, knobs) -> [R, P] values that add up to the step's sum. A knob
# is a number, or [R, P], one of each comparison.


def pairwise(
  function: Callable, responses: Responses, reading: Reading, knobs: dict, *more: Pair | jax.Array
) -> jax.Array:
  """(policy, reference, *more, **knobs) -> loss of each pair, elementwise."""
  policy, reference = map(pair_of, reading(responses))
  values = function(policy, reference, *more, **knobs) * responses.weights
  return jnp.where(responses.pairs, values, 0)


def with_lengths(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """`pairwise` with the responses' lengths."""
  return pairwise(function, responses, reading, knobs, pair_of(responses.lengths))


def with_token_kl(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """`pairwise` with the KL of each response's tokens."""
  return pairwise(function, responses, reading, knobs, pair_of(_made(responses.token_kl)))


def with_mixed(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """`pairwise` with the log-probs of the policy moved to the reference and away from it."""
  return pairwise(function, responses, reading, knobs, *map(pair_of, _made(responses.mixed)))


def with_sampled(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """`pairwise` with the log-prob of the response that the reference sampled, which the data tell."""
  policy = pair_of(reading(responses)[0])
  sampled = jnp.where(knobs["sampled_rejected"] > 0.5, policy.rejected, policy.chosen)
  rest = {name: value for name, value in knobs.items() if name != "sampled_rejected"}
  return pairwise(function, responses, reading, rest, sampled)


def reference_free(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(policy, **knobs) -> loss of each pair, elementwise."""
  policy = pair_of(reading(responses)[0])
  return jnp.where(responses.pairs, function(policy, **knobs) * responses.weights, 0)


def ranking(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(policy, reference, *, where, **knobs) -> loss of each ranking of [..., K], best first."""
  return function(*reading(responses), where=responses.there, **_of_each_response(knobs))


def sorted_pairs(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(policy, reference, *, where, **knobs) -> losses over the sorted last axis: all pairs of the step.

  Raises:
    ValueError: a knob is of each comparison, and a rank has two.
  """
  for name, value in knobs.items():
    if jnp.ndim(value):
      raise ValueError(
        f"{name} is given for each comparison, but a loss of ranks mixes comparisons; give one number"
      )
  policy, reference = map(pair_of, reading(responses))
  everything = responses.everything
  values = function(
    *jax.tree.map(everything, (policy, reference)), where=everything(responses.pairs), **knobs
  )
  # Every device holds all pairs of the step: each answers for its share of their sum.
  devices = values.size // responses.pairs.size
  return jnp.sum(values.reshape(devices, *responses.pairs.shape), axis=0) / devices


def by_step(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """DPO with the betas and weights that (margins, noise, running, *, where, **knobs) gives a step's pairs.

  Where nothing is remembered, as in an evaluation, it is DPO.
  """
  policy, reference = map(pair_of, reading(responses))
  if responses.running is None:
    values = losses.dpo_loss(policy, reference, beta=knobs["beta"])
  else:
    every = lambda x: responses.everything(jnp.broadcast_to(x, responses.pairs.shape))
    moved, weights = function(
      every(responses.margins),
      every(responses.noise),
      responses.running,
      where=every(responses.pairs),
      **knobs | {"beta": every(knobs["beta"])},
    )
    values = losses.dpo_loss(policy, reference, beta=responses.ours(moved)) * responses.ours(weights)
  return jnp.where(responses.pairs, values, 0)


def single(function: Callable, responses: Responses, reading: Reading, knobs: dict) -> jax.Array:
  """(log_ratios, desirable, **knobs) -> loss of each response; the mean over those that are there."""
  policy, reference = reading(responses)
  first = jnp.arange(policy.shape[-1]) == 0
  desirable = jnp.broadcast_to(first, policy.shape)
  # A third response, where there is one, is another prompt's: KTO reads it for its reference point only.
  values = function(policy - reference, desirable, **_of_each_response(knobs))[..., :2]
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


def _of_each_response(knobs: dict) -> dict:
  """[R, P] knobs as [R, P, 1]."""
  return {name: value[..., None] if jnp.ndim(value) else value for name, value in knobs.items()}


class Loss(NamedTuple):
  """An entry of the table.

  Attributes:
    function: of `dpojax.losses`, or alike.
    form: how it is fed.
    reads_reference: whether it compares with a reference.
    mean: whether its definition reads mean log-probs.
    options: of 'length_normalize', 'ld_alpha', 'sampo', 'wpo' and 'dr_dpo', those it can be
      combined with.
    whole_step: whether responses of different comparisons meet in it, so that a step cannot be
      computed in parts.
    of_all: keywords that are one number for all comparisons.
    of_data: what its form has to be told of each comparison, by names in `dpojax.data.knobs.OF_DATA`.
  """

  function: Callable
  form: Callable = pairwise
  reads_reference: bool = True
  mean: bool = False
  options: tuple[str, ...] = ("length_normalize", "ld_alpha", "sampo", "wpo", "dr_dpo")
  whole_step: bool = False
  of_all: tuple[str, ...] = ()
  of_data: tuple[str, ...] = ()

  def knobs(self) -> dict[str, inspect.Parameter]:
    """Returns the keywords it takes besides beta, with their defaults."""
    # These are given by the objective, not by a user.
    given = ("beta", "where", "divergence", "kl")
    return {
      name: parameter
      for name, parameter in self.signature().items()
      if parameter.kind is parameter.KEYWORD_ONLY and name not in given
    }

  @property
  def single(self) -> bool:
    """Whether it reads each response alone, so that a comparison may have only one."""
    return self.form in (kto, bco, best)

  @property
  def reads_every_token(self) -> bool:
    """Whether it reads the reference's whole next-token distributions, and not log-probs alone."""
    return self.form in (with_token_kl, with_mixed)

  def takes_beta(self) -> bool:
    return "beta" in self.signature()

  def signature(self):
    return inspect.signature(self.function).parameters


LOSSES = {name: Loss(function) for name, function in losses.PAIRWISE_LOSSES.items()} | {
  "dpo_plackett_luce": Loss(losses.dpo_plackett_luce_loss, ranking, options=("length_normalize",)),
  "aot": Loss(
    losses.aot_loss,
    sorted_pairs,
    options=("length_normalize", "ld_alpha"),
    whole_step=True,
    of_all=("beta", "label_smoothing"),
  ),
  "aot_unpaired": Loss(
    losses.aot_unpaired_loss,
    sorted_pairs,
    options=("length_normalize", "ld_alpha"),
    whole_step=True,
    of_all=("beta", "label_smoothing"),
  ),
  "beta_dpo": Loss(losses.beta_dpo_batch, by_step, options=(), whole_step=True, of_all=("alpha", "share")),
  "kto": Loss(losses.kto_loss, kto, options=(), whole_step=True),
  "bco": Loss(losses.bco_loss, bco, options=("length_normalize",), whole_step=True),
  "h_dpo": Loss(losses.h_dpo_loss),
  "r_dpo": Loss(losses.r_dpo_loss, with_lengths, options=("wpo", "dr_dpo")),
  "tdpo1": Loss(losses.tdpo1_loss, with_token_kl, options=("wpo", "dr_dpo")),
  "tdpo2": Loss(losses.tdpo2_loss, with_token_kl, options=("wpo", "dr_dpo")),
  "epsilon_dpo": Loss(losses.epsilon_dpo_loss, with_mixed, options=("wpo", "dr_dpo"), of_all=("epsilon",)),
  "xpo": Loss(losses.xpo_loss, with_sampled, options=("wpo", "dr_dpo"), of_data=("sampled_rejected",)),
  "simpo": Loss(
    losses.simpo_loss, reference_free, reads_reference=False, mean=True, options=("wpo", "dr_dpo")
  ),
  "alphapo": Loss(
    losses.alphapo_loss, reference_free, reads_reference=False, mean=True, options=("wpo", "dr_dpo")
  ),
  "cpo": Loss(losses.cpo_loss, reference_free, reads_reference=False),
  "orpo": Loss(losses.orpo_loss, reference_free, reads_reference=False, mean=True, options=("wpo", "dr_dpo")),
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
  # A knob goes to every loss of the sum that has one of that name.
  return [
    Term(
      name,
      LOSSES[name],
      weight,
      {
        knob: value
        for knob, value in (knobs or {}).items()
        if knob in (*LOSSES[name].knobs(), *LOSSES[name].of_data)
      },
    )
    for name, weight in zip(names, weights, strict=True)
  ]


def preference_objective(
  apply: Apply,
  terms: Sequence[Term],
  *,
  beta: float | jax.Array,
  num_responses: int = 2,
  beta_factor: Callable[[jax.Array | int], jax.Array] | None = None,
  length_normalize: bool = False,
  ld_alpha: float | None = None,
  sampo: bool = False,
  wpo: bool = False,
  dr_dpo: float | None = None,
  with_reference: bool = True,
  seed: int = 0,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> Objective:
  """The weighted sum of losses between the responses of each comparison, chosen first.

  Rows may carry knobs of their own, beta among them, which take the place of those given here.

  Metrics: `rewards/*` are beta (log pi - log pi_ref) of the log-probs the first loss reads, without
  a reference beta log pi, with beta 1 for a loss that has none; `beta` is there where it moves.

  Args:
    apply: the model; it is applied to the policy's params, and to the reference's unless the rows
      carry stored log-probs.
    terms: the losses; see `make_terms`.
    beta: strength of the pull to the reference.
    num_responses: responses of a comparison that are compared. KTO's rows hold one more, a response
      to another prompt: see `dpojax.data.loader.Mismatched`.
    beta_factor: what every beta is multiplied by, by step; None is 1.
    length_normalize: the losses that can read mean log-probs instead of sums.
    ld_alpha: LD-DPO's alpha, for the losses that can.
    sampo: the losses that can read as many tokens, drawn anew at each step, as the shorter response
      has.
    wpo: weigh pairs by how likely the policy is to sample them, in the losses that can.
    dr_dpo: Dr. DPO's tau: weigh pairs by how small their loss is, in the losses that can.
    with_reference: false sets every reference log-prob to 0, a uniform reference.
    seed: of the tokens that SamPO draws.
    chunk_size: see `dpojax.log_probs.token_log_probs`.
    axis_name: the mapped axis that rows are spread over, under `pmap`.
  """
  forms = {term.loss.form for term in terms}
  rows_hold = num_responses + (kto in forms)
  needs_reference = with_reference and any(term.loss.reads_reference for term in terms)
  score = _Scoring(rows_hold, ld_alpha, sampo, seed, chunk_size)
  asked = dict(length_normalize=length_normalize, ld_alpha=ld_alpha is not None, sampo=sampo)
  reading_of = lambda loss: Reading(
    mean=loss.mean or (asked["length_normalize"] and "length_normalize" in loss.options),
    shared=any(asked[name] and name in loss.options for name in ("ld_alpha", "sampo")),
  )

  def read(params, reference, rows, step, memory) -> Responses:
    across = axis_name or row_axes() or None
    outputs, frozen_outputs = apply(params, rows), None
    tokens, policy, shared = score(outputs, rows, step)
    # No reference is a uniform one: its log-ratios are the policy's log-probs.
    frozen, frozen_shared = jax.tree.map(jnp.zeros_like, (policy, shared))
    if needs_reference and rows.reference is not None:
      # Stored as sums over tokens, which is why what reads single tokens is refused with a store.
      frozen = rows.reference
    elif needs_reference:
      frozen_outputs = jax.lax.stop_gradient(apply(reference, rows))
      _, frozen, frozen_shared = jax.lax.stop_gradient(score(frozen_outputs, rows, step))
    lengths = _by_response(jnp.ones_like(tokens), rows, rows_hold)
    cut = lambda x: x[..., :num_responses]
    responses = Responses(
      cut(policy),
      cut(frozen),
      cut(lengths),
      None if shared is None else (shared, frozen_shared),
      _wpo_weights(outputs, rows, tokens, lengths, chunk_size) if wpo else jnp.ones(policy.shape[:-1]),
      _kl_of_mismatched(policy, frozen, lengths, across) if kto in forms else None,
      *_of_every_token(terms, outputs, frozen_outputs, rows, rows_hold, chunk_size),
      running=None,
      noise=None,
      axis_name=across,
    )
    if memory is None:
      return responses
    margins, pairs = map(responses.everything, (responses.margins, responses.pairs))
    return responses._replace(
      running=losses.running_margins(memory, margins, where=pairs), noise=_noise_of_examples(rows, seed, step)
    )

  def values_of(term: Term, responses: Responses, of_rows: dict, moved: jax.Array | float) -> jax.Array:
    taken = (*term.loss.knobs(), *term.loss.of_data)
    knobs = term.knobs | {name: of_rows[name] for name in taken if name in of_rows}
    knobs |= {"beta": moved} if term.loss.takes_beta() else {}
    values = term.loss.form(term.loss.function, responses, reading_of(term.loss), knobs)
    if dr_dpo is not None and "dr_dpo" in term.loss.options:
      values *= _dr_dpo_weights(values, responses, dr_dpo)
    return values

  def evaluate(params, reference, rows, step=0, memory=None):
    responses = read(params, reference, rows, step, memory)
    of_rows = rows.knobs or {}
    moved = (1.0 if beta_factor is None else beta_factor(step)) * of_rows.get("beta", beta)
    count = jnp.sum(rows.example >= 0, dtype=jnp.float32)
    totals = [jnp.sum(values_of(term, responses, of_rows, moved)) for term in terms]
    weighed = (term.weight * total for term, total in zip(terms, totals))
    loss = Mean(sum(weighed, start=jnp.zeros((), jnp.float32)), count)
    metrics = {"loss": loss}
    if len(terms) > 1:
      metrics |= {f"loss/{term.name}": Mean(total, count) for term, total in zip(terms, totals)}
    # Of several losses the first is the one whose rewards are told.
    first = terms[0].loss
    metrics |= _metrics(responses, reading_of(first), moved if first.takes_beta() else 1.0, needs_reference)
    metrics |= _metrics_of_step(responses, count)
    if beta_factor is not None or "beta" in of_rows:
      metrics["beta"] = mean_of_comparisons(jnp.broadcast_to(moved, rows.example.shape), rows)
    return loss, metrics

  remembers = by_step in forms
  return Objective(
    evaluate,
    num_responses=rows_hold,
    needs_reference=needs_reference,
    moves=beta_factor is not None or sampo or remembers,
    memory=losses.RunningMargins(jnp.float32(0), jnp.float32(0)) if remembers else None,
    remember=_remembered_margins,
  )


class _Scoring(NamedTuple):
  """How what a model gave becomes the log-probs that losses read.

  Attributes:
    num_responses: `K`, responses of each comparison in the rows.
    ld_alpha, sampo, seed, chunk_size: those of `preference_objective`.
  """

  num_responses: int
  ld_alpha: float | None
  sampo: bool
  seed: int
  chunk_size: int | None

  def __call__(
    self, outputs, rows: Rows, step: jax.Array | int
  ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns log-probs of tokens [R, S], of responses [R, P, K], and the `shared` of `Responses`."""
    tokens = token_log_probs(
      predicting_states(outputs.hidden, rows.source),
      outputs.head,
      rows.target,
      where=_scored(rows, self.num_responses),
      chunk_size=self.chunk_size,
    )
    shared = self._shared(tokens, rows, step) if self.sampo or self.ld_alpha is not None else None
    return tokens, _by_response(tokens, rows, self.num_responses), shared

  def _shared(self, tokens: jax.Array, rows: Rows, step: jax.Array | int) -> jax.Array:
    mask = _pair_masks(rows, self.num_responses)
    of_each = lambda values: jax.tree.map(lambda m: jnp.broadcast_to(values[:, None], m.shape), mask)
    if self.sampo:
      noise = _noise(rows, self.num_responses, self.seed, step)
      pair = losses.sampo_log_probs(of_each(tokens), mask, of_each(noise))
    else:
      pair = losses.ld_dpo_log_probs(of_each(tokens), mask, alpha=_made(self.ld_alpha))
    return jnp.stack(pair, axis=-1)


def _kl_of_mismatched(policy: jax.Array, reference: jax.Array, lengths: jax.Array, across) -> jax.Array:
  """Returns KTO's z_0 (Ethayarajh et al. 2024, Sec. 4): of responses to other prompts, never below 0.

  It is one of the whole step. Those responses stand last in [R, P, K].
  """
  ratios = policy[..., -1] - reference[..., -1]
  return jnp.maximum(step_mean(ratios, lengths[..., -1] > 0, axis_name=across), 0)


def _remembered_margins(before: losses.RunningMargins, metrics: dict[str, Mean]) -> losses.RunningMargins:
  """Returns what the metrics of a step tell of the running margins; a step without pairs tells nothing."""
  told = (metrics[f"running_margins/{name}"].value() for name in before._fields)
  return losses.RunningMargins(*(jnp.where(jnp.isnan(new), old, new) for old, new in zip(before, told)))


def _metrics(responses: Responses, reading: Reading, beta, needs_reference: bool) -> dict[str, Mean]:
  policy, reference = reading(responses)
  rewards = pair_of(_of_each_response({"beta": beta})["beta"] * (policy - reference))
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


def _metrics_of_step(responses: Responses, count: jax.Array) -> dict[str, Mean]:
  """Returns numbers of the whole step, weighed so that the mean over devices gives them back."""
  told = {} if responses.kl is None else {"kl": responses.kl}
  if responses.running is not None:
    told |= {f"running_margins/{name}": value for name, value in responses.running._asdict().items()}
  return {name: Mean(value * count, count) for name, value in told.items()}


def step_mean(values: jax.Array, where: jax.Array, *, axis_name: str | tuple[str, ...] | None) -> jax.Array:
  """Returns the mean over the whole step, without gradient."""
  mean = jax.lax.stop_gradient(mean_where(values, where))
  if axis_name is not None:
    mean = jax.lax.psum(mean, axis_name)
  return mean.total / jnp.maximum(mean.count, 1)


def _scored(rows: Rows, num_responses: int) -> jax.Array:
  """Returns which of the scored places [R, S] hold a token."""
  return rows.slot < rows.example.shape[-1] * num_responses


def _of_every_token(
  terms: Sequence[Term], outputs, reference_outputs, rows: Rows, num_responses: int, chunk_size
) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array] | None]:
  """Returns `token_kl` and `mixed` of `Responses`, either only where a loss reads it."""
  readers = {term.loss.form: term for term in terms if term.loss.reads_every_token}
  if readers and reference_outputs is None:
    raise ValueError(
      f"{', '.join(term.name for term in readers.values())} reads the reference's next-token "
      "distributions, which are not stored; give the reference's params"
    )
  if not readers:
    return None, None
  hidden, reference_hidden = (
    predicting_states(each.hidden, rows.source) for each in (outputs, reference_outputs)
  )
  head, reference_head = (whole_head(each.head, each.hidden.dtype) for each in (outputs, reference_outputs))
  token_kl = mixed = None
  if with_token_kl in readers:
    scored = _scored(rows, num_responses)
    tokens = token_kl_from(
      hidden, head, reference_hidden, reference_head, where=scored, chunk_size=chunk_size
    )
    token_kl = _by_response(tokens, rows, num_responses)
  if with_mixed in readers:
    term = readers[with_mixed]
    epsilon = term.knobs.get("epsilon", term.loss.knobs()["epsilon"].default)

    def moved(share):
      tokens = token_mixed_log_probs(
        hidden, head, reference_hidden, reference_head, rows.target, share=share, chunk_size=chunk_size
      )
      return _by_response(tokens, rows, num_responses)

    mixed = moved(epsilon), moved(-epsilon)
  return token_kl, mixed


def _dr_dpo_weights(values: jax.Array, responses: Responses, tau: float) -> jax.Array:
  """Returns Dr. DPO's weights [R, P] of this device's values, among those of the whole step."""
  weights = losses.dr_dpo_weights(
    responses.everything(jax.lax.stop_gradient(values)), tau=tau, where=responses.everything(responses.pairs)
  )
  return responses.ours(weights)


def _noise(rows: Rows, num_responses: int, seed: int, step: jax.Array | int) -> jax.Array:
  """Returns a uniform draw for each scored place [R, S], whatever row its response stands in.

  It depends on the seed, the step, the comparison's example, the response and the place in it.
  """
  last = rows.example.shape[-1] * num_responses
  places = jnp.arange(rows.slot.shape[-1])
  first = jax.vmap(lambda slot: jax.ops.segment_min(places, slot, num_segments=last + 1)[slot])(
    jnp.asarray(rows.slot)
  )
  example = jnp.take_along_axis(
    jnp.asarray(rows.example), jnp.minimum(rows.slot, last - 1) // num_responses, axis=-1
  )
  # The place within its response, which no packing changes: the same tokens are drawn in any row.
  number = (places[None] - first) * num_responses + rows.slot % num_responses
  key = jax.random.fold_in(jax.random.key(seed), step)

  def draw(example, number):
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, example), number))

  return jax.vmap(jax.vmap(draw))(example, number)


def _noise_of_examples(rows: Rows, seed: int, step: jax.Array | int) -> jax.Array:
  """Returns a uniform draw for each comparison [R, P]; it depends on the seed, the step and the example."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  draw = lambda example: jax.random.uniform(jax.random.fold_in(key, example))
  return jax.vmap(jax.vmap(draw))(jnp.asarray(rows.example))


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
  hidden, head = outputs.hidden, whole_head(outputs.head, outputs.hidden.dtype)
  collisions = token_log_collisions(predicting_states(hidden, rows.source), head, chunk_size=chunk_size)
  alignment = _by_response(tokens - collisions, rows, lengths.shape[-1])
  return losses.wpo_weights(pair_of(losses.length_normalize(alignment, lengths)))
