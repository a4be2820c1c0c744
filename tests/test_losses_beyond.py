"""Losses that TRL has not: their authors' formulas, neutral knobs, limits, and what each is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax import losses
from dpojax.losses import Pair
from tests.test_losses_parity import VECTORS, inputs


def log_sigmoid(x):
  return -np.logaddexp(0, -np.asarray(x))


def sigmoid(x):
  return np.exp(log_sigmoid(x))


# Each formula in the order its authors' code computes it, in NumPy and float64, from log-probs p of the
# policy and r of the reference, chosen (0) and rejected (1), lengths n, and b for beta.


def dpop(p, r, n, b):
  penalty = np.maximum(0, r[0] - p[0])
  return -log_sigmoid(b * ((p[0] - p[1]) - (r[0] - r[1]) - 5.0 * penalty))


def cal_dpo(p, r, n, b):
  chosen, rejected = p[0] - r[0], p[1] - r[1]
  calibration = (chosen - 0.5 / b) ** 2 + (rejected + 0.5 / b) ** 2
  return -log_sigmoid(chosen - rejected) + 0.5 * calibration


def bdpo(p, r, n, b):
  mixed = np.log(0.5 * np.exp(p[1]) + 0.5 * np.exp(r[1]))
  return -log_sigmoid(b * (p[0] - mixed) - b * (r[0] - r[1]))


def tdpo(p, r, n, b, *, alpha=1.0, kl=(0.7, 0.2)):
  return -log_sigmoid(b * ((p[0] - r[0]) - (p[1] - r[1]) - alpha * (kl[1] - kl[0])))


def beta_dpo(p, r, n, b):
  gap = p[0] - r[0] - p[1] + r[1]
  used = np.clip(b * (1 + 0.6 * (FIXED_MEAN - 0.1)), 1e-3, None)
  return -log_sigmoid(used * gap)


def alphapo(p, r, n, b):
  chosen, rejected = ((1 - np.exp(-0.25 * x / m)) / 0.25 for x, m in zip(p, n))
  return -log_sigmoid(b * (chosen - rejected) - 0.1)


FIXED_MEAN = None  # of the margins; beta-DPO takes it as a number
KL = Pair(*(np.full(6, value) for value in (0.7, 0.2)))
AUTHORS = {
  "dpop": (dpop, lambda x, b: losses.dpop_loss(x.policy, x.reference, beta=b, weight=5.0)),
  "cal_dpo": (cal_dpo, lambda x, b: losses.cal_dpo_loss(x.policy, x.reference, beta=b, weight=0.5)),
  "bdpo": (bdpo, lambda x, b: losses.bdpo_loss(x.policy, x.reference, beta=b)),
  "mappo": (
    lambda p, r, n, b: -log_sigmoid(b * (p[0] - r[0]) - 0.3 * b * (p[1] - r[1])),
    lambda x, b: losses.mappo_loss(x.policy, x.reference, beta=b, gap=0.3),
  ),
  "odpo": (
    lambda p, r, n, b: -log_sigmoid(b * (p[0] - r[0] - p[1] + r[1]) - 1.0 * np.log(0.9 - 0.2)),
    lambda x, b: losses.odpo_loss(x.policy, x.reference, beta=b, margin=np.log(0.7)),
  ),
  "gpo_exponential": (
    lambda p, r, n, b: np.exp(-b * (p[0] - r[0] - p[1] + r[1])),
    lambda x, b: losses.gpo_exponential_loss(x.policy, x.reference, beta=b),
  ),
  "gpo_truncated_quadratic": (
    lambda p, r, n, b: np.maximum(0, 1 - b * (p[0] - r[0] - p[1] + r[1])) ** 2,
    lambda x, b: losses.gpo_truncated_quadratic_loss(x.policy, x.reference, beta=b),
  ),
  "gpo_savage": (
    lambda p, r, n, b: (1 + np.exp(b * (p[0] - r[0] - p[1] + r[1]))) ** -2.0,
    lambda x, b: losses.gpo_savage_loss(x.policy, x.reference, beta=b),
  ),
  "r_dpo": (
    lambda p, r, n, b: -log_sigmoid(b * ((p[0] - p[1]) - (r[0] - r[1])) + 0.02 * (n[0] - n[1])),
    lambda x, b: losses.r_dpo_loss(x.policy, x.reference, x.lengths, beta=b, alpha=0.02),
  ),
  "h_dpo": (
    lambda p, r, n, b: -log_sigmoid(0.9 * b * p[0] - b * r[0] - 0.9 * b * p[1] + b * r[1]),
    lambda x, b: losses.h_dpo_loss(x.policy, x.reference, beta=b, alpha=0.9),
  ),
  "tdpo1": (tdpo, lambda x, b: losses.tdpo1_loss(x.policy, x.reference, KL, beta=b)),
  "tdpo2": (
    functools.partial(tdpo, alpha=0.5),
    lambda x, b: losses.tdpo2_loss(x.policy, x.reference, KL, beta=b),
  ),
  "beta_dpo": (
    beta_dpo,
    lambda x, b: losses.beta_dpo_loss(x.policy, x.reference, beta=b, alpha=0.6, center=0.1),
  ),
  "alphapo": (alphapo, lambda x, b: losses.alphapo_loss(x.means, beta=b, gamma=0.1, alpha=0.25)),
  "xpo": (
    lambda p, r, n, b: -log_sigmoid(b * (p[0] - r[0] - p[1] + r[1])) + 1e-2 * p[1],
    lambda x, b: losses.xpo_loss(x.policy, x.reference, x.policy.rejected, beta=b, alpha=1e-2),
  ),
}


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", AUTHORS)
def test_values_and_slopes_are_the_authors(name, beta, monkeypatch):
  """At the inputs of the golden vectors; slopes against central differences of the NumPy formula."""
  formula, loss = AUTHORS[name]
  with jax.enable_x64(True):

    def total(shift):
      values = loss(inputs(shift, "float64"), beta)
      return values.sum(), values

    grads, got = jax.grad(total, has_aux=True)(jnp.zeros((2, 6)))
  policy, reference, lengths = (np.asarray(VECTORS[key]) for key in ("policy", "reference", "lengths"))
  p, r = policy.sum(-1), reference.sum(-1)
  monkeypatch.setitem(globals(), "FIXED_MEAN", np.mean(p[0] - r[0] - p[1] + r[1]))
  np.testing.assert_allclose(got, formula(p, r, lengths, beta), rtol=1e-10)
  for side in (0, 1):
    step = 1e-6 * np.eye(2)[side][:, None]
    slope = (formula(p + step, r, lengths, beta) - formula(p - step, r, lengths, beta)) / 2e-6
    np.testing.assert_allclose(grads[side], slope, rtol=1e-6, atol=1e-9)


# A neutral knob gives DPO.


NEUTRAL = {
  "dpop": lambda p, r: losses.dpop_loss(p, r, beta=0.3, weight=0.0),
  "mappo": lambda p, r: losses.mappo_loss(p, r, beta=0.3, gap=1.0),
  "bdpo": lambda p, r: losses.bdpo_loss(p, r, beta=0.3, mix=1 - 1e-9),
  "r_dpo": lambda p, r: losses.r_dpo_loss(p, r, Pair(jnp.arange(4.0), jnp.arange(4.0)), beta=0.3, alpha=2.0),
  "h_dpo": lambda p, r: losses.h_dpo_loss(p, r, beta=0.3, alpha=1.0),
  "tdpo1": lambda p, r: losses.tdpo1_loss(p, r, Pair(jnp.ones(4), jnp.ones(4)), beta=0.3),
  "tdpo2": lambda p, r: losses.tdpo2_loss(p, r, Pair(jnp.ones(4), jnp.zeros(4)), beta=0.3, alpha=0.0),
  "beta_dpo": lambda p, r: losses.beta_dpo_loss(p, r, beta=0.3, alpha=0.0, center=5.0),
  "odpo": lambda p, r: losses.odpo_loss(p, r, beta=0.3, margin=0.0),
  "epsilon_dpo": lambda p, r: losses.epsilon_dpo_loss(p, r, r, p, beta=0.3, epsilon=0.0),
  "xpo": lambda p, r: losses.xpo_loss(p, r, p.chosen, beta=0.3, alpha=0.0),
}


def four_pairs(rng):
  reference = Pair(*jnp.asarray(rng.normal(-20, 3, size=(2, 4))))
  return Pair(*(r + jnp.asarray(rng.normal(size=4)) for r in reference)), reference


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_knob_gives_dpo_and_its_gradient(name, rng):
  with jax.enable_x64(True):
    policy, reference = four_pairs(rng)
    got, want = (
      jax.value_and_grad(lambda p, f=f: f(p, reference).sum())(policy)
      for f in (NEUTRAL[name], lambda p, r: losses.dpo_loss(p, r, beta=0.3))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_alphapo_goes_to_simpo_as_alpha_goes_to_0():
  means = Pair(jnp.asarray([-0.5, -2.0]), jnp.asarray([-1.0, -1.5]))
  with jax.enable_x64(True):
    means = jax.tree.map(lambda x: x.astype("float64"), means)
    np.testing.assert_allclose(
      losses.alphapo_loss(means, beta=2.5, gamma=0.5, alpha=1e-6),
      losses.simpo_loss(means, beta=2.5, gamma=0.5),
      rtol=1e-5,
    )


# Where policy and reference agree: (value, push on chosen, push on rejected) of beta.


START = {
  "dpop": lambda b: (np.log(2), b / 2, -b / 2),
  "cal_dpo": lambda b: (np.log(2) + 1 / (2 * b**2), 0.5 + 1 / b, -0.5 - 1 / b),
  "bdpo": lambda b: (np.log(2), b / 2, -b / 4),
  "gpo_exponential": lambda b: (1, b, -b),
  "gpo_truncated_quadratic": lambda b: (1, 2 * b, -2 * b),
  "gpo_savage": lambda b: (1 / 4, b / 4, -b / 4),
}


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("name", START)
def test_where_policy_is_reference(name, beta):
  with jax.enable_x64(True):
    here = Pair(jnp.full((), -20.0), jnp.full((), -25.0))
    value, slopes = jax.value_and_grad(lambda p: losses.PAIRWISE_LOSSES[name](p, here, beta=beta))(here)
    np.testing.assert_allclose((value, *(-s for s in slopes)), START[name](beta), rtol=1e-9)


def test_h_dpo_starts_at_log_2_only_where_the_reference_is_indifferent():
  here = Pair(jnp.float32(-20.0), jnp.float32(-25.0))
  value = losses.h_dpo_loss(here, here, beta=0.1, alpha=0.9)
  np.testing.assert_allclose(value, -log_sigmoid(0.1 * (0.9 - 1) * 5), rtol=1e-5)


# What they are for.


LEVELS = st.floats(-8, 8, width=32)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
  chosen=LEVELS,
  rejected=LEVELS,
  more=st.floats(0.25, 4, width=32),
  beta=st.sampled_from([0.05, 0.5]),
  name=st.sampled_from(
    sorted(
      {*NEUTRAL, "gpo_exponential", "gpo_truncated_quadratic", "gpo_savage"}
      - {"xpo", "beta_dpo", "epsilon_dpo", "tdpo1", "tdpo2", "r_dpo"}
    )
  ),
)
def test_a_likelier_chosen_and_a_less_likely_rejected_response_never_cost(name, chosen, rejected, more, beta):
  knobs = {"mappo": {"gap": 0.4}, "h_dpo": {"alpha": 0.8}, "odpo": {"margin": 0.3}}.get(name, {})
  loss = losses.h_dpo_loss if name == "h_dpo" else losses.PAIRWISE_LOSSES[name]
  zero = Pair(jnp.float32(0), jnp.float32(0))
  at = lambda w, l: float(loss(Pair(jnp.float32(w), jnp.float32(l)), zero, beta=beta, **knobs))
  here = at(chosen, rejected)
  assert at(chosen + more, rejected) <= here + 1e-6 and at(chosen, rejected - more) <= here + 1e-6


def pushes(loss, chosen, rejected):
  """How hard a step raises the chosen and lowers the rejected response, at log-ratios."""
  zero = jnp.zeros(())
  slopes = jax.grad(lambda p: loss(p, Pair(zero, zero)))(Pair(jnp.float64(chosen), jnp.float64(rejected)))
  return -slopes.chosen, slopes.rejected


@pytest.mark.parametrize("weight", [1.0, 50.0])
def test_dpop_pushes_a_chosen_response_below_the_reference_1_plus_weight_times(weight):
  with jax.enable_x64(True):
    loss = functools.partial(losses.dpop_loss, beta=0.1, weight=weight)
    up, down = pushes(loss, -0.5, -3.0)
    np.testing.assert_allclose(up / down, 1 + weight, rtol=1e-9)
    np.testing.assert_allclose(*pushes(loss, 0.5, -3.0), rtol=1e-9)


def test_cal_dpo_rests_where_neither_term_pulls_and_that_is_about_half_a_margin_of_1_over_beta():
  """By bisection of the chosen response's slope along h_l = -h_w, the way both go by symmetry."""
  with jax.enable_x64(True):
    for beta in (0.05, 0.2):
      low, high = 0.0, 100.0
      for _ in range(60):
        middle = (low + high) / 2
        up, _ = pushes(functools.partial(losses.cal_dpo_loss, beta=beta), middle, -middle)
        low, high = (middle, high) if up > 0 else (low, middle)
      np.testing.assert_allclose(low, 1 / (2 * beta) + sigmoid(-2 * low) / 2, rtol=1e-6)


