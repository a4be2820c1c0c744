"""Losses against their formulas in plain NumPy, their gradients, extremes and fixed points."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from dpojax import losses
from dpojax.losses import Pair

OPTIONS = {
  "robust_dpo": {"label_smoothing": 0.1},
  "exo_pair": {"label_smoothing": 0.1},
  "mappo": {"gap": 0.4},
  "odpo": {"margin": 0.7},
}
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
  "odpo": lambda w, l, b: -log_sigmoid(b * (w - l) - 0.7),
  "ipo": lambda w, l, b: (w - l - 1 / (2 * b)) ** 2,
  "hinge": lambda w, l, b: np.maximum(0, 1 - b * (w - l)),
  "robust_dpo": lambda w, l, b: (-0.9 * log_sigmoid(b * (w - l)) + 0.1 * log_sigmoid(b * (l - w))) / 0.8,
  "exo_pair": lambda w, l, b: (
    sigmoid(b * (w - l)) * np.log(sigmoid(b * (w - l)) / 0.9)
    + sigmoid(b * (l - w)) * np.log(sigmoid(b * (l - w)) / 0.1)
  ),
  "nca_pair": lambda w, l, b: -log_sigmoid(b * w) - 0.5 * log_sigmoid(-b * w) - 0.5 * log_sigmoid(-b * l),
  "bco_pair": lambda w, l, b: -log_sigmoid(b * w) - log_sigmoid(-b * l),
  "sppo_hard": lambda w, l, b: (w - 0.5 / b) ** 2 + (l + 0.5 / b) ** 2,
  "apo_zero": lambda w, l, b: 1 - sigmoid(b * w) + sigmoid(b * l),
  "apo_down": lambda w, l, b: sigmoid(b * w) + 1 - sigmoid(b * (w - l)),
  "discopop": lambda w, l, b: (
    (1 - sigmoid(b * (w - l) / 0.05)) * -log_sigmoid(b * (w - l))
    + sigmoid(b * (w - l) / 0.05) * np.exp(-b * (w - l))
  ),
  "dpop": lambda w, l, b: -log_sigmoid(b * (w - l - 50 * np.maximum(0, -w))),
  "cal_dpo": lambda w, l, b: -log_sigmoid(w - l) + (w - 1 / (2 * b)) ** 2 + (l + 1 / (2 * b)) ** 2,
  "bdpo": lambda w, l, b: -log_sigmoid(b * (w - np.log(0.5 * np.exp(l) + 0.5))),
  "mappo": lambda w, l, b: -log_sigmoid(b * (w - 0.4 * l)),
  "gpo_exponential": lambda w, l, b: np.exp(-b * (w - l)),
  "gpo_truncated_quadratic": lambda w, l, b: np.maximum(0, 1 - b * (w - l)) ** 2,
  "gpo_savage": lambda w, l, b: 1 / (1 + np.exp(b * (w - l))) ** 2,
  "f_dpo_forward_kl": lambda w, l, b: -log_sigmoid(b * (np.exp(-l) - np.exp(-w))),
  "f_dpo_js_divergence": lambda w, l, b: (
    -log_sigmoid(b * (np.log(2 * np.exp(w) / (1 + np.exp(w))) - np.log(2 * np.exp(l) / (1 + np.exp(l)))))
  ),
  "f_dpo_alpha_divergence": lambda w, l, b: (
    -log_sigmoid(b * ((1 - np.exp(-0.5 * w)) / 0.5 - (1 - np.exp(-0.5 * l)) / 0.5))
  ),
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


RUNNING = losses.RunningMargins(jnp.float32(0.3), jnp.float32(1.5))

# Every public function, as a function of four arrays and a beta. A new one without data here fails.


def public_functions():
  return {
    name: function
    for name, function in vars(losses).items()
    if inspect.isfunction(function) and not name.startswith("_") and function.__module__ == losses.__name__
  }


def two_pairs(x):
  return Pair(*x[:2]), Pair(*x[2:4])


def stacked(x):
  return jnp.stack(x[:4], axis=-1)


def constants(x, chosen, rejected):
  return Pair(*(jnp.full(jnp.shape(x[0]), value) for value in (chosen, rejected)))


def masks(x):
  """Of a chosen response of two tokens and a rejected one of three."""
  return Pair(*(jnp.broadcast_to(jnp.arange(4) < n, (*x[0].shape, 4)) for n in (2, 3)))


DATA = {
  **{
    name: two_pairs
    for name in (
      "dpo_loss",
      "odpo_loss",
      "ipo_loss",
      "hinge_loss",
      "robust_dpo_loss",
      "exo_pair_loss",
      "nca_pair_loss",
      "bco_pair_loss",
      "sppo_hard_loss",
      "apo_zero_loss",
      "apo_down_loss",
      "discopop_loss",
      "aot_loss",
      "aot_unpaired_loss",
      "f_dpo_loss",
      "dpop_loss",
      "cal_dpo_loss",
      "bdpo_loss",
      "mappo_loss",
      "gpo_exponential_loss",
      "gpo_truncated_quadratic_loss",
      "gpo_savage_loss",
      "h_dpo_loss",
      "beta_dpo_loss",
    )
  },
  **{name: lambda x: (*two_pairs(x), constants(x, 0.7, 0.4)) for name in ("tdpo1_loss", "tdpo2_loss")},
  "r_dpo_loss": lambda x: (*two_pairs(x), constants(x, 3, 5)),
  "epsilon_dpo_beta": lambda x: (Pair(*x[:2]), Pair(*x[1:3]), Pair(*x[2:4])),
  "epsilon_dpo_loss": lambda x: (*two_pairs(x), Pair(*x[1:3]), Pair(*x[2:4])),
  "beta_dpo_filter": lambda x: (x[0], jax.nn.sigmoid(x[1])),
  "beta_dpo_beta": lambda x: x[:1],
  "running_margins": lambda x: (RUNNING, x[0]),
  "beta_dpo_batch": lambda x: (x[0], jax.nn.sigmoid(x[1]), RUNNING),
  "nash_md_loss": lambda x: (x[0], x[1], jax.nn.sigmoid(x[2])),
  "dr_dpo_weights": lambda x: x[:1],
  "xpo_loss": lambda x: (*two_pairs(x), x[1]),
  **{
    name: lambda x: x[:1]
    for name in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "nll_loss")
  },
  **{
    name: lambda x: x[:2]
    for name in ("implicit_reward", "bradley_terry_loss", "kl_k1", "kl_k2", "kl_k3", "mix_reference")
  },
  **{
    name: lambda x: (Pair(*x[:2]),) for name in ("simpo_loss", "cpo_loss", "unlikelihood_loss", "wpo_weights")
  },
  **{name: lambda x: (Pair(*(-jnp.abs(y) for y in x[:2])),) for name in ("orpo_loss", "alphapo_loss")},
  "kl_penalized_reward": lambda x: x[:3],
  "plackett_luce_loss": lambda x: (stacked(x),),
  "dpo_plackett_luce_loss": lambda x: (stacked(x), stacked(x[3::-1])),
  "kto_loss": lambda x: (x[0], jnp.ones(x[0].shape, bool), 0.3),
  "bco_loss": lambda x: (x[0], jnp.ones(x[0].shape, bool)),
  "length_normalize": lambda x: (x[0], jnp.full(x[0].shape, 3)),
  "ld_dpo_log_probs": lambda x: (Pair(stacked(x), stacked(x)), masks(x)),
  "sampo_log_probs": lambda x: (
    Pair(stacked(x), stacked(x)),
    masks(x),
    Pair(
      *(
        jnp.broadcast_to(jnp.asarray(noise), (*x[0].shape, 4))
        for noise in ([0.4, 0.1, 0.9, 0.2], [0.3, 0.5, 0.1, 0.7])
      )
    ),
  ),
  "token_kl": lambda x: (-jnp.abs(stacked(x)), -jnp.abs(stacked(x[3::-1]))),
}
"""Positional arguments of each function, made of arrays x[:4] of one shape."""

KNOBS = {
  "beta": 0.3,
  "label_smoothing": 0.1,
  "delta": 0.2,
  "tau": 0.05,
  "alpha": 0.3,
  "gamma": 0.5,
  "weight": 0.1,
  "desirable_weight": 1.5,
  "undesirable_weight": 0.7,
  "mix": 0.4,
  "gap": 0.4,
  "margin": 0.7,
  "momentum": 0.8,
  "epsilon": 0.2,
  "center": 0.3,
  "spread": 1.5,
  "share": 0.6,
}
"""A value of every knob there is; `where` is data, and `divergence` a function."""


def knobs_of(function):
  parameters = inspect.signature(function).parameters.values()
  return {
    p.name: KNOBS[p.name]
    for p in parameters
    if p.kind is p.KEYWORD_ONLY and p.name not in ("where", "divergence")
  }


def call(name, x, **knobs):
  """The function of that name on arrays x[:4]; where it returns several arrays, their sum."""
  if name == "f_dpo_loss":
    knobs["divergence"] = losses.alpha_divergence
  result = getattr(losses, name)(*DATA[name](x), **knobs)
  return sum(result) if isinstance(result, tuple) else result


def swept(name):
  """The function with x[4] for its beta, or for the knob that is like one."""
  knobs = knobs_of(getattr(losses, name))
  knob = next((k for k in ("beta", "weight", "gamma") if k in knobs), None)
  if name == "unlikelihood_loss":
    knob = "alpha"
  return lambda x: call(name, x, **knobs | ({knob: x[4]} if knob else {}))


def on_pairs(loss, **knobs):
  return lambda x: loss(*two_pairs(x), beta=x[4], **knobs)


MASKED = jnp.asarray([True, False, True, True])
EVERY_LOSS = {
  **{name: swept(name) for name in public_functions() if name != "mix_reference"},
  **{name: on_pairs(loss_named(name)) for name in NAMES},
  "f_dpo, reverse_kl": on_pairs(losses.f_dpo_loss, divergence=losses.reverse_kl),
  "dpo_plackett_luce, masked": lambda x: losses.dpo_plackett_luce_loss(
    *DATA["dpo_plackett_luce_loss"](x), beta=x[4], where=jnp.broadcast_to(MASKED, (*x[0].shape, 4))
  ),
  "kto, undesirable": lambda x: losses.kto_loss(
    x[0], jnp.zeros(x[0].shape, bool), 0.3, beta=x[4], undesirable_weight=1.5
  ),
  "bco, undesirable": lambda x: losses.bco_loss(x[0], jnp.zeros(x[0].shape, bool), beta=x[4], delta=0.2),
}
"""(chosen, rejected, reference chosen, reference rejected, beta) -> loss, of arrays of one shape."""

OF_A_BATCH = {
  "aot_loss",
  "aot_unpaired_loss",
  "beta_dpo_loss",
  "beta_dpo_beta",
  "beta_dpo_filter",
  "beta_dpo_batch",
  "running_margins",
  "dr_dpo_weights",
}
"""They compare the pairs of the last axis; all others are elementwise."""

WITHOUT_GRADIENT = {
  "wpo_weights",
  "dr_dpo_weights",
  "beta_dpo_filter",
  "beta_dpo_loss",
  "beta_dpo_beta",
  "beta_dpo_batch",
  "running_margins",
  "nash_md_loss",
}
"""All of them, or a part: beta-DPO's beta is given the mean margin as a number, Nash-MD what is won."""


