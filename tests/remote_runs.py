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

import dpojax.evaluate.__main__ as evaluate_command
import dpojax.export.__main__ as export_command
import dpojax.models.from_gguf as from_gguf_command
import dpojax.sample.__main__ as sample_command
from configs import online as online_config
from configs import ppo as ppo_config
from dpojax.export import writer
from dpojax.online import loop as online
from dpojax.ppo import loop as ppo
from dpojax.runtime import appending, paths
from dpojax.runtime.command import command, is_main
from dpojax.sample import files
from dpojax.sample.draws import Draw
from dpojax.train import loop as train
from dpojax.training import checkpoint, throughput
from dpojax.training.log import Log
from dpojax.training.metrics import read_metrics
from tests import gguf_files, worlds

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
  _write_gguf(here)
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


def adapter(root, compiled):
  """A GGUF file to a folder, an adapter on it, with a trace, written for PEFT, sampled and measured."""
  _told(from_gguf_command, f"{root}/tiny.gguf", f"--out={root}/published")
  changes = {
    "model.checkpoint": f"{root}/published",
    "tokenizer": "",
    "data.max_length": 64,
    "data.max_prompt_length": 24,
    "row_length": 160,
    "lora.rank": 2,
    "steps": 3,
    "eval_every": 0,
    "checkpoint_every": 3,
    "profile_steps": "2:3",
    "compile_cache": compiled,
  }
  workdir = f"{root}/adapter"
  train.run(worlds.run_config("dpo", **given(root, **changes)), workdir)
  _told(export_command, f"--workdir={workdir}", f"--out={workdir}/peft", "--lora")
  _told(
    sample_command,
    *(f"--workdir={workdir}", f"--prompts={root}/pairs.jsonl", f"--out={workdir}/samples.jsonl"),
    *("--limit=4", "--max_new_tokens=4", "--batch_size=4"),
  )
  _told(
    evaluate_command,
    *(f"--workdir={workdir}", f"--pairs={root}/pairs.jsonl", f"--pair_scores={workdir}/scored.jsonl"),
    *(f"--out={workdir}/measured.json", "--num_prompts=4", "--max_new_tokens=4", "--batch_size=4"),
  )
  made = ("samples.jsonl", "scored.jsonl", "peft/adapter_model.safetensors", "peft/tokenizer.json")
  traces = [name for name in paths.files_under(paths.of(workdir)) if name.endswith(".xplane.pb")]
  return {
    "metrics": _metrics(workdir),
    "measured": _numbers(json.loads(paths.of(f"{workdir}/measured.json").read_text())),
    "base": json.loads(paths.of(f"{workdir}/peft/adapter_config.json").read_text())[
      "base_model_name_or_path"
    ].removeprefix(str(root)),
    "weights": _digest(f"{root}/published/model.safetensors"),
    "traces": [os.path.dirname(os.path.dirname(name)) for name in traces],
    **{name: _digest(f"{workdir}/{name}") for name in made},
  }


def rewarded(root, compiled):
  """A reward model, PPO with it in two starts, and online DPO with it as the judge."""
  small = {"steps": 2, "eval_every": 2, "checkpoint_every": 2, "compile_cache": compiled}
  train.run(worlds.run_config("reward", **given(root, **small)), f"{root}/reward")
  shared = {
    "model.checkpoint": f"{root}/sft",
    "data.path": f"{root}/pairs.jsonl",
    "data.cache_dir": f"{root}/cache",
    "data.max_length": 16,
    "data.max_prompt_length": 4,
    "data.eval_size": 16,
    "row_length": 64,
    "batch_size": 8,
    "checkpoint_every": 1,
    "check_memory": False,
    "compile_cache": compiled,
  }
  of_ppo = {
    "eval_every": 0,
    "ppo.reward": f"{root}/reward",
    "ppo.num_samples": 2,
    "ppo.max_new_tokens": 4,
    "ppo.epochs": 1,
    "ppo.minibatches": 1,
    "ppo.target_kl": 0.0,
  }
  for steps in (1, 2):  # the second goes on from the first
    ppo.run(_changed(ppo_config.get_config(), shared | of_ppo | {"steps": steps}), f"{root}/ppo")
  of_online = {
    "eval_every": 4,
    "log_every": 1,
    "steps": 4,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.05,
    "optimizer.warmup_steps": 0,
    "online.judge": f"{root}/reward",
    "online.steps_per_round": 2,
    "online.prompts_per_round": 16,
    "online.prompts_at_once": 8,
    "online.num_samples": 2,
    "online.max_new_tokens": 4,
    "profile_steps": "2:2",
  }
  online.run(_changed(online_config.get_config(), shared | of_online), f"{root}/online")
  _told(export_command, f"--workdir={root}/ppo", f"--out={root}/ppo/hf")
  made = ("ppo/hf/model.safetensors", "online/comparisons/round_1.jsonl", "online/comparisons/round_2.jsonl")
  return {
    "ppo": _metrics(f"{root}/ppo"),
    "online": _metrics(f"{root}/online"),
    "params": checkpoint.fingerprint(checkpoint.load_policy(f"{root}/online").params),
    **{name: _digest(f"{root}/{name}") for name in made},
  }


def _told(module, *arguments):
  """Calls a command as its command line does."""
  sys.argv = [module.__name__, *arguments]
  module.main()


def _changed(config, changes):
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(changes)
  return config


def _digest(path):
  return hashlib.sha256(
    appending.read(paths.of(path)).encode() if path.endswith("l") else paths.of(path).read_bytes()
  ).hexdigest()


def _metrics(workdir):
  return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(workdir)]


def _numbers(value):
  """The numbers of a result, by their keys: paths differ from place to place."""
  if isinstance(value, dict):
    return {key: found for key, each in value.items() if (found := _numbers(each)) not in (None, {})}
  return value if isinstance(value, (int, float)) else None


def _write_gguf(here):
  """Writes a GGUF model of random weights with a tokenizer of bytes."""
  letters = "abcdefghijklmnopqrstuvwxyz"
  tokens = ["<eos>", *letters, "\u0120", "th", "is"]
  values = gguf_files.CONFIGS["llama"] | {"vocab_size": len(tokens), "tie_word_embeddings": True}
  tokenizer = {
    "tokens": tokens,
    "token_type": [3, *[1] * (len(tokens) - 1)],
    "eos_token_id": 0,
    "model": "gpt2",
    "pre": "gpt-2",
    "add_bos_token": False,
    "merges": ["t h", "i s"],
  }
  tensors = gguf_files.tensors_of(values)
  gguf_files.write(
    here / "tiny.gguf", values, tensors, tokenizer={f"tokenizer.ggml.{k}": v for k, v in tokenizer.items()}
  )


RUNS = {"make_world": make_world, "dpo": dpo, "adapter": adapter, "rewarded": rewarded}


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
