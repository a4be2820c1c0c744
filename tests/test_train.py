"""The run: it starts at log 2, learns, is killed and continues, and refuses what cannot be run."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpojax.models import hf, transformer
from dpojax.runtime import digests, disk
from dpojax.runtime.errors import UserError
from dpojax.train import loop as train
from dpojax.training import checkpoint, metrics, preference, throughput
from dpojax.training import config as config_lib
from dpojax.training import workdir as workdir_lib
from dpojax.training.metrics import read_metrics
from tests import conftest, worlds
from tests.runs import finish, in_two_processes, start_run

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def given(words, tmp_path_factory):
  """Tokenizer, pairs and cache that runs share."""
  folder = tmp_path_factory.mktemp("given")
  path = worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 150))
  return dict(tokenizer=words, path=path, cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def sft(given, tmp_path_factory):
  """The workdir of a short SFT."""
  workdir = tmp_path_factory.mktemp("sft") / "run"
  train.run(worlds.run_config("sft", **given, steps=30), workdir)
  return str(workdir)


def lines(workdir, split):
  return [line for line in read_metrics(workdir) if line["split"] == split]


def test_sft_then_dpo_starts_at_log_2_and_learns(given, sft, tmp_path):
  nll = [line["nll_per_token"] for line in lines(sft, "eval")]
  assert nll[-1] < 0.7 * nll[0]
  config = worlds.run_config("dpo", **given, steps=12, **{"model.checkpoint": sft})
  result = train.run(config, tmp_path)
  steps = lines(tmp_path, "train")
  assert [line["step"] for line in steps] == list(range(1, 13))
  assert abs(steps[0]["loss"] - math.log(2)) < 1e-5
  assert result["rewards/accuracies"] > 0.9 and result["loss"] < 0.5
  assert set(steps[0]) >= {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
    "learning_rate",
    "pairs_per_second",
    *throughput.METRICS[:4],
    "step_seconds",
  }
  assert all(0 <= line["input_wait"] < 1 for line in steps)
  for line in steps:
    parts = [line[f"step_seconds/{part}"] for part in ("input", "device", "host")]
    assert min(parts) >= 0 and math.isclose(sum(parts), line["step_seconds"], rel_tol=1e-6)
  assert list((tmp_path / "tensorboard").iterdir())
  policy = checkpoint.load_policy(tmp_path)
  assert policy.step == 12 and policy.settings.beta == config.beta


def test_shuffled_labels_teach_nothing_that_holds_out(given, sft, tmp_path):
  result = train.run(
    worlds.run_config("dpo", **given, steps=12, **{"model.checkpoint": sft, "data.shuffle_labels": True}),
    tmp_path,
  )
  assert abs(result["rewards/margins"]) < 0.3


def test_a_reward_model_learns_and_the_best_checkpoint_is_kept(given, sft, tmp_path):
  result = train.run(
    worlds.run_config(
      "reward", **given, steps=12, **{"model.checkpoint": sft, "checkpoint_best": "rewards/accuracies"}
    ),
    tmp_path,
  )
  assert result["rewards/accuracies"] > 0.9
  accuracy = {line["step"]: line["rewards/accuracies"] for line in lines(tmp_path, "eval")}
  kept = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
  assert len(kept) <= 2 and max(accuracy[step] for step in kept) == max(
    value for step, value in accuracy.items() if step
  )


KNOBS = {
  "robust_dpo": {"label_smoothing": 0.1},
  "exo_pair": {"label_smoothing": 0.1},
  "simpo": {"gamma": 0.5},
  "orpo": {"weight": 0.1},
  "unlikelihood": {"alpha": 0.1},
  "mappo": {"gap": 0.5},
  "odpo": {"margin": 0.5},
  "h_dpo": {"alpha": 0.9},
  "r_dpo": {"alpha": 0.01},
  "alphapo": {"gamma": 0.5, "alpha": 0.25},
  "discopop": {"tau": 1.0},
}  # with its tau of 0.05 the slope at a margin of 0 is upward


ALONE = (
  "dpo",
  "apo_down",
  "dpop",
  "dpo_plackett_luce",
  "aot",
  "aot_unpaired",
  "kto",
  "bco",
  "tdpo2",
  "epsilon_dpo",
  "simpo",
  "orpo",
  "r_dpo",
  "unlikelihood",
  "odpo",
  "beta_dpo",
)
"""Losses that a run is made of by themselves: each reads something of its own, or is pulled up by others."""

SUMS = (
  "ipo,hinge,robust_dpo,exo_pair,nca_pair,bco_pair",
  "sppo_hard,apo_zero,discopop,cal_dpo",
  "bdpo,mappo,gpo_exponential,gpo_truncated_quadratic,gpo_savage,f_dpo_forward_kl",
  "f_dpo_js_divergence,f_dpo_alpha_divergence,h_dpo,tdpo1",
  "alphapo,cpo,nll,nll_mean",
  "dpo,nll_mean",
)
"""The others, several in a run, of which each has a metric of its own."""


def test_every_loss_is_in_a_run():
  of_offline_data = {name for name, loss in preference.LOSSES.items() if not loss.of_data}
  assert {*ALONE, *(name for names in SUMS for name in names.split(","))} == of_offline_data


def knobs_of(names):
  return {f"loss_options.{knob}": value for name in names for knob, value in KNOBS.get(name, {}).items()}


@pytest.mark.parametrize("loss", [*ALONE, *SUMS])
def test_a_run_with_any_loss_learns_what_is_preferred(loss, given, sft, tmp_path):
  names = loss.split(",")
  result = train.run(
    worlds.run_config(
      "dpo",
      **given,
      loss=loss,
      steps=6,
      checkpoint_every=0,
      eval_every=6,
      log_every=6,
      **{"model.checkpoint": sft, **knobs_of(names)},
    ),
    tmp_path,
  )
  first, last = lines(tmp_path, "eval")
  assert last["loss"] < first["loss"] and last["logps/chosen"] > first["logps/chosen"] - 1
  for name in names if len(names) > 1 else ():
    assert last[f"loss/{name}"] < first[f"loss/{name}"], name
  assert result["rewards/accuracies"] > 0.6 and math.isfinite(result["rewards/margins"])
  assert ("log_ratios/abs" in result) == any(preference.LOSSES[name].reads_reference for name in names)


def test_responses_judged_one_by_one_are_enough_for_kto(given, sft, tmp_path):
  records = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": bool(good)}
    for pair, good in zip(worlds.pairs(np.random.default_rng(1), 150), [1, 0] * 75)
  ]
  path = worlds.write_jsonl(tmp_path / "single.jsonl", records)
  train.run(
    worlds.run_config(
      "dpo",
      **given | {"path": path},
      loss="kto",
      steps=8,
      checkpoint_every=0,
      eval_every=8,
      **{"model.checkpoint": sft},
    ),
    tmp_path,
  )
  first, last = lines(tmp_path, "eval")
  assert last["loss"] < first["loss"]
  assert last["rewards/chosen"] > last["rewards/rejected"] and "rewards/accuracies" not in last


def test_rankings_of_several_lengths_train(given, sft, tmp_path):
  records = [
    {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"], " the"][:k]}
    for pair, k in zip(worlds.pairs(np.random.default_rng(1), 150), [3, 2, 3] * 50)
  ]
  path = worlds.write_jsonl(tmp_path / "ranked.jsonl", records)
  result = train.run(
    worlds.run_config(
      "dpo",
      **given | {"path": path},
      loss="dpo_plackett_luce",
      steps=8,
      checkpoint_every=0,
      eval_every=8,
      **{"model.checkpoint": sft, "data.num_responses": 3},
    ),
    tmp_path,
  )
  first, _ = lines(tmp_path, "eval")
  shares = [len(r["responses"]) for r in records]
  assert min(shares) == 2 and math.log(2) < first["loss"] < math.log(6)
  assert result["loss"] < first["loss"] - 0.1 and result["rewards/accuracies"] > 0.9


def test_a_reference_that_follows_at_every_step_keeps_the_loss_at_log_2(given, sft, tmp_path):
  train.run(
    worlds.run_config(
      "dpo",
      **given,
      steps=4,
      eval_every=0,
      **{"model.checkpoint": sft, "reference.sync_every": 1, "reference.sync_alpha": 1.0},
    ),
    tmp_path,
  )
  for line in lines(tmp_path, "train"):
    assert abs(line["loss"] - math.log(2)) < 1e-5


def test_a_run_whose_reference_moves_continues_where_it_was(given, sft, tmp_path):
  settings = dict(
    **given, eval_every=0, **{"model.checkpoint": sft, "reference.sync_every": 2, "reference.sync_alpha": 0.5}
  )
  train.run(worlds.run_config("dpo", **settings, steps=8), tmp_path / "whole")
  for steps in (6, 8):
    train.run(worlds.run_config("dpo", **settings, steps=steps), tmp_path / "twice")
  (want, want_metrics), (got, got_metrics) = (state_files(tmp_path / name, 8) for name in ("whole", "twice"))
  assert got_metrics == want_metrics
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_knobs_and_weights_of_losses_are_set_from_the_command_line(given, tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "dpojax.train",
      "--config=configs/dpo.py",
      f"--workdir={tmp_path}",
      "--config.loss=simpo,nll_mean",
      "--config.loss_weights=(1.0,0.5)",
      "--config.loss_options.gamma=0.5",
      "--config.loss_options.wpo=True",
      f"--config.tokenizer={given['tokenizer']}",
      "--config.data.path=/nowhere.jsonl",
    ],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert "data.path /nowhere.jsonl: no such file" in done.stderr, done.stderr[-2000:]
  settings = checkpoint.load_settings(tmp_path)
  assert config_lib.losses_of(settings) == ["simpo", "nll_mean"]
  assert settings.loss_weights == (1.0, 0.5)
  assert config_lib.knobs_of(settings) == {"gamma": 0.5}
  assert config_lib.combined_with(settings) == {"wpo": True}


def test_the_checkpoint_holds_the_references_fingerprint_and_not_the_reference(given, sft, tmp_path):
  train.run(
    worlds.run_config("dpo", **given, steps=2, **{"model.checkpoint": sft, "optimizer.name": "sgd"}), tmp_path
  )
  start = checkpoint.load_policy(sft).params
  about = json.loads((tmp_path / "checkpoints/2/about/metadata").read_text())
  assert about["reference"] == checkpoint.fingerprint(start)
  saved = sum(f.stat().st_size for f in (tmp_path / "checkpoints/2/state").rglob("*") if f.is_file())
  assert saved < 1.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(start))


def test_a_fingerprint_sees_one_bit(sft):
  params = checkpoint.load_policy(sft).params
  before = checkpoint.fingerprint(params)
  assert before == checkpoint.fingerprint(jax.tree.map(np.copy, params))
  table = params["embed"]["embedding"].copy()
  table[3, 5] = np.nextafter(table[3, 5], np.float32(1))
  assert before != checkpoint.fingerprint(params | {"embed": {"embedding": table}})
  rolled = np.roll(params["embed"]["embedding"], 1, axis=0)
  assert before != checkpoint.fingerprint(params | {"embed": {"embedding": rolled}})


def state_files(workdir, step):
  """The state, bit for bit, and the metrics without the clock's."""
  manager = checkpoint.Checkpoints(workdir, keep=0)
  state, _ = manager.restore_arrays(step)
  manager.close()
  return state, [
    {name: value for name, value in line.items() if name not in throughput.METRICS}
    for line in read_metrics(workdir)
  ]


