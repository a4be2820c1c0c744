"""The evaluation command on short runs, and on files of samples."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpojax.data import packing, tokenization
from dpojax.data.examples import DataError
from dpojax.evaluate import __main__, compare, confidence, measure, report, scorers
from dpojax.models import transformer
from dpojax.runtime.errors import ConfigError
from dpojax.sample.draws import Draw
from dpojax.sample.generator import make_mesh
from dpojax.training import checkpoint, objectives
from tests import conftest, worlds

pytestmark = pytest.mark.usefixtures("compiled")


def kindness(prompt, response):
  """A scorer for the tests: kind words less unkind ones."""
  words = response.split()
  return sum(word in worlds.GOOD for word in words) - sum(word in worlds.BAD for word in words)


def kinder(prompt, a, b):
  """A judge of two responses for the tests."""
  first, second = kindness(prompt, a), kindness(prompt, b)
  return "A" if first > second else "B" if second > first else "tie"


def calls(prompt, response):
  """A scorer that counts calls of the tool `warm`."""
  return response.count("warm({})")


def three(a, b, c, d):
  """Neither scorer nor judge."""


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
  """Pairs that no run has seen."""
  return worlds.write_jsonl(
    tmp_path_factory.mktemp("held_out") / "pairs.jsonl", worlds.pairs(np.random.default_rng(9), 60)
  )


@pytest.fixture(scope="module")
def measured(runs, held_out):
  return measure.evaluate_run(
    runs.dpo,
    pairs=held_out,
    scorer="tests.test_evaluate:kindness",
    num_prompts=8,
    draw=Draw(num_samples=32, max_new_tokens=6),
    batch_size=8,
  )


def test_dpo_prefers_what_was_chosen_and_moves_from_its_reference(measured):
  held_out, samples = measured["held_out"], measured["samples"]
  assert measured["pairs"] == 60
  assert held_out["accuracy"].low > 0.8 and held_out["margin"].low > 0
  np.testing.assert_allclose(
    held_out["margin"].value,
    held_out["rewards"]["chosen"].value - held_out["rewards"]["rejected"].value,
    rtol=1e-6,
  )
  assert (
    held_out["perplexity"]["policy"]["rejected"].low > held_out["perplexity"]["reference"]["rejected"].high
  )
  assert samples["policy"]["kl"].low > 0 and samples["policy"]["kl"].count == 8
  assert samples["policy"]["score"].low > samples["reference"]["score"].value
  assert samples["policy"]["samples"] == 256 and 1 < samples["policy"]["tokens"].value <= 6


def test_of_sft_the_perplexity_is_measured(runs, held_out):
  found = measure.evaluate_run(runs.sft, pairs=held_out, num_prompts=0)
  assert found["reference"] is None and set(found["held_out"]) == {"perplexity"}
  assert found["held_out"]["perplexity"]["policy"]["chosen"].value < len(worlds.GOOD) + 20


def test_perplexity_and_accuracy_are_of_the_training_primitive(measured, runs, held_out):
  """Against log-probs of each sequence by itself, unpacked."""
  policy = checkpoint.load_policy(runs.dpo)
  tokenizer = tokenization.load_tokenizer(policy.settings.tokenizer)
  total, tokens = 0.0, 0
  score = jax.jit(
    lambda params, rows: objectives.response_log_probs(
      transformer.make_apply(policy.config)(params, rows), rows, num_responses=1
    )
  )
  with open(held_out) as lines:
    records = [json.loads(line) for line in lines]
  encoded = tokenization.encode(
    [tokenization.Example(r["prompt"], (r["chosen"],)) for r in records], tokenizer
  )
  for prompt, (response,) in encoded:
    rows = packing.fill(
      [(np.array(prompt), [np.array(response)])],
      np.zeros(1, int),
      1,
      packing.RowShape(24, 16, 1),
      num_responses=1,
      example=[0],
    )
    scores = score(policy.params, rows)
    total, tokens = total + float(scores.sums[0, 0, 0]), tokens + float(scores.lengths[0, 0, 0])
  np.testing.assert_allclose(
    measured["held_out"]["perplexity"]["policy"]["chosen"].value, math.exp(-total / tokens), rtol=1e-4
  )


def test_a_reward_model_is_measured_and_scores_samples(runs, held_out):
  found = measure.evaluate_run(runs.reward, pairs=held_out)
  assert found["held_out"]["accuracy"].low > 0.8
  score = scorers.make_scorer(runs.reward, make_mesh(1, 1))
  with open(held_out) as lines:
    records = [json.loads(line) for line in lines]
  chosen, rejected = (
    score([r["prompt"] for r in records], [r[key] for r in records]) for key in ("chosen", "rejected")
  )
  np.testing.assert_allclose(np.mean(chosen - rejected), found["held_out"]["margin"].value, rtol=1e-4)
  assert np.isfinite(score(["the film is"], [""])).all()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Two files of samples to the same prompts, ours kinder in three of four, and pairs."""
  folder = tmp_path_factory.mktemp("files")
  prompts = [f"the {noun} is" for noun in worlds.NOUNS]
  line = lambda i, response: {"index": i, "sample": 0, "prompt": prompts[i], "response": response}
  ours = worlds.write_jsonl(folder / "ours.jsonl", [line(i, " warm" if i % 4 else " cold") for i in range(8)])
  theirs = worlds.write_jsonl(folder / "theirs.jsonl", [line(i, " the") for i in reversed(range(8))])
  pairs = worlds.write_jsonl(
    folder / "pairs.jsonl", [{"prompt": prompt, "chosen": " the", "rejected": " cold"} for prompt in prompts]
  )
  return ours, theirs, pairs


