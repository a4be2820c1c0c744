"""The experiments in small: both worlds, every method in them, and what figures are made from."""

import itertools
import json

import jax
import numpy as np
import pytest

from dpojax import ppo, preference
from dpojax.config import ConfigError
from dpojax.data import tokenization
from dpojax.data.examples import DataError
from dpojax.metrics import read_metrics
from experiments import (
    best_of_n, beta_ablation, choices, enumerable, frontier, loss_ablation, measure, methods, sentiment,
    suite, sweep, training_curve, win_rate)
from tests import conftest, worlds


pytestmark = pytest.mark.usefixtures("compiled")


# The enumerable world.

UNJUDGED = {"eval_every": 0}  # nothing held out: half the programs
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
      seeds=(0,), betas=(0.5, 2.0), alphas=(0.1,), ppo_values=(0.5,), ppo_seeds=(0,),
      ppo=frontier.ENUMERABLE.ppo.__class__(**vars(frontier.ENUMERABLE.ppo) | {
          "steps": 4, "prompts_per_step": 16}),
      dpo=UNJUDGED, short_dpo=UNJUDGED, unlikelihood={"steps": 10} | UNJUDGED,
      preferred_ft={"steps": 10} | UNJUDGED, ppo_measure_every=4, at_once=1)
  lines = frontier.run(world, plan)
  ends = methods.final(lines)
  assert {line["method"] for line in ends} == {"DPO", "Unlikelihood", "Preferred-FT", "PPO", "PPO-GT",
                                                frontier.SHUFFLED}
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
  assert set(loss_ablation.SWEPT) == set(preference.LOSSES) - ranked_or_single


def test_every_command_of_the_suite_is_a_module_with_these_flags(tmp_path):
  for name, *arguments in itertools.chain(*suite.chains(tmp_path, "sentences", "pairs")):
    text = (conftest.ROOT / "experiments" / f"{name}.py").read_text()
    assert "def main()" in text
    for argument in arguments:
      assert f'"{argument.partition("=")[0]}"' in text, (name, argument)


def test_losses_are_compared_at_the_same_kl(small, capsys):
  world, table = small
  lines = loss_ablation.run(world, ["orpo"], {"steps": 10}, seeds=(0,))
  assert len(lines) == 4
  loss_ablation.show(lines, table)
  assert "| `orpo` |" in capsys.readouterr().out
  loss_ablation.plot(lines, table, world.folder / "losses.png")
  point = lambda kl, reward: {"kl": kl, "reward": reward}
  points = [point(1.0, 0.8), point(0.25, 0.3)]
  best = lambda kl: kl**0.5
  assert loss_ablation.share_at(points, 1.0, best) == pytest.approx(0.8)
  assert loss_ablation.share_at(points, 0.625, best) == pytest.approx(0.7)
  assert np.isnan(loss_ablation.share_at(points, 0.1, best)) and np.isnan(loss_ablation.share_at(points, 1.5, best))


# The bench.

def test_the_kl_of_samples_is_the_exact_one(small):
  """The mean over samples of summed per-token KLs, against the sum over all responses."""
  world, table = small
  noisy = jax.tree.map(lambda x: x * 1.3, world.model.params)
  exact = world.measure(noisy, 0)
  bench = measure.Bench(world.model.config, world.reward, stop_id=0, num_samples=512,
                        max_new_tokens=enumerable.ROOM, prompts_at_once=4)
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
  data = methods.in_ids([np.array([1, 2]), np.array([3])], [np.array([4]), np.array([5, 6])],
                        [np.array([7, 8, 9]), np.array([0])])
  prompt, responses = data[1]
  assert prompt.tolist() == [3] and [r.tolist() for r in responses] == [[5, 6], [0]]
  assert data.lengths.tolist() == [[2, 1, 3], [1, 2, 1]]


# Controlled sentiment.

def sentences(rng, count):
  def one():
    good = rng.random() < 0.5
    words = rng.choice(worlds.GOOD if good else worlds.BAD, size=rng.integers(1, 3))
    return {"text": f"the {rng.choice(worlds.NOUNS)} of this film is {' and '.join(words)} .",
            "label": int(good)}
  return [one() for _ in range(count)]


TEXTS = sentiment.Sizes(
    vocabulary=320, width=32, layers=1, sft_steps=150, prefixes=120, held_out=32,
    max_new_tokens=12, dpo_steps=30, batch_size=32)


@pytest.fixture(scope="module")
def make_text(tmp_path_factory):
  """(sizes, labels) -> the small world of sentences, made once."""
  folder = tmp_path_factory.mktemp("sentiment")
  path = worlds.write_jsonl(folder / "sentences.jsonl", sentences(np.random.default_rng(0), 800))
  return lambda sizes=TEXTS, labels="argmax": sentiment.make(folder / "world", path, sizes, labels=labels)


@pytest.fixture(scope="module")
def made(make_text):
  return make_text()