def test_three_kills_change_nothing(given, sft, tmp_path, rng):
  settings = dict(
    kind="dpo", **given, steps=24, log_every=2, eval_every=6, checkpoint_every=3, **{"model.checkpoint": sft}
  )
  whole = start_run(tmp_path, "whole", settings)
  finish(whole)
  for until in sorted(rng.choice(np.arange(4, 22), size=3, replace=False)):
    process = start_run(tmp_path, "killed", settings | {"slow": 0.1})
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
      reached = max((line["step"] for line in read_metrics(tmp_path / "killed")), default=0)
      if reached >= until:
        break
      time.sleep(0.01)
    assert process.poll() is None and reached < 24, process.communicate()[0][-3000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
  finish(start_run(tmp_path, "killed", settings))
  (want, want_metrics), (got, got_metrics) = (
    state_files(tmp_path / name, 24) for name in ("whole", "killed")
  )
  assert got_metrics == want_metrics
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_checkpoint_cut_off_half_way_is_never_loaded_and_is_removed_aloud(given, sft, tmp_path, capsys):
  config = worlds.run_config("dpo", **given, steps=4, checkpoint_keep=0, **{"model.checkpoint": sft})
  train.run(config, tmp_path)
  # What a kill leaves: a folder not yet renamed, here with a copy of everything but the end.
  whole = tmp_path / "checkpoints" / "4"
  whole.rename(tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp")
  assert checkpoint.load_policy(tmp_path).step == 2
  assert (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").exists()  # who only reads removes nothing
  train.run(config, tmp_path)
  assert checkpoint.load_policy(tmp_path).step == 4
  assert "half written by a run that was stopped: 4.orbax-checkpoint-tmp\n" in capsys.readouterr().out
  assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def flip(workdir, step, name="ocdbt.process_*"):
  """Flips a bit in the middle of the largest of a checkpoint's array files."""
  files = (workdir / f"checkpoints/{step}/state").rglob(f"{name}/d/*")
  file = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 4
  file.write_bytes(content)
  return file


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(given, sft, tmp_path, capsys):
  config = worlds.run_config("dpo", **given, steps=4, checkpoint_keep=0, **{"model.checkpoint": sft})
  train.run(config, tmp_path)
  want = checkpoint.load_policy(tmp_path).params
  file = flip(tmp_path, 4)
  capsys.readouterr()
  assert checkpoint.load_policy(tmp_path).step == 2
  with pytest.raises(checkpoint.CheckpointError, match="checkpoints/4 cannot be read.*continue from step 2"):
    checkpoint.load_policy(tmp_path, 4)
  train.run(config, tmp_path)
  told = capsys.readouterr().out
  assert told.count(f"{file} is damaged") == 2 and f"continuing from step 2 of {tmp_path}" in told
  policy = checkpoint.load_policy(tmp_path)
  assert policy.step == 4 and [path.name for path in (tmp_path / "damaged").iterdir()] == ["4"]
  jax.tree.map(np.testing.assert_array_equal, policy.params, want)


def test_where_the_only_checkpoint_is_damaged_the_run_stops(given, sft, tmp_path):
  config = worlds.run_config("dpo", **given, steps=2, **{"model.checkpoint": sft})
  train.run(config, tmp_path)
  file = flip(tmp_path, 2)
  with pytest.raises(checkpoint.CheckpointError, match=f"{file} is damaged.*continue from the start"):
    train.run(config, tmp_path)


def test_two_processes_train_evaluate_and_continue_as_one(given, sft, tmp_path):
  changes = {
    "model.checkpoint": sft,
    "row_length": 32,
    "checkpoint_keep": 0,
    "parallel.strategy": "mesh",
    "parallel.data": 2,
    "parallel.fsdp": 2,
    "parallel.tensor": 2,
  }
  train.run(worlds.run_config("dpo", **given, steps=6, **changes), tmp_path / "one")
  for steps in (4, 6):
    told = in_two_processes(tmp_path, dict(**given, steps=steps, **changes))
    if steps == 4:
      assert len(json.loads((tmp_path / "two/checkpoints/4/digests.json").read_text())["files"]) > 4
      file = flip(tmp_path / "two", 4, name="ocdbt.process_1")
  assert told[0].count(f"{file} is damaged") == 1 and "continuing from step 2" in told[0]
  assert file.name not in told[1]  # one process speaks, and both continue from there
  one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
  assert [(line["step"], line["split"]) for line in one] == [(line["step"], line["split"]) for line in two]
  for a, b in zip(one, two):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    np.testing.assert_allclose(a["logps/chosen"], b["logps/chosen"], rtol=1e-4)


@pytest.mark.parametrize(
  "cut",
  [{}, {"lora.rank": 2, "parallel.strategy": "mesh", "parallel.fsdp": 4}],
  ids=["replicas", "adapter_on_a_mesh"],
)
def test_two_processes_train_and_sample_as_one(cut, given, sft, tmp_path):
  """`pmap` is the default strategy: nothing is said of it. The adapter's base lies over both processes."""
  prompts = [{"prompt": f"the {noun} is"} for noun in worlds.NOUNS[:3]]
  changes = {
    "model.checkpoint": sft,
    "row_length": 32,
    "steps": 3,
    "checkpoint_every": 0,
    "sample_every": 3,
    "sample_prompts": worlds.write_jsonl(tmp_path / "prompts.jsonl", prompts),
    "sample_count": 2,
    "sample_max_new_tokens": 5,
    "sample_scorer": "tests.test_watching:kindness",
    **cut,
  }
  train.run(worlds.run_config("dpo", **given, **changes), tmp_path / "one")
  in_two_processes(tmp_path, {**given, **changes})
  one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
  assert [(line["step"], line["split"]) for line in one] == [(line["step"], line["split"]) for line in two]
  for a, b in zip(one, two):
    for name in ("loss", "kl", "score", "tokens"):
      if name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
  one, two = (
    [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
    for name in ("one", "two")
  )
  assert len(one) == 2 * 3 * 2 and len({line["response"] for line in one}) > 3
  assert [line["response"] for line in one] == [line["response"] for line in two]


def test_sigterm_saves_and_the_same_command_continues(given, sft, tmp_path):
  settings = dict(
    kind="dpo", **given, steps=40, checkpoint_every=40, eval_every=0, slow=0.05, **{"model.checkpoint": sft}
  )
  process = start_run(tmp_path, "run", settings)
  while process.poll() is None and len(read_metrics(tmp_path / "run")) < 3:
    time.sleep(0.02)
  process.terminate()
  output, _ = process.communicate(timeout=120)
  assert process.returncode != 0 and "the same command continues" in output
  reached = checkpoint.load_policy(tmp_path / "run").step
  assert 3 <= reached < 40
  finish(start_run(tmp_path, "run", settings | {"slow": 0.0}))
  steps = [line["step"] for line in lines(tmp_path / "run", "train")]
  assert steps == list(range(1, 41))


def refused(given, tmp_path, error=config_lib.ConfigError, **changes):
  """The message a run is refused with, before anything is compiled."""
  config = worlds.run_config("dpo", **{**given, **changes})
  with jax.log_compiles(False), pytest.raises(error) as caught:
    train.run(config, tmp_path / "run")
  return str(caught.value)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"beta": -0.1}, "config.beta is -0.1; it must be positive"),
    ({"steps": 0}, "config.steps is 0; it must be at least 1"),
    ({"loss": "dop"}, "config.loss is 'dop'.*did you mean dpo"),
    ({"objective": "dpoo"}, "config.objective is 'dpoo'.*did you mean dpo"),
    ({"learning_rate": 1e-3}, "config.learning_rate is not a key; did you mean optimizer.learning_rate"),
    ({"optimizer.name": "adam"}, "config.optimizer.name is 'adam'.*did you mean adamw"),
    ({"model.heads": 3}, "config.model.width is 32 and model.heads 3; heads must divide width"),
    ({"data.max_prompt_length": 32}, "data.max_prompt_length is 32.*lower max_prompt_length"),
    ({"data.form": "open_ai"}, "config.data.form is 'open_ai'; it must be one of.*did you mean openai"),
    ({"data.form": "orca", "data.source": "hh"}, "data.source='hh' has a form of its own; leave it empty"),
    ({"row_length": 16}, "config.row_length is 16, shorter than data.max_length 32; raise row_length"),
    ({"data.eval_size": 0}, "nothing to evaluate on; set data.eval_path"),
    ({"checkpoint_best": "loss", "eval_every": 3}, "checkpoint_every=2 is not a multiple of eval_every=3"),
    ({"checkpoint_best": "los"}, "config.checkpoint_best is 'los'; it must be one of .*rewards/accuracies"),
    ({"parallel.strategy": "mesh", "parallel.fsdp": 3}, "config.parallel.data x fsdp x tensor.*8 devices"),
    ({"parallel.fsdp": 2}, "parallel.strategy='mesh'"),
    ({"parallel.lost_after": 2.0}, "config.parallel.lost_after is 2.0; .*give at least 5, or 0"),
    ({"loss_options.smoothing": 0.1}, "config.loss_options.smoothing is not a key"),
    ({"loss_options.gamma": 0.1}, "config.loss_options.gamma is not an option of dpo; it takes"),
    ({"loss_options.label_smoothing": 0.6}, "label_smoothing is 0.6; it must be in \\[0, 0.5\\)"),
    ({"loss": "exo_pair", "loss_options.label_smoothing": 0.0}, "exo_pair needs one between 0 and 1"),
    ({"loss": "simpo"}, "needs loss_options.gamma; set it, such as --config.loss_options.gamma=0.1"),
    ({"loss": "dpo,dop"}, "config.loss is 'dpo,dop'.*did you mean dpo"),
    ({"loss": "dpo,dpo"}, "names a loss twice; name it once"),
    ({"loss": "dpo,nll", "loss_weights": (1.0,)}, "loss_weights has 1 numbers for 2 losses"),
    ({"loss": "dpo,nll", "loss_weights": (1.0, 0.0)}, "every weight must be a positive number"),
    ({"loss": "aot", "rows_at_once": 2}, "aot compares responses of all comparisons.*set rows_at_once=0"),
    ({"loss": "kto", "rows_at_once": 2}, "kto compares responses of all comparisons"),
    (
      {"loss": "orpo", "loss_options.weight": 1.0, "loss_options.length_normalize": True},
      "length_normalize cannot be combined with orpo: it reads mean log-probs by definition",
    ),
    ({"loss": "kto", "loss_options.wpo": True}, "loss_options.wpo cannot be combined with kto"),
    ({"loss_options.ld_alpha": 0.5, "loss_options.length_normalize": True}, "set one of them"),
    ({"loss_options.ld_alpha": 1.5}, "ld_alpha is 1.5; it must be in"),
    ({"data.num_responses": 4}, "num_responses is 4 but dpo compares 2 responses"),
    ({"loss": "dpo_plackett_luce", "data.num_responses": 1}, "it must be at least 2"),
    ({"loss": "cpo", "reference.sync_every": 2}, "sync_every is 2 but cpo has no reference"),
    ({"reference.mode": "none", "reference.sync_every": 2}, "but reference.mode is 'none'"),
    ({"reference.mode": "stored", "reference.sync_every": 2}, "'stored' with sync_every: the reference"),
    ({"reference.mode": "stored", "loss_options.ld_alpha": 0.5}, "'stored' with ld_alpha: log-probs"),
    ({"reference.mode": "stored", "loss": "kto"}, "'stored' with kto: its responses"),
    ({"reference.mode": "none", "loss": "kto"}, "kto measures its reference point against"),
    ({"reference.sync_every": 2, "reference.sync_alpha": 0.0}, "sync_alpha is 0.0; it must be in"),
    ({"objective": "sft", "loss": "token_mean", "loss_options.gamma": 1.0}, "loss_options.gamma is set"),
    ({"loss": "exo_pair"}, "config.loss is 'exo_pair', which needs loss_options.label_smoothing"),
    ({"reference.checkpoint": "/elsewhere"}, "set reference.may_differ=True"),
    ({"batch_size": 1000}, "batch_size is 1000 but there are 127 comparisons; lower batch_size"),
    (
      {"model.vocab_size": 5},
      "comparison .* has id .* of the tokenizer .* the model has embeddings of 5 ids; set model.vocab_size=0",
    ),
    ({"model.checkpoint": "/nowhere"}, "/nowhere is not the workdir of a run"),
    ({"tokenizer": "/nowhere"}, "tokenizer '/nowhere' cannot be loaded"),
    ({"path": "/nowhere.jsonl"}, "data.path /nowhere.jsonl: no such file"),
  ],
)
def test_what_cannot_run_is_refused_by_name_and_with_the_fix(changes, message, given, tmp_path):
  assert re.search(message, refused(given, tmp_path, error=UserError, **changes), re.DOTALL)
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_value_of_the_wrong_type_is_named(given):
  config = worlds.run_config("dpo", **given).to_dict()
  config["steps"] = "many"
  with pytest.raises(config_lib.ConfigError, match="config.steps is 'many'; it must be of type int"):
    config_lib.validate(config_lib.from_json(json.dumps(config)))


