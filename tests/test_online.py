"""DPO on the policy's own samples: pairing, rounds, budgets, kills in every phase, and its controls."""

import importlib
import json

import jax
import numpy as np
import pytest

from dpojax import train
from dpojax.data import loader, packing
from dpojax.evaluate import scorers
from dpojax.online import config as online_config
from dpojax.online import labels, loop, pairs, rounds
from dpojax.sample.generator import Generator
from dpojax.training import checkpoint, resolve, throughput
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.config import ConfigError
from dpojax.training.metrics import read_metrics
from tests import worlds

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


def run_config(runs, words, folder, **changes):
  config = importlib.import_module("configs.online").get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(
      {
        "model.checkpoint": runs.sft,
        "tokenizer": words,
        "data.path": runs.pairs,
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
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-2,
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
def whole(runs, words, tmp_path_factory):
  """A run that nobody has stopped, and how often its judge was asked."""
  folder = tmp_path_factory.mktemp("online")
  ASKED.clear()
  loop.run(run_config(runs, words, folder), folder / "run")
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
  sampled = {line["response"]: line["ids"] for line in map(json.loads, lines) if line["finished"]}
  found = 0
  usable = [record for record in records if record["chosen"].strip() and record["rejected"].strip()]
  for i, record in enumerate(usable):
    texts = record["chosen"], record["rejected"]
    assert kindness("", texts[0]) > kindness("", texts[1])
    for text, ids in zip(texts, data.comparison(i)[1], strict=True):
      assert sampled.get(text, ids.tolist()) == ids.tolist()
      found += text in sampled
  assert len(data) == len(usable) and found > 20


class Killed(BaseException):
  """What a kill is here: nothing that the code would handle."""


PHASES = {
  "sampling": (Generator, "__call__", 5),
  "scoring": (rounds.Rounds, "_ask", 55),
  "pairing": (rounds, "_write", 12),
  "training": (train.Loop, "step", 4),
  "saving": (Checkpoints, "save", 4),
}
"""Where a phase can be stopped, and at which call: in the second round."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_any_phase_goes_on_to_the_same_bits(phase, whole, runs, words, tmp_path, monkeypatch):
  workdir, asked = whole
  owner, name, at = PHASES[phase]
  real, calls = getattr(owner, name), []

  def killing(*args, **kwargs):
    calls.append(name)
    if len(calls) == at:
      raise Killed
    return real(*args, **kwargs)

  config = run_config(runs, words, tmp_path)
  ASKED.clear()
  monkeypatch.setattr(owner, name, killing)
  with pytest.raises(Killed):
    loop.run(config, tmp_path / "run")
  assert 1 <= len(lines_of(tmp_path / "run", "round")) <= 2
  loop.run(config, tmp_path / "run")
  assert len(ASKED) == asked
  assert lines_of(tmp_path / "run") == lines_of(workdir)
  assert files_of(tmp_path / "run") == files_of(workdir)
  assert bits_of(tmp_path / "run", 6) == bits_of(workdir, 6)
