"""PPO: its functions against plain loops, its optimum against the closed form, kills and refusals."""

import dataclasses
import importlib
import itertools
import math
import shutil

import jax
import numpy as np
import pytest

from dpojax.data import tokenization
from dpojax.evaluate import scorers
from dpojax.models import transformer
from dpojax.ppo import loop as ppo
from dpojax.ppo import losses as ppo_losses
from dpojax.ppo import step as ppo_step
from dpojax.runtime.errors import ConfigError
from dpojax.sample import rollouts
from dpojax.training import checkpoint, parallel, weights
from dpojax.training.metrics import read_metrics
from dpojax.training.objectives import response_log_probs
from tests import worlds

pytestmark = pytest.mark.usefixtures("compiled")

STOP, VOCAB, ROOM = 0, 5, 3


def tiny(seed=0):
  config = worlds.llama(vocab_size=VOCAB, width=16, layers=1, heads=2, kv_heads=2)
  return config, worlds.params_of(config, seed)


RESPONSES = [
  np.array(ids, np.int32)
  for length in range(1, ROOM + 1)
  for ids in itertools.product(range(VOCAB), repeat=length)
  if STOP not in ids[:-1] and (ids[-1] == STOP or length == ROOM)
]
"""Every response there can be."""

PROMPTS, LENGTHS = np.array([[1, 2], [3, 0], [2, 4], [4, 0]], np.int32), np.array([2, 1, 2, 1])


def exact_log_probs(config, params):
  """Log-probs of every response to every prompt, [4, N]."""
  tokens, counts = rollouts.padded(RESPONSES, ROOM)
  every = lambda x: np.broadcast_to(x, (len(PROMPTS), *x.shape))
  rows = rollouts.rows_of(PROMPTS, LENGTHS, every(tokens), every(counts))
  apply = transformer.make_apply(config)
  score = jax.jit(
    lambda params, rows: response_log_probs(apply(params, rows), rows, num_responses=len(RESPONSES)).sums[
      :, 0
    ]
  )
  return np.asarray(score(params, rows), np.float64)


def table_reward(prompts, responses):
  """Pays for each 1, and for 2 behind the prompt's last id 2."""
  return np.array(
    [
      np.sum(r == 1) * 0.6 - 0.5 * np.sum(r == 3) + 0.4 * (p[-1] == 2) * (r[0] == 2)
      for p, r in zip(prompts, responses)
    ]
  )


def every_reward():
  """The reward of every response to every prompt, [4, N]."""
  return np.stack(
    [table_reward([prompt[:n]] * len(RESPONSES), RESPONSES) for prompt, n in zip(PROMPTS, LENGTHS)]
  )


def reward_and_kl(log_probs, reference):
  """Exact mean reward and KL to the reference, over prompts."""
  chances = np.exp(log_probs)
  return ((chances * every_reward()).sum(1).mean(), (chances * (log_probs - reference)).sum(1).mean())


def settings(**changes):
  return ppo.Settings(
    **dict(
      steps=18,
      prompts_per_step=32,
      num_samples=16,
      max_new_tokens=ROOM,
      epochs=2,
      minibatches=2,
      beta=0.5,
      normalize_rewards=False,
      learning_rate=6e-3,
      critic_learning_rate=2e-2,
      schedule="linear",
      value_clip=1.0,
    )
    | changes
  )


# The functions.


def responses_of(rng):
  """Five responses of 1 to 6 tokens: three arrays [5, 6], and lengths."""
  return *rng.normal(size=(3, 5, 6)), np.array([6, 1, 3, 5, 2])


def test_advantages_are_a_plain_loops(rng):
  rewards, values, _, lengths = responses_of(rng)
  got = jax.vmap(lambda *x: ppo_losses.gae(*x, gamma=0.9, lam=0.7))(rewards, values, lengths)
  want = np.zeros((5, 6))
  for i, length in enumerate(lengths):
    for t in range(length):
      for later in range(t, length):
        following = values[i, later + 1] if later + 1 < length else 0.0
        want[i, t] += (0.9 * 0.7) ** (later - t) * (rewards[i, later] + 0.9 * following - values[i, later])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_advantages_at_lambda_1_are_returns_less_values(rng):
  rewards, values, _, lengths = responses_of(rng)
  got = jax.vmap(lambda *x: ppo_losses.gae(*x, gamma=1.0, lam=1.0))(rewards, values, lengths)
  for i, length in enumerate(lengths):
    returns = np.cumsum(rewards[i, :length][::-1])[::-1]
    np.testing.assert_allclose(got[i, :length], returns - values[i, :length], rtol=1e-4, atol=1e-5)
    assert not np.any(got[i, length:])


