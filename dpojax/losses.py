"""Preference losses: pure functions of log-probs, elementwise over comparisons and unreduced.

`policy` and `reference` are `Pair`s of log-probs of the chosen and of the rejected response, arrays
of any equal shape [...], summed over tokens unless a docstring says mean. Which of the two a loss
gets is decided by the array that is passed: see `length_normalize`. Everything is computed in
float32, or float64 for float64 inputs, and is finite with finite gradients at log-ratios of +-1e4.
Every knob may be a traced array, so a sweep over beta compiles once.

Below, h_w and h_l are log pi - log pi_ref of the chosen and the rejected response, and
h = h_w - h_l.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# exp(60) is 1e26, and exp(89) more than float32 holds: capped, losses and gradients stay finite.
_LARGEST_EXPONENT = 60.0

Knob = float | jax.Array


class Pair(NamedTuple):
  """A value of the chosen and of the rejected response; arrays of equal shape [...]."""

  chosen: jax.Array
  rejected: jax.Array


# DPO, as the paper builds it up.


def implicit_reward(policy: jax.Array, reference: jax.Array, *, beta: Knob) -> jax.Array:
  """Returns beta (log pi - log pi_ref) (Rafailov et al. 2023, Eq. 5), [...].

  The reward the policy is optimal for, up to a term that depends on the prompt alone.
  """
  return beta * (_wide(policy) - _wide(reference))


def bradley_terry_loss(
  chosen_rewards: jax.Array, rejected_rewards: jax.Array, *, margin: Knob = 0.0
) -> jax.Array:
  """Returns -log sigmoid(r_w - r_l - margin) (Rafailov et al. 2023, Eq. 2), [...].

  The margin, 0 there, is that of a rating: the clearer the preference, the larger (Touvron et al. 2023,
  Eq. 2).
  """
  return -jax.nn.log_sigmoid(_wide(chosen_rewards) - _wide(rejected_rewards) - margin)


def plackett_luce_loss(rewards: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """Returns -sum_k [r_k - logsumexp_{j >= k} r_j] of rankings, best first, [...].

  Rafailov et al. 2023, App. A.3. With K = 2 it is `bradley_terry_loss`.

  Args:
    rewards: [..., K], best first.
    where: [..., K] bool, false for responses that are not there.
  """
  rewards = _wide(rewards)
  there = jnp.ones(rewards.shape, bool) if where is None else where
  # As sum_k softplus(logsumexp_{j > k} (r_j - r_k)): exact however large the rewards are.
  rewards = jnp.where(there, rewards, 0)
  ahead = rewards[..., None, :] - rewards[..., :, None]
  worse = jnp.triu(jnp.broadcast_to(there[..., None, :], ahead.shape), 1)
  # A quarter of the least number: a row of nothing else, the last's, then still has finite differences.
  rivals = jax.nn.logsumexp(jnp.where(worse, ahead, jnp.finfo(ahead.dtype).min / 4), axis=-1)
  return jnp.sum(jax.nn.softplus(rivals), axis=-1, where=there)


def dpo_plackett_luce_loss(
  policy: jax.Array, reference: jax.Array, *, beta: Knob, where: jax.Array | None = None
) -> jax.Array:
  """Returns the Plackett-Luce loss of implicit rewards (Rafailov et al. 2023, App. A.3), [...].

  policy, reference and where are [..., K], best first; `plackett_luce_loss` has the formula.
  """
  return plackett_luce_loss(implicit_reward(policy, reference, beta=beta), where=where)


def dpo_loss(policy: Pair, reference: Pair, *, beta: Knob, label_smoothing: Knob = 0.0) -> jax.Array:
  """Returns the DPO loss of each pair, -log sigmoid(beta h) (Rafailov et al. 2023, Eq. 7), [...].

  With label_smoothing e it is conservative DPO (Mitchell 2023, Eq. 3):
  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), least at beta h = log((1 - e) / e).

  Args:
    policy: summed log-probs under the policy.
    reference: summed log-probs under the reference.
    beta: strength of the pull to the reference.
    label_smoothing: probability that a label is wrong, in [0, 0.5).
  """
  chosen = implicit_reward(policy.chosen, reference.chosen, beta=beta)
  rejected = implicit_reward(policy.rejected, reference.rejected, beta=beta)
  # Two log-sigmoids and never log(1 - sigmoid): each is exact where the other is all rounding.
  as_labelled, flipped = bradley_terry_loss(chosen, rejected), bradley_terry_loss(rejected, chosen)
  return (1 - label_smoothing) * as_labelled + label_smoothing * flipped


def odpo_loss(policy: Pair, reference: Pair, *, beta: Knob, margin: Knob) -> jax.Array:
  """Returns -log sigmoid(beta h - margin) (Amini et al. 2024), [...].

  DPO with an offset: the chosen response is to be ahead by how much better it is. margin is the paper's
  Delta, alpha log of the difference of two scores; a number, or one of each pair, [...]. 0 gives DPO.
  """
  return bradley_terry_loss(
    implicit_reward(policy.chosen, reference.chosen, beta=beta),
    implicit_reward(policy.rejected, reference.rejected, beta=beta),
    margin=margin,
  )


# Other losses of a pair against a reference.


def ipo_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns (h - 1 / (2 beta))^2 (Azar et al. 2023, Eq. 17), [...].

  With summed log-probs it is the reference implementation's, with mean ones TRL's.
  """
  return jnp.square(_margin(policy, reference) - 1 / (2 * beta))


