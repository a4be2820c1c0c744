"""The runs that are killed: small, made of everything a run does, and told apart by what they are doing.

Each runs in a process of its own, into a folder, and leaves there `outcome.json`: digests of all that it is
for. The same run, killed or not, gives the same digests.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import time

import jax
import numpy as np

from dpojax.data import builders, tokenization
from dpojax.online import loop as online
from dpojax.online import rounds
from dpojax.ppo import loop as ppo
from dpojax.runtime import processes
from dpojax.runtime.command import command, is_main
from dpojax.sample import files
from dpojax.sample.draws import Draw
from dpojax.sample.generator import Generator
from dpojax.train import loop as train
from dpojax.training import checkpoint, programs, reference, throughput
from dpojax.training.log import Log
from dpojax.training.metrics import read_metrics
from tests import worlds

CLOCK = (*throughput.METRICS, "samples_per_second", "time")


def make_world(folder, with_reward):
  """Makes what the runs are given: a tokenizer, pairs, an SFT run and perhaps a reward model."""
  worlds.save_tokenizer(folder / "words")
  worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 150))
  worlds.write_jsonl(folder / "others.jsonl", worlds.pairs(np.random.default_rng(1), 150))
  small = dict(eval_every=0, log_every=50, checkpoint_every=50)
  train.run(worlds.run_config("sft", **_given(folder, folder), steps=20, **small), folder / "sft")
  if not with_reward:
    return
  train.run(
    worlds.run_config(
      "reward",
      **_given(folder, folder),
      steps=6,
      **small,
      **{"model.checkpoint": str(folder / "sft"), "checkpoint_best": ""},
    ),
    folder / "reward",
  )


def _given(world, folder):
  return dict(
    tokenizer=str(world / "words"), path=str(world / "pairs.jsonl"), cache_dir=str(folder / "cache")
  )


def run_train(world, folder, **changes):
  """DPO with a stored reference and an empty cache: prepares, tokenizes, stores, trains, evaluates, saves."""
  workdir = pathlib.Path(changes.pop("workdir", folder / "run"))
  if versions := changes.pop("versions", None):
    real = processes.versions()
    processes.versions = lambda: real | versions
  config = worlds.run_config(
    "dpo",
    **_given(world, folder)
    | {
      "model.checkpoint": str(world / "sft"),
      "reference.mode": "stored",
      "steps": 12,
      "eval_every": 4,
      "checkpoint_every": 2,
      "check_memory": False,
    }
    | changes,
  )
  with command():
    train.join_processes(config)
    train.run(config, workdir)
    outcome = _of_run(workdir, 12) | _of_cache(folder / "cache")  # Orbax opens it in all processes
    if is_main():
      _tell(folder, outcome, workdir)


def run_two(world, folder, **changes):
  """The same on a mesh over two processes."""
  run_train(world, folder, **{"parallel.strategy": "mesh", "parallel.data": 2} | changes)


def run_ppo(world, folder):
  config = importlib.import_module("configs.ppo").get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(
      {
        "model.checkpoint": str(world / "sft"),
        "ppo.reward": str(world / "reward"),
        "data.path": str(world / "pairs.jsonl"),
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": 32,
        "data.eval_size": 16,
        "data.max_prompt_length": 4,
        "row_length": 64,
        "steps": 6,
        "batch_size": 8,
        "eval_every": 3,
        "checkpoint_every": 1,
        "log_every": 1,
        "ppo.num_samples": 2,
        "ppo.max_new_tokens": 4,
        "ppo.epochs": 1,
        "ppo.minibatches": 2,
        "ppo.target_kl": 0.0,
      }
    )
  with command():
    ppo.run(config, folder / "run")
    _tell(folder, _of_run(folder / "run", 6))


def run_online(world, folder):
  """Three rounds of DPO on samples that a reward model scores."""
  config = importlib.import_module("configs.online").get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(
      {
        "model.checkpoint": str(world / "sft"),
        "tokenizer": str(world / "words"),
        "data.path": str(world / "pairs.jsonl"),
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": 32,
        "data.eval_size": 16,
        "data.max_prompt_length": 4,
        "row_length": 64,
        "steps": 9,
        "batch_size": 16,
        "eval_every": 3,
        "checkpoint_every": 2,
        "log_every": 1,
        "check_memory": False,
        "optimizer.learning_rate": 1e-4,
        "online.judge": str(world / "reward"),
        "online.steps_per_round": 3,
        "online.prompts_per_round": 160,
        "online.prompts_at_once": 16,
        "online.num_samples": 3,
        "online.max_new_tokens": 6,
        "online.offline_share": 0.25,
      }
    )
  with command():
    workdir = folder / "run"
    online.run(config, workdir)
    kept = [*workdir.glob("comparisons/*"), *workdir.glob("rounds/*/*.jsonl")]
    files = {str(path.relative_to(workdir)): _sha(path.read_bytes()) for path in sorted(kept)}
    _tell(folder, _of_run(workdir, 9) | files)


def run_sample(world, folder):
  with command():
    files.run(
      str(world / "sft"),
      str(world / "pairs.jsonl"),
      str(folder / "samples.jsonl"),
      Draw(num_samples=2, max_new_tokens=6),
      batch_size=4,
      limit=100,
    )
    _tell(folder, {"samples": _sha((folder / "samples.jsonl").read_bytes())})


RUNS = {"train": run_train, "two": run_two, "ppo": run_ppo, "sample": run_sample, "online": run_online}
"""Scenarios by name."""

PHASES = {
  "train": (
    "preparing",
    "tokenizing",
    "storing a reference",
    "restoring",
    "evaluating",
    "training",
    "saving",
  ),
  "two": ("storing a reference", "restoring", "evaluating", "training", "saving"),
  "ppo": ("preparing", "restoring", "evaluating", "PPO step", "saving"),
  "sample": ("sampling",),
  "online": ("restoring", "evaluating", "sampling", "labelling", "pairing", "training", "saving"),
}
"""What a scenario does, and a kill can be aimed at."""


def _of_run(workdir, step):
  manager = checkpoint.Checkpoints(workdir, keep=0)
  state, _ = manager.restore_arrays(step)
  manager.close()
  bits = [
    (jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, _sha(leaf.tobytes()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  ]
  metrics = [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(workdir)]
  return {"state": _sha(json.dumps(bits).encode()), "metrics": _sha(json.dumps(metrics).encode())}


def _of_cache(cache):
  """Digests of token arrays and of stored log-probs by position."""
  found = {}
  for path in sorted((cache / "tokenized").glob("*/*.npy")):
    found[f"{path.parent.name[:8]}/{path.name}"] = _sha(path.read_bytes())
  for folder in sorted(path for path in (cache / "reference").iterdir() if path.is_dir()):
    values = np.full((150, 2), np.nan, np.float32)
    reference._read(folder, values)
    found[folder.name[:8]] = _sha(values.tobytes())
  return found


def _tell(folder, outcome, workdir=None):
  left = [path.name for path in (workdir or folder).glob("checkpoints/*tmp*")]
  path = (workdir or folder) / "outcome.json"
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(outcome | {"left half written": left}))
  os.replace(temporary, path)


def _sha(data):
  return hashlib.sha256(data).hexdigest()[:16]


# What a run is doing, written where it can be read after a kill.


class Phase:
  """The present phase of this process, in a file."""

  def __init__(self, path):
    self._file, self.now = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), ""
    self.enter("starting")

  def enter(self, name):
    before, self.now = self.now, name
    os.pwrite(self._file, name.ljust(32).encode(), 0)
    return before

  @contextlib.contextmanager
  def during(self, name):
    before = self.enter(name)
    try:
      yield
    finally:
      self.enter(before)


def watch_phases(path, slow):
  """Lets this process tell what it is doing; a step takes `slow` seconds longer."""
  phase = Phase(path)

  def told(owner, name, what):
    original = getattr(owner, name)

    def telling(*args, **kwargs):
      with phase.during(what):
        return original(*args, **kwargs)

    setattr(owner, name, telling)

  told(builders, "prepare", "preparing")
  told(tokenization, "tokenize", "tokenizing")
  told(reference, "_compute", "storing a reference")
  told(ppo.Trainer, "step", "PPO step")
  told(ppo.Trainer, "measure", "evaluating")
  told(Generator, "__call__", "sampling")
  told(rounds.Rounds, "_label", "labelling")
  told(rounds.Rounds, "_finish", "pairing")
  for name in ("save", "wait"):
    told(checkpoint.Checkpoints, name, "saving")
  told(checkpoint.Checkpoints, "restore", "restoring")
  make_evaluate, advance = programs.make_evaluate, Log.advance

  def telling_evaluate(*args, **kwargs):
    evaluate = make_evaluate(*args, **kwargs)

    def telling(*args):
      with phase.during("evaluating"):
        return evaluate(*args)

    return telling

  def slowly(*args, **kwargs):
    phase.enter("training")
    time.sleep(slow)
    advance(*args, **kwargs)

  programs.make_evaluate, Log.advance = telling_evaluate, slowly
  reference._FLUSH = 1
