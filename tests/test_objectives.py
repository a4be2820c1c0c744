"""Objectives: what they average, where they start, and which tokens they read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import losses, objectives
from dpojax.models import transformer
from tests import worlds

CONFIG = worlds.llama()


def evaluate(objective, params, reference, rows):
  loss, metrics = jax.jit(objective.evaluate)(params, reference, rows)
  return float(loss.value()), {name: float(mean.value()) for name, mean in metrics.items()}


def dpo(**options):
  return objectives.preference_objective(
      transformer.make_apply(CONFIG), losses.dpo_loss, beta=0.3, **options)


def test_first_loss_is_log_2_whatever_the_weights(rng):
  params = worlds.params_of(CONFIG)
  rows = worlds.packed(worlds.comparisons(rng, 9, 2), 64)
  loss, metrics = evaluate(dpo(), params, params, rows)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert metrics["log_ratios/abs"] < 1e-5


def test_rewards_are_beta_times_the_log_ratios_of_policy_and_reference(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  rows = worlds.packed(worlds.comparisons(rng, 9, 2), 64)
  apply = transformer.make_apply(CONFIG)
  scores = [np.asarray(objectives.response_log_probs(apply(p, rows), rows, num_responses=2).sums)[
      np.asarray(rows.example) >= 0] for p in (params, reference)]
  ratios = scores[0] - scores[1]
  loss, metrics = evaluate(dpo(), params, reference, rows)
  rewards = 0.3 * ratios
  want = {
      "loss": np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean(),
      "rewards/chosen": rewards[:, 0].mean(), "rewards/rejected": rewards[:, 1].mean(),
      "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
      "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
      "logps/chosen": scores[0][:, 0].mean(), "logps/rejected": scores[0][:, 1].mean(),
      "log_ratios/chosen": ratios[:, 0].mean(), "log_ratios/rejected": ratios[:, 1].mean(),
      "log_ratios/abs": np.abs(ratios).mean()}
  assert metrics.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(loss, want["loss"], rtol=1e-4)


@pytest.mark.parametrize("name", sorted(losses.PAIRWISE_LOSSES))
def test_every_loss_of_the_table_lowers_itself_by_a_step_down_its_gradient(name, rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 0)
  rows = worlds.packed(worlds.comparisons(rng, 9, 2), 64)
  options = {"label_smoothing": 0.1} if name in ("robust_dpo", "exo_pair") else {}
  objective = objectives.preference_objective(
      transformer.make_apply(CONFIG), losses.PAIRWISE_LOSSES[name], beta=0.3, **options)
  total = jax.jit(jax.value_and_grad(lambda p: objective.evaluate(p, reference, rows)[0].value()))
  before, grads = total(params)
  norm = float(optax.tree.norm(grads))
  moved = jax.tree.map(lambda p, g: p - np.float32(1e-3 / norm) * g, params, grads)
  assert norm > 0 and total(moved)[0] < before


def test_the_reference_gets_no_gradient(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  rows = worlds.packed(worlds.comparisons(rng, 5, 2), 64)
  grads = jax.grad(lambda reference: dpo().evaluate(params, reference, rows)[0].total)(reference)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_sft_sums_over_tokens_and_averages_over_comparisons_or_over_tokens(rng):
  params = worlds.params_of(CONFIG)
  rows = worlds.packed(worlds.comparisons(rng, 9, 1, empty_prompts=False), 64)
  apply = transformer.make_apply(CONFIG)
  scores = objectives.response_log_probs(apply(params, rows), rows, num_responses=1)
  total, tokens = -float(scores.sums.sum()), float(scores.lengths.sum())
  assert tokens == np.sum(np.asarray(rows.branch) > 0)
  summed, _ = evaluate(objectives.sft_objective(apply), params, None, rows)
  by_token, metrics = evaluate(objectives.token_mean_sft_objective(apply), params, None, rows)
  np.testing.assert_allclose(summed, total / 9, rtol=1e-5)
  np.testing.assert_allclose(by_token, total / tokens, rtol=1e-5)
  np.testing.assert_allclose(metrics["nll_per_token"], by_token, rtol=1e-6)


def test_a_reward_is_the_head_on_the_last_token_of_its_response(rng):
  config = worlds.llama(reward_head=True)
  params = worlds.params_of(config)
  examples = worlds.comparisons(rng, 7, 2)
  rows = worlds.packed(examples, 64)
  apply = transformer.make_apply(config)
  got = np.asarray(objectives.response_rewards(apply(params, rows), rows, num_responses=2))
  position = jnp.arange(20)[None]
  one = jnp.ones_like(position)
  hidden_of = jax.jit(lambda tokens: transformer.Transformer(config).apply(
      {"params": params}, tokens[None], position, one, 0 * one)[0])
  for i, (prompt, responses) in enumerate(examples):
    where = tuple(np.argwhere(np.asarray(rows.example) == i)[0])
    for k, response in enumerate(responses):
      ids = np.concatenate([prompt, response])
      hidden = hidden_of(np.pad(ids, (0, 20 - len(ids))))
      np.testing.assert_allclose(
          got[where][k], hidden[len(ids) - 1] @ params["reward_head"], rtol=1e-4, atol=1e-5)


def test_a_reward_model_with_a_fresh_head_starts_at_log_2_and_learns(rng):
  config = worlds.llama(reward_head=True)
  params = worlds.params_of(config) | {"reward_head": jnp.zeros(config.width)}
  rows = worlds.packed(worlds.comparisons(rng, 7, 2), 64)
  objective = objectives.reward_objective(transformer.make_apply(config))
  loss, _ = evaluate(objective, params, None, rows)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  grads = jax.grad(lambda p: objective.evaluate(p, None, rows)[0].total)(params)
  moved = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
  assert evaluate(objective, moved, None, rows)[0] < np.log(2)


def test_padding_rows_change_nothing(rng):
  params, reference = worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 1)
  examples = worlds.comparisons(rng, 9, 2)
  few = worlds.packed(examples, 64)
  many = worlds.packed(examples, 64, rows=few.tokens.shape[0] + 3)
  want, got = (evaluate(dpo(), params, reference, rows)[1] for rows in (few, many))
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