@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9])
def test_bdpo_lets_a_rejected_response_win_no_more_than_its_bound(mix):
  with jax.enable_x64(True):
    zero = jnp.zeros(())
    lost = losses.bdpo_loss(Pair(zero, jnp.float64(-1e4)), Pair(zero, zero), beta=0.3, mix=mix)
    np.testing.assert_allclose(lost, -log_sigmoid(-0.3 * np.log(1 - mix)), rtol=1e-9)
    up, down = pushes(functools.partial(losses.bdpo_loss, beta=0.3, mix=mix), -1.0, -40.0)
    assert up > 0.05 and abs(down) < 1e-12


@pytest.mark.parametrize("mix", [0, 0.0, 1.0, -0.2, 2])
def test_a_mix_outside_of_0_and_1_is_refused(mix):
  zero = Pair(jnp.zeros(()), jnp.zeros(()))
  with pytest.raises(ValueError, match=f"mix is {mix}; bdpo_loss needs one between 0 and 1"):
    losses.bdpo_loss(zero, zero, beta=0.1, mix=mix)


def test_mappo_lowers_the_rejected_response_gap_times_as_hard_and_a_gap_may_be_of_each_pair():
  gap = jnp.asarray([0.0, 0.25, 1.0])
  zero = Pair(jnp.zeros(3), jnp.zeros(3))
  slopes = jax.grad(lambda p: losses.mappo_loss(p, zero, beta=0.2, gap=gap).sum())(zero)
  np.testing.assert_allclose(slopes.rejected, -gap * slopes.chosen, rtol=1e-6)


