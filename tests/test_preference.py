"""The preference objective: every loss, read from packed rows, is its formula on single sequences."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import losses
from dpojax.data import loader, packing
from dpojax.losses import Pair
from dpojax.models import transformer
from dpojax.training import objectives, preference, step
from tests import worlds

CONFIG = worlds.llama(layers=1)
BETA = 0.3
KNOBS = {
  "robust_dpo": {"label_smoothing": 0.1},
  "exo_pair": {"label_smoothing": 0.1},
  "aot": {"label_smoothing": 0.1},
  "bco_pair": {"delta": 0.2},
  "discopop": {"tau": 0.1},
  "f_dpo_alpha_divergence": {"alpha": 0.3},
  "simpo": {"gamma": 0.5},
  "orpo": {"weight": 0.7},
  "unlikelihood": {"alpha": 0.2},
  "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
  "dpop": {"weight": 5.0},
  "cal_dpo": {"weight": 0.5},
  "bdpo": {"mix": 0.3},
  "mappo": {"gap": 0.4},
  "h_dpo": {"alpha": 0.9},
  "r_dpo": {"alpha": 0.1},
  "tdpo2": {"alpha": 0.3},
  "epsilon_dpo": {"epsilon": 0.2},
  "alphapo": {"gamma": 0.5, "alpha": 0.25},
  "odpo": {"margin": 0.7},
  "xpo": {"alpha": 0.1, "sampled_rejected": 1.0},
}
NAMES = sorted(preference.LOSSES)


def num_responses_of(name):
  return {"dpo_plackett_luce": 4, "kto": 3}.get(name, 2)


apply = jax.jit(transformer.make_apply(CONFIG))


@jax.jit
def gradient_of(params, rows, cotangents):
  """The gradient of params, of that of the outputs: compiled once for all losses."""
  _, pull = jax.vjp(lambda p: apply(p, rows), params)
  return pull(cotangents)[0]


def objective(*names, weights=(), knobs=None, apply=apply, **options):
  if knobs is None:
    knobs = {knob: value for name in names for knob, value in KNOBS.get(name, {}).items()}
  return preference.preference_objective(
    apply,
    preference.make_terms(names, weights, knobs),
    beta=BETA,
    num_responses=4 if "dpo_plackett_luce" in names else 2,
    **options,
  )


def evaluate_outputs(name):
  """`evaluate` of a loss, for what models gave in place of their params."""
  return objective(name, apply=lambda outputs, rows: outputs).evaluate


@functools.cache
def of_outputs(name):
  """A loss of what models gave, and its gradient: a program of its own, while the model is one for all."""
  evaluate = evaluate_outputs(name)
  return jax.jit(jax.value_and_grad(lambda outputs, *others: evaluate(outputs, *others)[0].value()))


def evaluate(objective, params, reference, rows):
  loss, metrics = jax.jit(objective.evaluate)(params, reference, rows)
  return float(loss.value()), {name: float(mean.value()) for name, mean in metrics.items()}


class Single(NamedTuple):
  """Of each comparison and response: token log-probs [N, K, T], where they are, WPO's terms, all the
  vocabulary's log-probs [N, K, T, V], and the ids that are scored."""

  tokens: np.ndarray
  mask: np.ndarray
  collisions: np.ndarray
  every: np.ndarray
  targets: np.ndarray

  @property
  def sums(self):
    return np.where(self.mask, self.tokens, 0).sum(-1)

  @property
  def means(self):
    return self.sums / np.maximum(self.mask.sum(-1), 1)


@jax.jit
def log_softmax(params, ids):
  """Of a sequence alone, [T, V]."""
  position = jnp.arange(len(ids))[None]
  one = jnp.ones_like(position)
  hidden = transformer.Transformer(CONFIG).apply({"params": params}, ids[None], position, one, 0 * one)[0]
  return jax.nn.log_softmax(hidden @ transformer.output_head(params).T)