def hinge_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns max(0, 1 - beta h), [...]: RSO's hinge on log-ratios (Liu et al. 2023), after SLiC's.

  SLiC itself has no reference: up to a factor it is this loss with a reference of zeros.
  """
  return jax.nn.relu(1 - beta * _margin(policy, reference))


def robust_dpo_loss(policy: Pair, reference: Pair, *, beta: Knob, label_smoothing: Knob) -> jax.Array:
  """Returns [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e), [...].

  Chowdhury et al. 2024: unbiased for the clean DPO loss when labels are flipped with probability
  e = label_smoothing, in [0, 0.5).
  """
  logits = beta * _margin(policy, reference)
  right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


def exo_pair_loss(policy: Pair, reference: Pair, *, beta: Knob, label_smoothing: Knob) -> jax.Array:
  """Returns KL(Bernoulli(sigmoid(beta h)) || Bernoulli(1 - e)) (Ji et al. 2024, Eq. 16), [...].

  With s = sigmoid(beta h): s (log s - log(1 - e)) + (1 - s) (log(1 - s) - log e), least at
  beta h = log((1 - e) / e). e = label_smoothing is in (0, 0.5); at 0 the loss is infinite.

  Raises:
    ValueError: label_smoothing is a number and not positive.
  """
  if isinstance(label_smoothing, (int, float)) and label_smoothing <= 0:
    raise ValueError(f"label_smoothing is {label_smoothing}; exo_pair_loss needs one above 0")
  # The reverse KL: the policy's own probabilities weigh, and log s is log_sigmoid, so that 0 log 0 is 0.
  logits = beta * _margin(policy, reference)
  right = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-label_smoothing))
  wrong = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(label_smoothing))
  return right + wrong


def nca_pair_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns -log s(beta h_w) - log s(-beta h_w) / 2 - log s(-beta h_l) / 2, [...].

  The pairwise form of noise contrastive alignment (Chen et al. 2024); s is the sigmoid. The chosen
  response's terms are least at beta h_w = log 2, above the reference.
  """
  chosen, rejected = _rewards(policy, reference, beta)
  return -(jax.nn.log_sigmoid(chosen) + (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)) / 2)


def bco_pair_loss(policy: Pair, reference: Pair, *, beta: Knob, delta: Knob = 0.0) -> jax.Array:
  """Returns -log s(beta h_w - delta) - log s(-(beta h_l - delta)) (Jung et al. 2024), [...].

  The binary classifier's loss of a pair, s the sigmoid: the sum of `bco_loss` of both responses.
  The paper's delta is a running mean of the rewards; TRL's pairwise form has none.
  """
  chosen, rejected = _rewards(policy, reference, beta)
  return -jax.nn.log_sigmoid(chosen - delta) - jax.nn.log_sigmoid(delta - rejected)