def test_every_token_pays_for_its_log_ratio_and_the_last_one_earns_the_score(rng):
  log_probs, reference, _, lengths = responses_of(rng)
  scores = rng.normal(size=5)
  got = jax.vmap(lambda *x: ppo_losses.token_rewards(*x, beta=0.3))(scores, log_probs, reference, lengths)
  want = np.zeros((5, 6))
  for i, length in enumerate(lengths):
    for t in range(length):
      want[i, t] = -0.3 * (log_probs[i, t] - reference[i, t]) + scores[i] * (t == length - 1)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_two_losses_are_plain_loops(rng):
  log_probs, old, advantages, _ = responses_of(rng)
  policy = ppo_losses.ppo_policy_loss(log_probs, old, advantages, clip=0.2)
  value = ppo_losses.ppo_value_loss(log_probs, old, advantages, clip=0.3)
  for at in np.ndindex(5, 6):
    new, before, aim = log_probs[at], old[at], advantages[at]
    ratio = math.exp(new - before)
    near = min(max(ratio, 0.8), 1.2)
    assert policy[at] == pytest.approx(-min(ratio * aim, near * aim), rel=1e-4)
    near = min(max(new, before - 0.3), before + 0.3)
    assert value[at] == pytest.approx(max((new - aim) ** 2, (near - aim) ** 2) / 2, rel=1e-4)


def test_moments_of_parts_are_those_of_the_whole_and_whitening_uses_the_marked(rng):
  values, where = rng.normal(3, 2, size=(7, 10)), rng.random((7, 10)) < 0.5
  moments = ppo_losses.no_moments()
  assert moments.deviation() == 1
  for part in np.split(values, [1, 3]):
    moments = ppo_losses.add_moments(moments, part)
  assert moments.mean == pytest.approx(values.mean(), rel=1e-5)
  assert moments.deviation() == pytest.approx(values.std(), rel=1e-5)
  got = np.asarray(ppo_losses.whiten(values, where))
  np.testing.assert_allclose(
    got[where], (values[where] - values[where].mean()) / values[where].std(), rtol=1e-4, atol=1e-5
  )
  assert not np.any(got[~where])


def test_beta_rises_where_the_kl_is_too_large_and_by_no_more_than_a_fiftieth():
  for kl, change in ((6.0, 0.0), (6.6, 0.01), (60.0, 0.02), (5.4, -0.01), (0.0, -0.02)):
    assert ppo_losses.adapted_beta(0.5, kl, target=6.0) == pytest.approx(0.5 * (1 + change))


def test_the_first_gradient_is_reinforce_with_advantages(rng):
  config, params = tiny()
  tokens, counts = rollouts.padded(RESPONSES[-16:], ROOM)
  every = lambda x: np.broadcast_to(x, (len(PROMPTS), *x.shape))
  rows = rollouts.rows_of(PROMPTS, LENGTHS, every(tokens), every(counts))
  apply, where = transformer.make_apply(config), rows.slot < 16
  log_probs = jax.jit(lambda params: rollouts.scored_log_probs(apply(params, rows), rows, where))
  advantages = rng.normal(size=where.shape).astype(np.float32)
  experience = ppo.Experience(rows, ppo_step.Targets(log_probs(params), *[advantages] * 3))
  objective = ppo_step.policy_objective(apply, settings())

  def clipped(params):
    loss, metrics = objective.evaluate(params, (), experience)
    return loss.value(), metrics

  got, metrics = jax.jit(jax.grad(clipped, has_aux=True))(params)
  assert metrics["policy/ratio"].value() == pytest.approx(1, abs=1e-6)
  assert metrics["policy/clipfrac"].value() == 0
  want = jax.jit(jax.grad(lambda params: -(log_probs(params) * advantages).sum() / where.sum()))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


# The loop.


