"""What digests and checks cost: training of the small HH config and loading of 500 MB, with and without.

python -m experiments.measurements.check_cost --out=FILE.json --tokenizer=GPT2_FOLDER \\
    --data=HARMLESS_BASE_TEST.jsonl.gz

Loading, restoring and saving are measured with the checks and without, in turns, each in a process of its
own: the seconds are the median of its repeats, the memory is its peak. Training is so much longer than the
checks that their seconds are counted inside of it instead. What came out is in docs/reliability.md.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import numpy as np
import safetensors

from configs import hh_small
from dpojax import train
from dpojax.models import config as model_config
from dpojax.models import hf, transformer
from dpojax.runtime import command, digests
from dpojax.training import checkpoint, checkpoint_files, metrics

STEPS = 2


def model() -> model_config.ModelConfig:
  """A LLaMA of 125 million parameters, 500 MB in float32."""
  return model_config.llama_style(vocab_size=32_000, width=768, layers=11, heads=12, max_positions=1024)


def make(folder: pathlib.Path, options: argparse.Namespace) -> None:
  """Writes what is to be loaded: a model folder, and checkpoints with digests and as before."""
  config = model()
  params = jax.device_get(transformer.init_params(config, jax.random.key(0)))
  hf.save(folder / "model", config, params)
  checkpoints = checkpoint.Checkpoints(folder / "run", keep=0, owner=True)
  checkpoints.save(1, {"params": params}, {})
  checkpoints.close()
  with older():
    checkpoints = checkpoint.Checkpoints(folder / "older", keep=0, owner=True)
    checkpoints.save(1, {"params": params}, {})
    checkpoints.close()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
  """Takes no digests and believes everything."""
  exists = lambda folder, *, without: pathlib.Path(folder).exists()
  with contextlib.ExitStack() as stack:
    for module, name, other in (
      (checkpoint_files, "seal", lambda folder, step: None),
      (checkpoint_files, "_write_own", lambda folder: None),
      (checkpoint_files, "check", lambda folder, items, together: True),
      (digests, "is_sound", exists),
      (safetensors, "safe_open", lambda path, framework: contextlib.nullcontext()),
    ):
      stack.enter_context(mock.patch.object(module, name, other))
    yield


@contextlib.contextmanager
def older() -> Iterator[None]:
  """The same, and arrays compressed, as they were before there were digests."""
  arrays = checkpoint_files.Arrays
  compressed = lambda **_: arrays(use_compression=True)
  handlers = mock.patch.object(checkpoint_files, "Arrays", compressed)
  with unchecked(), handlers:
    yield


def load(folder: pathlib.Path, options: argparse.Namespace) -> list[tuple[float, float]]:
  return timed(lambda: hf.load(folder / "model"), options.repeats)


def restore(
  folder: pathlib.Path, options: argparse.Namespace, name: str = "run"
) -> list[tuple[float, float]]:
  def work():
    checkpoints = checkpoint.Checkpoints(folder / name, keep=0)
    checkpoints.restore_arrays(checkpoints.last_sound(together=False))
    checkpoints.close()

  return timed(work, options.repeats)


def save(folder: pathlib.Path, options: argparse.Namespace) -> list[tuple[float, float]]:
  params = hf.load(folder / "model").params

  def work():
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
      checkpoints = checkpoint.Checkpoints(workdir, keep=0, owner=True)
      checkpoints.save(1, {"params": params}, {})
      checkpoints.close()

  return timed(work, options.repeats)


def training(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, float]:
  """Seconds of a step of the small HH config, of all digests of a run with one save, and their share.

  The share is that of the steps the config makes between two saves.
  """
  config = hh_small.get_config("sft")
  every = config.checkpoint_every
  config.steps, config.checkpoint_every, config.eval_every = STEPS, STEPS, 0
  config.tokenizer, config.data.path = options.tokenizer, options.data
  config.data.cache_dir = str(folder / "cache")
  of_files, spent = digests.of_files, []

  def counted(*args):
    start = time.perf_counter()
    found = of_files(*args)
    spent.append(time.perf_counter() - start)
    return found

  with tempfile.TemporaryDirectory(dir=folder) as workdir, mock.patch.object(digests, "of_files", counted):
    train.run(config, workdir)
    lines = [line for line in metrics.read_metrics(workdir) if line["split"] == "train"]
  step = config.batch_size / lines[-1]["pairs_per_second"]
  return {"step": step, "digests": sum(spent), "share": sum(spent) / (every * step)}


def timed(work: Callable, repeats: int) -> list[tuple[float, float]]:
  """Seconds of the clock and of the processor, over all threads, of each repeat."""
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter(), time.process_time()
    work()
    seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
  return seconds


MEASURES = {"load": load, "restore": restore, "save": save}
CHECKS = {"without": unchecked, "with": contextlib.nullcontext, "older": older}


def measure(folder: pathlib.Path, options: argparse.Namespace) -> dict:
  """One measurement, in this process."""
  with CHECKS[options.checks]():
    name = {"name": "older"} if (options.measure, options.checks) == ("restore", "older") else {}
    seconds = MEASURES[options.measure](folder, options, **name)
  return {"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def speed(folder: pathlib.Path) -> dict[str, float]:
  """GB/s of digests of a file that is in the page cache, by one thread and by all."""
  path = folder / "model"
  names = ["model.safetensors"]
  size, rates = (path / names[0]).stat().st_size, {}
  for workers in sorted({1, os.cpu_count()}):
    with mock.patch.object(digests, "_WORKERS", workers):
      rates[f"threads_{workers}"] = size / 1e9 / min(timed(lambda: digests.of_files(path, names), 9))[0]
  block = bytes(np.random.default_rng(0).bytes(2**20))
  rates["in_memory"] = 2**20 / 1e9 / min(timed(lambda: digests.of_bytes(block), 50))[0]
  return rates


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", required=True)
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--data", required=True)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--folder", default="")
  parser.add_argument("--measure", default="", choices=["", *MEASURES])
  parser.add_argument("--checks", default="", choices=["", *CHECKS])
  options = parser.parse_args()
  if options.measure:
    with command.command():
      print(json.dumps(measure(pathlib.Path(options.folder), options)))
    return
  with command.command(), tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
    make(pathlib.Path(folder), options)
    results = {"digests_gb_per_second": speed(pathlib.Path(folder))}
    for name in MEASURES:
      found = {checks: [] for checks in CHECKS if checks != "older" or name in ("restore", "save")}
      for _ in range(options.rounds):
        for checks in found:
          done = subprocess.run(
            [
              sys.executable,
              "-m",
              "experiments.measurements.check_cost",
              *sys.argv[1:],
              f"--folder={folder}",
              f"--measure={name}",
              f"--checks={checks}",
            ],
            capture_output=True,
            text=True,
            check=True,
          )
          found[checks].append(json.loads(done.stdout.splitlines()[-1]))
      results[name] = {
        checks: {
          "seconds": statistics.median(clock for each in of for clock, _ in each["seconds"]),
          "least_seconds": min(clock for each in of for clock, _ in each["seconds"]),
          "processor_seconds": statistics.median(used for each in of for _, used in each["seconds"]),
          "mib": statistics.median(each["mib"] for each in of),
        }
        for checks, of in found.items()
      }
      print(name, json.dumps(results[name]), flush=True)
    results["training"] = training(pathlib.Path(folder), options)
  pathlib.Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
  print(json.dumps(results, indent=1))


if __name__ == "__main__":
  main()
