"""All that an accelerator has to say of dpojax, in one sitting: attention, head, a 1B step, one real run.

python -m experiments.accelerator --data=HH.jsonl.gz --tokenizer=GPT2 --out=runs/accelerator
    [--stages=attention,head,benchmark,run] [--limit=500]

Each stage is a command of its own, whose output goes to --out/STAGE.log; one that fails or takes too
long leaves the others alone. Compiled programs are kept in --out/compiled, so that a second sitting
starts where the first one stopped. Prints the last lines of each, and the seconds it took.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time


def commands(data: str, tokenizer: str, out: pathlib.Path) -> dict[str, list[list[str]]]:
  """Returns the commands of each stage, as arguments of `python -m`."""
  benchmark = ["experiments.benchmark", f"--data={data}", f"--tokenizer={tokenizer}",
               "--rounds=1", "--as-installed", "--row-length=2048"]
  whole = [*benchmark, "--case=gpu-1b", "--batch-size=128", "--rows-at-once=0", "--scan-layers",
           "--steps=10"]
  real = [f"--config.data.path={data}", f"--config.tokenizer={tokenizer}", "--config.model.width=768",
          "--config.model.layers=12", "--config.model.heads=12", "--config.model.dtype=bfloat16",
          "--config.row_length=2048", "--config.batch_size=64"]
  train = ["dpojax.train", "--config=configs/hh_small.py:"]
  return {
      "attention": [["experiments.attention_speed", "--repeats=10"]],
      "head": [["experiments.head_speed", "--repeats=10"]],
      "smoke": [[*benchmark, "--case=tiny", "--batch-size=64", "--steps=3", "--micro=16",
                 "--sides=dpojax,trl,torch", f"--out={out}/tiny"]],
      "step": [[*whole, "--sides=dpojax", f"--out={out}/step"]],
      "parts": [[*whole, "--sides=dpojax", "--rows-at-once=2", f"--out={out}/parts"]],
      "benchmark": [[*whole, "--sides=dpojax,trl", "--micro=16,32,64", "--peer-steps=3",
                     f"--out={out}/benchmark"]],
      "run": [[train[0], f"{train[1]}sft", f"--workdir={out}/sft", *real],
              [train[0], f"{train[1]}dpo", f"--workdir={out}/dpo", *real,
               f"--config.model.checkpoint={out}/sft"]]}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True, help="HH pairs, .jsonl or .jsonl.gz")
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--stages", default="attention,head,benchmark,run")
  parser.add_argument("--limit", type=float, default=500, help="seconds for all of them")
  options = parser.parse_args()
  options.out.mkdir(parents=True, exist_ok=True)
  started = time.perf_counter()
  kept = {"JAX_COMPILATION_CACHE_DIR": str(options.out.absolute() / "compiled")}
  for stage in options.stages.split(","):
    with open(options.out / f"{stage}.log", "w") as log:
      for command in commands(options.data, options.tokenizer, options.out)[stage]:
        left = options.limit - (time.perf_counter() - started)
        try:
          code = subprocess.run(
              [sys.executable, "-u", "-m", *command], stdout=log, stderr=subprocess.STDOUT,
              timeout=max(1, left), env=os.environ | kept, check=False).returncode
        except subprocess.TimeoutExpired:
          code = "out of time"
        log.write(f"\n{command[0]}: {code}, {time.perf_counter() - started:.0f} s since the start\n")
        log.flush()
    print(f"== {stage}", *open(log.name).read().splitlines()[-30:], sep="\n", flush=True)


if __name__ == "__main__":
  main()
