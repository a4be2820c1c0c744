"""Losses against their formulas in plain NumPy, their gradients, extremes and fixed points."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from dpojax import losses
from dpojax.losses import Pair

OPTIONS = {"robust_dpo": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.1}}
NAMES = sorted(losses.PAIRWISE_LOSSES)


def loss_named(name):
  return functools.partial(losses.PAIRWISE_LOSSES[name], **OPTIONS.get(name, {}))


def log_sigmoid(x):
  return -np.logaddexp(0, -x)


def sigmoid(x):
  return np.exp(log_sigmoid(x))


# Each formula as its paper states it, of h_w, h_l and beta.
FORMULAS = {
    "dpo": lambda w, l, b: -log_sigmoid(b * (w - l)),
    "ipo": lambda w, l, b: (w - l - 1 / (2 * b)) ** 2,
    "hinge": lambda w, l, b: np.maximum(0, 1 - b * (w - l)),
    "robust_dpo": lambda w, l, b: (
        -0.9 * log_sigmoid(b * (w - l)) + 0.1 * log_sigmoid(b * (l - w))) / 0.8,
    "exo_pair": lambda w, l, b: (
        sigmoid(b * (w - l)) * np.log(sigmoid(b * (w - l)) / 0.9)
        + sigmoid(b * (l - w)) * np.log(sigmoid(b * (l - w)) / 0.1)),
    "nca_pair": lambda w, l, b: (
        -log_sigmoid(b * w) - 0.5 * log_sigmoid(-b * w) - 0.5 * log_sigmoid(-b * l)),
    "bco_pair": lambda w, l, b: -log_sigmoid(b * w) - log_sigmoid(-b * l),
    "sppo_hard": lambda w, l, b: (w - 0.5 / b) ** 2 + (l + 0.5 / b) ** 2,
    "apo_zero": lambda w, l, b: 1 - sigmoid(b * w) + sigmoid(b * l),
    "apo_down": lambda w, l, b: sigmoid(b * w) + 1 - sigmoid(b * (w - l)),
    "discopop": lambda w, l, b: (
        (1 - sigmoid(b * (w - l) / 0.05)) * -log_sigmoid(b * (w - l))
        + sigmoid(b * (w - l) / 0.05) * np.exp(-b * (w - l))),
    "f_dpo_forward_kl": lambda w, l, b: -log_sigmoid(b * (np.exp(-l) - np.exp(-w))),
    "f_dpo_js_divergence": lambda w, l, b: -log_sigmoid(
        b * (np.log(2 * np.exp(w) / (1 + np.exp(w))) - np.log(2 * np.exp(l) / (1 + np.exp(l))))),
    "f_dpo_alpha_divergence": lambda w, l, b: -log_sigmoid(
        b * ((1 - np.exp(-0.5 * w)) / 0.5 - (1 - np.exp(-0.5 * l)) / 0.5)),
}


@pytest.fixture
def pairs(rng):
  """Policy and reference, 12 pairs of summed log-probs."""
  draw = lambda: rng.normal(-20, 3, size=(4, 3))
  reference = Pair(draw(), draw())
  return Pair(*(r + rng.normal(size=r.shape) for r in reference)), reference


def test_every_loss_of_the_table_has_its_formula_here():
  assert set(FORMULAS) == set(NAMES)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_its_papers_formula(name, beta, pairs):
  policy, reference = pairs
  want = FORMULAS[name](*(p - r for p, r in zip(policy, reference)), beta)
  with jax.enable_x64(True):
    got = loss_named(name)(*jax.tree.map(jnp.asarray, pairs), beta=beta)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
  single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pairs)
  # A log-ratio of values near 20 is known to about 2e-6 in float32.
  np.testing.assert_allclose(loss_named(name)(*single, beta=beta), want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, pairs):
  with jax.enable_x64(True):
    policy, reference = jax.tree.map(jnp.asarray, pairs)
    check_grads(lambda p, b: loss_named(name)(p, reference, beta=b), (policy, 0.7), order=1,
                modes=["rev"], rtol=1e-4, atol=1e-4, eps=1e-6)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.sampled_from(NAMES), st.sampled_from([-1e4, -50.0, 0.0, 50.0, 1e4]),
       st.sampled_from([-1e4, -50.0, 0.0, 50.0, 1e4]), st.sampled_from([0.05, 1.0, 5.0]),
       st.sampled_from(["float32", "bfloat16"]))
def test_losses_and_gradients_are_finite_at_extremes(name, chosen, rejected, beta, dtype):
  policy = Pair(jnp.asarray([chosen], dtype), jnp.asarray([rejected], dtype))
  reference = Pair(jnp.zeros(1, dtype), jnp.zeros(1, dtype))
  value, grads = jax.value_and_grad(
      lambda p: loss_named(name)(p, reference, beta=beta).sum())(policy)
  assert value.dtype == jnp.float32
  assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in grads)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.sampled_from(NAMES), st.sampled_from([(), (1,), (5,), (2, 3), (0,)]))
def test_losses_keep_the_shape_and_are_elementwise(name, shape):
  rng = np.random.default_rng(1)
  policy, reference = (Pair(*jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)) for _ in "ab")
  got = loss_named(name)(policy, reference, beta=0.3)
  assert got.shape == shape
  flat = [Pair(*(x.ravel() for x in pair)) for pair in (policy, reference)]
  one_by_one = [loss_named(name)(*(Pair(*(x[i] for x in pair)) for pair in flat), beta=0.3)
                for i in range(got.size)]
  np.testing.assert_allclose(got.ravel(), one_by_one, rtol=1e-5, atol=1e-6)


def test_a_sweep_of_sixteen_betas_compiles_once_and_vmaps(pairs):
  policy, reference = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pairs)
  for name in NAMES:
    traces = []
    @jax.jit
    def loss(beta, name=name, traces=traces):
      traces.append(beta)
      return loss_named(name)(policy, reference, beta=beta)
    betas = jnp.geomspace(0.05, 5.0, 16)
    swept = jnp.stack([loss(beta) for beta in betas])
    assert len(traces) == 1
    np.testing.assert_allclose(
        jax.vmap(lambda beta, name=name: loss_named(name)(policy, reference, beta=beta))(betas),
        swept, rtol=2e-5, atol=1e-5)


# DPO.


def test_loss_is_log_2_and_the_weight_one_half_where_policy_is_reference(pairs):
  reference = jax.tree.map(jnp.asarray, pairs[1])
  value, grads = jax.value_and_grad(
      lambda p: losses.dpo_loss(p, reference, beta=0.3).sum())(reference)
  np.testing.assert_allclose(value, 12 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(grads.chosen, -0.3 / 2, rtol=1e-6)
  np.testing.assert_allclose(grads.rejected, 0.3 / 2, rtol=1e-6)


def test_gradient_weighs_a_pair_by_how_wrong_its_reward_is(pairs):
  policy, reference = jax.tree.map(jnp.asarray, pairs)
  grads = jax.grad(lambda p: losses.dpo_loss(p, reference, beta=0.3).sum())(policy)
  chosen, rejected = (losses.implicit_reward(p, r, beta=0.3) for p, r in zip(policy, reference))
  np.testing.assert_allclose(grads.chosen, -0.3 * jax.nn.sigmoid(rejected - chosen), rtol=1e-5)
  np.testing.assert_allclose(grads.rejected, 0.3 * jax.nn.sigmoid(rejected - chosen), rtol=1e-5)


def minimum(loss):
  """The h that minimises a convex loss of h, by bisection of its slope."""
  slope = jax.grad(lambda h: loss(Pair(h, jnp.zeros(())), Pair(jnp.zeros(()), jnp.zeros(()))))
  low, high = -100.0, 100.0
  for _ in range(80):
    middle = (low + high) / 2
    low, high = (middle, high) if slope(middle) < 0 else (low, middle)
  return low


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_stops_at_a_margin_of_1_over_2_beta_and_cdpo_at_its_log_odds(beta):
  with jax.enable_x64(True):
    np.testing.assert_allclose(
        minimum(functools.partial(losses.ipo_loss, beta=beta)), 1 / (2 * beta), rtol=1e-6)
    np.testing.assert_allclose(
        minimum(functools.partial(losses.dpo_loss, beta=beta, label_smoothing=0.2)),
        np.log(0.8 / 0.2) / beta, rtol=1e-6)


def test_ipo_with_label_probability_p_stops_at_2p_minus_1_over_2_beta():
  def expected(policy, reference):
    flipped = [Pair(pair.rejected, pair.chosen) for pair in (policy, reference)]
    return 0.7 * losses.ipo_loss(policy, reference, beta=0.5) + 0.3 * losses.ipo_loss(*flipped, beta=0.5)
  with jax.enable_x64(True):
    np.testing.assert_allclose(minimum(expected), (2 * 0.7 - 1) / (2 * 0.5), rtol=1e-6)


def test_robust_dpo_is_unbiased_under_flipped_labels(pairs):
  with jax.enable_x64(True):
    policy, reference = jax.tree.map(jnp.asarray, pairs)
    flipped = [Pair(pair.rejected, pair.chosen) for pair in (policy, reference)]
    robust = functools.partial(losses.robust_dpo_loss, beta=0.4, label_smoothing=0.2)
    np.testing.assert_allclose(
        0.8 * robust(policy, reference) + 0.2 * robust(*flipped),
        losses.dpo_loss(policy, reference, beta=0.4), rtol=1e-9)


def test_exo_without_label_smoothing_is_refused(pairs):
  with pytest.raises(ValueError, match="label_smoothing is 0.0; exo_pair_loss needs one above 0"):
    losses.exo_pair_loss(*pairs, beta=0.1, label_smoothing=0.0)


# Rankings.


def test_plackett_luce_of_two_is_bradley_terry(rng):
  rewards = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
  np.testing.assert_allclose(
      losses.plackett_luce_loss(rewards), losses.bradley_terry_loss(rewards[:, 0], rewards[:, 1]),
      rtol=1e-5)


def test_plackett_luce_is_the_chance_of_drawing_the_ranking(rng):
  rewards = rng.normal(size=5)
  chance = 1.0
  for k in range(5):
    chance *= np.exp(rewards[k]) / np.exp(rewards[k:]).sum()
  np.testing.assert_allclose(losses.plackett_luce_loss(jnp.asarray(rewards)), -np.log(chance), rtol=1e-5)


def test_absent_responses_do_not_count_in_a_ranking(rng):
  rewards = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
  where = jnp.arange(5)[None] < jnp.asarray([[5], [3], [2], [1]])
  got, grads = jax.value_and_grad(
      lambda r: losses.plackett_luce_loss(r, where=where).sum())(rewards)
  want = sum(losses.plackett_luce_loss(row[:n]) for row, n in zip(rewards, (5, 3, 2, 1)))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert not np.any(np.where(where, 0, grads)) and np.all(np.isfinite(grads))


def test_a_reward_of_the_prompt_alone_changes_no_preference_loss(rng):
  rewards = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
  shifted = rewards + jnp.asarray(rng.normal(size=(6, 1)), jnp.float32)
  np.testing.assert_allclose(
      losses.plackett_luce_loss(shifted), losses.plackett_luce_loss(rewards), rtol=1e-4)


# Without a reference, unpaired, and what losses are given.


def test_reference_free_losses_are_their_formulas(rng):
  chosen, rejected = -rng.uniform(0.1, 3, size=(2, 7))
  policy = Pair(jnp.asarray(chosen), jnp.asarray(rejected))
  odds = lambda m: np.log(np.exp(m) / (1 - np.exp(m)))
  for got, want in (
      (losses.simpo_loss(policy, beta=2.0, gamma=0.5), -log_sigmoid(2 * (chosen - rejected) - 0.5)),
      (losses.cpo_loss(policy, beta=0.3), -log_sigmoid(0.3 * (chosen - rejected))),
      (losses.orpo_loss(policy, weight=0.1), -chosen - 0.1 * log_sigmoid(odds(chosen) - odds(rejected))),
      (losses.unlikelihood_loss(policy, alpha=0.5), -chosen + 0.5 * rejected),
      (losses.nll_loss(policy.chosen), -chosen)):
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("mean_log_prob", [-1e4, -30.0, -1e-6, 0.0])
def test_orpo_is_finite_for_probabilities_next_to_0_and_1(mean_log_prob):
  value, grads = jax.value_and_grad(lambda p: losses.orpo_loss(p, weight=0.1))(
      Pair(jnp.float32(mean_log_prob), jnp.float32(-1.0)))
  assert jnp.isfinite(value) and all(map(jnp.isfinite, grads))


def test_unpaired_losses_are_their_formulas(rng):
  ratios, desirable = rng.normal(size=9), rng.random(9) < 0.5
  sign = np.where(desirable, 1, -1)
  got = losses.kto_loss(jnp.asarray(ratios), jnp.asarray(desirable), jnp.asarray(0.3), beta=0.5,
                        desirable_weight=1.5, undesirable_weight=0.7)
  np.testing.assert_allclose(
      got, np.where(desirable, 1.5, 0.7) * (1 - sigmoid(sign * 0.5 * (ratios - 0.3))), rtol=1e-5)
  negative = losses.kto_loss(jnp.asarray(ratios), jnp.asarray(desirable), jnp.asarray(-2.0), beta=0.5)
  np.testing.assert_allclose(negative, 1 - sigmoid(sign * 0.5 * ratios), rtol=1e-5)
  assert jax.grad(lambda kl: losses.kto_loss(
      jnp.asarray(ratios), jnp.asarray(desirable), kl, beta=0.5).sum())(0.3) == 0
  got = losses.bco_loss(jnp.asarray(ratios), jnp.asarray(desirable), beta=0.5, delta=0.2)
  np.testing.assert_allclose(got, -log_sigmoid(sign * (0.5 * ratios - 0.2)), rtol=1e-5)


def test_sorted_losses_compare_rank_by_rank(pairs):
  with jax.enable_x64(True):
    policy, reference = jax.tree.map(lambda x: jnp.asarray(x).ravel(), pairs)
    margins = np.sort(policy.chosen - policy.rejected) - np.sort(reference.chosen - reference.rejected)
    np.testing.assert_allclose(
        losses.aot_loss(policy, reference, beta=0.4), -log_sigmoid(0.4 * margins), rtol=1e-9)
    chosen, rejected = (np.sort(p - r) for p, r in zip(policy, reference))
    np.testing.assert_allclose(
        losses.aot_unpaired_loss(policy, reference, beta=0.4),
        -log_sigmoid(0.4 * (chosen - rejected)), rtol=1e-9)


def test_lengths_divide_sums_and_absent_responses_stay_0():
  sums = Pair(jnp.asarray([-6.0, 0.0]), jnp.asarray([-8.0, -3.0]))
  got = losses.length_normalize(sums, Pair(jnp.asarray([3, 0]), jnp.asarray([2, 1])))
  np.testing.assert_allclose(got.chosen, [-2.0, 0.0])
  np.testing.assert_allclose(got.rejected, [-4.0, -3.0])


def test_ld_dpo_counts_the_tokens_beyond_the_shorter_response_alpha_times():
  values = Pair(jnp.asarray([-1.0, -2.0, -4.0, -8.0]), jnp.asarray([-1.0, -1.0, 0.0, 0.0]))
  mask = Pair(jnp.asarray([1, 1, 1, 1], bool), jnp.asarray([1, 1, 0, 0], bool))
  got = losses.ld_dpo_log_probs(values, mask, alpha=0.5)
  np.testing.assert_allclose(got, [-3.0 + 0.5 * -12.0, -2.0])
  plain = losses.ld_dpo_log_probs(values, mask, alpha=1.0)
  np.testing.assert_allclose(plain, [-15.0, -2.0])


def test_wpo_weights_are_capped_at_1_and_carry_no_gradient():
  alignment = Pair(jnp.asarray([-0.5, 1.0]), jnp.asarray([-0.2, 0.5]))
  np.testing.assert_allclose(losses.wpo_weights(alignment), [np.exp(-0.7), 1.0], rtol=1e-6)
  grads = jax.grad(lambda a: losses.wpo_weights(a).sum())(alignment)
  assert not any(np.any(g) for g in grads)


def test_a_mixed_reference_lies_between_and_keeps_its_dtype():
  policy, reference = {"w": jnp.full(2, 3.0)}, {"w": jnp.full(2, 1.0, jnp.bfloat16)}
  mixed = losses.mix_reference(policy, reference, alpha=0.25)
  assert mixed["w"].dtype == jnp.bfloat16
  np.testing.assert_allclose(mixed["w"].astype(jnp.float32), 1.5)


def test_kl_estimators_agree_with_the_exact_kl_in_expectation(rng):
  ours, theirs = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=8), jnp.float32)) for _ in "ab")
  exact = losses.token_kl(ours, theirs)
  expectation = lambda values: jnp.sum(jnp.exp(ours) * values)
  np.testing.assert_allclose(expectation(losses.kl_k1(ours, theirs)), exact, rtol=1e-4)
  np.testing.assert_allclose(expectation(losses.kl_k3(ours, theirs)), exact, rtol=1e-4)
  assert jnp.all(losses.kl_k3(ours, theirs) >= 0)
  np.testing.assert_allclose(
      losses.kl_k2(ours, theirs), np.square(np.asarray(ours) - np.asarray(theirs)) / 2, rtol=1e-5)
  assert jnp.isfinite(losses.kl_k3(jnp.float32(-1e4), jnp.float32(0.0)))


def test_every_public_function_says_what_it_returns():
  for name, function in vars(losses).items():
    public = inspect.isfunction(function) and not name.startswith("_")
    if public and function.__module__ == losses.__name__:
      assert function.__doc__ and function.__doc__.startswith("Returns"), name