@pytest.mark.parametrize("judge", ["tests.test_evaluate:kindness", "tests.test_evaluate:kinder"])
@pytest.mark.parametrize("against", [1, 2])
def test_a_function_gives_the_win_rate_of_a_file(judge, against, files):
  found = compare.compare_files(files[0], files[against], judge, seed=1)
  assert found["win_rate"].value == 0.75 and (found["win"], found["tie"], found["loss"]) == (6, 0, 2)
  assert found["outcomes"] == ["loss", "win", "win", "win"] * 2


def test_answers_in_messages_are_judged_as_their_text(tmp_path, capsys):
  asked = [{"role": "user", "content": "how is the film ?"}]
  call = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "warm", "arguments": {}}}],
  }
  ours = worlds.write_jsonl(
    tmp_path / "ours.jsonl",
    [{"index": i, "sample": 0, "prompt": asked, "response": " warm"} for i in range(2)],
  )
  theirs = worlds.write_jsonl(
    tmp_path / "theirs.jsonl",
    [
      {
        "input": {"messages": asked},
        "preferred_output": [answer],
        "non_preferred_output": [{"role": "assistant", "content": "other"}],
      }
      for answer in ({"role": "assistant", "content": "cold"}, call)
    ],
  )
  found = compare.compare_files(ours, theirs, "tests.test_evaluate:calls")
  assert found["outcomes"] == ["tie", "loss"] and found["words"]["theirs"].value == 1
  worse = worlds.write_jsonl(
    tmp_path / "worse.jsonl",
    [
      {"prompt": asked, "chosen": " ", "rejected": "cold"},
      {"prompt": asked, "chosen": [call], "rejected": "cold"},
    ],
  )
  assert compare.compare_files(ours, worse, "tests.test_evaluate:calls")["outcomes"] == ["loss"]
  assert f'{worse} line 1: "chosen" is empty' in capsys.readouterr().out
  tools = worlds.write_jsonl(
    tmp_path / "tools.jsonl",
    [{"prompt": asked, "chosen": [call], "rejected": "cold", "tools": [{"type": "function"}]}] * 2,
  )
  with pytest.raises(DataError, match="prompt 0 of .*ours.jsonl is not that of .*tools.jsonl"):
    compare.compare_files(ours, tools, "tests.test_evaluate:kinder")


def test_a_reward_model_judges_files(runs, files):
  found = compare.compare_files(files[0], files[1], runs.reward)
  assert found["win"] >= 6 and found["words"]["ours"].value == 1