def single_sequences(params, examples, longest=24):
  """Every sequence alone, through the whole vocabulary's log-softmax."""
  shape = (len(examples), len(examples[0][1]), longest)
  out = Single(
    np.zeros(shape),
    np.zeros(shape, bool),
    np.zeros(shape),
    np.zeros((*shape, CONFIG.vocab_size)),
    np.zeros(shape, int),
  )
  for i, (prompt, responses) in enumerate(examples):
    for k, response in enumerate(responses):
      ids = np.concatenate([prompt, response]).astype(int)
      every = np.asarray(log_softmax(params, np.pad(ids, (0, longest - len(ids)))), np.float64)
      places = range(max(len(prompt), 1), len(ids))
      for t, place in enumerate(places):
        out.tokens[i, k, t] = every[place - 1, ids[place]]
        out.every[i, k, t], out.targets[i, k, t] = every[place - 1], ids[place]
        out.collisions[i, k, t] = np.log(np.exp(2 * every[place - 1]).sum())
      out.mask[i, k, : len(places)] = True
  return out


def pair(values):
  return Pair(jnp.asarray(values[:, 0]), jnp.asarray(values[:, 1]))


def token_kl(policy, reference):
  """KL(reference || policy) of the next token, summed over a response's places, [N, K]."""
  kl = np.sum(np.exp(reference.every) * (reference.every - policy.every), axis=-1)
  return np.where(policy.mask, kl, 0).sum(-1)


def mixed_sums(policy, reference, share):
  """Log-probs of (1 - share) policy + share reference logits, summed over a response, [N, K]."""
  logits = (1 - share) * policy.every + share * reference.every
  every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  tokens = np.take_along_axis(every, policy.targets[..., None], axis=-1)[..., 0]
  return np.where(policy.mask, tokens, 0).sum(-1)


