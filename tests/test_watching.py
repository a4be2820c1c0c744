"""Samples while training, and averages of params: what is written, resumed, evaluated and handed on."""

import json

import jax
import numpy as np
import pytest

from dpojax import train
from dpojax.evaluate import watching
from dpojax.sample import files
from dpojax.sample.draws import Draw
from dpojax.training import checkpoint, step, throughput
from dpojax.training import config as config_lib
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.metrics import read_metrics
from tests import worlds


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  folder = tmp_path_factory.mktemp("given")
  worlds.save_tokenizer(folder / "words")
  records = worlds.pairs(np.random.default_rng(0), 143)
  return {
    "tokenizer": str(folder / "words"),
    "cache_dir": folder / "cache",
    "path": worlds.write_jsonl(folder / "pairs.jsonl", records),
  }


@pytest.fixture(scope="module")
def sft(given, tmp_path_factory, compiled):
  workdir = tmp_path_factory.mktemp("sft")
  train.run(worlds.run_config("sft", **given, steps=20, checkpoint_every=20), workdir)
  return str(workdir)


def kindness(prompt, response):
  """A scorer: the share of kind words, of the response to a prompt of this world."""
  words = response.split()
  assert prompt.startswith("the ")
  return sum(word in worlds.GOOD for word in words) / max(1, len(words))


SAMPLES = {
  "sample_every": 4,
  "sample_limit": 6,
  "sample_count": 8,
  "sample_max_new_tokens": 8,
  "sample_scorer": "tests.test_watching:kindness",
}


def samples_of(workdir):
  return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


def means_of(workdir):
  return [line for line in read_metrics(workdir) if line["split"] == "samples"]


def test_a_run_tells_what_its_policy_answers_and_what_it_pays(given, sft, tmp_path):
  prompts = worlds.write_jsonl(
    tmp_path / "prompts.jsonl", [{"prompt": f"the {noun} is"} for noun in worlds.NOUNS]
  )
  train.run(
    worlds.run_config(
      "dpo",
      **given,
      steps=8,
      eval_every=8,
      checkpoint_every=8,
      **{"model.checkpoint": sft, "optimizer.learning_rate": 1e-2, "sample_prompts": prompts, **SAMPLES},
    ),
    tmp_path,
  )
  lines, means = samples_of(tmp_path), means_of(tmp_path)
  assert [line["step"] for line in means] == [0, 4, 8]
  assert [(r["step"], r["index"], r["sample"]) for r in lines] == [
    (at, i, k) for at in (0, 4, 8) for i in range(6) for k in range(8)
  ]
  assert abs(means[0]["kl"]) < 1e-5 < 0.01 < means[-1]["kl"]
  assert means[-1]["score"] > means[0]["score"]
  for mean in means:
    records = [r for r in lines if r["step"] == mean["step"]]
    assert mean["score"] == pytest.approx(np.mean([kindness(r["prompt"], r["response"]) for r in records]))
    kl = np.reshape([r["log_prob"] - r["reference_log_prob"] for r in records], (6, 8)).mean(1)
    assert mean["kl"] == pytest.approx(kl.mean(), abs=1e-7)
    assert mean["kl_error"] == pytest.approx(kl.std(ddof=1) / 6**0.5, abs=1e-7)
    assert mean["tokens"] == pytest.approx(np.mean([r["tokens"] for r in records]))

  files.run(
    str(tmp_path),
    prompts,
    str(tmp_path / "again.jsonl"),
    Draw(num_samples=8, max_new_tokens=8, seed=0),
    limit=6,
  )
  again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
  for want, got in zip(again, lines[-48:], strict=True):
    assert got["response"] == want["response"] and got["finished"] == want["finished"]
    np.testing.assert_allclose(got["log_prob"], want["log_prob"], rtol=1e-4)