def test_another_config_in_the_same_workdir_is_refused(given, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text(config_lib.to_json(worlds.run_config("dpo", **given, beta=0.7)))
  assert "config.beta=0.7, not 0.1; take another workdir" in refused(given, tmp_path)


def test_another_reference_than_the_runs_is_refused(given, sft, tmp_path):
  config = worlds.run_config("dpo", **given, steps=2, **{"model.checkpoint": sft})
  train.run(config, tmp_path)
  about = tmp_path / "checkpoints/2/about/metadata"
  about.write_text(about.read_text().replace('"reference": "', '"reference": "0'))
  digests.write(tmp_path / "checkpoints/2")
  with pytest.raises(checkpoint.CheckpointError, match="started with another reference weights"):
    train.run(config, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(given, tmp_path):
  config = worlds.run_config(
    "sft",
    **given,
    steps=6,
    **{"optimizer.name": "sgd", "optimizer.learning_rate": 1e20, "optimizer.max_grad_norm": 0.0},
  )
  with pytest.raises(train.TrainingError, match=r"not finite at step 2; the state before it is saved"):
    train.run(config, tmp_path)
  policy = checkpoint.load_policy(tmp_path)
  assert policy.step == 1
  assert [line["step"] for line in lines(tmp_path, "train")] == [1]


def test_a_reference_that_disagrees_before_step_1_stops_the_run(given, sft, tmp_path, monkeypatch):
  other = tmp_path / "other"
  train.run(worlds.run_config("sft", **given, steps=2, seed=1), other)
  config = worlds.run_config(
    "dpo",
    **given,
    **{"model.checkpoint": sft, "reference.checkpoint": str(other), "reference.may_differ": True},
  )
  result = train.run(config, tmp_path / "on_purpose")
  config.reference.may_differ = False
  with pytest.raises(train.TrainingError, match="differ by .* nats .* reference.may_differ=True"):
    train.check_agreement(result, config)
  # Without evaluations the first step tells it, before anything is kept. The config is refused before any
  # step for naming another reference: what is left are those that differ by mistake.
  mistaken, check = config.copy_and_resolve_references(), train.check_agreement
  monkeypatch.setattr(train, "check_agreement", lambda metrics, _: check(metrics, mistaken))
  config.eval_every, config.checkpoint_every, config.reference.may_differ = 0, 1, True
  with pytest.raises(train.TrainingError, match="before step 1 .* differ by .* nats"):
    train.run(config, tmp_path / "by_mistake")
  assert not lines(tmp_path / "by_mistake", "train")
  with pytest.raises(checkpoint.CheckpointError):
    checkpoint.load_policy(tmp_path / "by_mistake")


@pytest.mark.parametrize("stacked", [True, False])
def test_a_reference_whose_layers_lie_otherwise_is_the_same_reference(stacked, given, tmp_path):
  config = worlds.run_config("sft", **given, steps=1, **{"model.scan_layers": not stacked})
  train.run(config, tmp_path / "other")
  name = str(tmp_path / "other")
  policy = checkpoint.load_policy(name)
  params = transformer.laid_out(policy.config, policy.params, stacked)
  assert ("layers" in params) == stacked != ("layers" in policy.params)
  back = transformer.laid_out(dataclasses.replace(policy.config, scan_layers=stacked), params, not stacked)
  jax.tree.map(np.testing.assert_array_equal, back, policy.params)
  hf.save(tmp_path / "folder", policy.config, policy.params)
  config = worlds.run_config(
    "dpo",
    **given,
    steps=1,
    **{
      "model.checkpoint": str(tmp_path / "folder"),
      "model.scan_layers": stacked,
      "reference.checkpoint": name,
      "reference.may_differ": True,
    },
  )
  train.run(config, tmp_path / "run")
  (first,) = lines(tmp_path / "run", "train")
  assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_no_room_for_a_checkpoint_is_said_before_training(given, tmp_path, monkeypatch):
  monkeypatch.setattr(
    workdir_lib.shutil, "disk_usage", lambda _: workdir_lib.shutil._ntuple_diskusage(1, 1, 1)
  )
  message = refused(given, tmp_path, error=disk.DiskError)
  assert "MiB free; free some space, or set checkpoint_every=0" in message


def test_a_disk_that_fills_up_is_one_line_at_once_and_loses_no_checkpoint_written_before(
  given, sft, tmp_path
):
  settings = dict(kind="dpo", **given, steps=4, checkpoint_every=2, eval_every=0, **{"model.checkpoint": sft})
  finish(start_run(tmp_path, "run", settings))
  (tmp_path / "run.json").write_text(
    json.dumps(settings | {"steps": 60, "checkpoint_every": 20, "slow": 0.1, "largest_file": 64 * 1024})
  )
  # No file may grow beyond 64 kB from here on, which is how a full disk looks to one process.
  process = subprocess.run(
    [sys.executable, "-m", "tests.run_training", str(tmp_path / "run.json"), str(tmp_path / "run")],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=240,
    env=os.environ | {"XLA_FLAGS": conftest.QUICK_COMPILES, "PYTHONDONTWRITEBYTECODE": "1"},
  )
  assert process.returncode == 1
  told = [line for line in process.stderr.splitlines() if not line.startswith("[transformers]")]
  assert len(told) == 1, process.stderr
  (line,) = told
  assert re.fullmatch(
    r"error: step 20 could not be saved: the disk of \S+ is full; .*start the same command again.*\. "
    "Step 4 is the last that is saved; what was half written is removed",
    line,
  ), line
  assert 20 <= max(line["step"] for line in read_metrics(tmp_path / "run")) <= 35  # the next save is at 40
  # Orbax may have let go of step 2 when it began with step 20.
  assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1:] == ["4"]
  assert checkpoint.load_policy(tmp_path / "run").step == 4


def test_a_full_disk_under_the_metrics_is_named(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, after_step=-1)
  writer.write(1, "train", {"loss": 0.5})
  lines_file, writer._file = writer._file, open("/dev/full", "w", buffering=1)
  with pytest.raises(disk.DiskError, match=f"the disk of {tmp_path} is full"):
    writer.write(2, "train", {"loss": 0.4})
  with contextlib.suppress(OSError):
    writer._file.close()
  writer._file = lines_file
  writer.close()
  assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_line_cut_off_by_a_kill_and_lines_after_the_checkpoint_are_written_again(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}\n{"step": 3, "sp'
  )
  metrics.MetricsWriter(tmp_path, after_step=1).close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "split": "train"}\n'


def test_a_workdir_that_cannot_be_made_is_named(given, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(disk.DiskError, match="cannot be written.*check the path and its permissions"):
    train.run(worlds.run_config("dpo", **given), tmp_path / "file" / "run")