def by_formula(name, policy, reference):
  """The mean loss, from arrays of single sequences."""
  entry, knobs = preference.LOSSES[name], dict(KNOBS.get(name, {}))
  if entry.takes_beta():
    knobs["beta"] = BETA
  ratios = policy.sums - reference.sums
  if name == "kto":
    kl = max(0.0, ratios[:, 2].mean())
    desirable = jnp.array([[True, False]] * len(ratios))
    return losses.kto_loss(ratios[:, :2], desirable, jnp.full(ratios[:, :2].shape, kl), **knobs)
  if name == "bco":
    desirable = jnp.array([[True, False]] * len(ratios))
    return losses.bco_loss(ratios, desirable, delta=BETA * ratios.mean(), **knobs)
  if name == "dpo_plackett_luce":
    return losses.dpo_plackett_luce_loss(policy.sums, reference.sums, **knobs)
  if name in ("nll", "nll_mean"):
    return losses.nll_loss((policy.means if entry.mean else policy.sums)[:, 0])
  if not entry.reads_reference:
    return entry.function(pair(policy.means if entry.mean else policy.sums), **knobs)
  if name == "r_dpo":
    return losses.r_dpo_loss(pair(policy.sums), pair(reference.sums), pair(policy.mask.sum(-1)), **knobs)
  if name == "beta_dpo":  # an evaluation remembers nothing
    return losses.dpo_loss(pair(policy.sums), pair(reference.sums), beta=BETA)
  if name == "xpo":
    sampled = pair(policy.sums).rejected
    return losses.xpo_loss(pair(policy.sums), pair(reference.sums), sampled, beta=BETA, alpha=0.1)
  if name in ("tdpo1", "tdpo2"):
    kl = pair(token_kl(policy, reference))
    return entry.function(pair(policy.sums), pair(reference.sums), kl, **knobs)
  if name == "epsilon_dpo":
    moved = [pair(mixed_sums(policy, reference, share)) for share in (0.2, -0.2)]
    margins = [np.asarray(m.chosen - m.rejected) for m in (moved[0], pair(policy.sums), moved[1])]
    steps = np.sign(margins[1] - margins[0]) * (
      np.sign(margins[1] - margins[0]) == np.sign(margins[2] - margins[1])
    )
    assert {-1, 1} <= set(steps)
    return losses.dpo_loss(
      pair(policy.sums), pair(reference.sums), beta=jnp.asarray(BETA / (1 + 0.2 * steps))
    )
  return entry.function(pair(policy.sums), pair(reference.sums), **knobs)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_loss_is_the_formula_on_single_sequences(name, rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  examples = worlds.comparisons(rng, 9, num_responses_of(name))
  rows = worlds.packed(examples, 64)
  got, _ = of_outputs(name)(apply(params, rows), apply(reference, rows), rows)
  want = by_formula(name, *(single_sequences(p, examples) for p in (params, reference)))
  np.testing.assert_allclose(got, jnp.mean(want), rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_down_the_gradient_lowers_every_loss(name, rng):
  params = worlds.params_of(CONFIG, 0)
  rows = worlds.packed(worlds.comparisons(rng, 9, num_responses_of(name)), 64)
  reference = apply(params, rows)
  before, cotangents = of_outputs(name)(reference, reference, rows)
  grads = gradient_of(params, rows, cotangents)
  norm = float(optax.tree.norm(grads))
  moved = jax.tree.map(lambda p, g: p - np.float32(1e-3 / norm) * g, params, grads)
  assert norm > 0 and of_outputs(name)(apply(moved, rows), reference, rows)[0] < before


def two_models(rng, count=9):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  examples = worlds.comparisons(rng, count, 2)
  singles = [single_sequences(p, examples) for p in (params, reference)]
  return params, reference, worlds.packed(examples, 64), *singles


def test_length_normalize_gives_the_loss_mean_log_probs(rng):
  params, reference, rows, policy, frozen = two_models(rng)
  got, metrics = evaluate(objective("ipo", length_normalize=True), params, reference, rows)
  want = losses.ipo_loss(pair(policy.means), pair(frozen.means), beta=BETA)
  np.testing.assert_allclose(got, jnp.mean(want), rtol=1e-4)
  margins = policy.means - frozen.means
  np.testing.assert_allclose(
    metrics["rewards/margins"], BETA * (margins[:, 0] - margins[:, 1]).mean(), rtol=1e-4
  )


def test_ld_alpha_discounts_tokens_behind_the_shorter_response(rng):
  params, reference, rows, policy, frozen = two_models(rng)

  def discounted(single):
    lengths = single.mask.sum(-1)
    weights = np.where(np.arange(24) < lengths.min(-1)[:, None], 1.0, 0.25)[:, None]
    return pair((single.tokens * weights * single.mask).sum(-1))

  got, _ = evaluate(objective("dpo", ld_alpha=0.25), params, reference, rows)
  want = losses.dpo_loss(discounted(policy), discounted(frozen), beta=BETA)
  np.testing.assert_allclose(got, jnp.mean(want), rtol=1e-4)
  plain, whole = (
    evaluate(objective("dpo", **o), params, reference, rows)[0] for o in ({}, {"ld_alpha": 1.0})
  )
  np.testing.assert_allclose(whole, plain, rtol=1e-6)
  assert abs(got - plain) > 1e-3 * abs(plain)


def test_sampo_reads_as_many_tokens_as_the_shorter_response_has_anew_at_each_step(rng):
  """Draws do not depend on the packing, or on the number of rows; the shorter response is whole."""
  params, reference, rows, policy, frozen = two_models(rng)
  examples = worlds.comparisons(np.random.default_rng(5), 9, 2)
  shapes = [worlds.packed(examples, length) for length in (64, 40)]
  drawn = objective("dpo", sampo=True)
  assert drawn.moves
  at = lambda step, rows: float(jax.jit(drawn.at(step))(params, reference, rows)[0].value())
  np.testing.assert_allclose(at(3, shapes[0]), at(3, shapes[1]), rtol=1e-5)
  assert len({at(step, rows) for step in range(4)}) == 4
  assert at(0, rows) == float(jax.jit(drawn.evaluate)(params, reference, rows)[0].value())

  prompt, long, short = np.array([5, 6]), np.repeat(7, 3), np.array([9, 9])
  one = [(prompt, [long, short])]
  ratio = np.subtract(*(single_sequences(p, one).tokens[0] for p in (params, reference)))
  _, metrics = evaluate(drawn, params, reference, worlds.packed(one, 64))
  pairs_of_three = [ratio[0, :3].sum() - ratio[0, left_out] for left_out in range(3)]
  assert min(abs(metrics["rewards/chosen"] / BETA - np.array(pairs_of_three))) < 1e-4
  np.testing.assert_allclose(metrics["rewards/rejected"] / BETA, ratio[1, :2].sum(), atol=1e-4)


def test_dr_dpo_gives_the_gradient_of_the_batchs_log_mean_exp(rng):
  params, reference, rows, policy, frozen = two_models(rng)
  values = losses.dpo_loss(pair(policy.sums), pair(frozen.sums), beta=BETA)
  weights = np.exp(-values) / np.mean(np.exp(-values))
  robust = objective("dpo", dr_dpo=1.0)
  got, _ = evaluate(robust, params, reference, rows)
  np.testing.assert_allclose(got, np.mean(weights * values), rtol=1e-4)

  def whole(p):
    each = _losses(p, reference, rows)
    return -jnp.log(jnp.mean(jnp.exp(-each), where=jnp.asarray(rows.example >= 0)))

  want = jax.jit(jax.grad(whole))(params)
  got = jax.jit(jax.grad(lambda p: robust.evaluate(p, reference, rows)[0].value()))(params)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4 * np.abs(w).max() + 1e-6), got, want)