SIZES = [-1e4, -60.0, -1.0, 0.0, 1.0, 60.0, 1e4]


def test_every_public_function_is_swept():
  assert set(DATA) == set(public_functions())


@pytest.mark.parametrize("name", sorted(set(EVERY_LOSS) - WITHOUT_GRADIENT))
def test_gradients_are_those_of_finite_differences(name, pairs):
  with jax.enable_x64(True):
    policy, reference = jax.tree.map(lambda x: jnp.asarray(x)[0], pairs)
    check_grads(
      EVERY_LOSS[name],
      ((*policy, *reference, 0.7),),
      order=1,
      modes=["rev", "fwd"],
      rtol=1e-4,
      atol=1e-4,
      eps=1e-6,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_losses_and_gradients_are_finite_at_extremes(name, dtype):
  """At every pair of log-ratios up to +-1e4, and every beta, the gradient by beta too."""
  chosen, rejected = jnp.meshgrid(jnp.asarray(SIZES, dtype), jnp.asarray(SIZES, dtype))
  zero = jnp.zeros_like(chosen)

  def total(x):
    values = EVERY_LOSS[name](x)
    return values.sum(), values

  for beta in (0.01, 1.0, 10.0):
    grads, values = jax.grad(total, has_aux=True)((chosen, rejected, zero, zero, beta))
    assert values.dtype == jnp.float32
    assert jnp.isfinite(values).all()
    assert all(jnp.isfinite(g).all() for g in grads)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
  name=st.sampled_from(sorted(set(EVERY_LOSS) - OF_A_BATCH)),
  shape=hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3),
  dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
  seed=st.integers(0, 9),
)
def test_losses_keep_the_shape_and_are_elementwise(name, shape, dtype, seed):
  x = np.random.default_rng(seed).normal(size=(4, *shape))
  x = tuple(jnp.asarray(x, dtype))
  got = EVERY_LOSS[name]((*x, 0.3))
  assert got.shape == shape and got.dtype == jnp.float32
  flat = [y.ravel() for y in x]
  one_by_one = [EVERY_LOSS[name]((*(y[i] for y in flat), 0.3)) for i in range(min(got.size, 3))]
  np.testing.assert_allclose(got.ravel()[:3], one_by_one, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(name=st.sampled_from(sorted(EVERY_LOSS)), seed=st.integers(0, 9))
def test_bfloat16_inputs_are_computed_in_float32(name, seed):
  x = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5), scale=20), jnp.bfloat16)
  widened = EVERY_LOSS[name]((*x.astype(jnp.float32), 0.3))
  np.testing.assert_array_equal(EVERY_LOSS[name]((*x, 0.3)), widened)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_a_sweep_of_sixteen_betas_compiles_once_and_vmaps(name, pairs):
  x = jax.tree.leaves(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pairs))
  traces = []

  @jax.jit
  def loss(beta):
    traces.append(beta)
    return EVERY_LOSS[name]((*x, beta))

  betas = jnp.geomspace(0.05, 5.0, 16)
  swept = jnp.stack([loss(beta) for beta in betas])
  assert len(traces) == 1
  of_vector = jax.vmap(lambda beta: EVERY_LOSS[name]((*x, beta)))(betas)
  np.testing.assert_allclose(of_vector, swept, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, f in public_functions().items() if knobs_of(f)])