@pytest.mark.parametrize(
  "changes",
  [
    {"parallel.strategy": "mesh", "parallel.fsdp": 2},
    {"lora.rank": 2},
    {"reference.sync_every": 2},
    {"optimizer.name": "schedule_free"},
    {"optimizer.ema": 0.5},
  ],
)
def test_a_run_that_was_stopped_writes_the_same_samples(changes, given, sft, tmp_path):
  prompts = worlds.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the film is"}, {"prompt": "the plot is"}])
  settings = dict(
    **given,
    eval_every=2,
    **{"model.checkpoint": sft, **SAMPLES, "sample_every": 2, "sample_prompts": prompts, **changes},
  )
  train.run(worlds.run_config("dpo", **settings, steps=6), tmp_path / "whole")
  for steps in (4, 6):
    train.run(worlds.run_config("dpo", **settings, steps=steps), tmp_path / "twice")
    with open(tmp_path / "twice" / "samples.jsonl", "a") as file:
      file.write('{"step": 5, "of a step that was not saved')  # cut off by a kill
  whole, twice = ((tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "twice"))
  assert twice.startswith(whole) and len(whole.splitlines()) == 4 * 16
  without = lambda lines: [
    {name: value for name, value in line.items() if name not in throughput.METRICS} for line in lines
  ]
  assert without(read_metrics(tmp_path / "whole")) == without(read_metrics(tmp_path / "twice"))


def test_without_a_reference_there_is_no_kl(given, tmp_path):
  train.run(worlds.run_config("sft", **given, steps=2, sample_every=2, sample_max_new_tokens=4), tmp_path)
  assert [line["step"] for line in means_of(tmp_path)] == [0, 2]
  assert all("kl" not in line for line in means_of(tmp_path))
  assert all(line["reference_log_prob"] is None for line in samples_of(tmp_path))


def test_errors_are_over_prompts_and_absent_of_one_prompt():
  record = lambda index, score: {
    "index": index,
    "score": score,
    "tokens": 1,
    "finished": True,
    "log_prob": -1.0,
    "reference_log_prob": -2.0,
  }
  several = watching.means([record(0, 1.0), record(0, 3.0), record(1, 4.0)])
  assert several["score"] == pytest.approx(8 / 3) and several["score_error"] == pytest.approx(1.0)
  assert several["kl"] == 1 and several["kl_error"] == 0
  assert np.isnan(watching.means([record(0, 1.0)])["score_error"])