def test_the_result_is_json_and_a_table(measured, tmp_path, capsys):
  report.write(measured, tmp_path / "result.json")
  read = json.loads((tmp_path / "result.json").read_text())
  assert read["samples"]["policy"]["kl"]["value"] == measured["samples"]["policy"]["kl"].value
  report.write({"mean": confidence.mean(np.ones(1))}, tmp_path / "one.json")
  assert json.loads((tmp_path / "one.json").read_text())["mean"]["high"] is None
  names = [name for name, *_ in report.show(measured)]
  assert "held_out/accuracy" in names and "samples/policy/kl" in names


@pytest.mark.parametrize(
  "prompt, query",
  [
    ("\n\nHuman: why?\n\nAssistant:", "why?"),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "Human: a\n\nAssistant: b\n\nHuman: c"),
    ("SUBREDDIT: r/x\n\nPOST: long\n\nTL;DR:", "SUBREDDIT: r/x\n\nPOST: long"),
    ([{"role": "user", "content": "why?"}], "why?"),
    (
      [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}],
      "system: be kind\n\nuser: why?",
    ),
  ],
)
def test_a_judge_reads_the_query(prompt, query):
  assert compare.as_text(prompt, query=True) == query


def test_what_cannot_be_compared_is_named(files, tmp_path):
  other = worlds.write_jsonl(
    tmp_path / "other.jsonl", [{"index": 0, "sample": 0, "prompt": "the cast is", "response": " warm"}]
  )
  with pytest.raises(DataError, match="prompt 0 of .*ours.jsonl is not that of .*other.jsonl"):
    compare.compare_files(files[0], other, "tests.test_evaluate:kindness")
  far = worlds.write_jsonl(
    tmp_path / "far.jsonl", [{"index": 99, "sample": 0, "prompt": "the cast is", "response": " warm"}]
  )
  with pytest.raises(DataError, match="no prompt in common"):
    compare.compare_files(files[0], far, "tests.test_evaluate:kindness")
  for judge, message in (
    ("tests.test_evaluate:nothing", "cannot be imported"),
    ("tests.test_evaluate:three", "takes 4 arguments; it must take"),
    ("http://127.0.0.1:9/v1", "--judge_model is missing"),
  ):
    with pytest.raises(ConfigError, match=message):
      compare.compare_files(files[0], files[1], judge)
  with pytest.raises(ConfigError, match="--question is 'poem'; it must be one of summary"):
    compare.compare_files(files[0], files[1], "http://127.0.0.1:9/v1", judge_model="m", question="poem")
  (tmp_path / "question.txt").write_text("Which? {a} {b}")
  with pytest.raises(ConfigError, match="has no {prompt}"):
    compare.compare_files(
      files[0], files[1], "http://127.0.0.1:9/v1", judge_model="m", question=str(tmp_path / "question.txt")
    )


def test_what_a_run_has_not_is_named(runs):
  with pytest.raises(ConfigError, match="held nothing out .*give --pairs"):
    measure.evaluate_run(runs.dpo)
  with pytest.raises(ConfigError, match="is no reward model"):
    scorers.make_scorer(runs.sft, make_mesh(1, 1))
  with pytest.raises(ConfigError, match="--pair_scores is of policies"):
    measure.evaluate_run(runs.reward, pairs=runs.pairs, pair_scores="scores.jsonl")


def test_the_command_compares_and_writes(files, tmp_path):
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "dpojax.evaluate",
      f"--ours={files[0]}",
      f"--theirs={files[1]}",
      "--judge=tests.test_evaluate:kinder",
      f"--out={tmp_path}/result.json",
    ],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  assert "win_rate" in result.stdout and "0.75" in result.stdout
  assert json.loads((tmp_path / "result.json").read_text())["win"] == 6


def test_what_a_command_lacks_is_one_line(files, tmp_path, monkeypatch):
  for flags, message in (
    ([f"--ours={files[0]}", f"--theirs={files[1]}"], "--judge is missing"),
    ([], "give --workdir to measure a run, or --ours"),
  ):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--out={tmp_path}/result.json", *flags])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
      __main__.main()