def test_every_knob_may_be_traced_and_mapped(name, pairs):
  x = jax.tree.leaves(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pairs))
  knobs = knobs_of(getattr(losses, name))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
  close(jax.jit(lambda knobs: call(name, x, **knobs))(knobs), call(name, x, **knobs))
  for knob in knobs:
    values = jnp.asarray([0.9, 1.1]) * knobs[knob]
    mapped = jax.vmap(lambda value, knob=knob: call(name, x, **knobs | {knob: value}))(values)
    close(mapped, jnp.stack([call(name, x, **knobs | {knob: value}) for value in values]))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
  name=st.sampled_from(sorted(EVERY_LOSS)),
  dtype=st.sampled_from(["float32", "bfloat16"]),
  x=hnp.arrays(np.float32, (4, 2), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)),
  beta=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
)
def test_losses_and_gradients_are_finite_anywhere_up_to_10000(name, dtype, x, beta):
  x = tuple(jnp.asarray(x, dtype))
  value, grads = jax.value_and_grad(lambda x: EVERY_LOSS[name](x).sum())((*x, beta))
  assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in grads)


# DPO.


def test_loss_is_log_2_and_the_weight_one_half_where_policy_is_reference(pairs):
  reference = jax.tree.map(jnp.asarray, pairs[1])
  value, grads = jax.value_and_grad(lambda p: losses.dpo_loss(p, reference, beta=0.3).sum())(reference)
  np.testing.assert_allclose(value, 12 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(grads.chosen, -0.3 / 2, rtol=1e-6)
  np.testing.assert_allclose(grads.rejected, 0.3 / 2, rtol=1e-6)


def test_gradient_weighs_a_pair_by_how_wrong_its_reward_is(pairs):
  policy, reference = jax.tree.map(jnp.asarray, pairs)
  grads = jax.grad(lambda p: losses.dpo_loss(p, reference, beta=0.3).sum())(policy)
  chosen, rejected = (losses.implicit_reward(p, r, beta=0.3) for p, r in zip(policy, reference))
  np.testing.assert_allclose(grads.chosen, -0.3 * jax.nn.sigmoid(rejected - chosen), rtol=1e-5)
  np.testing.assert_allclose(grads.rejected, 0.3 * jax.nn.sigmoid(rejected - chosen), rtol=1e-5)


OF_THE_MARGIN = {
  "dpo",
  "odpo",
  "ipo",
  "hinge",
  "robust_dpo",
  "exo_pair",
  "discopop",
  "gpo_exponential",
  "gpo_truncated_quadratic",
  "gpo_savage",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_prompt_adds_to_both_log_ratios_cancels_in_losses_of_the_margin(name, pairs, rng):
  """And in no other: those see how likely the chosen response itself has become."""
  with jax.enable_x64(True):
    policy, reference = jax.tree.map(jnp.asarray, pairs)
    shift = jnp.asarray(rng.normal(size=(4, 3)))
    moved = Pair(*(p + shift for p in policy))
    loss = functools.partial(loss_named(name), beta=0.3)
    same = np.allclose(loss(moved, reference), loss(policy, reference), rtol=1e-9)
    assert same == (name in OF_THE_MARGIN)


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
      minimum(functools.partial(losses.ipo_loss, beta=beta)), 1 / (2 * beta), rtol=1e-6
    )
    np.testing.assert_allclose(
      minimum(functools.partial(losses.dpo_loss, beta=beta, label_smoothing=0.2)),
      np.log(0.8 / 0.2) / beta,
      rtol=1e-6,
    )


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
      losses.dpo_loss(policy, reference, beta=0.4),
      rtol=1e-9,
    )


