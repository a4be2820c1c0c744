"""What a user waits for: from the start of a process to its first answers, and to its first training step.

python -m experiments.measurements.time_to_first --model=FOLDER --pairs=FILE [--out=runs/time_to_first]
    [--repeats=1] [--peers] [--tokens=40]

Three prompts are answered greedily, and one DPO step of four pairs is taken, each by the command that a user
would type, once with an empty compile cache and once with what that has left. With --peers `transformers`'
generate and TRL's DPOTrainer do the same in processes of their own (`pip install -e '.[parity]'`). Beside the
whole stands what of it is importing, tracing, lowering and XLA's compiling. Writes time_to_first.json.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from dpojax.runtime.command import command
from dpojax.runtime.disk import disk_errors

STAGES = {
  "import": "importing",
  "/jax/core/compile/jaxpr_trace_duration": "tracing",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
  "/jax/core/compile/backend_compile_duration": "XLA",
}
"""What a timed command tells of itself, and what the table calls it; XLA includes reading its cache."""

TIMED = """
import atexit, importlib, json, runpy, sys, time
start = time.perf_counter()
module, out, *arguments = sys.argv[1:]
import jax
found = dict.fromkeys({stages}, 0.0)
def heard(name, seconds, **_):
  if name in found:
    found[name] += seconds
jax.monitoring.register_event_duration_secs_listener(heard)
importlib.import_module({imported}[module])
found["import"] = time.perf_counter() - start
atexit.register(lambda: open(out, "w").write(json.dumps(found)))
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
""".format(
  stages=list(STAGES), imported={"dpojax.sample": "dpojax.sample.files", "dpojax.train": "dpojax.train.loop"}
)
"""Runs a command as `python -m` does and says how long its parts took."""

PEERS = {
  "sample": """
import json, sys
import torch, transformers
model, prompts, tokens = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
given = tokenizer.apply_chat_template(
  prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True)
answers = loaded.generate(**given, max_new_tokens=tokens, do_sample=False)
print(*tokenizer.batch_decode(answers[:, given["input_ids"].shape[1]:], skip_special_tokens=True), sep="\\n")
print("first", flush=True)
""",
  "train": """
import json, sys, tempfile
import datasets, torch, transformers, trl
model, pairs, count = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
class First(transformers.TrainerCallback):
  def on_step_end(self, *_, **__):
    print("first", flush=True)
loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
trl.DPOTrainer(
  model=loaded, processing_class=transformers.AutoTokenizer.from_pretrained(model),
  train_dataset=datasets.Dataset.from_list(pairs[:count]), callbacks=[First()],
  args=trl.DPOConfig(output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=count,
    learning_rate=1e-6, beta=0.1, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
    disable_tqdm=True, gradient_checkpointing=False, train_sampling_strategy="sequential"),
).train()
""",
}
"""`transformers` and TRL doing the same."""

QUESTIONS = ("What is the capital of France?", "Name three fruits.", "Why is the sky blue?")
PAIRS = 4


def waited(
  arguments: Sequence[str], said: str, log: pathlib.Path, env: dict[str, str]
) -> tuple[float, float]:
  """Returns seconds from the start of a process to a line that begins with `said`, and to its end.

  Raises:
    RuntimeError: it failed, or has not said it.
  """
  start, first = time.perf_counter(), None
  with open(log, "w") as file:
    with subprocess.Popen(
      arguments, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
      for line in process.stdout:
        file.write(line)
        if first is None and line.startswith(said):
          first = time.perf_counter() - start
    code = process.returncode
  if code or first is None:
    raise RuntimeError(f"{' '.join(arguments[:3])} ended with {code} and has not said {said!r}; see {log}")
  return first, time.perf_counter() - start


def ours(
  what: str, model: str, data: dict[str, pathlib.Path], out: pathlib.Path, tokens: int, warm: bool
) -> dict:
  """Runs a command in an empty folder; returns seconds to its first result, in all, and by stage."""
  cache, folder, stages = out / f"compiled_{what}", out / "run", out / "stages.json"
  for each in (folder, *([] if warm else [cache])):
    shutil.rmtree(each, ignore_errors=True)
  if what == "sample":
    module, said = "dpojax.sample", "3 samples drawn"
    arguments = [f"--workdir={model}", f"--prompts={data['prompts']}", f"--out={folder / 'samples.jsonl'}"]
    arguments += ["--temperature=0", f"--max_new_tokens={tokens}"]
  else:
    module, said = "dpojax.train", "step 1/1"
    arguments = ["--config=configs/dpo.py", f"--workdir={folder}"]
    arguments += [
      f"--config.{key}={value}"
      for key, value in {
        "model.checkpoint": model,
        "data.path": data["pairs"],
        "data.cache_dir": out / "prepared",
        "batch_size": PAIRS,
        "steps": 1,
        "eval_every": 0,
        "checkpoint_every": 0,
        "row_length": 512,
        "rows_at_once": 1,
        "optimizer.name": "adamw",
        "optimizer.warmup_steps": 0,
        "compile_cache": cache,
      }.items()
    ]
  env = {"DPOJAX_CACHE": str(cache)}
  first, whole = waited(
    [sys.executable, "-u", "-c", TIMED, module, str(stages), *arguments], said, out / f"{what}.log", env
  )
  return {"first": first, "whole": whole} | json.loads(stages.read_text())


def measured(
  model: str, pairs: str, out: pathlib.Path, *, repeats: int, peers: bool, tokens: int
) -> list[dict]:
  """Returns a line for every command, cold and warm, and every peer: medians over repeats."""
  out.mkdir(parents=True, exist_ok=True)
  data = write_inputs(model, pairs, out)
  lines = []
  for what in ("sample", "train"):
    for name, warm in (("dpojax, nothing compiled", False), ("dpojax, compiled before", True)):
      found = [ours(what, model, data, out, tokens, warm) for _ in range(repeats)]
      lines.append({"what": what, "side": name} | _medians(found))
    if peers:
      given, said = data["questions" if what == "sample" else "rendered"], "first"
      count = tokens if what == "sample" else PAIRS
      command_ = [sys.executable, "-u", "-c", PEERS[what], model, str(given), str(count)]
      found = [waited(command_, said, out / f"peer_{what}.log", {}) for _ in range(repeats)]
      name = "transformers" if what == "sample" else "TRL"
      lines.append(
        {"what": what, "side": name} | _medians([{"first": first, "whole": whole} for first, whole in found])
      )
  return lines


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
  return {key: statistics.median(each[key] for each in found) for key in found[0]}


def write_inputs(model: str, pairs: str, out: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes the prompts and the pairs, the same for all sides."""
  from dpojax.data import tokenization
  from experiments import chat_pairs

  paths = {name: out / f"{name}.json" for name in ("questions", "rendered")}
  paths |= {name: out / f"{name}.jsonl" for name in ("prompts", "pairs")}
  questions = [[{"role": "user", "content": question}] for question in QUESTIONS]
  records = chat_pairs.read(
    pairs, tokenization.load_tokenizer(model), out / "prepared", longest_prompt=128, longest=192
  )[0][:PAIRS]
  write_lines = lambda path, lines: path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  with disk_errors(out):
    paths["questions"].write_text(json.dumps(questions))
    paths["rendered"].write_text(json.dumps(records))
    write_lines(paths["prompts"], [{"prompt": each} for each in questions])
    write_lines(paths["pairs"], records)
  return paths


def table(lines: Sequence[dict[str, Any]]) -> str:
  """Returns the table as Markdown; what no stage has is reading weights and data, and the work itself."""
  head = ["until", "side", "first result, s", "whole process, s", *(f"{name}, s" for name in STAGES.values())]
  rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  until = {"sample": "three answers", "train": "the first step"}
  for line in lines:
    stages = [f"{line[key]:.1f}" if key in line else "" for key in STAGES]
    cells = [until[line["what"]], line["side"], f"{line['first']:.1f}", f"{line['whole']:.1f}", *stages]
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--model", required=True, help="a Hugging Face folder with a chat template")
  parser.add_argument("--pairs", required=True)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/time_to_first"))
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument("--tokens", type=int, default=40, help="of an answer, at most")
  parser.add_argument("--peers", action="store_true", help="transformers and TRL as well")
  arguments = parser.parse_args()
  out = arguments.out.absolute()
  with command():
    lines = measured(
      arguments.model,
      arguments.pairs,
      out,
      repeats=arguments.repeats,
      peers=arguments.peers,
      tokens=arguments.tokens,
    )
    (out / "time_to_first.json").write_text(json.dumps(lines, indent=1) + "\n")
  print(table(lines))


if __name__ == "__main__":
  main()
