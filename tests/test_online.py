"""DPO on the policy's own samples: pairing, rounds, budgets, kills in every phase, and its controls."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from dpojax.data import packing
from dpojax.evaluate import judging
from dpojax.online import config as online_config
from dpojax.online import loop, pairs, rounds
from dpojax.runtime.digests import DamageError
from dpojax.runtime.errors import ConfigError
from dpojax.sample.generator import Generator
from dpojax.train import loop as train
from dpojax.training import checkpoint, resolve, throughput
from dpojax.training import config as config_lib
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.metrics import read_metrics
from tests import runs, worlds

pytestmark = pytest.mark.usefixtures("compiled")


# Pairing.


def test_best_and_worst_are_paired_and_ties_counted():
  got = pairs.paired("best_worst", [[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [2.0, 0.0, 2.0]])
  assert got == ([(0, (1, 0)), (2, (0, 1))], {"ties": 1})


def test_a_ranking_goes_from_best_to_worst_and_keeps_one_of_equals():
  got = pairs.paired("ranking", [[1.0, 3.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
  assert got == ([(0, (1, 2, 0))], {"ties": 1})


def test_a_judge_chooses_within_pairs_and_what_is_no_choice_is_counted():
  said = [["win", "loss"], ["tie", "refused"], ["unparseable", "win"]]
  want = [(0, (0, 1)), (0, (3, 2)), (2, (2, 3))]
  assert pairs.paired("choice", said) == (want, {"ties": 1, "refused": 1, "unparseable": 1})
  assert pairs.paired("choice", [[1.0, 2.0, 4.0, 4.0]]) == ([(0, (1, 0))], {"ties": 1})


def test_offline_comparisons_are_their_share_of_all():
  which = pairs.offline_beside(30, 25, 0.4, np.random.default_rng(0))
  assert len(which) == 20 and len(set(which.tolist())) == 20
  assert sorted(pairs.offline_beside(30, 10, 0.4, np.random.default_rng(0)).tolist()) == sorted(
    [*range(10)] * 2
  )
  assert not len(pairs.offline_beside(30, 10, 0.0, np.random.default_rng(0)))


def test_coarse_plans_of_data_alike_have_one_shape_and_hold_everything():
  shapes = set()
  for seed in range(8):
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(3, 6, 90), *rng.integers(4, 13, (2, 90))], axis=1)
    plan = packing.plan(lengths, 0, 0, 30, 64, coarse=True)
    shapes.add((plan.shape, *plan.rows.tolist()))
    for index, row, total in zip(plan.index, plan.row, plan.rows):
      assert row.max() < total
      tokens = np.bincount(row, weights=lengths[index].sum(1))
      scored = np.bincount(row, weights=lengths[index, 1:].sum(1))
      assert tokens.max() <= 64 and scored.max() <= plan.shape.scored
  assert len(shapes) <= 2


# Runs.


def kindness(prompt, response):
  """How many kind words an answer has, less the unkind ones."""
  ASKED.append((prompt, response))
  words = response.split()
  return sum(word in worlds.GOOD for word in words) - sum(word in worlds.BAD for word in words)


def kinder(prompt, a, b):
  """Says which of two answers is kinder."""
  first, second = kindness(prompt, a), kindness(prompt, b)
  return "A" if first > second else "B" if second > first else "tie"


ASKED = []
"""What `kindness` was asked."""


@pytest.fixture(scope="module")
def given(tmp_path_factory, words):
  """Pairs, and a run that has learnt to write like them."""
  folder = tmp_path_factory.mktemp("given")
  path = worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 150))
  small = {"eval_every": 0, "log_every": 50, "checkpoint_every": 50}
  train.run(worlds.run_config("sft", words, path, folder / "cache", steps=20, **small), folder / "sft")
  return {"model.checkpoint": str(folder / "sft"), "tokenizer": words, "data.path": path}


def run_config(given, folder, **changes):
  config = importlib.import_module("configs.online").get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(
      given
      | {
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": 16,
        "data.max_prompt_length": 4,
        "data.eval_size": 16,
        "row_length": 64,
        "batch_size": 16,
        "steps": 6,
        "log_every": 1,
        "eval_every": 3,
        "checkpoint_every": 1,
        "checkpoint_keep": 0,
        "check_memory": False,
        "optimizer.name": "sgd",  # as far as gradients go: those of shuffled labels are small
        "optimizer.learning_rate": 0.5,
        "optimizer.warmup_steps": 0,
        "online.judge": "tests.test_online:kindness",
        "online.steps_per_round": 2,
        "online.prompts_per_round": 40,
        "online.prompts_at_once": 16,
        "online.num_samples": 3,
        "online.max_new_tokens": 6,
      }
      | changes
    )
  return config


def lines_of(workdir, split=""):
  clock = (*throughput.METRICS, "samples_per_second")
  return [
    {name: value for name, value in line.items() if name not in clock}
    for line in read_metrics(workdir)
    if line["split"].startswith(split)
  ]


def bits_of(workdir, step):
  manager = Checkpoints(workdir, keep=0)
  state, _ = manager.restore_arrays(step)
  manager.close()
  return {
    jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def files_of(workdir):
  """What a run's rounds leave, but for how fast they were."""
  found = {path.name: path.read_text() for path in sorted((workdir / "comparisons").iterdir())}
  for path in sorted((workdir / "rounds").rglob("*.jsonl")):
    found[str(path.relative_to(workdir))] = path.read_text()
  return found


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
  """A run that nobody has stopped, and how often its judge was asked."""
  folder = tmp_path_factory.mktemp("online")
  ASKED.clear()
  loop.run(run_config(given, folder), folder / "run")
  return folder / "run", len(ASKED)