def test_savage_gives_up_a_pair_far_on_the_wrong_side_and_the_others_do_not():
  with jax.enable_x64(True):
    near, far = (
      [
        pushes(functools.partial(loss, beta=1.0), h, 0.0)[0]
        for loss in (
          losses.gpo_savage_loss,
          losses.dpo_loss,
          losses.gpo_exponential_loss,
          losses.gpo_truncated_quadratic_loss,
        )
      ]
      for h in (-1.0, -20.0)
    )
    assert far[0] < 1e-6 * near[0]
    assert all(f > n for f, n in zip(far[1:], near[1:]))


def test_r_dpo_pushes_a_pair_less_whose_chosen_response_is_the_longer():
  lengths = Pair(jnp.asarray([10.0, 20.0, 30.0]), jnp.full(3, 20.0))
  zero = Pair(jnp.zeros(3), jnp.zeros(3))
  up = -jax.grad(lambda p: losses.r_dpo_loss(p, zero, lengths, beta=0.1, alpha=0.05).sum())(zero).chosen
  np.testing.assert_allclose(up, 0.1 * sigmoid(-0.05 * np.array([-10, 0, 10])), rtol=1e-5)
  assert up[0] > up[1] > up[2]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_optimum_of_h_dpo_is_the_policy_of_its_objective(alpha, rng):
  """Under Bradley-Terry labels, pi_ref^(1 / alpha) exp(r / (alpha beta)) has no slope left."""
  beta, count = 0.4, 5
  rewards, logits = rng.normal(size=(2, count))
  with jax.enable_x64(True):
    reference = jax.nn.log_softmax(jnp.asarray(logits))
    best = jax.nn.log_softmax(reference / alpha + rewards / (alpha * beta))
    first, second = (jnp.asarray(i) for i in np.nonzero(~np.eye(count, dtype=bool)))
    chance = jax.nn.sigmoid(jnp.asarray(rewards)[first] - jnp.asarray(rewards)[second])

    def expected(logits):
      policy = jax.nn.log_softmax(logits)
      return jnp.sum(
        chance
        * losses.h_dpo_loss(
          Pair(policy[first], policy[second]),
          Pair(reference[first], reference[second]),
          beta=beta,
          alpha=alpha,
        )
      )

    np.testing.assert_allclose(jax.grad(expected)(best), 0, atol=1e-10)
    entropy = -jnp.sum(jnp.exp(best) * best)
    sharper = jax.nn.log_softmax(reference / (alpha / 2) + rewards / (alpha / 2 * beta))
    assert entropy > -jnp.sum(jnp.exp(sharper) * sharper)


