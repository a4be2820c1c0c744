"""Runs in buckets, each forked from a process that has imported everything; `tests.test_remote` asks.

python -m tests.remote_runs: reads a JSON object a line, {"run", "given", "environment", "log"}, forks, and
answers with the pid of the child, or {"wait", "seconds"} and its exit code, null while it goes on.
"""

import asyncio
import ctypes
import hashlib
import json
import os
import pathlib
import signal
import sys
import time
import traceback
import types

import numpy as np

from dpojax.export import writer
from dpojax.runtime import paths
from dpojax.runtime.command import command, is_main
from dpojax.sample import files
from dpojax.sample.draws import Draw
from dpojax.train import loop as train
from dpojax.training import checkpoint, throughput
from dpojax.training.log import Log
from dpojax.training.metrics import read_metrics
from tests import worlds

CLOCK = (*throughput.METRICS, "samples_per_second", "time")
STEPS = 8


def given(root, **changes):
  return {
    "tokenizer": f"{root}/words",
    "path": f"{root}/pairs.jsonl",
    "cache_dir": f"{root}/cache",
    "check_memory": False,
    **changes,
  }


def make_world(root, here):
  """A tokenizer and pairs, and SFT on them, in a folder or bucket."""
  here = pathlib.Path(here)
  worlds.save_tokenizer(here / "words")
  worlds.write_jsonl(here / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 60))
  if paths.is_remote(root):
    paths.upload(here, paths.of(root))
  config = worlds.run_config("sft", **given(root), steps=4, eval_every=0, checkpoint_every=4)
  train.run(config, f"{root}/sft")


def dpo(root, *, slow=0.0, name="dpo", sampled=True, impatient=False, **changes):
  """DPO from that SFT with a stored reference; then samples and an export, and digests of all that."""
  if impatient:  # gcsfs waits for one to two seconds after each request that failed
    paths.filesystem(root)  # which sets up what is imported here, in the child: grpc does not outlive a fork
    from gcsfs import retry

    sleep = asyncio.sleep
    retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: sleep(seconds / 20))
  advance = Log.advance
  Log.advance = lambda *args: (time.sleep(slow), advance(*args))
  defaults = {
    "model.checkpoint": f"{root}/sft",
    "reference.mode": "stored",
    "steps": STEPS,
    "eval_every": 4,
    "checkpoint_every": 2,
    "compile_cache": f"{root}/compiled",
  }
  config = worlds.run_config("dpo", **given(root, **defaults) | changes)
  workdir = f"{root}/{name}"
  with command():
    train.join_processes(config)
    train.run(config, workdir)
    policy = checkpoint.load_policy(workdir)
    if not is_main():
      return None
    outcome = {
      "step": policy.step,
      "params": checkpoint.fingerprint(policy.params),
      "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(workdir)],
    }
    if sampled:
      draw = Draw(num_samples=2, max_new_tokens=4, seed=0)
      files.run(workdir, f"{root}/pairs.jsonl", f"{workdir}/samples.jsonl", draw, limit=4, batch_size=4)
      writer.export(workdir, f"{workdir}/hf")
      for made in ("samples.jsonl", "hf/model.safetensors", "hf/tokenizer.json"):
        data = (paths.of(workdir) / made).read_bytes()
        outcome[made] = hashlib.sha256(data).hexdigest()
    return outcome


RUNS = {"make_world": make_world, "dpo": dpo}


def _child(asked):
  ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # it does not outlive who asked for it
  log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(log, 1)
  os.dup2(log, 2)
  sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
  os.environ |= asked["environment"]
  outcome = RUNS[asked["run"]](**asked["given"])
  pathlib.Path(f"{asked['log']}.json").write_text(json.dumps(outcome))


def main():
  for line in iter(sys.stdin.readline, ""):
    asked = json.loads(line)
    if "wait" in asked:
      until, code = time.monotonic() + asked["seconds"], None
      while code is None and time.monotonic() < until:
        done, status = os.waitpid(asked["wait"], os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.0 if done else 0.01)
      print(json.dumps(code), flush=True)
      continue
    pid = os.fork()
    if pid:
      print(pid, flush=True)
      continue
    code = 1
    try:
      _child(asked)
      code = 0
    except SystemExit as exit:
      print(exit, file=sys.stderr)
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stderr.flush()
      os._exit(code)


if __name__ == "__main__":
  main()