def test_rounds_raise_the_reward_and_tell_what_they_cost(whole):
  workdir, asked = whole
  told = lines_of(workdir, "round")
  assert [(line["step"], line["round"]) for line in told] == [(1, 1), (3, 2), (5, 3)]
  assert abs(told[0]["kl"]) < 1e-5 < 0.05 < told[-1]["kl"]
  assert told[-1]["score"] > told[0]["score"] + 0.3
  assert told[-1]["labels"] == asked
  for line in told:
    assert line["pairs"] + line["ties"] == 40 and line["score/chosen"] > line["score/rejected"]
    assert line["samples"] == 120


def test_every_comparison_is_kept_as_data_that_train_reads(whole, words, tmp_path):
  workdir, _ = whole
  path = workdir / "comparisons" / "round_2.jsonl"
  config = worlds.run_config("dpo", words, str(path), tmp_path, eval_every=0)
  data = resolve.load_data(config).train
  records = [json.loads(line) for line in path.read_text().splitlines()]
  told = next(line for line in lines_of(workdir, "round") if line["round"] == 2)
  assert len(records) == told["pairs"]
  lines = (workdir / "rounds" / "2" / "samples.jsonl").read_text().splitlines()
  whole_words = lambda line: line["finished"] and 1 not in line["ids"]  # the text leaves out <unk>
  sampled = {line["response"]: line["ids"] for line in map(json.loads, lines) if whole_words(line)}
  found = 0
  usable = [record for record in records if record["chosen"].strip() and record["rejected"].strip()]
  for i, record in enumerate(usable):
    texts = record["chosen"], record["rejected"]
    assert kindness("", texts[0]) > kindness("", texts[1])
    for text, ids in zip(texts, data.comparison(i)[1], strict=True):
      assert ids.tolist() == sampled.get(text, ids.tolist())
      found += text in sampled
  assert len(data) == len(usable) and found >= 10


@pytest.mark.parametrize("judge, pairing", [("kindness", "best_worst"), ("kinder", "choice")])
def test_two_processes_make_the_rounds_of_one(judge, pairing, given, tmp_path):
  """A mesh over both: all sample, the first writes and asks the judge, and all read what came of it."""
  changes = {
    "steps": 4,
    "online.judge": f"tests.test_online:{judge}",
    "online.pairing": pairing,
    "online.num_samples": 2,
    "parallel.strategy": "mesh",
    "parallel.fsdp": 4,
  }
  config = run_config(given, tmp_path, **changes)
  loop.run(config, tmp_path / "one")
  runs.in_two_processes(tmp_path, {"kind": "online", **config_lib.flatten(config)})
  one, two = (files_of(tmp_path / name) for name in ("one", "two"))
  assert one.keys() == two.keys() and len(one) == 2 + 2 * 2
  for name in one:
    if not name.endswith("samples.jsonl"):  # log-probs are rounded otherwise
      assert one[name] == two[name], name
  for a, b in zip(*(read_metrics(tmp_path / name) for name in ("one", "two")), strict=True):
    assert (a["step"], a["split"]) == (b["step"], b["split"])
    for name in {"loss", "score", "kl", "pairs", "labels", "tokens"} & a.keys():
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)


