"""What a run needs, told before it starts: against the run itself, over devices, and refused in time."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpojax import train
from dpojax.models import config as model_config
from dpojax.plan import needs as plan
from dpojax.training import config as config_lib
from dpojax.training import parallel, resolve, step
from tests import conftest, worlds

LENGTHS = np.random.default_rng(0).integers(2, 12, (200, 3))


def config_of(**changes):
  return worlds.run_config(
    "dpo", "words", "pairs.jsonl", "cache", **{"model.vocab_size": 20, "eval_every": 0} | changes
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the config.json of a Llama, and nothing else."""
  published = json.loads((conftest.ROOT / "tests" / "published_models.json").read_text())
  small = published["meta-llama/Llama-3.2-1B"]["config"] | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
  }
  path = tmp_path_factory.mktemp("llama")
  (path / "config.json").write_text(json.dumps(small))
  return str(path)


@pytest.mark.parametrize("mode", ["inline", "stored", "none"])
def test_arguments_are_those_of_a_placed_run(mode):
  config = config_of(**{"reference.mode": mode})
  needs = plan.plan(config, LENGTHS)
  devices = resolve.make_devices(config)
  setup = resolve.make_setup_of_shapes(config, axis_name=devices.axis_name)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), setup.params)
  tx, _ = resolve.make_train_step(config, setup.objective, devices)
  state = devices.place(step.init_state(params, tx))
  assert needs.trained == sum(leaf.size for leaf in jax.tree.leaves(params))
  assert needs.params == parallel.device_bytes(state.params)
  assert needs.optimizer == parallel.device_bytes(state.opt_state)
  assert needs.reference == (needs.params if mode == "inline" else 0)
  assert needs.peak >= needs.params + needs.optimizer + needs.reference + needs.rows
  assert needs.temporaries > 0 and needs.flops > 0


def test_a_mesh_cuts_what_every_replica_holds_whole():
  whole = plan.plan(config_of(), LENGTHS)
  cut = plan.plan(config_of(**{"parallel.strategy": "mesh", "parallel.fsdp": 8}), LENGTHS)
  assert cut.trained == whole.trained and cut.flops == whole.flops
  arguments = lambda needs: needs.params + needs.optimizer + needs.reference
  assert arguments(cut) < arguments(whole) / 4
  assert cut.peak > arguments(cut) + cut.temporaries  # the rows and what comes out are there too


def test_an_adapter_needs_one_model_and_the_config_json_is_enough(folder):
  shapes = {"model.checkpoint": folder, "model.vocab_size": 0}
  full, adapter = (plan.plan(config_of(**shapes, **rank), LENGTHS) for rank in ({}, {"lora.rank": 2}))
  assert full.trained == full.frozen == adapter.frozen
  assert adapter.trained < full.trained / 5 and adapter.optimizer < full.optimizer / 5
  assert adapter.peak < full.peak and adapter.flops == pytest.approx(full.flops * 3 / 4)


def test_parts_and_recomputing_need_less():
  long = np.random.default_rng(0).integers(10, 20, (200, 3))
  of = lambda **changes: plan.plan(
    config_of(row_length=64, batch_size=64, **{"model.layers": 4, "parallel.strategy": "mesh"} | changes),
    long,
  )
  temporaries = [
    of(**changes).temporaries
    for changes in ({}, {"model.remat": "full"}, {"model.remat": "full", "rows_at_once": 1})
  ]
  assert temporaries == sorted(temporaries, reverse=True)


def test_necessary_flops_are_those_of_the_formula():
  model = model_config.llama_style(
    vocab_size=100, width=8, layers=2, heads=2, max_positions=32, tie_embeddings=True
  )
  lengths = np.array([[2, 1, 3]])
  matrices = 4 * 8 * 8 + 3 * 8 * model.mlp_width
  seen = (1 + 2) + (2 + 1) + (2 + 1 + 2 + 2 + 2 + 3)  # by each token of the prompt and the responses
  forward = 2 * (2 * matrices * 6 + 4 * 8 * seen) + 2 * 8 * 100 * 4
  assert plan.necessary_flops(model, lengths, 4) == 4 * forward
  plain = dataclasses.replace(model, mlp="gelu", reward_head=True)
  assert plan.necessary_flops(plain, lengths, 3) == 3 * (
    forward - 2 * 2 * 6 * 8 * model.mlp_width - 2 * 8 * 100 * 4
  )