def test_exo_without_label_smoothing_is_refused(pairs):
  with pytest.raises(ValueError, match="label_smoothing is 0.0; exo_pair_loss needs one above 0"):
    losses.exo_pair_loss(*pairs, beta=0.1, label_smoothing=0.0)


# Rankings.


def test_plackett_luce_of_two_is_bradley_terry(rng):
  rewards = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
  np.testing.assert_allclose(
    losses.plackett_luce_loss(rewards), losses.bradley_terry_loss(rewards[:, 0], rewards[:, 1]), rtol=1e-5
  )


def test_plackett_luce_is_the_chance_of_drawing_the_ranking(rng):
  rewards = rng.normal(size=5)
  chance = 1.0
  for k in range(5):
    chance *= np.exp(rewards[k]) / np.exp(rewards[k:]).sum()
  np.testing.assert_allclose(losses.plackett_luce_loss(jnp.asarray(rewards)), -np.log(chance), rtol=1e-5)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(hnp.arrays(bool, (5,)), st.integers(0, 9), st.sampled_from([0.0, np.nan, -np.inf]))
def test_absent_responses_do_not_count_in_a_ranking(where, seed, absent):
  """Whatever stands in their places: the loss is that of the others in their order."""
  rewards = np.random.default_rng(seed).normal(size=5)
  got, grads = jax.value_and_grad(lambda r: losses.plackett_luce_loss(r, where=jnp.asarray(where)))(
    jnp.asarray(np.where(where, rewards, absent), jnp.float32)
  )
  there = rewards[where]
  want = sum(np.log(np.exp(there[k:]).sum()) - there[k] for k in range(len(there)))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  assert not np.any(np.where(where, 0, grads)) and np.all(np.isfinite(grads))