def test_the_classifier_knows_held_out_sentences_and_its_reward_is_a_probability(made):
  assert made.classifier.accuracy > 0.95
  good, bad, none = made.classifier(["the cast is wonderful .", "the cast is dull .", ""])
  assert 0 < bad < 0.3 < none < 0.7 < good < 1


def test_a_prefix_ends_with_a_word_and_has_2_to_8_tokens(made, rng):
  tokenizer = tokenization.load_tokenizer(str(made.world.folder / "tokenizer"))
  for text in ("the plot of this film is warm .", "a b c d e f g h i j k l"):
    start, rest = sentiment.split(tokenizer, text, rng)
    assert start + rest == text and rest.startswith(" ")
    assert 2 <= len(tokenizer(start)["input_ids"]) <= sentiment.LONGEST_PREFIX


def test_of_each_pair_the_true_reward_prefers_the_chosen(made):
  world = made.world
  data = world.data(world.config)
  for i in range(0, len(data.train), 17):
    prompt, responses = data.train.comparison(i)
    better, worse = world.reward([prompt] * 2, responses)
    assert better > worse


def test_clear_pairs_are_those_far_apart(make_text, made):
  world = make_text(labels="clear").world
  data = world.data(world.config)
  rewards = np.array([world.reward([prompt] * 2, responses)
                      for prompt, responses in map(data.train.comparison, range(len(data.train)))])
  assert np.all(rewards[:, 0] - rewards[:, 1] >= sentiment.CLEAR)
  assert 0 < len(data.train) < len(made.world.data(made.world.config).train)
  with pytest.raises(ValueError, match="labels is 'sure'"):
    make_text(labels="sure")


def test_dpo_on_text_raises_the_true_reward_and_one_step_of_ppo_runs(made):
  world = made.world
  lines = methods.trained(world, "DPO", {"optimizer.learning_rate": 2e-3}, seeds=(0,), values=(0.2,),
                          measure_every=30)
  first, last = lines[0], lines[-1]
  assert first["kl"] == 0 and last["kl"] > 0
  assert last["reward"] > first["reward"] + 2 * last["reward_error"]
  settings = ppo.Settings(steps=1, prompts_per_step=16, num_samples=4, epochs=1, minibatches=2)
  lines = methods.ppo_runs(
      world, "PPO-GT", lambda seed: world.reward, settings, seeds=(0,), axis="target_kl",
      values=(3.0,), measure_every=1)
  assert [line["step"] for line in lines] == [0, 1] and lines[0]["kl"] == 0


def test_choices_are_made_one_at_a_time_and_rounds_go_on_from_their_own_samples(make_text, made, capsys):
  plan = frontier.SENTIMENT._replace(short_dpo=UNJUDGED | {"optimizer.learning_rate": 2e-3, "log_every": 1})
  several = (choices.Choice("other", labels="bradley_terry", share=0.5),)
  rounds = choices.Rounds(count=2, steps=10, prefixes=60)
  run = lambda: choices.run(make_text, plan, TEXTS._replace(dpo_steps=10), choices=several, rounds=rounds,
                            betas=(0.2,))
  lines = run()
  steps = {method: [line["step"] for line in lines if line["method"] == method]
           for method in ("other", choices.OWN_SAMPLES)}
  assert steps == {"other": [0, 3, 6, 9, 10], choices.OWN_SAMPLES: [0, 10, 20]}
  own = [line for line in lines if line["method"] == choices.OWN_SAMPLES]
  assert own[0]["kl"] == 0 < own[1]["kl"] < own[2]["kl"] and own[2]["reward"] > own[0]["reward"]
  margins = [next(line for line in sweep.read_table(
      made.world.folder / "choices" / "own_samples" / f"beta_0.2_round_{number}" / "sweep")
      if line["split"] == "train")["rewards/margins"] for number in (0, 1)]
  assert abs(margins[0]) < 1e-6 < 1e-3 < abs(margins[1])  # the second starts where the first ended
  assert run() == lines
  points = [line | {"method": method} for line in own
            for method in (frontier.DPO, frontier.PPO, frontier.PPO_GT)]
  choices.report(lines, points)
  out = capsys.readouterr().out
  assert "| DPO, its own samples | " in out and "nan | nan | 0 | 0 of 3 | 0 | 0 of 3 |\n" in out
  assert choices.best_at(own, own[1]["kl"]) == pytest.approx(own[1]["reward"])


@pytest.fixture(scope="module")
def model(made):
  """A reward model of the small world, trained for a moment."""
  return methods.reward_model(made.world, {
      "steps": 40, "eval_every": 10, "checkpoint_every": 10, "optimizer.learning_rate": 3e-3})


def test_the_reward_model_that_is_kept_is_the_one_with_the_best_accuracy(made, model):
  lines = [line for line in read_metrics(made.world.folder / "reward_model_0" / "run")
           if line["split"] == "eval" and line["step"]]
  assert model.accuracy == max(line["rewards/accuracies"] for line in lines) > 0.6


