"""Controlled sentiment in small: DPO and PPO in it, choices, best-of-N and win rates."""

import json

import numpy as np
import pytest

from dpojax.data import tokenization
from dpojax.data.examples import DataError
from dpojax.ppo import loop as ppo
from dpojax.training.metrics import read_metrics
from experiments import sweep
from experiments.paper import best_of_n, choices, frontier, methods, sentiment, win_rate
from tests import worlds

pytestmark = pytest.mark.usefixtures("compiled")


def sentences(rng, count):
  def one():
    good = rng.random() < 0.5
    words = rng.choice(worlds.GOOD if good else worlds.BAD, size=rng.integers(1, 3))
    return {
      "text": f"the {rng.choice(worlds.NOUNS)} of this film is {' and '.join(words)} .",
      "label": int(good),
    }

  return [one() for _ in range(count)]


DPO = {"optimizer.learning_rate": 2e-3, "rows_at_once": 3}  # steps of any size in one program
TEXTS = sentiment.Sizes(
  vocabulary=320,
  width=32,
  layers=1,
  sft_steps=150,
  prefixes=120,
  held_out=32,
  max_new_tokens=12,
  dpo_steps=30,
  batch_size=32,
)


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
  rewards = np.array(
    [
      world.reward([prompt] * 2, responses)
      for prompt, responses in map(data.train.comparison, range(len(data.train)))
    ]
  )
  assert np.all(rewards[:, 0] - rewards[:, 1] >= sentiment.CLEAR)
  assert 0 < len(data.train) < len(made.world.data(made.world.config).train)
  with pytest.raises(ValueError, match="labels is 'sure'"):
    make_text(labels="sure")


def test_dpo_on_text_raises_the_true_reward_and_one_step_of_ppo_runs(made):
  world = made.world
  lines = methods.trained(world, "DPO", DPO, seeds=(0,), values=(0.2,), measure_every=30)
  first, last = lines[0], lines[-1]
  assert first["kl"] == 0 and last["kl"] > 0
  assert last["reward"] > first["reward"] + 2 * last["reward_error"]
  settings = ppo.Settings(steps=1, prompts_per_step=16, num_samples=4, epochs=1, minibatches=2)
  lines = methods.ppo_runs(
    world,
    "PPO-GT",
    lambda seed: world.reward,
    settings,
    seeds=(0,),
    axis="target_kl",
    values=(3.0,),
    measure_every=1,
  )
  assert [line["step"] for line in lines] == [0, 1] and lines[0]["kl"] == 0


def test_choices_are_made_one_at_a_time_and_rounds_go_on_from_their_own_samples(make_text, made, capsys):
  plan = frontier.SENTIMENT._replace(short_dpo=DPO | {"eval_every": 0, "log_every": 1})
  several = (choices.Choice("other", labels="bradley_terry", share=0.5),)
  rounds = choices.Rounds(count=2, steps=10, prefixes=60)
  run = lambda: choices.run(
    make_text, plan, TEXTS._replace(dpo_steps=10), choices=several, rounds=rounds, betas=(0.2,)
  )
  lines = run()
  steps = {
    method: [line["step"] for line in lines if line["method"] == method]
    for method in ("other", choices.OWN_SAMPLES)
  }
  assert steps == {"other": [0, 3, 6, 9, 10], choices.OWN_SAMPLES: [0, 10, 20]}
  own = [line for line in lines if line["method"] == choices.OWN_SAMPLES]
  assert own[0]["kl"] == 0 < own[1]["kl"] < own[2]["kl"] and own[2]["reward"] > own[0]["reward"]
  margins = [
    next(
      line
      for line in sweep.read_table(
        made.world.folder / "choices" / "own_samples" / f"beta_0.2_round_{number}" / "sweep"
      )
      if line["split"] == "train"
    )["rewards/margins"]
    for number in (0, 1)
  ]
  assert abs(margins[0]) < 1e-6 < 1e-3 < abs(margins[1])  # the second starts where the first ended
  assert run() == lines
  points = [
    line | {"method": method} for line in own for method in (frontier.DPO, frontier.PPO, frontier.PPO_GT)
  ]
  choices.report(lines, points)
  out = capsys.readouterr().out
  assert "| DPO, its own samples | " in out and "nan | nan | 0 | 0 of 3 | 0 | 0 of 3 |\n" in out
  assert choices.best_at(own, own[1]["kl"]) == pytest.approx(own[1]["reward"])


@pytest.fixture(scope="module")
def model(made):
  """A reward model of the small world, trained for a moment."""
  return methods.reward_model(
    made.world, {"steps": 40, "eval_every": 10, "checkpoint_every": 10, "optimizer.learning_rate": 3e-3}
  )


def test_the_reward_model_that_is_kept_is_the_one_with_the_best_accuracy(made, model):
  lines = [
    line
    for line in read_metrics(made.world.folder / "reward_model_0" / "run")
    if line["split"] == "eval" and line["step"]
  ]
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
  dpo = methods.trained(made.world, "DPO", DPO, seeds=(0,), values=(0.2,), measure_every=30)
  assert dpo
  kept = methods.load_policy(made.world, "DPO", 0.2, 0)
  lines = win_rate.run(
    made,
    made.held_out,
    [("SFT", 0.0, made.world.model.params), ("DPO", 0.2, kept)],
    model,
    temperatures=(0.0, 1.0),
    best_of=4,
  )
  of = {(line["method"], line["temperature"]): line["win_rate"] for line in lines}
  assert of["DPO", 1.0] > of["SFT", 1.0] and of["Best of 4", 1.0] > of["SFT", 1.0]
  win_rate.show(lines)
  assert "| DPO | 0.2 |" in capsys.readouterr().out
  win_rate.plot(lines, made.world.folder / "win_rate.png")
  assert (made.world.folder / "win_rate.png").stat().st_size > 10_000


def test_texts_of_another_kind_are_first_questions_and_their_ends_are_what_is_beaten(made, tmp_path):
  text = (
    "\n\nHuman: {} of this film is wonderful and so is all the rest\n\nAssistant: yes"
    "\n\nHuman: and?\n\nAssistant: no"
  )
  path = worlds.write_jsonl(
    tmp_path / "pairs.jsonl",
    [{"chosen": text.format(noun), "rejected": ""} for noun in ("plot", "cast", "plot")],
  )
  asked = win_rate.questions(made.world.folder, path, 32)
  assert asked.texts == [
    f"{noun} of this film is wonderful and so is all the rest" for noun in ("plot", "cast")
  ]
  (line,) = win_rate.run(made, asked, [("SFT", 0.0, made.world.model.params)], None, temperatures=(0.0,))
  assert line["n"] == 2 and 0 <= line["win_rate"] <= 1


def test_sentences_that_cannot_be_read_are_refused_by_name(tmp_path):
  (tmp_path / "broken.jsonl").write_text(json.dumps({"text": "fine"}) + "\n")
  for name in ("missing.jsonl", "broken.jsonl"):
    with pytest.raises(DataError, match=name):
      sentiment.make(tmp_path / "world", tmp_path / name)