@pytest.mark.parametrize("size", SIZES)
def test_two_large_rewards_are_ranked_as_exactly_as_a_pair(size):
  for gap in (-1.0, 0.0, 0.5):
    pair = jnp.asarray([size + gap, size], jnp.float32)
    ranking = jax.value_and_grad(losses.plackett_luce_loss)(pair)
    exact = jax.value_and_grad(lambda r: losses.bradley_terry_loss(r[0], r[1]))(pair)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ranking, exact)


def test_the_dpo_loss_of_rankings_of_two_is_the_dpo_loss(pairs):
  with jax.enable_x64(True):
    policy, reference = jax.tree.map(jnp.asarray, pairs)
    ranked = [jnp.stack(pair, axis=-1) for pair in (policy, reference)]
    np.testing.assert_allclose(
      losses.dpo_plackett_luce_loss(*ranked, beta=0.3),
      losses.dpo_loss(policy, reference, beta=0.3),
      rtol=1e-12,
    )


def test_a_reward_of_the_prompt_alone_changes_no_preference_loss(rng):
  rewards = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
  shifted = rewards + jnp.asarray(rng.normal(size=(6, 1)), jnp.float32)
  np.testing.assert_allclose(
    losses.plackett_luce_loss(shifted), losses.plackett_luce_loss(rewards), rtol=1e-4
  )


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
    (losses.nll_loss(policy.chosen), -chosen),
  ):
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("mean_log_prob", [-1e4, -30.0, -1e-6, 0.0])
def test_orpo_is_finite_for_probabilities_next_to_0_and_1(mean_log_prob):
  value, grads = jax.value_and_grad(lambda p: losses.orpo_loss(p, weight=0.1))(
    Pair(jnp.float32(mean_log_prob), jnp.float32(-1.0))
  )
  assert jnp.isfinite(value) and all(map(jnp.isfinite, grads))