def test_a_beta_that_moves_is_that_of_its_step_in_loss_and_metrics(rng):
  params, reference, rows, policy, frozen = two_models(rng)
  factor = step.make_beta_factor((0, 10), (1.0, 3.0))
  moving = objective("dpo", beta_factor=factor)
  for at, beta in ((0, BETA), (5, 2 * BETA), (99, 3 * BETA)):
    loss, metrics = jax.jit(moving.at(jnp.int32(at)))(params, reference, rows)
    want = losses.dpo_loss(pair(policy.sums), pair(frozen.sums), beta=beta)
    np.testing.assert_allclose(loss.value(), jnp.mean(want), rtol=1e-4)
    np.testing.assert_allclose(metrics["beta"].value(), beta, rtol=1e-6)
    margins = policy.sums - frozen.sums
    np.testing.assert_allclose(
      metrics["rewards/margins"].value(), beta * (margins[:, 0] - margins[:, 1]).mean(), rtol=1e-4
    )
  assert not objective("dpo").moves and "beta" not in evaluate(objective("dpo"), params, reference, rows)[1]


WITHOUT_OWN_BETA = {"aot", "aot_unpaired"}


@pytest.mark.parametrize(
  "name", [n for n in NAMES if preference.LOSSES[n].takes_beta() and n not in WITHOUT_OWN_BETA]
)
def test_every_comparison_may_bring_a_beta_of_its_own(name, rng):
  """One step of several betas is the mean of steps of one each."""
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  examples = worlds.comparisons(rng, 6, num_responses_of(name))
  if name in ("kto", "bco"):  # their point is of the whole step: the same examples at one beta each
    examples = examples[:1] * 6
  betas = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2], np.float32)
  compiled = jax.jit(evaluate_outputs(name))  # once, for rows of one shape

  def loss_of(examples, betas):
    rows = _packed_with(examples, {"beta": betas})
    loss, metrics = compiled(apply(params, rows), apply(reference, rows), rows)
    return float(loss.value()), {name: float(mean.value()) for name, mean in metrics.items()}

  got, metrics = loss_of(examples, betas)
  each = [loss_of([example], betas[i : i + 1])[0] for i, example in enumerate(examples)]
  if name == "bco":  # delta is the step's mean log-ratio at each pair's own beta
    each = [loss_of(examples, np.full(6, b, np.float32))[0] for b in betas]
  np.testing.assert_allclose(got, np.mean(each), rtol=2e-4)
  np.testing.assert_allclose(metrics["beta"], betas.mean(), rtol=1e-5)


def test_other_knobs_may_be_of_each_comparison_and_only_of_losses_that_take_them(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  examples = worlds.comparisons(rng, 4, 2)
  gaps = np.array([0.0, 0.3, 0.7, 1.0], np.float32)
  policy, frozen = (single_sequences(p, examples) for p in (params, reference))
  rows = _packed_with(examples, {"gap": gaps, "nothing_of_a_loss": gaps})
  got, _ = evaluate(objective("mappo"), params, reference, rows)
  want = losses.mappo_loss(pair(policy.sums), pair(frozen.sums), beta=BETA, gap=gaps)
  np.testing.assert_allclose(got, jnp.mean(want), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(WITHOUT_OWN_BETA))
def test_a_loss_of_ranks_refuses_a_beta_of_each_comparison(name, rng):
  params = worlds.params_of(CONFIG)
  rows = _packed_with(worlds.comparisons(rng, 3, 2), {"beta": np.ones(3, np.float32)})
  with pytest.raises(ValueError, match="beta is given for each comparison, but a loss of ranks"):
    evaluate(objective(name), params, params, rows)


def _packed_with(examples, knobs):
  lengths = worlds.lengths_of(examples)
  plan = packing.plan_in_order(lengths, len(examples), 64)
  return packing.fill(
    examples,
    plan.row[0],
    7,  # with one that stays empty
    packing.RowShape(64, 64, 6),
    num_responses=len(examples[0][1]),
    example=range(len(examples)),
    knobs=knobs,
  )


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "epsilon_dpo"])
def test_losses_of_every_token_refuse_a_reference_of_stored_log_probs(name, rng):
  params = worlds.params_of(CONFIG)
  rows = worlds.packed(worlds.comparisons(rng, 3, 2), 64)
  rows = rows._replace(reference=np.zeros((*rows.example.shape, 2), np.float32))
  with pytest.raises(ValueError, match=f"{name} reads the reference's next-token distributions"):
    evaluate(objective(name), params, None, rows)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "epsilon_dpo"])
