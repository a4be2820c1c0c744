"""Objectives: what they average, where they start, and which tokens they read."""

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.models import transformer
from dpojax.training import objectives
from tests import worlds

CONFIG = worlds.llama()


def evaluate(objective, params, reference, rows):
  loss, metrics = jax.jit(objective.evaluate)(params, reference, rows)
  return float(loss.value()), {name: float(mean.value()) for name, mean in metrics.items()}


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
  hidden_of = jax.jit(
    lambda tokens: transformer.Transformer(config).apply(
      {"params": params}, tokens[None], position, one, 0 * one
    )[0]
  )
  for i, (prompt, responses) in enumerate(examples):
    where = tuple(np.argwhere(np.asarray(rows.example) == i)[0])
    for k, response in enumerate(responses):
      ids = np.concatenate([prompt, response])
      hidden = hidden_of(np.pad(ids, (0, 20 - len(ids))))
      np.testing.assert_allclose(
        got[where][k], hidden[len(ids) - 1] @ params["reward_head"], rtol=1e-4, atol=1e-5
      )


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