class Killed(BaseException):
  """What a kill is here: nothing that the code would handle."""


PHASES = {
  "sampling": (Generator, "__call__", 2),
  "scoring": (rounds.Rounds, "_ask", 30),
  "pairing": (pairs, "paired", 1),
  "training": (train.Loop, "step", 4),
  "saving": (Checkpoints, "save", 2),
}
"""Where a phase can be stopped, and at which call."""


def test_a_run_killed_in_every_phase_ends_with_the_same_bits_and_asks_nothing_twice(
  whole, given, tmp_path, monkeypatch
):
  workdir, asked = whole
  config = run_config(given, tmp_path)
  ASKED.clear()
  for owner, name, at in PHASES.values():
    real, calls = getattr(owner, name), []

    def killing(*args, real=real, calls=calls, at=at, **kwargs):
      calls.append(at)
      if len(calls) == at:
        raise Killed
      return real(*args, **kwargs)

    with monkeypatch.context() as patch:
      patch.setattr(owner, name, killing)
      with pytest.raises(Killed):
        loop.run(config, tmp_path / "run")
    for path in (tmp_path / "run" / "rounds").glob("*/*.jsonl"):
      with open(path, "a") as file:  # what a kill may leave of a line, where lines are still to come
        if not (path.parent / "round.json").exists():
          file.write('{"index": 3, "sam')
  loop.run(config, tmp_path / "run")
  assert len(ASKED) == asked
  assert lines_of(tmp_path / "run") == lines_of(workdir)
  assert files_of(tmp_path / "run") == files_of(workdir)
  assert bits_of(tmp_path / "run", 6) == bits_of(workdir, 6)


def test_without_rounds_a_run_is_that_of_train(given, tmp_path):
  config = run_config(
    given, tmp_path, **{"steps": 4, "online.offline_steps": 4, "online.judge": "", "eval_every": 2}
  )
  loop.run(config, tmp_path / "online")
  train.run(online_config.of_training(config), tmp_path / "train")
  assert lines_of(tmp_path / "online") == lines_of(tmp_path / "train")
  assert bits_of(tmp_path / "online", 4) == bits_of(tmp_path / "train", 4)
  assert not (tmp_path / "online" / "rounds").exists()


def test_shuffled_labels_destroy_the_gain(whole, given, tmp_path):
  workdir, _ = whole
  config = run_config(given, tmp_path, **{"data.shuffle_labels": True, "steps": 4})
  loop.run(config, tmp_path / "run")
  told, shuffled = lines_of(workdir, "round"), lines_of(tmp_path / "run", "round")
  gain = lambda rounds: rounds[1]["score"] - rounds[0]["score"]
  assert gain(shuffled) < 0.5 * gain(told)
  one, other = (files_of(each)["round_1.jsonl"] for each in (tmp_path / "run", workdir))
  assert one == other  # what was said is kept


def test_an_adapter_on_a_mesh_samples_what_the_model_does_and_learns(whole, given, tmp_path):
  workdir, _ = whole
  changes = {"steps": 4, "parallel.fsdp": 2, "lora.rank": 2, "optimizer.name": "adamw"}
  loop.run(run_config(given, tmp_path, **changes, **{"optimizer.learning_rate": 3e-2}), tmp_path / "run")
  ours, theirs = (
    files_of(each)["rounds/1/samples.jsonl"].splitlines() for each in (tmp_path / "run", workdir)
  )
  for one, other in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
    assert one["ids"] == other["ids"]
    np.testing.assert_allclose(one["log_prob"], other["log_prob"], atol=1e-4)
  told = lines_of(tmp_path / "run", "round")
  assert abs(told[0]["kl"]) < 1e-4 < 0.02 < told[1]["kl"]