def test_losses_of_every_token_start_as_dpo(name, rng):
  params = worlds.params_of(CONFIG)
  rows = worlds.packed(worlds.comparisons(rng, 5, 2), 64)
  of = lambda name: jax.jit(
    jax.value_and_grad(lambda p: objective(name).evaluate(p, params, rows)[0].value())
  )(params)
  (got, got_grads), (want, want_grads) = of(name), of("dpo")
  np.testing.assert_allclose(got, want, rtol=1e-6)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max() + 1e-7), got_grads, want_grads
  )


def test_wpo_weighs_each_pair_without_a_gradient_through_the_weight(rng):
  params, reference, rows, policy, frozen = two_models(rng)
  alignment = np.where(policy.mask, policy.tokens - policy.collisions, 0).sum(-1) / policy.mask.sum(-1)
  weights = np.minimum(1, np.exp(alignment.sum(-1)))
  assert weights.min() < 0.9
  values = losses.dpo_loss(pair(policy.sums), pair(frozen.sums), beta=BETA)
  got, _ = evaluate(objective("dpo", wpo=True), params, reference, rows)
  np.testing.assert_allclose(got, (weights * values).mean(), rtol=1e-4)

  gradient = lambda objective: jax.jit(jax.grad(lambda p: objective.evaluate(p, reference, rows)[0].total))(
    params
  )
  want = jax.jit(jax.grad(lambda p: jnp.sum(_by_example(rows, weights) * _losses(p, reference, rows))))(
    params
  )
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4 * np.abs(w).max() + 1e-6),
    gradient(objective("dpo", wpo=True)),
    want,
  )


def _by_example(rows, values):
  """[N] values of examples where they stand in the rows, [R, P]."""
  return jnp.where(rows.example >= 0, jnp.asarray(values)[rows.example], 0)


def _losses(params, reference, rows):
  apply = transformer.make_apply(CONFIG)
  policy, frozen = (
    objectives.pair_of(objectives.response_log_probs(apply(p, rows), rows, num_responses=2).sums)
    for p in (params, reference)
  )
  return losses.dpo_loss(policy, frozen, beta=BETA)


def test_losses_add_with_their_weights_and_are_told_apart(rng):
  params, reference, rows, *_ = two_models(rng)
  names, weights = ("dpo", "nll_mean", "kto"), (1.0, 0.2, 0.5)
  rows = worlds.packed(worlds.comparisons(rng, 9, 3), 64)
  parts = [
    evaluate(
      preference.preference_objective(
        transformer.make_apply(CONFIG), preference.make_terms([name]), beta=BETA
      ),
      params,
      reference,
      rows,
    )[0]
    for name in ("kto",)
  ]
  loss, metrics = evaluate(objective(*names, weights=weights, knobs={}), params, reference, rows)
  np.testing.assert_allclose(
    loss, sum(w * metrics[f"loss/{name}"] for name, w in zip(names, weights)), rtol=1e-5
  )
  np.testing.assert_allclose(metrics["loss/kto"], parts[0], rtol=1e-5)


def test_without_a_reference_dpo_is_cpo_and_nothing_is_compared(rng):
  params, reference, rows, *_ = two_models(rng)
  free = objective("dpo", with_reference=False)
  assert not free.needs_reference and not objective("cpo").needs_reference
  got, metrics = evaluate(free, params, None, rows)
  want, _ = evaluate(objective("cpo"), params, None, rows)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert not [name for name in metrics if name.startswith("log_ratios")]