def test_a_run_that_does_not_fit_is_refused_before_it_starts(words, tmp_path, monkeypatch):
  path = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 60))
  config = worlds.run_config("sft", words, path, tmp_path / "cache", steps=2)
  monkeypatch.setattr(parallel, "memory_limit", lambda: 2**16)
  with pytest.raises(config_lib.ConfigError, match=r"needs .* GiB on each device, which has 0.00"):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
  config.check_memory = False
  train.run(config, tmp_path / "run")


def test_lengths_are_means_and_keep_to_what_a_row_holds():
  config = config_of(row_length=1024, **{"data.max_length": 512, "data.max_prompt_length": 256})
  lengths = plan.drawn_lengths("100,60,40", config)
  np.testing.assert_allclose(lengths.mean(0), [100, 60, 40], rtol=0.1)
  assert lengths.min() >= 1 and lengths[:, 0].max() <= 256 and lengths.sum(1).max() <= 1024
  for text in ("", "100", "100,x", "100,0"):
    with pytest.raises(config_lib.ConfigError, match="--lengths must be mean tokens"):
      plan.drawn_lengths(text, config)


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "dpojax.plan", *arguments],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=240,
  )


def test_the_command_prints_the_plan_of_simulated_devices(folder):
  small = [f"--config.model.checkpoint={folder}", "--config.row_length=512", "--config.batch_size=16"]
  result = command(
    "--config=configs/llama3.py:full",
    *small,
    "--config.data.path=x",
    "--config.data.max_length=256",
    "--config.data.max_prompt_length=128",
    "--devices=8",
    "--chip=h100",
    "--lengths=60,30,30",
  )
  assert result.returncode == 0, result.stderr
  assert "compiled for    8 cpu device(s)" in result.stdout
  assert "fits its 74.5 GiB" in result.stdout and "peak" in result.stdout
  result = command(
    "--config=configs/llama3.py:full",
    "--config.model.checkpoint=/nowhere",
    "--config.data.path=x",
    "--lengths=60,30,30",
  )
  assert result.returncode == 1 and "error: /nowhere is not the workdir of a run" in result.stderr


def test_a_second_process_finds_what_the_first_has_compiled(words, tmp_path):
  path = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 60))
  config = worlds.run_config(
    "sft",
    words,
    path,
    tmp_path / "cache",
    steps=1,
    eval_every=0,
    checkpoint_every=0,
    compile_cache=str(tmp_path / "compiled"),
  )
  (tmp_path / "config.json").write_text(config_lib.to_json(config))
  code = (
    "import sys, jax, pathlib\n"
    "from dpojax import train\n"
    "from dpojax.training import config\n"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
    "events = []\n"
    "jax.monitoring.register_event_listener(lambda name, **_: events.append(name))\n"
    "train.run(config.from_json(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2])\n"
    "print('hits', events.count('/jax/compilation_cache/cache_hits'),\n"
    "      'misses', events.count('/jax/compilation_cache/cache_misses'))\n"
  )
  counts = []
  for name in ("one", "two"):
    result = subprocess.run(
      [sys.executable, "-c", code, str(tmp_path / "config.json"), str(tmp_path / name)],
      cwd=conftest.ROOT,
      capture_output=True,
      text=True,
      timeout=240,
    )
    assert result.returncode == 0, result.stderr
    words_of = result.stdout.split()[-4:]
    counts.append((int(words_of[1]), int(words_of[3])))
  (_, compiled), (found, again) = counts
  assert compiled > 10 and found == compiled and again == 0


def test_what_a_compiler_does_not_count_is_not_told():
  counted = plan.Needs(**dict.fromkeys(plan.Needs._fields, 1))
  assert "XLA counts" in plan.report(counted, devices=1)
  assert "XLA" not in plan.report(counted._replace(counted_flops=float("nan")), devices=1)