def test_tdpo1_sends_a_gradient_through_both_kls_and_tdpo2_through_the_rejected_ones():
  zero = Pair(jnp.zeros(()), jnp.zeros(()))
  kl = Pair(jnp.float32(0.5), jnp.float32(0.8))
  both = jax.grad(lambda kl: losses.tdpo1_loss(zero, zero, kl, beta=0.2))(kl)
  one = jax.grad(lambda kl: losses.tdpo2_loss(zero, zero, kl, beta=0.2, alpha=0.5))(kl)
  weight = 0.2 * sigmoid(0.2 * 0.3)
  np.testing.assert_allclose(both, [-weight, weight], rtol=1e-5)
  np.testing.assert_allclose(one, [0, 0.1 * sigmoid(0.1 * 0.3)], rtol=1e-5)


# A beta that moves.


def test_beta_dpo_raises_beta_for_wide_batches_lowers_it_for_narrow_ones_and_keeps_it_above_0():
  zero = Pair(jnp.zeros(4), jnp.zeros(4))

  def beta(mean):
    """Read off the loss of a margin of 1 beside one that makes the mean."""
    policy = Pair(jnp.asarray([1.0, 4 * mean - 1, 0, 0]), jnp.zeros(4))
    loss = losses.beta_dpo_loss(policy, zero, beta=0.1, alpha=0.5, center=1.0)[0]
    return float(-np.log(np.expm1(loss)))

  for mean in (0.0, 1.0, 3.0):
    np.testing.assert_allclose(beta(mean), 0.1 * (1 + 0.5 * (mean - 1)), rtol=1e-4)
  np.testing.assert_allclose(beta(-9.0), 1e-3, rtol=1e-2)