def test_a_response_that_is_not_there_counts_nothing(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  nothing = np.zeros(0, int)
  examples = [
    (prompt, [good, nothing, other] if i % 3 else [nothing, bad, other])
    for i, (prompt, (good, bad, other)) in enumerate(worlds.comparisons(rng, 9, 3, empty_prompts=False))
  ]
  policy, frozen = (single_sequences(p, examples) for p in (params, reference))
  ratios = policy.sums - frozen.sums
  desirable = np.arange(9) % 3 > 0
  values = losses.kto_loss(
    np.where(desirable, ratios[:, 0], ratios[:, 1]),
    desirable,
    jnp.full(9, max(0.0, ratios[:, 2].mean())),
    beta=BETA,
    **KNOBS["kto"],
  )
  rows = worlds.packed(examples, 64)
  loss, metrics = evaluate(objective("kto"), params, reference, rows)
  np.testing.assert_allclose(loss, values.mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["logps/chosen"], policy.sums[desirable, 0].mean(), rtol=1e-4)
  assert np.isnan(metrics["rewards/accuracies"])


def test_a_ranking_may_be_shorter_than_the_longest(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  examples = [
    (prompt, responses[:3] + [responses[3][:0]] if i % 2 else responses)
    for i, (prompt, responses) in enumerate(worlds.comparisons(rng, 8, 4, empty_prompts=False))
  ]
  policy, frozen = (single_sequences(p, examples).sums for p in (params, reference))
  want = [
    losses.dpo_plackett_luce_loss(p[:k], f[:k], beta=BETA) for p, f, k in zip(policy, frozen, [4, 3] * 4)
  ]
  got, _ = evaluate(objective("dpo_plackett_luce"), params, reference, worlds.packed(examples, 64))
  np.testing.assert_allclose(got, np.mean(want), rtol=1e-4)


def test_a_borrowed_response_is_another_comparisons_and_fits():
  rng = np.random.default_rng(0)
  examples = worlds.comparisons(rng, 20, 2, empty_prompts=False)

  class Data:
    lengths = worlds.lengths_of(examples)
    example = np.arange(20)

    def __len__(self):
      return 20

    def __getitem__(self, i):
      return examples[i]

  subset = loader.mismatched(loader.all_of(Data()), seed=0, max_length=14)
  used = []
  for i in range(20):
    prompt, (chosen, rejected, borrowed) = subset.comparison(i)
    assert subset.lengths[i].tolist() == [len(prompt), len(chosen), len(rejected), len(borrowed)]
    assert 0 < len(borrowed) and len(prompt) + len(borrowed) <= 14
    partner = int(subset.partner[i])
    assert partner != i and any(
      np.array_equal(borrowed, response[: len(borrowed)]) for response in examples[partner][1]
    )
    used.append(partner)
  assert sorted(used) == list(range(20))


def test_first_loss_is_log_2_whatever_the_weights(rng):
  params = worlds.params_of(CONFIG)
  rows = worlds.packed(worlds.comparisons(rng, 9, 2), 64)
  loss, metrics = evaluate(objective("dpo"), params, params, rows)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert metrics["log_ratios/abs"] < 1e-5


def test_rewards_are_beta_times_the_log_ratios_of_policy_and_reference(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  rows = worlds.packed(worlds.comparisons(rng, 9, 2), 64)
  apply = transformer.make_apply(CONFIG)
  scores = [
    np.asarray(objectives.response_log_probs(apply(p, rows), rows, num_responses=2).sums)[
      np.asarray(rows.example) >= 0
    ]
    for p in (params, reference)
  ]
  ratios = scores[0] - scores[1]
  loss, metrics = evaluate(objective("dpo"), params, reference, rows)
  rewards = BETA * ratios
  want = {
    "loss": np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean(),
    "rewards/chosen": rewards[:, 0].mean(),
    "rewards/rejected": rewards[:, 1].mean(),
    "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
    "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
    "logps/chosen": scores[0][:, 0].mean(),
    "logps/rejected": scores[0][:, 1].mean(),
    "log_ratios/chosen": ratios[:, 0].mean(),
    "log_ratios/rejected": ratios[:, 1].mean(),
    "log_ratios/abs": np.abs(ratios).mean(),
  }
  assert metrics.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(loss, want["loss"], rtol=1e-4)


def test_the_reference_gets_no_gradient(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  rows = worlds.packed(worlds.comparisons(rng, 5, 2), 64)
  grads = jax.grad(lambda reference: objective("dpo").evaluate(params, reference, rows)[0].total)(reference)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_padding_rows_change_nothing(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  examples = worlds.comparisons(rng, 9, 2)
  few = worlds.packed(examples, 64)
  many = worlds.packed(examples, 64, rows=few.tokens.shape[0] + 3)
  want, got = (evaluate(objective("dpo"), params, reference, rows)[1] for rows in (few, many))
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