def test_the_best_of_more_is_better_and_the_true_reward_chooses_best(made, model):
  lines = best_of_n.run(made, model, sizes=(1, 2, 8), temperatures=(1.0,))
  learned, true = lines[:3], lines[3:]
  assert [line["setting"] for line in true] == [1, 2, 8]
  assert true[0]["reward"] < true[1]["reward"] < true[2]["reward"]
  assert learned[0]["reward"] == pytest.approx(true[0]["reward"])
  assert learned[0]["score"] < learned[1]["score"] < learned[2]["score"]
  assert learned[2]["reward"] < true[2]["reward"]
  best_of_n.show(lines)
  best_of_n.plot(lines, made.world.folder / "best_of_n.png")
  assert (made.world.folder / "best_of_n.png").stat().st_size > 10_000


def test_a_win_is_a_higher_true_reward_and_half_a_win_an_equal_one():
  won = win_rate.wins(np.array([0.9, 0.2, 0.5]), np.array([0.5, 0.5, 0.5]))
  assert won.tolist() == [1, 0, 0.5]
  line = win_rate.line("SFT", 0.0, 1.0, won)
  assert line["win_rate"] == 0.5 and line["error"] == pytest.approx((0.25 / 3) ** 0.5)


def test_win_rates_of_kept_policies_and_the_best_of_n(made, model, capsys):
  dpo = methods.trained(made.world, "DPO", {"optimizer.learning_rate": 2e-3}, seeds=(0,), values=(0.2,),
                        measure_every=30)
  assert dpo
  kept = methods.load_policy(made.world, "DPO", 0.2, 0)
  lines = win_rate.run(
      made, made.held_out, [("SFT", 0.0, made.world.model.params), ("DPO", 0.2, kept)], model,
      temperatures=(0.0, 1.0), best_of=4)
  of = {(line["method"], line["temperature"]): line["win_rate"] for line in lines}
  assert of["DPO", 1.0] > of["SFT", 1.0] and of["Best of 4", 1.0] > of["SFT", 1.0]
  win_rate.show(lines)
  assert "| DPO | 0.2 |" in capsys.readouterr().out
  win_rate.plot(lines, made.world.folder / "win_rate.png")
  assert (made.world.folder / "win_rate.png").stat().st_size > 10_000


def test_texts_of_another_kind_are_first_questions_and_their_ends_are_what_is_beaten(made, tmp_path):
  text = "\n\nHuman: {} of this film is wonderful and so is all the rest\n\nAssistant: yes\n\nHuman: and?\n\nAssistant: no"
  path = worlds.write_jsonl(tmp_path / "pairs.jsonl", [
      {"chosen": text.format(noun), "rejected": ""} for noun in ("plot", "cast", "plot")])
  asked = win_rate.questions(made.world.folder, path, 32)
  assert asked.texts == [f"{noun} of this film is wonderful and so is all the rest" for noun in ("plot", "cast")]
  (line,) = win_rate.run(
      made, asked, [("SFT", 0.0, made.world.model.params)], None, temperatures=(0.0,))
  assert line["n"] == 2 and 0 <= line["win_rate"] <= 1


def test_sentences_that_cannot_be_read_are_refused_by_name(tmp_path):
  (tmp_path / "broken.jsonl").write_text(json.dumps({"text": "fine"}) + "\n")
  for name in ("missing.jsonl", "broken.jsonl"):
    with pytest.raises(DataError, match=name):
      sentiment.make(tmp_path / "world", tmp_path / name)


# Real preferences against beta.

def test_the_beta_ablation_in_small_tells_of_every_beta(tmp_path, capsys):
  rng = np.random.default_rng(1)
  records = []
  for i, each in enumerate(worlds.pairs(rng, 60)):
    start = f"\n\nHuman: {i} {each['prompt']}?\n\nAssistant:"
    records.append({"chosen": start + each["chosen"], "rejected": start + each["rejected"]})
  path = worlds.write_jsonl(tmp_path / "pairs.jsonl", records)
  table = beta_ablation.run(
      path, tmp_path / "run", beta_ablation.Sizes(
          vocabulary=300, width=32, layers=1, sft_steps=3, dpo_steps=6, batch_size=16, held_out=12,
          sampled=6, prompt_tokens=18, max_length=64, max_new_tokens=6), betas=(0.1, 5.0), seeds=(0, 1))
  beta_ablation.show(table)
  out = capsys.readouterr().out
  assert "| 0.1 | " in out and "| 5 | " in out
  first = [line for line in table if line["split"] == "measured" and line["step"] == 0]
  last = [line for line in table if line["split"] == "measured" and line["step"] == 6]
  assert len(last) == 4
  assert all(line["kl"] == 0 for line in first) and all(line["kl"] > 0 for line in last)
