"""The enumerable world in small: every method in it, the bench, and what figures are made from."""

import itertools
import time

import jax
import numpy as np
import pytest

from dpojax.runtime.errors import ConfigError
from dpojax.training import preference
from experiments import suite
from experiments.measurements import measure
from experiments.paper import enumerable, frontier, loss_ablation, methods, on_policy, training_curve
from tests import conftest

pytestmark = pytest.mark.usefixtures("compiled")

UNJUDGED = {
  "eval_every": 0,
  "rows_at_once": 8,
}  # nothing held out: half the programs; steps of any size in one
SMALL = enumerable.Sizes(prompts=4, layers=1, comparisons=1280, held_out=200, batch_size=64)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  return enumerable.make(tmp_path_factory.mktemp("enumerable"), SMALL)


def test_responses_are_all_there_are_and_their_chances_add_to_one(small):
  world, table = small
  assert len(enumerable.RESPONSES) == 1 + 5 + 25 * 6
  np.testing.assert_allclose(np.exp(table.log_probs).sum(axis=1), 1, rtol=1e-9)
  chances = np.exp(table.log_probs)
  np.testing.assert_allclose((chances * table.rewards).sum(axis=1), 0, atol=1e-9)
  assert (chances * table.rewards**2).sum(axis=1).mean() == pytest.approx(1)
  start = world.measure(world.model.params, 0)
  assert start["reward"] == pytest.approx(0, abs=1e-9) and start["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_the_optimum_is_worth_beta_log_z_and_nothing_at_its_kl_is_better(small, beta, rng):
  _, table = small
  reward, kl = enumerable.reward_and_kl(table, enumerable.optimum(table, beta))
  log_z = np.logaddexp.reduce(table.log_probs + table.rewards / beta, axis=1)
  assert reward - beta * kl == pytest.approx(beta * log_z.mean())
  assert enumerable.best_reward(table, kl) == pytest.approx(reward, rel=1e-6)
  for _ in range(20):
    other = enumerable.optimum(table, beta) + rng.normal(size=table.rewards.shape, scale=0.3)
    other -= np.logaddexp.reduce(other, axis=1, keepdims=True)
    reward, kl = enumerable.reward_and_kl(table, other)
    assert reward < enumerable.best_reward(table, kl)


def test_labels_are_drawn_from_bradley_terry(small, rng):
  _, table = small
  which, chosen, rejected = enumerable.draw_comparisons(rng, table, 40000)
  assert np.all(chosen != rejected)
  margin = np.abs(table.rewards[which, chosen] - table.rewards[which, rejected])
  right = table.rewards[which, chosen] > table.rewards[which, rejected]
  expected = 1 / (1 + np.exp(-margin))
  error = np.sqrt((expected * (1 - expected)).mean() / len(right))
  assert abs(right.mean() - expected.mean()) < 4 * error


def test_every_method_runs_and_none_is_above_the_optimum(small):
  world, table = small
  plan = frontier.ENUMERABLE._replace(
    seeds=(0,),
    betas=(0.5, 2.0),
    alphas=(0.1,),
    ppo_values=(0.5,),
    ppo_seeds=(0,),
    ppo=frontier.ENUMERABLE.ppo.__class__(
      **vars(frontier.ENUMERABLE.ppo) | {"steps": 4, "prompts_per_step": 16}
    ),
    dpo=UNJUDGED,
    short_dpo=UNJUDGED,
    unlikelihood={"steps": 10} | UNJUDGED,
    preferred_ft={"steps": 10} | UNJUDGED,
    ppo_measure_every=4,
    at_once=1,
  )
  lines = frontier.run(world, plan)
  ends = methods.final(lines)
  assert {line["method"] for line in ends} == {
    "DPO",
    "Unlikelihood",
    "Preferred-FT",
    "PPO",
    "PPO-GT",
    frontier.SHUFFLED,
  }
  for line in ends:
    assert line["reward"] < enumerable.best_reward(table, line["kl"])
  of = {(line["method"], line["setting"]): line for line in ends}
  assert of["DPO", 0.5]["reward"] > of["DPO", 2.0]["reward"] > 0.2
  assert of["DPO", 0.5]["kl"] > of["DPO", 2.0]["kl"] > 0
  assert of["PPO-GT", 0.5]["reward"] > 0.1
  assert abs(of[frontier.SHUFFLED, 0.5]["reward"]) < 0.25 * of["DPO", 0.5]["reward"]
  assert frontier.run(world, plan) == lines  # from its folder
  with pytest.raises(ConfigError, match="other settings"):
    frontier.run(world, plan._replace(betas=(0.5, 1.0)))
  frontier.report(lines, lambda kl: enumerable.best_reward(table, kl))
  frontier.plot(lines, world.folder / "frontier.png")
  training_curve.plot(lines, world.folder / "curve.png")
  for name in ("frontier.png", "curve.png"):
    assert (world.folder / name).stat().st_size > 10_000


def test_the_loss_ablation_knows_every_loss_between_two_responses():
  ranked_or_single = {"dpo_plackett_luce", "kto", "bco", "nll", "nll_mean"}
  assert set(loss_ablation.SWEPT) == set(preference.LOSSES) - ranked_or_single - {"xpo"}


def test_every_command_of_the_suite_is_a_module_with_these_flags(tmp_path):
  every = [
    *suite.chains(tmp_path, "sentences", "pairs"),
    *suite.real_chains(tmp_path, "sentences", "pairs", "model"),
    *suite.longest_of_real(tmp_path, "pairs", "model"),
  ]
  for name, *arguments in itertools.chain(*every):
    text = (conftest.ROOT / "experiments" / f"{name.replace('.', '/')}.py").read_text()
    assert "def main()" in text
    for argument in arguments:
      assert f'"{argument.partition("=")[0]}"' in text, (name, argument)


@pytest.mark.parametrize("chains, shares", [(1, [[0, 1, 2]]), (2, [[0, 2], [1]]), (5, [[0], [1], [2]])])
def test_chains_share_the_cores_and_the_last_has_all(chains, shares, tmp_path, monkeypatch):
  taken, started = [], []
  monkeypatch.setattr(suite.os, "sched_setaffinity", lambda thread, share: taken.append(share), raising=False)

  def run_chain(chain, workdir):
    started.append(chain)
    while len(started) < len(shares):  # until every thread has a chain
      time.sleep(0.001)
    return chain if chain == "fails" else ""

  monkeypatch.setattr(suite, "run_chain", run_chain)
  todo = ["fails", *["works"] * (chains - 1)]
  assert suite.run_chains(todo, tmp_path, cores=[0, 1, 2], jobs=len(shares)) == ["fails"]
  assert sorted(taken) == sorted(shares)


def test_losses_are_compared_at_the_same_kl(small, capsys):
  world, table = small
  lines = loss_ablation.run(world, ["orpo"], {"steps": 10} | UNJUDGED, seeds=(0,))
  assert len(lines) == 4
  loss_ablation.show(lines, table)
  assert "| `orpo` |" in capsys.readouterr().out
  loss_ablation.plot(lines, table, world.folder / "losses.png")
  point = lambda kl, reward: {"kl": kl, "reward": reward}
  points = [point(1.0, 0.8), point(0.25, 0.3)]
  best = lambda kl: kl**0.5
  assert loss_ablation.share_at(points, 1.0, best) == pytest.approx(0.8)
  assert loss_ablation.share_at(points, 0.625, best) == pytest.approx(0.7)
  assert np.isnan(loss_ablation.share_at(points, 0.1, best)) and np.isnan(
    loss_ablation.share_at(points, 1.5, best)
  )


# The bench.


def test_the_kl_of_samples_is_the_exact_one(small):
  """The mean over samples of summed per-token KLs, against the sum over all responses."""
  world, table = small
  noisy = jax.tree.map(lambda x: x * 1.3, world.model.params)
  exact = world.measure(noisy, 0)
  bench = measure.Bench(
    world.model.config,
    world.reward,
    stop_id=0,
    num_samples=512,
    max_new_tokens=enumerable.ROOM,
    prompts_at_once=4,
  )
  got = bench.measure(noisy, world.model.params, world.prompts, world.prompt_lengths, seed=0)
  answers = bench.answers(noisy, world.prompts, world.prompt_lengths, seed=0)
  each = bench.kl(noisy, world.model.params, world.prompts, world.prompt_lengths, answers)
  assert got["kl"] == pytest.approx(each.mean())
  assert abs(got["kl"] - exact["kl"]) < 5 * each.std() / each.size**0.5
  assert abs(got["reward"] - exact["reward"]) < 5 * answers.rewards.std() / answers.rewards.size**0.5
  assert np.all(bench.kl(noisy, noisy, world.prompts, world.prompt_lengths, answers) == 0)


# What figures count.


def test_a_point_is_dominated_where_another_has_more_reward_at_less_kl():
  point = lambda reward, kl: {"reward": reward, "kl": kl}
  others = [point(0.5, 1.0), point(0.9, 5.0)]
  assert methods.dominated([point(0.4, 2.0), point(0.4, 0.5), point(0.95, 9.0)], others) == 1


def test_ids_at_hand_are_comparisons_of_the_loader():
  data = methods.in_ids(
    [np.array([1, 2]), np.array([3])], [np.array([4]), np.array([5, 6])], [np.array([7, 8, 9]), np.array([0])]
  )
  prompt, responses = data[1]
  assert prompt.tolist() == [3] and [r.tolist() for r in responses] == [[5, 6], [0]]
  assert data.lengths.tolist() == [[2, 1, 3], [1, 2, 1]]


def test_win_rates_at_a_temperature_are_those_of_tempered_draws(rng):
  count = len(enumerable.RESPONSES)
  log_probs = np.log(rng.dirichlet(np.ones(count), 2))
  table = enumerable.Table(np.log(rng.dirichlet(np.ones(count), 2)), rng.normal(size=(2, count)))
  np.testing.assert_allclose(on_policy.at_temperature(log_probs, 1.0), np.exp(log_probs), rtol=1e-9)
  assert on_policy.win_rate(table, table.log_probs, 1.0) == pytest.approx(0.5)
  greedy = on_policy.at_temperature(log_probs, 0.0)
  assert np.sort(greedy, axis=1)[:, -1].tolist() == [1, 1] and greedy.sum() == 2
  half = on_policy.at_temperature(log_probs, 0.5)
  first = np.array([response[0] for response in enumerable.RESPONSES])
  mass = np.stack([np.exp(log_probs)[:, first == token].sum(1) for token in range(enumerable.IDS)], axis=1)
  want = mass**2 / (mass**2).sum(axis=1, keepdims=True)
  for token in range(enumerable.IDS):
    np.testing.assert_allclose(half[:, first == token].sum(1), want[:, token])