def test_a_fixed_beta_approaches_the_closed_form_optimum():
  config, params = tiny()
  reference = exact_log_probs(config, params)
  best = reference + every_reward() / 0.5
  best -= np.log(np.exp(best).sum(1, keepdims=True))
  wanted_reward, wanted_kl = reward_and_kl(best, reference)
  first_reward, _ = reward_and_kl(reference, reference)

  seen = []
  trained, history = ppo.train(
    config,
    params,
    PROMPTS,
    LENGTHS,
    table_reward,
    settings(),
    stop_id=STOP,
    callback=lambda step, params, metrics: seen.append((step, metrics)),
  )
  after = exact_log_probs(config, trained)
  reward, kl = reward_and_kl(after, reference)
  value = lambda reward, kl: reward - 0.5 * kl
  gained = value(reward, kl) - value(first_reward, 0)
  assert gained > 0.97 * (value(wanted_reward, wanted_kl) - value(first_reward, 0))
  assert abs(reward / wanted_reward - 1) < 0.05 and abs(kl / wanted_kl - 1) < 0.1

  assert [step for step, _ in seen] == list(range(19)) and [m for _, m in seen[1:]] == history
  assert max(line["policy/mismatch"] for line in history) < 1e-5
  assert max(line["policy/sampler_error"] for line in history) < 1e-5
  assert history[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
  assert history[-1]["val/explained_variance"] > 0.8
  assert {line["objective/beta"] for line in history} == {0.5}


def test_a_step_on_weights_that_are_cut_is_that_of_one_device():
  config, params = tiny()

  def after_a_step(devices):
    once = settings(prompts_per_step=4, num_samples=4, epochs=1, minibatches=1, optimizer="sgd", steps=1)
    trainer = ppo.Trainer(config, params, table_reward, once, stop_id=STOP, devices=devices)
    metrics = trainer.step(0, PROMPTS, LENGTHS)
    return jax.device_get((trainer.state.policy.params, trainer.state.critic.params)), metrics

  want, told = after_a_step(parallel.Mesh(devices=jax.devices()[:1]))
  got, metrics = after_a_step(parallel.Mesh(fsdp=2, devices=jax.devices()[:2]))
  # At a learning rate of 0.006 a step of these gradients is larger by far than what may differ.
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-6), got, want)
  assert max(np.abs(w - b).max() for w, b in zip(*map(jax.tree.leaves, (want[0], params)))) > 1e-4
  assert metrics == pytest.approx(told, rel=1e-3, abs=1e-5)


def test_under_a_reward_model_scores_rise_and_an_adaptive_beta_holds_its_kl():
  config, params = tiny()
  judge = dataclasses.replace(config, reward_head=True)
  reward = rollouts.LearnedReward(
    judge,
    worlds.params_of(judge, seed=5),
    parallel.Mesh(),
    num_samples=16,
    prompt_width=2,
    max_new_tokens=ROOM,
  )
  trained, history = ppo.train(
    config,
    params,
    PROMPTS,
    LENGTHS,
    reward,
    settings(
      steps=28,
      beta=0.7,
      target_kl=0.3,
      kl_gain=0.4,
      normalize_rewards=True,
      learning_rate=4e-3,
      schedule="constant",
      rows_at_once=2,
      prompts_at_once=16,
    ),
    stop_id=STOP,
  )
  of = lambda name: np.array([line[f"objective/{name}"] for line in history])
  assert of("kl")[:14].max() > 0.6 and abs(of("kl")[-12:].mean() - 0.3) < 0.1
  assert of("beta")[-12:].mean() > 0.8
  assert of("scores")[-12:].mean() > of("scores")[0] + 0.3 * of("scores_std")[0]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(beta=-1.0), "beta is -1.0"),
    (dict(minibatches=3), "minibatches is 3"),
    (dict(lam=1.5), "lam is 1.5"),
    (dict(beta=0.0, target_kl=1.0), "beta is 0 and target_kl"),
    (dict(prompts_per_step=12, minibatches=1), "make it a multiple of 8"),
    (dict(prompts_at_once=4), "prompts_at_once is 4"),
    (dict(schedule="step"), "schedule is 'step'"),
  ],
)
def test_settings_that_cannot_run_are_refused(changes, message):
  config, params = tiny()
  with pytest.raises(ValueError, match=message):
    ppo.train(config, params, PROMPTS, LENGTHS, table_reward, settings(**changes), stop_id=STOP)


def test_prompts_and_rewards_that_cannot_be_used_are_refused():
  ids = [np.array([1])] * 2
  for prompts, lengths, message in (
    (PROMPTS, LENGTHS[:2], "give ids"),
    (PROMPTS, LENGTHS * 0, "prompt 0 has length 0"),
  ):
    with pytest.raises(ValueError, match=message):
      rollouts.check_prompts(prompts, lengths)
  for reward, message in (
    (lambda p, r: np.zeros((2, 1)), r"returned \(2, 1\) for 2"),
    (lambda p, r: [0.0, float("nan")], "response 1 is nan"),
  ):
    with pytest.raises(ValueError, match=message):
      rollouts.checked_scores(reward, ids, ids)