def test_beta_dpo_takes_the_mean_of_the_pairs_that_are_there_and_no_gradient_through_it():
  policy = Pair(jnp.asarray([1.0, 2.0, 50.0]), jnp.zeros(3))
  zero = Pair(jnp.zeros(3), jnp.zeros(3))
  where = jnp.asarray([True, True, False])
  loss = lambda p: losses.beta_dpo_loss(p, zero, beta=0.1, alpha=0.5, center=1.0, where=where)
  moved = 0.1 * (1 + 0.5 * (1.5 - 1))
  np.testing.assert_allclose(loss(policy)[:2], -log_sigmoid(moved * np.array([1.0, 2.0])), rtol=1e-5)
  grads = jax.grad(lambda p: loss(p)[:2].sum())(policy).chosen
  np.testing.assert_allclose(grads, -moved * sigmoid(-moved * np.array([1, 2, np.inf])), rtol=1e-5)


def test_the_filter_of_beta_dpo_draws_a_share_without_replacement_in_proportion_to_its_chances(rng):
  margins = jnp.asarray([0.0, 1.0, 3.0, 0.5])
  where = jnp.asarray([True, True, True, False])
  noise = jnp.asarray(rng.random((4000, 4)), jnp.float32)
  kept = losses.beta_dpo_filter(
    jnp.broadcast_to(margins, noise.shape),
    noise,
    center=0.0,
    spread=1.0,
    share=0.4,
    where=jnp.broadcast_to(where, noise.shape),
  )
  np.testing.assert_array_equal(kept.sum(-1), 1)  # 0.4 of the three that are there, rounded down
  chances = np.exp(-np.square(np.array([0.0, 1.0, 3.0])) / 2)
  np.testing.assert_allclose(kept.mean(0)[:3], chances / chances.sum(), atol=0.03)
  assert not kept[:, 3].any()