def test_unpaired_losses_are_their_formulas(rng):
  ratios, desirable = rng.normal(size=9), rng.random(9) < 0.5
  sign = np.where(desirable, 1, -1)
  got = losses.kto_loss(
    jnp.asarray(ratios),
    jnp.asarray(desirable),
    jnp.asarray(0.3),
    beta=0.5,
    desirable_weight=1.5,
    undesirable_weight=0.7,
  )
  np.testing.assert_allclose(
    got, np.where(desirable, 1.5, 0.7) * (1 - sigmoid(sign * 0.5 * (ratios - 0.3))), rtol=1e-5
  )
  negative = losses.kto_loss(jnp.asarray(ratios), jnp.asarray(desirable), jnp.asarray(-2.0), beta=0.5)
  np.testing.assert_allclose(negative, 1 - sigmoid(sign * 0.5 * ratios), rtol=1e-5)
  assert (
    jax.grad(lambda kl: losses.kto_loss(jnp.asarray(ratios), jnp.asarray(desirable), kl, beta=0.5).sum())(0.3)
    == 0
  )
  got = losses.bco_loss(jnp.asarray(ratios), jnp.asarray(desirable), beta=0.5, delta=0.2)
  np.testing.assert_allclose(got, -log_sigmoid(sign * (0.5 * ratios - 0.2)), rtol=1e-5)