def test_a_server_is_asked_nothing_twice_and_the_last_rounds_policy_is_the_reference(serve, given, tmp_path):
  patience = [25]

  def answer(request, headers):
    patience[0] -= 1
    if patience[0] < 0:
      return 400, {}, {"error": {"message": "enough for today"}}
    question = request["messages"][0]["content"]
    a, b = (question.split(f"Response {name}:\n")[1].split("\n")[0] for name in "AB")
    return f"Comparison: of words\nMore helpful: {kinder('', a, b)}"

  server = serve(answer)
  config = run_config(
    given,
    tmp_path,
    **{
      "steps": 4,
      "batch_size": 32,
      "online.judge": server.url,
      "online.judge_model": "a judge",
      "online.judge_workers": 1,
      "online.pairing": "choice",
      "online.num_samples": 2,
      "online.prompts_per_round": 31,  # fewer than a batch: the others are the data's
      "online.offline_share": 0.5,
      "online.reference": "last_round",
    },
  )
  with pytest.raises(judging.JudgeError, match="enough for today"):
    loop.run(config, tmp_path / "run")
  patience[0] = 1000
  loop.run(config, tmp_path / "run")
  answered = [count for question, count in server.asked.items()]
  assert sum(answered) - len(answered) <= 8  # those that were under way when one was refused
  told = lines_of(tmp_path / "run", "round")
  assert len(told) == 2 and all(abs(line["kl"]) < 1e-5 for line in told)
  assert told[1]["labels"] <= 62 and "score" not in told[0]
  evaluated = lines_of(tmp_path / "run", "eval")
  assert abs(evaluated[-1]["rewards/margins"]) < 1e-5  # the reference has just become the policy


def test_rankings_of_all_answers_are_trained_on_as_far_as_labels_reach(given, tmp_path, capsys):
  config = run_config(
    given,
    tmp_path,
    **{
      "loss": "dpo_plackett_luce",
      "data.num_responses": 3,
      "online.pairing": "ranking",
      "online.max_labels": 239,  # a round takes up to 120
      "parallel.strategy": "pmap",
    },
  )
  loop.run(config, tmp_path / "run")
  (told,) = lines_of(tmp_path / "run", "round")
  assert told["labels"] <= 120 and lines_of(tmp_path / "run")[-1]["step"] == 2
  assert "2 of 6 steps" in capsys.readouterr().out
  records = [json.loads(line) for line in files_of(tmp_path / "run")["round_1.jsonl"].splitlines()]
  assert {len(record.get("responses", "ab")) for record in records} == {2, 3}
  for record in records:
    scores = [kindness("", text) for text in record.get("responses", ())]
    assert scores == sorted(scores, reverse=True)


def test_a_round_whose_files_are_not_as_written_is_named(whole, given, tmp_path):
  workdir, _ = whole
  config = run_config(given, tmp_path)
  shutil.copytree(workdir, tmp_path / "run")
  for step in (4, 5, 6):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
  path = tmp_path / "run" / "rounds" / "2" / "labels.jsonl"
  path.write_text(path.read_text().replace("1.0", "2.0", 1))
  with pytest.raises(DamageError, match="round 2 cannot be read"):
    loop.run(config, tmp_path / "run")


SERVER = {"online.judge": "http://127.0.0.1:1/v1", "online.judge_model": "m"}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"online.judge": ""}, "config.online.judge is empty"),
    ({"online.juge": "a"}, "config.online.juge is not a key; did you mean judge"),
    ({"online.judge": "tests.test_online:kinder"}, "gives no scores; set pairing='choice'"),
    ({**SERVER, "online.pairing": "choice"}, "num_samples is 3"),
    ({"online.pairing": "ranking"}, "set loss='dpo_plackett_luce'"),
    ({"online.steps_per_round": 4}, "config.steps is 6 and online.offline_steps 0"),
    ({"online.prompts_per_round": 15}, "fewer than batch_size=16"),
    ({"online.offline_share": 1.0}, r"offline_share is 1.0; it must be in \[0, 1\)"),
    ({"online.max_new_tokens": 13}, "together more than data.max_length=16"),
    ({"online.max_labels": 119}, "a round takes up to 120"),
    ({"online.temperature": -1.0}, "config.online.temperature is -1.0"),
    ({"online.reference": "moving"}, "reference.sync_every 0"),
    ({"reference.sync_every": 2}, "set online.reference='moving'"),
    ({"reference.mode": "stored"}, "samples are new in each round"),
    ({"lora.rank": 2, "online.reference": "last_round"}, "the base below it"),
    ({"data.columns.beta": "b"}, "have no such key"),
    ({"objective": "sft"}, "dpojax.online runs objective='dpo'"),
    ({"online.judge": "nothing/there"}, "nothing/there"),
  ],
)
def test_a_config_that_cannot_run_is_refused(changes, message, given, tmp_path):
  with pytest.raises((ConfigError, checkpoint.CheckpointError), match=message):
    loop.run(run_config(given, tmp_path, **changes), tmp_path / "run")