def test_the_filter_counts_and_keeps_nothing_of_an_empty_batch():
  margins, noise = jnp.arange(5.0), jnp.full(5, 0.5)
  for share, count in ((0.0, 0), (0.5, 2), (1.0, 5)):
    assert losses.beta_dpo_filter(margins, noise, center=0.0, spread=1.0, share=share).sum() == count
  nothing = losses.beta_dpo_filter(
    margins, noise, center=0.0, spread=1.0, share=1.0, where=jnp.zeros(5, bool)
  )
  assert not nothing.any()


def test_epsilon_dpo_lowers_beta_where_the_policy_prefers_more_the_farther_it_is():
  zero = jnp.zeros(4)
  margin = lambda *values: Pair(jnp.asarray(values), zero)
  near = margin(0.9, 1.1, 1.1, 1.0)
  far = margin(1.1, 0.9, 1.1, 1.0)
  beta = losses.epsilon_dpo_beta(Pair(jnp.ones(4), zero), near, far, beta=0.1, epsilon=0.2)
  np.testing.assert_allclose(beta, [0.1 / 1.2, 0.1 / 0.8, 0.1, 0.1], rtol=1e-6)


# What a loss is given.


@settings(deadline=None, max_examples=25, derandomize=True)
@given(lengths=st.tuples(st.integers(0, 7), st.integers(0, 7)), seed=st.integers(0, 99))
def test_sampo_keeps_the_shorter_response_and_as_many_tokens_of_the_longer(lengths, seed):
  rng = np.random.default_rng(seed)
  values = Pair(*(2.0 ** jnp.arange(7) for _ in "ab"))  # a sum tells which tokens are in it
  mask = Pair(*(jnp.arange(7) < n for n in lengths))
  noise = Pair(*jnp.asarray(rng.random((2, 7)), jnp.float32))
  sums = losses.sampo_log_probs(values, mask, noise)
  for total, n in zip(sums, lengths):
    kept = f"{int(total):07b}"[::-1]
    assert kept.count("1") == min(lengths) and "1" not in kept[n:]


def test_sampo_draws_each_token_of_the_longer_response_as_often(rng):
  values = Pair(jnp.asarray([1.0, 10.0, 100.0, 1000.0]), jnp.asarray([1.0, 1.0, 0, 0]))
  mask = Pair(jnp.ones(4, bool), jnp.arange(4) < 2)
  noise = Pair(*jnp.asarray(rng.random((2, 3000, 4)), jnp.float32))
  whole = jax.tree.map(lambda x: jnp.broadcast_to(x, (3000, 4)), (values, mask))
  sums = losses.sampo_log_probs(*whole, noise)
  np.testing.assert_allclose(sums.chosen.mean(), 1111 / 2, rtol=0.05)
  np.testing.assert_array_equal(sums.rejected, 2.0)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(seed=st.integers(0, 99), tau=st.sampled_from([0.2, 1.0, 10.0]))
def test_the_weights_of_dr_dpo_give_the_gradient_of_its_loss(seed, tau):
  rng = np.random.default_rng(seed)
  where = jnp.asarray(rng.random(6) < 0.7).at[0].set(True)
  with jax.enable_x64(True):
    margins = jnp.asarray(rng.normal(size=6, scale=3))
    loss = lambda h: -jax.nn.log_sigmoid(h)

    def robust(h):
      return -tau * jnp.log(jnp.mean(jnp.exp(-loss(h) / tau), where=where))

    def weighted(h):
      values = loss(h)
      return jnp.mean(losses.dr_dpo_weights(values, tau=tau, where=where) * values, where=where)

    np.testing.assert_allclose(jax.grad(weighted)(margins), jax.grad(robust)(margins), rtol=1e-9)
    weights = losses.dr_dpo_weights(loss(margins), tau=tau, where=where)
    np.testing.assert_allclose(jnp.mean(weights, where=where), 1.0, rtol=1e-9)