def test_an_epoch_is_about_each_prompt_once():
  seen = np.concatenate([ppo.prompts_of_step(12, step, settings(prompts_per_step=8)) for step in range(3)])
  for epoch in (seen[:12], seen[12:]):
    assert sorted(epoch.tolist()) == list(range(12))
  assert seen[:12].tolist() != seen[12:].tolist()


# The run.


def run_config(runs, folder, **changes):
  config = importlib.import_module("configs.ppo").get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(
      {
        "model.checkpoint": runs.sft,
        "ppo.reward": runs.reward,
        "data.path": runs.pairs,
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": 32,
        "data.eval_size": 16,
        "data.max_prompt_length": 4,
        "row_length": 64,
        "steps": 3,
        "batch_size": 16,
        "eval_every": 3,
        "checkpoint_every": 1,
        "checkpoint_keep": 9,
        "ppo.num_samples": 4,
        "ppo.max_new_tokens": 6,
        "ppo.epochs": 2,
        "ppo.minibatches": 2,
        "ppo.target_kl": 0.0,
        "optimizer.learning_rate": 5e-3,
        "ppo.critic_learning_rate": 5e-3,
        "parallel.fsdp": 2,
      }
      | changes
    )
  return config


TIMES = ("time", "samples_per_second", "tokens_per_second")


def lines(workdir):
  return [
    {name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(workdir)
  ]


def wordy(prompt, response):
  """Pays for kind words, by text."""
  return sum(word in worlds.GOOD for word in response.split())


def test_a_run_learns_and_continues_after_a_kill_to_the_same_numbers(runs, tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  config = run_config(runs, tmp_path, **{"ppo.reward": "tests.test_ppo:wordy", "ppo.critic": runs.reward})
  result = ppo.run(config, whole)
  first = next(line for line in lines(whole) if line["split"] == "eval")
  assert first["step"] == 0 and abs(first["objective/kl"]) < 1e-5
  assert result["objective/scores"] > first["objective/scores"] + 0.3
  shutil.copytree(whole, killed)
  for step in (2, 3):  # as a kill during step 2 leaves it
    shutil.rmtree(killed / "checkpoints" / str(step))
  ppo.run(config, killed)
  assert lines(killed) == lines(whole)
  one, other = (checkpoint.load_policy(folder) for folder in (whole, killed))
  assert one.step == other.step == 3
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_a_reward_model_gives_ids_what_it_gives_their_text(runs, tmp_path):
  config, devices = run_config(runs, tmp_path), parallel.Mesh()
  tokenizer = tokenization.load_tokenizer(weights.load(runs.sft).tokenizer)
  prompts = [text for text in ("the film is", "the plot is") for _ in range(4)]
  responses = ["wonderful", "dull", "clever warm clever", "cold", "", "tired dull", "warm", "moving"]
  ids = lambda texts: [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
  ended = [np.append(response, tokenizer.eos_token_id) for response in ids(responses)]
  got = ppo._reward(config, tokenizer, devices)(ids(prompts), ended)
  want = scorers.make_scorer(runs.reward, devices)(prompts, [f" {text}" for text in responses])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert got[0] > got[1] and got[2] > got[3]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"ppo.reward": ""}, "config.ppo.reward is empty"),
    ({"ppo.minibatches": 5}, "config.ppo.minibatches is 5 and batch_size 16"),
    ({"lora.rank": 4}, "config.lora.rank is 4, which PPO does not take"),
    ({"ppo.gamma": 2.0}, r"config.ppo.gamma is 2.0; it must be in \[0, 1\]"),
    ({"ppo.num_samples": "4"}, "config.ppo.num_samples is '4'; it must be of type int"),
    ({"ppo.taget_kl": 3.0}, "config.ppo.taget_kl is not a key; did you mean target_kl"),
    ({"ppo.reward": "tests.test_ppo:missing"}, "missing cannot be imported"),
    ({"objective": "dpo"}, "dpojax.ppo runs objective='ppo'"),
  ],
)
def test_a_config_that_cannot_run_is_refused(changes, message, runs, tmp_path):
  with pytest.raises(ConfigError, match=message):
    ppo.run(run_config(runs, tmp_path, **changes), tmp_path / "run")


def test_a_policy_is_no_reward(runs, tmp_path):
  with pytest.raises(ConfigError, match="no reward model"):
    ppo.run(run_config(runs, tmp_path, **{"ppo.reward": runs.sft}), tmp_path / "run")