def sppo_hard_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2 (Wu et al. 2024, Eq. 4.7), [...].

  SPPO with win probabilities 1 and 0; 1 / beta is the paper's eta.
  """
  chosen, rejected = _log_ratios(policy, reference)
  return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def apo_zero_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns 1 - sigmoid(beta h_w) + sigmoid(beta h_l) (D'Oosterlinck et al. 2024, Eq. 7), [...].

  For chosen responses better than the policy's: it raises them and lowers the rejected ones.
  """
  chosen, rejected = _rewards(policy, reference, beta)
  return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns sigmoid(beta h_w) + 1 - sigmoid(beta h) (D'Oosterlinck et al. 2024, Eq. 8), [...].

  For chosen responses worse than the policy's: it lowers both, the rejected ones more.
  """
  chosen, rejected = _rewards(policy, reference, beta)
  return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def discopop_loss(policy: Pair, reference: Pair, *, beta: Knob, tau: Knob = 0.05) -> jax.Array:
  """Returns (1 - m) (-log sigmoid(x)) + m exp(-x), m = sigmoid(x / tau), x = beta h, [...].

  The log-ratio modulated loss of Lu et al. 2024, Eq. 5; tau is in (0, 1).
  """
  logits = beta * _margin(policy, reference)
  # In one exponent: far on the wrong side exp(-x) alone overflows where m exp(-x) is small.
  exponential = _exp(jax.nn.log_sigmoid(logits / tau) - logits)
  return -jax.nn.sigmoid(-logits / tau) * jax.nn.log_sigmoid(logits) + exponential


def aot_loss(
  policy: Pair, reference: Pair, *, beta: Knob, label_smoothing: Knob = 0.0, where: jax.Array | None = None
) -> jax.Array:
  """Returns the DPO loss of sorted margins (Melnyk et al. 2024, paired), [..., B].

  The policy's margins log pi(y_w) - log pi(y_l) and the reference's are sorted over the last axis
  and compared rank by rank: not elementwise, the last axis is the batch. Pairs that are not `where`
  rank last, and their losses are 0.
  """
  ours = _sorted(_wide(policy.chosen) - _wide(policy.rejected), where)
  theirs = _sorted(_wide(reference.chosen) - _wide(reference.rejected), where)
  return _dpo_of_ranks(ours, theirs, beta, label_smoothing, where)


def aot_unpaired_loss(
  policy: Pair, reference: Pair, *, beta: Knob, label_smoothing: Knob = 0.0, where: jax.Array | None = None
) -> jax.Array:
  """Returns the DPO loss of sorted log-ratios (Melnyk et al. 2024, unpaired), [..., B].

  h_w and h_l are sorted over the last axis each and compared rank by rank: not elementwise. Pairs
  that are not `where` rank last, and their losses are 0.
  """
  chosen, rejected = (_sorted(x, where) for x in _log_ratios(policy, reference))
  return _dpo_of_ranks(chosen, rejected, beta, label_smoothing, where)


# Losses that see whether the chosen response itself loses probability.


def dpop_loss(policy: Pair, reference: Pair, *, beta: Knob, weight: Knob = 50.0) -> jax.Array:
  """Returns -log sigmoid(beta [h - weight max(0, -h_w)]) (Pal et al. 2024, Eq. 3), [...].

  DPO-Positive: while the chosen response is less likely than under the reference, raising it counts
  1 + weight times; else it is DPO, and so it is where policy and reference agree. weight is the
  paper's lambda, 50 there. mlx-lm adds weight max(0, -h_w) to the DPO loss instead, outside of the
  sigmoid and without beta.
  """
  chosen, rejected = _log_ratios(policy, reference)
  return -jax.nn.log_sigmoid(beta * (chosen - rejected - weight * jax.nn.relu(-chosen)))


def cal_dpo_loss(policy: Pair, reference: Pair, *, beta: Knob, weight: Knob = 1.0) -> jax.Array:
  """Returns -log sigmoid(h) + weight [(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2], [...].

  Calibrated DPO (Xiao et al. 2024): the logistic term has no beta, the squares are
  `sppo_hard_loss`. weight is 1 in the listing of the paper and 1/2 in the authors' repository.
  """
  chosen, rejected = _log_ratios(policy, reference)
  return bradley_terry_loss(chosen, rejected) + weight * sppo_hard_loss(policy, reference, beta=beta)


def bdpo_loss(policy: Pair, reference: Pair, *, beta: Knob, mix: Knob = 0.5) -> jax.Array:
  """Returns -log sigmoid(beta [h_w - log(mix exp(h_l) + 1 - mix)]) (Cho et al. 2025), [...].

  Bounded DPO: mix pi + (1 - mix) pi_ref stands in the place of pi(y_l), so that lowering the
  rejected response gains no more than -beta log(1 - mix). It goes to DPO as mix goes to 1.

  Args:
    policy, reference: summed log-probs.
    beta: strength of the pull to the reference.
    mix: share of the policy, the paper's lambda, in (0, 1).

  Raises:
    ValueError: mix is a number outside of (0, 1).
  """
  if isinstance(mix, (int, float)) and not 0 < mix < 1:
    raise ValueError(f"mix is {mix}; bdpo_loss needs one between 0 and 1")
  chosen, rejected = _log_ratios(policy, reference)
  # log(mix exp(h_l) + 1 - mix) without exp(h_l), which overflows.
  bounded = jnp.logaddexp(rejected + jnp.log(mix), jnp.log1p(-mix))
  return -jax.nn.log_sigmoid(beta * (chosen - bounded))


def mappo_loss(policy: Pair, reference: Pair, *, beta: Knob, gap: Knob) -> jax.Array:
  """Returns -log sigmoid(beta (h_w - gap h_l)) (Lan et al. 2025, Eq. 8), [...].

  Args:
    policy, reference: summed log-probs.
    beta: strength of the pull to the reference.
    gap: how much better the chosen response is by rewards in [0, 1] known beforehand, r_w - r_l; a
      number, or one of each pair, [...]. 1 gives DPO; at 0 the rejected response counts nothing.
  """
  chosen, rejected = _log_ratios(policy, reference)
  return -jax.nn.log_sigmoid(beta * (chosen - gap * rejected))


# GPO: other functions of the margin than the logistic one, the square and the hinge.


def gpo_exponential_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns exp(-beta h) (Tang et al. 2024), [...]: AdaBoost's; the exponent is capped at 60."""
  return _exp(-beta * _margin(policy, reference))


def gpo_truncated_quadratic_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns max(0, 1 - beta h)^2 (Tang et al. 2024), [...].

  The square of `hinge_loss`: content at any margin of 1 / beta or more, where IPO pulls back.
  """
  return jnp.square(hinge_loss(policy, reference, beta=beta))


def gpo_savage_loss(policy: Pair, reference: Pair, *, beta: Knob) -> jax.Array:
  """Returns 1 / (1 + exp(beta h))^2 (Tang et al. 2024), [...].

  It is not convex: a pair far on the wrong side is given up, as one with a flipped label.
  """
  return jnp.square(jax.nn.sigmoid(-beta * _margin(policy, reference)))


# Length, entropy, and the KL of tokens within the margin.


def r_dpo_loss(policy: Pair, reference: Pair, lengths: Pair, *, beta: Knob, alpha: Knob) -> jax.Array:
  """Returns -log sigmoid(beta h + alpha (|y_w| - |y_l|)) (Park et al. 2024), [...].

  DPO of the reward less alpha a token: a pair whose chosen response is the longer is pushed less. It
  starts at log 2 only where lengths are equal. lengths are in tokens; alpha = 0 gives DPO.
  """
  margin = beta * _margin(policy, reference)
  longer = _wide(lengths.chosen) - _wide(lengths.rejected)
  return -jax.nn.log_sigmoid(margin + alpha * longer.astype(margin.dtype))


def h_dpo_loss(policy: Pair, reference: Pair, *, beta: Knob, alpha: Knob) -> jax.Array:
  """Returns -log sigmoid(beta [alpha (log pi_w - log pi_l) - (log pi_ref_w - log pi_ref_l)]), [...].

  H-DPO (Omura et al. 2024): in the KL to the reference the policy's entropy counts alpha times, and
  the optimum is proportional to pi_ref^(1 / alpha) exp(r / (alpha beta)). alpha below 1 sharpens; 1
  gives DPO. With another alpha it does not start at log 2.
  """
  margin = alpha * (_wide(policy.chosen) - _wide(policy.rejected)) - (
    _wide(reference.chosen) - _wide(reference.rejected)
  )
  return -jax.nn.log_sigmoid(beta * margin)


def tdpo1_loss(policy: Pair, reference: Pair, kl: Pair, *, beta: Knob) -> jax.Array:
  """Returns -log sigmoid(beta [h + D_w - D_l]) (Zeng et al. 2024, TDPO1), [...].

  D is KL(pi_ref || pi) of the next token, summed over the places of a response: the forward KL, of
  which the gradient at the reference is 0, so that the first step is DPO's.

  Args:
    policy, reference: summed log-probs.
    kl: D of both responses, see `dpojax.kernels.distributions.token_kl_from`.
    beta: strength of the pull to the reference.
  """
  margin = _margin(policy, reference) + _wide(kl.chosen) - _wide(kl.rejected)
  return -jax.nn.log_sigmoid(beta * margin)


def tdpo2_loss(policy: Pair, reference: Pair, kl: Pair, *, beta: Knob, alpha: Knob = 0.5) -> jax.Array:
  """Returns -log sigmoid(beta [h + alpha (D_w - D_l)]), D_w without gradient, [...].

  TDPO2 (Zeng et al. 2024): only the rejected response is held by its D, see `tdpo1_loss`. alpha = 0
  gives DPO.
  """
  apart = jax.lax.stop_gradient(_wide(kl.chosen)) - _wide(kl.rejected)
  return -jax.nn.log_sigmoid(beta * (_margin(policy, reference) + alpha * apart))


# A beta that moves: by the batch, or by the pair.


def beta_dpo_loss(
  policy: Pair, reference: Pair, *, beta: Knob, alpha: Knob, center: Knob, where: jax.Array | None = None
) -> jax.Array:
  """Returns the DPO loss with max(0.001, beta [1 + alpha (mean h - center)]) for beta, [..., B].

  Beta-DPO (Wu et al. 2024b): batches of wide margins get a larger beta. The mean is over the last
  axis, the batch, without gradient; not elementwise. alpha = 0 gives DPO.

  Args:
    policy, reference: summed log-probs.
    beta: where the mean margin is the center.
    alpha: how much of beta a nat of the mean margin is worth, 0.6 in the authors' example.
    center: what the mean margin usually is; the authors move it by a tenth of the way to each
      batch's mean, that of the batch at hand included, from 0.
    where: pairs that the mean is over, such as those of `beta_dpo_filter`; all have a loss.
  """
  moved = beta_dpo_beta(_margin(policy, reference), beta=beta, alpha=alpha, center=center, where=where)
  return dpo_loss(policy, reference, beta=moved)


def beta_dpo_beta(
  margins: jax.Array, *, beta: Knob, alpha: Knob, center: Knob, where: jax.Array | None = None
) -> jax.Array:
  """Returns max(0.001, beta [1 + alpha (mean margin - center)]) for each pair, [..., B].

  Of `beta_dpo_loss`, which has the arguments; margins are h. Margins of [..., B, 1] give each pair a beta
  by its own margin, which the paper holds to be less steady.
  """
  margins = jax.lax.stop_gradient(_wide(margins))
  there = jnp.ones(margins.shape, bool) if where is None else where
  count = jnp.maximum(jnp.sum(there, axis=-1, keepdims=True), 1)
  mean = jnp.sum(margins, axis=-1, keepdims=True, where=there) / count
  return jnp.maximum(beta * (1 + alpha * (jnp.broadcast_to(mean, margins.shape) - center)), 1e-3)


def beta_dpo_filter(
  margins: jax.Array,
  noise: jax.Array,
  *,
  center: Knob,
  spread: Knob,
  share: Knob,
  where: jax.Array | None = None,
) -> jax.Array:
  """Returns 1 for the pairs that beta-DPO trains on and 0 for the others, [..., B].

  Of the pairs of the last axis a share is drawn, without replacement, with chances in proportion to
  exp(-((h - center) / spread)^2 / 2) (Wu et al. 2024b): outliers mostly go.

  Args:
    margins: h of each pair.
    noise: [..., B] uniform draws from (0, 1) that decide; the largest of log chance - log(-log noise)
      are kept.
    center, spread: running mean and standard deviation of h.
    share: of pairs that are kept, rounded down; the authors' is 0.8.
    where: pairs that are there; the others get 0.
  """
  margins = jax.lax.stop_gradient(_wide(margins))
  there = jnp.ones(margins.shape, bool) if where is None else where
  chances = -jnp.square((margins - center) / spread) / 2
  # A draw of 0 or 1 would be an infinite Gumbel number.
  noise = jnp.clip(_wide(noise), jnp.finfo(margins.dtype).tiny, 1 - jnp.finfo(margins.dtype).epsneg)
  # Gumbel's trick: the largest of log chance plus Gumbel noise are a draw without replacement (Kool et al.
  # 2019).
  order = jnp.where(there, chances - jnp.log(-jnp.log(noise)), -jnp.inf)
  # A sort of the sort is each one's rank.
  place = jnp.argsort(jnp.argsort(order, axis=-1, descending=True), axis=-1)
  kept = jnp.floor(share * jnp.sum(there, axis=-1, keepdims=True))
  return jax.lax.stop_gradient((place < jnp.broadcast_to(kept, place.shape)) * jnp.ones_like(margins))


class RunningMargins(NamedTuple):
  """The running mean and standard deviation of h over batches, both 0 before the first."""

  center: jax.Array
  spread: jax.Array


def running_margins(
  before: RunningMargins, margins: jax.Array, *, momentum: Knob = 0.9, where: jax.Array | None = None
) -> RunningMargins:
  """Returns momentum times what was, and 1 - momentum times a batch's mean and deviation.

  The M_0 of beta-DPO (Wu et al. 2024b) and the spread of its filter, as in the authors' code: from 0, with
  the deviation's divisor B - 1, and moved before the batch is weighed by them. Without gradient.

  Args:
    before: as it was.
    margins: [B], h of each pair of the batch.
    momentum: 0.9 in the authors' code.
    where: pairs that are there; of a batch without any nothing is learned.
  """
  margins = jax.lax.stop_gradient(_wide(margins))
  there = jnp.ones(margins.shape, bool) if where is None else where
  count = jnp.sum(there)
  mean = jnp.sum(margins, where=there) / jnp.maximum(count, 1)
  squares = jnp.sum(jnp.square(margins - mean), where=there) / jnp.maximum(count - 1, 1)
  move = lambda old, new: jnp.where(count > 0, momentum * old + (1 - momentum) * new, old)
  return RunningMargins(move(before.center, mean), move(before.spread, jnp.sqrt(squares)))


def beta_dpo_batch(
  margins: jax.Array,
  noise: jax.Array,
  running: RunningMargins,
  *,
  beta: Knob,
  alpha: Knob = 0.6,
  share: Knob = 0.8,
  where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the beta of each pair of a batch and its weight, both [B], without gradient.

  Beta-DPO whole (Wu et al. 2024b): `beta_dpo_filter` draws the pairs, `beta_dpo_beta` sets their beta by
  the mean of what is drawn. Weights are 0 for what is left out, and else such that the mean of values times
  weights is that of the pairs drawn. alpha = 0 and share = 1 give DPO.

  Args:
    margins: h of each pair.
    noise: uniform draws from (0, 1), see `beta_dpo_filter`.
    running: as `running_margins` gives it, this batch included.
    beta, alpha: of `beta_dpo_loss`.
    share: of pairs that are kept, 1 for all.
    where: pairs that are there.
  """
  there = jnp.ones(jnp.shape(margins), bool) if where is None else where
  spread = jnp.maximum(running.spread, jnp.finfo(running.spread.dtype).tiny ** 0.5)  # 0 before the first step
  kept = beta_dpo_filter(margins, noise, center=running.center, spread=spread, share=share, where=there)
  moved = beta_dpo_beta(margins, beta=beta, alpha=alpha, center=running.center, where=kept > 0)
  count = jnp.maximum(jnp.sum(kept), 1)
  return jax.lax.stop_gradient(moved), kept * jnp.sum(there) / count


def epsilon_dpo_beta(policy: Pair, nearer: Pair, farther: Pair, *, beta: Knob, epsilon: Knob) -> jax.Array:
  """Returns beta / (1 + epsilon s) of each pair, s in {-1, 0, 1}, [...].

  Epsilon-DPO (Lee et al. 2025): s is 1 where log pi(y_w) - log pi(y_l) rises strictly from `nearer`
  over `policy` to `farther`, -1 where it falls, else 0, as where policy and reference agree.

  Args:
    policy: summed log-probs under the policy.
    nearer, farther: the same with logits of (1 -+ epsilon) policy +- epsilon reference, see
      `dpojax.kernels.distributions.token_mixed_log_probs`.
    beta: before it moves.
    epsilon: how far the logits, and beta, are moved; 0.01 in the authors' configs.
  """
  near, here, far = (_wide(p.chosen) - _wide(p.rejected) for p in (nearer, policy, farther))
  step = 1.0 * ((near < here) & (here < far)) - 1.0 * ((near > here) & (here > far))
  return beta / (1 + epsilon * step) * jnp.ones_like(here)


def epsilon_dpo_loss(
  policy: Pair, reference: Pair, nearer: Pair, farther: Pair, *, beta: Knob, epsilon: Knob = 0.01
) -> jax.Array:
  """Returns the DPO loss of each pair with its own beta (Lee et al. 2025), [...].

  `epsilon_dpo_beta` has beta and the arguments; epsilon = 0 gives DPO. The authors' code smooths no
  labels, whatever label_smoothing says.
  """
  moved = epsilon_dpo_beta(policy, nearer, farther, beta=beta, epsilon=epsilon)
  return dpo_loss(policy, reference, beta=moved)


# f-DPO: other divergences than the reverse KL hold the policy near the reference.


def reverse_kl(log_ratio: jax.Array, *, alpha: Knob = 0.5) -> jax.Array:
  """Returns f'(u) - 1 = log u for f(u) = u log u, u = exp(log_ratio): DPO's. alpha is not used."""
  return _wide(log_ratio)


def forward_kl(log_ratio: jax.Array, *, alpha: Knob = 0.5) -> jax.Array:
  """Returns f'(u) = -1 / u for f(u) = -log u, u = exp(log_ratio). alpha is not used."""
  return -_exp(-_wide(log_ratio))


def js_divergence(log_ratio: jax.Array, *, alpha: Knob = 0.5) -> jax.Array:
  """Returns f'(u) = log(2 u / (1 + u)) of Jensen-Shannon, u = exp(log_ratio). alpha is not used."""
  return jax.nn.log_sigmoid(_wide(log_ratio)) + jnp.log(2.0)


def alpha_divergence(log_ratio: jax.Array, *, alpha: Knob = 0.5) -> jax.Array:
  """Returns f'(u) = (1 - u^-alpha) / alpha, u = exp(log_ratio); alpha is in (0, 1).

  It goes to `reverse_kl` as alpha goes to 0, and is `forward_kl` up to a constant at 1.
  """
  return -jnp.expm1(jnp.minimum(-alpha * _wide(log_ratio), _LARGEST_EXPONENT)) / alpha


def f_dpo_loss(
  policy: Pair, reference: Pair, *, beta: Knob, divergence: Callable, alpha: Knob = 0.5
) -> jax.Array:
  """Returns -log sigmoid(beta [f'(u_w) - f'(u_l)]), u = pi / pi_ref (Wang et al. 2023), [...].

  Args:
    policy, reference: summed log-probs.
    beta: strength of the pull to the reference.
    divergence: one of the four functions above; `reverse_kl` gives DPO. Exponents are capped at 60.
    alpha: of `alpha_divergence`.
  """
  chosen, rejected = (divergence(x, alpha=alpha) for x in _log_ratios(policy, reference))
  return bradley_terry_loss(beta * chosen, beta * rejected)


# Without a reference.


def simpo_loss(policy: Pair, *, beta: Knob, gamma: Knob) -> jax.Array:
  """Returns -log sigmoid(beta (m_w - m_l) - gamma) of MEAN log-probs m, [...].

  Meng et al. 2024, Eq. 6. gamma is the target margin itself, as TRL's simpo_gamma; SimPO's own code
  and Levanter take the ratio gamma / beta (gamma_beta_ratio).
  """
  return -jax.nn.log_sigmoid(beta * (_wide(policy.chosen) - _wide(policy.rejected)) - gamma)


def alphapo_loss(policy: Pair, *, beta: Knob, gamma: Knob, alpha: Knob) -> jax.Array:
  """Returns -log sigmoid(beta (f(m_w) - f(m_l)) - gamma), f(m) = (1 - exp(-alpha m)) / alpha, [...].

  AlphaPO (Gupta et al. 2025) of MEAN log-probs m: `simpo_loss` of `alpha_divergence`, to which it goes
  as alpha goes to 0. Exponents are capped at 60.
  """
  return simpo_loss(Pair(*(alpha_divergence(m, alpha=alpha) for m in policy)), beta=beta, gamma=gamma)


def cpo_loss(policy: Pair, *, beta: Knob, label_smoothing: Knob = 0.0) -> jax.Array:
  """Returns -log sigmoid(beta (log pi(y_w) - log pi(y_l))) of summed log-probs, [...].

  Xu et al. 2024, Eq. 3, whose CPO is this plus `nll_loss(policy.chosen)`. It is DPO without a
  reference, or with a uniform one.
  """
  # A uniform reference cancels in the margin.
  zero = jax.tree.map(jnp.zeros_like, policy)
  return dpo_loss(policy, zero, beta=beta, label_smoothing=label_smoothing)


def orpo_loss(policy: Pair, *, weight: Knob) -> jax.Array:
  """Returns -m_w - weight log sigmoid(log odds_w - log odds_l) of MEAN log-probs m, [...].

  Hong et al. 2024, Eq. 6 and 7; odds = p / (1 - p) with p = exp(m), weight is the paper's lambda.
  """
  log_odds = lambda m: m - _log1mexp(m)
  chosen, rejected = _wide(policy.chosen), _wide(policy.rejected)
  return -chosen - weight * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def unlikelihood_loss(policy: Pair, *, alpha: Knob) -> jax.Array:
  """Returns -log pi(y_w) + alpha log pi(y_l), the baseline of Rafailov et al. 2023 (Sec. 6), [...].

  It has no lower bound in log pi(y_l); that is the baseline's known failing.
  """
  return -_wide(policy.chosen) + alpha * _wide(policy.rejected)


def nll_loss(log_probs: jax.Array) -> jax.Array:
  """Returns -log pi, [...]: SFT, or the term that RPO and CPO add."""
  return -_wide(log_probs)


# Unpaired responses.


def kto_loss(
  log_ratios: jax.Array,
  desirable: jax.Array,
  kl: jax.Array,
  *,
  beta: Knob,
  desirable_weight: Knob = 1.0,
  undesirable_weight: Knob = 1.0,
) -> jax.Array:
  """Returns w (1 - sigmoid(+-beta (h - kl))), + where desirable (Ethayarajh et al. 2024), [...].

  The loss lambda_y - v(x, y) of the paper's Sec. 4. With kl = 0 it is the unpaired form of
  `apo_zero_loss`.

  Args:
    log_ratios: h = log pi - log pi_ref of each response, summed.
    desirable: bool, + and desirable_weight where true, - and undesirable_weight where false.
    kl: the reference point, an estimate of KL(pi || pi_ref); no gradient flows into it, and it
      counts as 0 where negative.
    beta: strength of the pull to the reference.
    desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U.
  """
  # A KL is not negative; its estimate of a few samples may be.
  point = jax.lax.stop_gradient(jnp.maximum(_wide(kl), 0))
  advantage = beta * (_wide(log_ratios) - point)
  return jnp.where(
    desirable, desirable_weight * jax.nn.sigmoid(-advantage), undesirable_weight * jax.nn.sigmoid(advantage)
  )


def bco_loss(log_ratios: jax.Array, desirable: jax.Array, *, beta: Knob, delta: Knob = 0.0) -> jax.Array:
  """Returns -log sigmoid(+-(beta h - delta)) (Jung et al. 2024), + where desirable, [...]."""
  logits = beta * _wide(log_ratios) - delta
  return -jax.nn.log_sigmoid(jnp.where(desirable, logits, -logits))


# On pairs of the policy's own.


def xpo_loss(policy: Pair, reference: Pair, sampled: jax.Array, *, beta: Knob, alpha: Knob) -> jax.Array:
  """Returns -log sigmoid(beta h) + alpha log pi(y) of a y that the reference sampled, [...].

  XPO (Xie et al. 2024): the policy is to explore what the reference does not say by itself. `sampled`
  is log pi(y), with a gradient, of the one of both responses that is the reference's. alpha = 0 gives
  online DPO.
  """
  return dpo_loss(policy, reference, beta=beta) + alpha * _wide(sampled)


def nash_md_loss(
  log_probs: jax.Array, reference: jax.Array, preference: jax.Array, *, beta: Knob
) -> jax.Array:
  """Returns -(P - 1/2 - beta log(pi / pi_ref)) log pi(y), the bracket without gradient, [...].

  Nash-MD-PG (Munos et al. 2023, Sec. 7): the policy gradient of winning against a rival, beta being the
  paper's tau. The gradient is the loss's; its value says nothing. P = 1/2 at pi = pi_ref has none.

  Args:
    log_probs: log pi(y) of a response that the policy sampled, summed.
    reference: log pi_ref(y).
    preference: P, the chance that y is preferred to a response of the rival: the geometric mixture of
      policy and reference, see `dpojax.kernels.distributions.token_mixed_log_probs`.
    beta: strength of the pull to the reference.
  """
  ours = _wide(log_probs)
  worth = _wide(preference) - 0.5 - beta * (ours - _wide(reference))
  return -jax.lax.stop_gradient(worth) * ours


# What a loss is given: lengths, weights, a reference that moves.


def length_normalize(log_probs: Any, lengths: Any) -> Any:
  """Returns summed log-probs divided by their lengths in tokens; arrays, or `Pair`s of them.

  `ipo_loss` of these is TRL's, `dpo_loss` of these is length-normalised DPO (Lambert et al. 2024,
  Eq. 6). An absent response, of length 0, stays 0.
  """
  return jax.tree.map(lambda sums, n: _wide(sums) / jnp.maximum(_wide(n), 1), log_probs, lengths)


def ld_dpo_log_probs(token_log_probs: Pair, mask: Pair, *, alpha: Knob) -> Pair:
  """Returns summed log-probs in which what is longer than the shorter response counts alpha times.

  LD-DPO (Liu et al. 2024): tokens up to the length of the shorter response of the pair count fully.

  Args:
    token_log_probs: [..., T] of each response.
    mask: [..., T] bool, true on the response's tokens.
    alpha: 1 gives plain sums.
  """
  # Counted within the mask: a response may begin anywhere in its row.
  places = jax.tree.map(lambda m: jnp.cumsum(m.astype(jnp.int32), axis=-1), mask)
  shared = jnp.minimum(places.chosen[..., -1:], places.rejected[..., -1:])

  def weighted(values, mask, place):
    weights = jnp.where(place <= shared, 1.0, alpha)
    return jnp.sum(_wide(values) * weights, axis=-1, where=mask)

  return Pair(*map(weighted, token_log_probs, mask, places))


def sampo_log_probs(token_log_probs: Pair, mask: Pair, noise: Pair) -> Pair:
  """Returns log-probs summed over as many tokens of either response as the shorter one has.

  SamPO (Lu et al. 2024b): of the longer response tokens are drawn without replacement. With the same
  noise for policy and reference the log-ratio is of the tokens drawn; the authors' code draws anew for
  each model.

  Args:
    token_log_probs: [..., T] of each response.
    mask: [..., T] bool, true on the response's tokens.
    noise: [..., T] uniform draws, of each response; its tokens with the least are kept.
  """
  shorter = jnp.minimum(*(jnp.sum(m, axis=-1, keepdims=True) for m in mask))

  def drawn(values, mask, noise):
    # Tokens of others rank last, whatever their noise.
    order = jnp.argsort(jnp.where(mask, _wide(noise), jnp.inf), axis=-1)
    place = jnp.argsort(order, axis=-1)
    kept = mask & (place < jnp.broadcast_to(shorter, place.shape))
    return jnp.sum(_wide(values), axis=-1, where=kept)

  return Pair(*map(drawn, token_log_probs, mask, noise))


def wpo_weights(alignment: Pair) -> jax.Array:
  """Returns min(1, exp(a_w + a_l)) without gradient (WPO, Zhou et al. 2024), [...].

  A pair counts as much as the policy itself would have sampled it (the paper's Eq. 2, aligned to
  sampling); multiply the loss of the pair by it. TRL's weights have no cap at 1.

  Args:
    alignment: of each response the mean over tokens of log pi(y_t) - log sum_v pi(v)^2; the latter
      is logsumexp(2 logits) - 2 logsumexp(logits).
  """
  return jax.lax.stop_gradient(jnp.exp(jnp.minimum(_wide(alignment.chosen) + _wide(alignment.rejected), 0.0)))


def dr_dpo_weights(values: jax.Array, *, tau: Knob, where: jax.Array | None = None) -> jax.Array:
  """Returns B softmax(-values / tau) over the last axis without gradient (Wu et al. 2024c), [..., B].

  Dr. DPO's -tau log mean exp(-values / tau) of a batch has the gradient of the mean of values times
  these weights: pairs of a large loss, as those with flipped labels, count less. They go to 1 as tau,
  the paper's beta', grows. Pairs that are not `where` get 0, and B counts the others.
  """
  values = _wide(values)
  there = jnp.ones(values.shape, bool) if where is None else where
  scores = jnp.where(there, -jnp.where(there, values, 0) / tau, jnp.finfo(values.dtype).min)
  count = jnp.sum(there, axis=-1, keepdims=True).astype(values.dtype)
  weights = jnp.broadcast_to(count, values.shape) * jax.nn.softmax(scores, axis=-1)
  return jax.lax.stop_gradient(jnp.where(there, weights, 0))


def mix_reference(policy_params: Any, reference_params: Any, *, alpha: Knob) -> Any:
  """Returns alpha policy + (1 - alpha) reference, leaf by leaf: TR-DPO, Gorbatovski et al. 2024.

  alpha = 1 is the paper's hard update; leaves keep the reference's dtype.
  """
  return jax.tree.map(
    lambda p, r: (alpha * _wide(p) + (1 - alpha) * _wide(r)).astype(r.dtype), policy_params, reference_params
  )


# The other side of the theorem: the reward that RLHF maximises, and the KL it pays.


def kl_penalized_reward(
  rewards: jax.Array, log_probs: jax.Array, reference_log_probs: jax.Array, *, beta: Knob
) -> jax.Array:
  """Returns r - beta (log pi - log pi_ref) (Rafailov et al. 2023, Eq. 3), [...]."""
  return _wide(rewards) - implicit_reward(log_probs, reference_log_probs, beta=beta)


def kl_k1(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
  """Returns log pi - log pi_ref of samples of pi (Schulman 2020), [...].

  Unbiased for KL(pi || pi_ref), of any sign. Of summed log-probs it estimates the sequences' KL, of
  token log-probs the tokens'.
  """
  return _wide(log_probs) - _wide(reference_log_probs)


def kl_k2(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
  """Returns (log pi - log pi_ref)^2 / 2 (Schulman 2020): biased, never negative, [...]."""
  return jnp.square(kl_k1(log_probs, reference_log_probs)) / 2


def kl_k3(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
  """Returns exp(-x) - 1 + x, x = log pi - log pi_ref (Schulman 2020), [...].

  Unbiased and never negative; the exponent is capped at 60.
  """
  x = kl_k1(log_probs, reference_log_probs)
  return jnp.expm1(jnp.minimum(-x, _LARGEST_EXPONENT)) + x


def token_kl(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
  """Returns the exact sum_v pi(v) (log pi(v) - log pi_ref(v)) of log-probs [..., V], [...].

  KL(pi || pi_ref) of the next token; summed over the tokens of samples of pi it estimates the
  sequences' KL without bias. Where pi is 0, log-probs may be -inf.
  """
  ours, theirs = _wide(log_probs), _wide(reference_log_probs)
  # 0 log 0 is 0: ids that the policy cannot say are taken out before they make nan of -inf - -inf.
  possible = jnp.isfinite(ours)
  ours, theirs = jnp.where(possible, ours, 0), jnp.where(possible, theirs, 0)
  return jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1, where=possible)


PAIRWISE_LOSSES: dict[str, Callable[..., jax.Array]] = {
  "dpo": dpo_loss,
  "odpo": odpo_loss,
  "ipo": ipo_loss,
  "hinge": hinge_loss,
  "robust_dpo": robust_dpo_loss,
  "exo_pair": exo_pair_loss,
  "nca_pair": nca_pair_loss,
  "bco_pair": bco_pair_loss,
  "sppo_hard": sppo_hard_loss,
  "apo_zero": apo_zero_loss,
  "apo_down": apo_down_loss,
  "discopop": discopop_loss,
  "dpop": dpop_loss,
  "cal_dpo": cal_dpo_loss,
  "bdpo": bdpo_loss,
  "mappo": mappo_loss,
  "gpo_exponential": gpo_exponential_loss,
  "gpo_truncated_quadratic": gpo_truncated_quadratic_loss,
  "gpo_savage": gpo_savage_loss,
  "f_dpo_forward_kl": partial(f_dpo_loss, divergence=forward_kl),
  "f_dpo_js_divergence": partial(f_dpo_loss, divergence=js_divergence),
  "f_dpo_alpha_divergence": partial(f_dpo_loss, divergence=alpha_divergence),
}
"""What `config.loss` names: (policy, reference, *, beta, ...) -> loss of each pair, elementwise."""


def _wide(x: jax.Array) -> jax.Array:
  """Returns x in float32, or in float64 if it is that already."""
  return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _exp(x: jax.Array) -> jax.Array:
  return jnp.exp(jnp.minimum(x, _LARGEST_EXPONENT))


def _log1mexp(x: jax.Array) -> jax.Array:
  """Returns log(1 - exp(x)) for x <= 0, with x held a rounding below 0."""
  # Both branches of a select are differentiated: each gets arguments that it is finite for. The two forms and
  # log 2 as the bound between them are Maechler's (2012).
  x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
  small = jnp.maximum(x, -1.0)
  large = jnp.minimum(x, -0.5)
  return jnp.where(x > -0.7, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def _sorted(x: jax.Array, where: jax.Array | None) -> jax.Array:
  """Returns x sorted over the last axis, with 0 behind those that are `where`."""
  if where is None:
    return jnp.sort(x, axis=-1)
  # Behind all others, and then 0: an infinity has no gradient that is a number.
  last = jnp.sort(jnp.where(where, x, jnp.inf), axis=-1)
  return jnp.where(_ranked(where), last, 0)


def _ranked(where: jax.Array) -> jax.Array:
  """[..., B] bool: the first places, as many as are `where`."""
  return jnp.sort(where, axis=-1, descending=True)


def _dpo_of_ranks(ours, theirs, beta, label_smoothing, where) -> jax.Array:
  zero = jnp.zeros_like(ours)
  values = dpo_loss(Pair(ours, zero), Pair(theirs, zero), beta=beta, label_smoothing=label_smoothing)
  return values if where is None else jnp.where(_ranked(where), values, 0)


def _log_ratios(policy: Pair, reference: Pair) -> Pair:
  return Pair(*(_wide(p) - _wide(r) for p, r in zip(policy, reference)))


def _rewards(policy: Pair, reference: Pair, beta: Knob) -> Pair:
  return Pair(*(implicit_reward(p, r, beta=beta) for p, r in zip(policy, reference)))


def _margin(policy: Pair, reference: Pair) -> jax.Array:
  chosen, rejected = _log_ratios(policy, reference)
  return chosen - rejected