def test_sorted_losses_compare_rank_by_rank(pairs):
  with jax.enable_x64(True):
    policy, reference = jax.tree.map(lambda x: jnp.asarray(x).ravel(), pairs)
    margins = np.sort(policy.chosen - policy.rejected) - np.sort(reference.chosen - reference.rejected)
    np.testing.assert_allclose(
      losses.aot_loss(policy, reference, beta=0.4), -log_sigmoid(0.4 * margins), rtol=1e-9
    )
    chosen, rejected = (np.sort(p - r) for p, r in zip(policy, reference))
    np.testing.assert_allclose(
      losses.aot_unpaired_loss(policy, reference, beta=0.4),
      -log_sigmoid(0.4 * (chosen - rejected)),
      rtol=1e-9,
    )


@settings(deadline=None, max_examples=30, derandomize=True)
@given(where=hnp.arrays(bool, (6,)), seed=st.integers(0, 9), absent=st.sampled_from([0.0, np.nan]))
def test_absent_pairs_do_not_count_in_a_sorted_loss(where, seed, absent):
  """Whatever stands in their places; the losses of the others come first, the rest are 0."""
  draw = np.random.default_rng(seed).normal(size=(4, 6))
  x = jnp.asarray(np.where(where, draw, absent), jnp.float32)
  present = jnp.asarray(draw[:, where], jnp.float32)
  for loss in (losses.aot_loss, losses.aot_unpaired_loss):

    def total(x, loss=loss):
      values = loss(*two_pairs(x), beta=0.4, where=jnp.asarray(where))
      return values.sum(), values

    grads, got = jax.grad(total, has_aux=True)(x)
    np.testing.assert_allclose(got[: where.sum()], loss(*two_pairs(present), beta=0.4), rtol=1e-5)
    assert not got[where.sum() :].any()
    assert jnp.isfinite(grads).all() and not np.any(np.where(where, 0, grads))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(masks=hnp.arrays(bool, (2, 3, 7)), alpha=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 9))
def test_ld_dpo_reads_any_mask_in_order(masks, alpha, seed):
  values = np.random.default_rng(seed).normal(size=(2, 3, 7))
  got = losses.ld_dpo_log_probs(
    Pair(*jnp.asarray(values, jnp.float32)), Pair(*jnp.asarray(masks)), alpha=alpha
  )
  for row in range(3):
    tokens = [values[side, row][masks[side, row]] for side in (0, 1)]
    shared = min(map(len, tokens))
    want = [t[:shared].sum() + alpha * t[shared:].sum() for t in tokens]
    np.testing.assert_allclose([side[row] for side in got], want, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("alpha", [0.6, np.float32(0.6)])
def test_a_mixed_reference_of_bfloat16_is_rounded_once(alpha, rng):
  policy, reference = (jnp.asarray(rng.normal(size=500), jnp.bfloat16) for _ in "ab")
  mixed = losses.mix_reference(policy, reference, alpha=alpha)
  exact = 0.6 * np.asarray(policy, np.float64) + 0.4 * np.asarray(reference, np.float64)
  np.testing.assert_allclose(np.asarray(mixed, np.float64), exact, rtol=1.001 * 2**-8, atol=1e-6)


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
    losses.kl_k2(ours, theirs), np.square(np.asarray(ours) - np.asarray(theirs)) / 2, rtol=1e-5
  )


def test_the_kl_of_tokens_allows_impossible_ones_and_gives_them_no_gradient():
  ours = jnp.log(jnp.asarray([0.0, 0.5, 0.5]))
  theirs = jnp.log(jnp.asarray([0.2, 0.3, 0.5]))
  kl, grads = jax.value_and_grad(losses.token_kl)(ours, theirs)
  np.testing.assert_allclose(kl, 0.5 * np.log(0.5 / 0.3), rtol=1e-6)
  assert grads[0] == 0 and jnp.isfinite(grads).all()


def test_every_public_function_says_what_it_returns():
  for name, function in public_functions().items():
    assert function.__doc__ and function.__doc__.startswith("Returns"), name