@pytest.mark.parametrize(
  "changes",
  [{"optimizer.ema": 0.9}, {"optimizer.name": "schedule_free"}, {"optimizer.ema": 0.9, "lora.rank": 2}],
)
def test_the_average_is_evaluated_and_loaded_and_params_are_trained(changes, given, sft, tmp_path):
  result = train.run(
    worlds.run_config(
      "dpo", **given, steps=4, eval_every=4, checkpoint_every=4, **{"model.checkpoint": sft, **changes}
    ),
    tmp_path,
  )
  state, _ = Checkpoints(tmp_path, keep=0).restore_arrays(4)
  average = step.average_of(state["params"], state["opt_state"])
  apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), average, state["params"])
  assert max(jax.tree.leaves(apart)) > 1e-5
  loaded = (checkpoint.load_adapter if "lora.rank" in changes else checkpoint.load_policy)(tmp_path)
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7), loaded.params, average
  )
  # A run that starts there, and does nothing, evaluates to the same.
  if "lora.rank" not in changes:
    again = train.run(
      worlds.run_config(
        "dpo",
        **given,
        steps=1,
        eval_every=1,
        checkpoint_every=0,
        **{
          "model.checkpoint": str(tmp_path),
          "reference.checkpoint": sft,
          "reference.may_differ": True,
          "optimizer.learning_rate": 1e-12,
        },
      ),
      tmp_path / "again",
    )
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in step.OPTIMIZERS if name not in ("rmsprop", "adamw")])
def test_a_run_of_every_optimizer_continues_bit_for_bit(name, given, sft, tmp_path):
  settings = dict(
    **given,
    eval_every=0,
    **{"model.checkpoint": sft, "optimizer.name": name, "parallel.strategy": "mesh", "parallel.fsdp": 2},
  )
  train.run(worlds.run_config("dpo", **settings, steps=4), tmp_path / "whole")
  for steps in (2, 4):
    train.run(worlds.run_config("dpo", **settings, steps=steps), tmp_path / "twice")
  whole, twice = (Checkpoints(tmp_path / run, keep=0).restore_arrays(4)[0] for run in ("whole", "twice"))
  jax.tree.map(np.testing.assert_array_equal, whole, twice)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"sample_every": 2, "objective": "reward", "loss": "bradley_terry"}, "a reward model writes nothing"),
    ({"sample_every": -1}, "sample_every is -1; it must be at least 0"),
    ({"sample_limit": 0}, "sample_limit is 0; it must be at least 1"),
    ({"optimizer.name": "sgd", "optimizer.weight_decay": 0.1}, "weight_decay is 0.1 but sgd has none"),
    ({"optimizer.ema": 1.0}, "optimizer.ema is 1.0; it must be in"),
    ({"optimizer.name": "schedule_free", "optimizer.ema": 0.9}, "ema is 0.9 but schedule_free averages"),
    ({"optimizer.name": "schedule_free", "optimizer.schedule": "cosine"}, "schedule='constant'"),
    ({"optimizer.name": "lyon"}, "did you mean lion"),
    ({"beta_schedule.steps": (0, 5)}, "2 steps and 0 factors"),
    ({"beta_schedule.steps": (5, 5), "beta_schedule.factors": (1.0, 2.0)}, "they must ascend"),
    ({"beta_schedule.steps": (0,), "beta_schedule.factors": (0.0,)}, "each must be a positive number"),
    ({"beta_schedule.steps": (0,), "beta_schedule.factors": (2.0,), "loss": "nll"}, "nll has no beta"),
    ({"beta_schedule.between": "cubic"}, "between is 'cubic'; it must be one of"),
    ({"objective": "sft", "loss": "token_mean", "beta_schedule.steps": (0,)}, "beta_schedule.steps is set"),
    ({"loss": "tdpo2", "reference.mode": "stored"}, "tdpo2 reads the reference's next-token"),
    ({"loss": "epsilon_dpo", "reference.mode": "none"}, "epsilon_dpo reads the reference's next-token"),
    ({"loss": "mappo"}, "needs loss_options.gap"),
    ({"loss": "mappo", "loss_options.gap": 1.5}, "gap is 1.5; it must be in"),
    ({"loss": "bdpo", "loss_options.mix": 1.0}, "mix is 1.0; it must be in"),
    ({"loss": "h_dpo", "loss_options.alpha": 0.0}, "h_dpo needs one above 0"),
    ({"loss_options.sampo": True, "loss_options.ld_alpha": 0.5}, "ld_alpha and sampo, two answers"),
    ({"loss_options.sampo": True, "reference.mode": "stored"}, "'stored' with sampo: log-probs"),
    ({"loss_options.dr_dpo": 0.0}, "dr_dpo is 0.0; it must be positive"),
    ({"loss_options.dr_dpo": 1.0, "rows_at_once": 1}, "dr_dpo compares responses of all comparisons"),
  ],
)
def test_what_cannot_run_is_refused(changes, message, given):
  config = worlds.run_config("dpo", **{**given, **changes})
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.validate(config)


def test_tuples_and_keys_of_older_runs_come_back(given):
  config = worlds.run_config(
    "dpo", **given, **{"beta_schedule.steps": (0, 10), "beta_schedule.factors": (2.0, 1.0)}
  )
  back = config_lib.from_json(config_lib.to_json(config))
  config_lib.validate(back)
  config_lib.check_continues(back, config)
  older = json.loads(config_lib.to_json(worlds.run_config("dpo", **given)))
  for key in ("beta_schedule", "sample_every"):
    del older[key]
  del older["optimizer"]["ema"]
  older = config_lib.from_json(json.dumps(older))
  config_lib.check_continues(older, worlds.run_config("dpo", **given))
  assert not config_lib.averages(older) and config_lib.beta_factor_of(older) is None
  with pytest.raises(config_lib.ConfigError, match="beta_schedule"):
    config_lib.check_continues(older, config)


def test_a_beta_that_moves_is_in_the_metrics_of_a_run(given, sft, tmp_path):
  train.run(
    worlds.run_config(
      "dpo",
      **given,
      steps=4,
      eval_every=2,
      **{"model.checkpoint": sft, "beta_schedule.steps": (0, 4), "beta_schedule.factors": (1.0, 5.0)},
    ),
    tmp_path,
  )
  lines = read_metrics(tmp_path)
  beta = lambda split: [line["beta"] / 0.1 for line in lines if line["split"] == split]
  np.testing.assert_allclose(beta("train"), [1, 2, 3, 4], rtol=1e-5)  # at the state the step starts from
  np.testing.assert_allclose(beta("eval"), [1, 3, 5], rtol=1e-5)
