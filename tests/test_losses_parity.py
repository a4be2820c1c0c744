"""Losses and gradients against golden vectors of TRL's own code, and every reading of a name.

`tests/parity/make_vectors.py` makes the vectors. Where TRL, the reference implementation, another
system and the paper mean different things by one name, a test states which composition is which.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import losses
from dpojax.losses import Pair
from tests import conftest

VECTORS = json.loads((conftest.ROOT / "tests" / "parity" / "vectors.json").read_text())
LENGTHS = np.asarray(VECTORS["lengths"])
CASES = {}
for _case in VECTORS["cases"]:
  _words = (_case["trainer"], _case["name"], *(f"{k}={v}" for k, v in _case["options"].items()))
  CASES.setdefault("-".join(_words), []).append(_case)

DIVERGENCES = {
  "forward_kl": losses.forward_kl,
  "js_divergence": losses.js_divergence,
  "alpha_divergence": losses.alpha_divergence,
}


class Inputs(NamedTuple):
  """What the vectors were made of, as Pairs over chosen and rejected."""

  policy: Pair  # summed log-probs, [6]
  reference: Pair
  lengths: Pair
  policy_tokens: Pair  # [6, 5]
  reference_tokens: Pair
  mask: Pair
  log_sum_square_probs: Pair

  @property
  def log_ratios(self):
    return Pair(*(p - r for p, r in zip(self.policy, self.reference)))

  @property
  def means(self):
    return losses.length_normalize(self.policy, self.lengths)


def inputs(shift, dtype):
  """Each response's summed log-prob raised by shift [2, 6], spread evenly over its tokens."""
  mask = np.arange(5) < LENGTHS[..., None]
  policy, reference, squares = (
    jnp.asarray(VECTORS[name], dtype) for name in ("policy", "reference", "log_sum_square_probs")
  )
  policy = policy + jnp.where(mask, (shift / LENGTHS)[..., None], 0)
  sums = lambda tokens: Pair(*tokens.sum(-1))
  return Inputs(
    sums(policy),
    sums(reference),
    Pair(*jnp.asarray(LENGTHS)),
    Pair(*policy),
    Pair(*reference),
    Pair(*jnp.asarray(mask)),
    Pair(*squares),
  )


def zeros(pair):
  return jax.tree.map(jnp.zeros_like, pair)


def sigmoid(x, beta, options):
  """TRL's `sigmoid`: DPO. It takes label_smoothing and does not use it."""
  if "f_divergence_type" in options:
    # TRL's coefficient c is 1 minus the paper's alpha: t^(c - 1) = t^-alpha.
    return losses.f_dpo_loss(
      x.policy,
      x.reference,
      beta=beta,
      divergence=DIVERGENCES[options["f_divergence_type"]],
      alpha=1 - options.get("f_alpha_divergence_coef", 0.5),
    )
  if "ld_alpha" in options:
    policy, reference = (
      losses.ld_dpo_log_probs(tokens, x.mask, alpha=options["ld_alpha"])
      for tokens in (x.policy_tokens, x.reference_tokens)
    )
    return losses.dpo_loss(policy, reference, beta=beta)
  loss = losses.dpo_loss(x.policy, x.reference, beta=beta)
  if "use_weighting" in options:  # TRL does not cap the weights at 1
    loss *= jax.lax.stop_gradient(jnp.exp(sum(alignment(x))))
  return loss


def alignment(x):
  """Mean over tokens of log pi(y_t) - log sum_v pi(v)^2, what `wpo_weights` takes."""
  return Pair(
    *(
      jnp.sum(p - s, axis=-1, where=m) / n
      for p, s, m, n in zip(x.policy_tokens, x.log_sum_square_probs, x.mask, x.lengths)
    )
  )


def against_reference(loss, *, mean=False, knob="label_smoothing", name="label_smoothing"):
  """The loss of policy and reference, or of f'(pi / pi_ref) and zeros; of sums or of means."""

  def composed(x, beta, options):
    pairs = x.policy, x.reference
    if "f_divergence_type" in options:
      scores = Pair(*map(DIVERGENCES[options["f_divergence_type"]], x.log_ratios))
      pairs = scores, zeros(scores)
    if mean:
      pairs = [losses.length_normalize(pair, x.lengths) for pair in pairs]
    return loss(*pairs, beta=beta, **({name: options[knob]} if knob in options else {}))

  return composed