def test_the_weights_of_dr_dpo_go_to_1_as_tau_grows_and_nothing_is_weighed_where_nothing_is():
  values = jnp.asarray([0.1, 5.0, np.nan])
  where = jnp.asarray([True, True, False])
  np.testing.assert_allclose(losses.dr_dpo_weights(values, tau=1e4, where=where), [1, 1, 0], atol=1e-3)
  assert not losses.dr_dpo_weights(values, tau=1.0, where=jnp.zeros(3, bool)).any()


# What beta-DPO remembers, and what it makes of a batch.


def test_running_margins_are_the_authors_over_batches(rng):
  """`update_and_sync_tensor_mean` of their trainers.py, with its standard deviation of divisor B - 1."""
  mean = std = 0.0
  running = losses.RunningMargins(jnp.float32(0), jnp.float32(0))
  for count in (8, 5, 8):
    gaps = rng.normal(1.0, 2.0, size=8).astype(np.float32)
    mean, std = 0.9 * mean + 0.1 * gaps[:count].mean(), 0.9 * std + 0.1 * gaps[:count].std(ddof=1)
    running = losses.running_margins(running, jnp.asarray(gaps), where=jnp.arange(8) < count)
    np.testing.assert_allclose(running, (mean, std), rtol=1e-5)
  nothing = losses.running_margins(running, jnp.ones(8), where=jnp.zeros(8, bool))
  assert nothing == running


def test_a_batch_of_beta_dpo_has_the_beta_of_what_it_keeps_and_weighs_that_as_the_whole(rng):
  margins, noise = (jnp.asarray(rng.normal(size=10), jnp.float32) for _ in range(2))
  noise, there = jax.nn.sigmoid(noise), jnp.arange(10) < 9
  running = losses.RunningMargins(jnp.float32(0.2), jnp.float32(0.7))
  beta, weights = losses.beta_dpo_batch(margins, noise, running, beta=0.5, alpha=0.6, share=0.8, where=there)
  kept = np.asarray(weights) > 0
  assert kept.sum() == int(0.8 * 9) and not kept[9]
  np.testing.assert_allclose(weights[kept], 9 / 7, rtol=1e-6)
  want = max(0.5 * (1 + 0.6 * (np.asarray(margins)[kept].mean() - 0.2)), 1e-3)
  np.testing.assert_allclose(beta, want, rtol=1e-5)
  first = losses.RunningMargins(jnp.float32(0), jnp.float32(0))  # policy and reference are one
  beta, weights = losses.beta_dpo_batch(jnp.zeros(10), noise, first, beta=0.5)
  np.testing.assert_allclose(beta, 0.5)
  np.testing.assert_allclose(weights.sum(), 10, rtol=1e-6)


def test_the_gradient_of_nash_md_is_that_of_winning_less_the_kl(rng):
  """Summed over all responses of a small world, by their chances, against a fixed rival."""
  with jax.enable_x64(True):
    logits, reference, rival = (jnp.asarray(rng.normal(size=5)) for _ in range(3))
    wins = jax.nn.sigmoid(jnp.asarray(rng.normal(size=(5, 5)))) @ jax.nn.softmax(rival)
    log_reference = jax.nn.log_softmax(reference)

    def sampled(logits):
      ours = jax.nn.log_softmax(logits)
      values = losses.nash_md_loss(ours, log_reference, wins, beta=0.3)
      return jnp.sum(jax.lax.stop_gradient(jnp.exp(ours)) * values)

    def exact(logits):
      ours = jax.nn.log_softmax(logits)
      return -jnp.sum(jnp.exp(ours) * (wins - 0.3 * (ours - log_reference)))

    np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(exact)(logits), rtol=1e-9)