def simpo(x, beta, options):
  means = x.means
  if "alpha" in options:  # AlphaPO
    means = Pair(*(losses.alpha_divergence(m, alpha=options["alpha"]) for m in means))
  if "label_smoothing" in options:  # smoothing is DPO's, with the target margin as the reference
    target = zeros(means)._replace(chosen=jnp.full_like(means.chosen, options["simpo_gamma"] / beta))
    return losses.dpo_loss(means, target, beta=beta, label_smoothing=options["label_smoothing"])
  return losses.simpo_loss(means, beta=beta, gamma=options["simpo_gamma"])


def kto(kl):
  def composed(x, beta, options):
    weights = {k: v for k, v in options.items() if k != "negative_kl"}
    desirable = jnp.broadcast_to(jnp.array([[True], [False]]), (2, 6))
    point = -kl if "negative_kl" in options else kl
    return losses.kto_loss(jnp.stack(x.log_ratios), desirable, point, beta=beta, **weights)

  return composed


COMPOSITIONS = {
  "dpo-sigmoid": sigmoid,
  "dpo-sigmoid_norm": against_reference(losses.dpo_loss, mean=True),
  "dpo-hinge": against_reference(losses.hinge_loss),
  "dpo-ipo": against_reference(losses.ipo_loss, mean=True),
  "dpo-robust": against_reference(losses.robust_dpo_loss),
  "dpo-exo_pair": against_reference(losses.exo_pair_loss),
  "dpo-nca_pair": against_reference(losses.nca_pair_loss),
  "dpo-bco_pair": against_reference(losses.bco_pair_loss),
  "dpo-sppo_hard": against_reference(losses.sppo_hard_loss),
  "dpo-apo_zero": against_reference(losses.apo_zero_loss),
  "dpo-apo_down": against_reference(losses.apo_down_loss),
  "dpo-discopop": against_reference(losses.discopop_loss, knob="discopop_tau", name="tau"),
  "dpo-aot": against_reference(losses.aot_loss),
  "dpo-aot_unpaired": against_reference(losses.aot_unpaired_loss),
  "dpo-sft": lambda x, beta, _: losses.nll_loss(x.policy.chosen) / x.lengths.chosen.mean(),
  "cpo-sigmoid": lambda x, beta, o: losses.cpo_loss(x.policy, beta=beta, **o),
  "cpo-hinge": lambda x, beta, _: losses.hinge_loss(x.policy, zeros(x.policy), beta=beta),
  "cpo-ipo": lambda x, beta, _: losses.ipo_loss(x.means, zeros(x.means), beta=beta),
  "cpo-simpo": simpo,
  # TRL's NLL term is over prompt and response; here it is left away on both sides.
  "orpo-orpo": lambda x, beta, _: losses.orpo_loss(x.means, weight=beta) - losses.nll_loss(x.means.chosen),
  "kto-kto": kto(np.mean(VECTORS["kl_log_ratios"])),
  "kto-apo_zero_unpaired": kto(0.0),
}


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("float32", 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_trls(name, dtype, tolerance):
  with jax.enable_x64(dtype == "float64"):
    for case in CASES[name]:
      compose = COMPOSITIONS[f"{case['trainer']}-{case['name']}"]

      def total(shift, case=case, compose=compose):
        values = compose(inputs(shift, dtype), case["beta"], case["options"])
        return values.sum(), values

      grads, values = jax.grad(total, has_aux=True)(jnp.zeros((2, 6), dtype))
      want, want_grads = np.asarray(case["losses"]), np.asarray(case["grads"])
      if not want.ndim:  # the mean of a batch
        values, grads = values.mean(), grads / 6
      assert values.dtype == dtype
      limit = max(tolerance, 1e-5 * case["float32"])  # TRL itself went to float32
      np.testing.assert_allclose(values, want, rtol=limit, atol=limit)
      np.testing.assert_allclose(grads, want_grads, rtol=limit, atol=limit)


# One name, several readings. x is the vectors' input in float64, as NumPy sees it.


@pytest.fixture
def x():
  with jax.enable_x64(True):
    yield inputs(jnp.zeros((2, 6)), "float64")


def log_sigmoid(x):
  return -np.logaddexp(0, -np.asarray(x))


def test_label_smoothing_is_used_by_the_reference_implementation_and_not_by_trl(x):
  """The reference implementation, Tunix and MaxText smooth DPO; TRL's `sigmoid` ignores the knob."""
  h = np.asarray(x.log_ratios.chosen - x.log_ratios.rejected)
  np.testing.assert_allclose(
    losses.dpo_loss(x.policy, x.reference, beta=0.3, label_smoothing=0.1),
    -0.9 * log_sigmoid(0.3 * h) - 0.1 * log_sigmoid(-0.3 * h),
    rtol=1e-9,
  )
  plain, smoothed = (
    [case["losses"] for case in CASES[name]] for name in ("dpo-sigmoid", "dpo-sigmoid-label_smoothing=0.1")
  )
  assert plain == smoothed


def test_ipo_of_sums_is_the_reference_implementations_and_of_means_trls(x):
  sums, means = (
    losses.ipo_loss(policy, reference, beta=0.3)
    for policy, reference in (
      (x.policy, x.reference),
      [losses.length_normalize(pair, x.lengths) for pair in (x.policy, x.reference)],
    )
  )
  chosen, rejected = (np.asarray(r) for r in x.log_ratios)
  lengths = [np.asarray(n) for n in x.lengths]
  np.testing.assert_allclose(sums, (chosen - rejected - 1 / 0.6) ** 2, rtol=1e-9)
  np.testing.assert_allclose(means, (chosen / lengths[0] - rejected / lengths[1] - 1 / 0.6) ** 2, rtol=1e-9)
  assert np.max(np.abs(sums - means)) > 0.1


def test_reference_free_dpo_is_cpo_and_a_uniform_reference(x):
  """`reference_free` of the reference implementation, ref_model=None of Tunix."""
  logits = np.asarray(x.policy.chosen - x.policy.rejected)
  want = -log_sigmoid(0.3 * logits)
  np.testing.assert_allclose(losses.cpo_loss(x.policy, beta=0.3), want, rtol=1e-9)
  uniform = Pair(*(jnp.full_like(p, -7.0) for p in x.policy))
  np.testing.assert_allclose(losses.dpo_loss(x.policy, uniform, beta=0.3), want, rtol=1e-9)


def test_bco_pair_of_delta_0_is_trls_and_of_the_mean_reward_easydels(x):
  chosen, rejected = (0.3 * np.asarray(r) for r in x.log_ratios)
  delta = np.mean([chosen, rejected])
  paired = losses.bco_pair_loss(x.policy, x.reference, beta=0.3, delta=delta)
  np.testing.assert_allclose(paired, -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected), rtol=1e-9)
  desirable = jnp.array([[True] * 6, [False] * 6])
  unpaired = losses.bco_loss(jnp.stack(x.log_ratios), desirable, beta=0.3, delta=delta)
  np.testing.assert_allclose(paired, unpaired.sum(0), rtol=1e-9)


def test_simpos_gamma_is_trls_and_beta_times_the_ratio_of_simpos_own_code(x):
  ratio, beta = 0.25, 2.0
  logits = np.asarray(x.means.chosen - x.means.rejected)
  np.testing.assert_allclose(
    losses.simpo_loss(x.means, beta=beta, gamma=beta * ratio),
    -log_sigmoid(beta * (logits - ratio)),
    rtol=1e-9,
  )


def test_wpo_weights_are_trls_capped_at_1(x):
  theirs = np.exp(np.asarray(sum(alignment(x))))
  assert theirs.min() < 1 < theirs.max()
  np.testing.assert_allclose(losses.wpo_weights(alignment(x)), np.minimum(theirs, 1), rtol=1e-9)


def test_sft_is_a_sum_in_the_reference_implementation_and_a_token_mean_in_trl(x):
  per_sequence = losses.nll_loss(x.policy.chosen)
  tokens = np.asarray(VECTORS["policy"])[0]
  np.testing.assert_allclose(per_sequence.mean(), -tokens.sum() / 6, rtol=1e-9)
  np.testing.assert_allclose(
    per_sequence.sum() / x.lengths.chosen.sum(), CASES["dpo-sft"][0]["losses"], rtol=1e-9
  )


def test_discopop_is_finite_where_its_formula_in_float32_is_infinity_times_0():
  far = Pair(jnp.array([-200.0], jnp.float32), jnp.zeros(1, jnp.float32))
  with np.errstate(over="ignore"):
    assert np.isinf(np.exp(np.float32(200))) and np.exp(np.float32(-200 / 0.05)) == 0
  np.testing.assert_allclose(losses.discopop_loss(far, zeros(far), beta=1.0), [200.0], rtol=1e-6)
