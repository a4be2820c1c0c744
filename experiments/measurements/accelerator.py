"""All that an accelerator has to say of dpojax, in one sitting: attention, head, a 1B step, one real run.

python -m experiments.measurements.accelerator --data=HH.jsonl.gz --tokenizer=GPT2 --out=runs/accelerator
    [--model=SMOLLM2] [--stages=smoke,attention,head,benchmark,run,displacement,trajectory,beta] [--limit=500]

Each stage is a command of its own, whose output goes to --out/STAGE.log; one that fails or takes too long
leaves the others alone. `run` is DPO of --model on the pairs or, without one, SFT and DPO of 124M random
weights; the last three are of --model: `experiments.paper.displacement`, the benchmark's trajectory beside
TRL, and `experiments.paper.beta_real` on all pairs. Compiled programs are kept in --out/compiled, so that a
second sitting starts where the first one stopped. Matrix products are left to cuBLAS: XLA otherwise tries
its own kernels for each of them, which is minutes of compiling. Prints the last lines of each, and the
seconds it took.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time


def commands(data: str, tokenizer: str, model: str, out: pathlib.Path) -> dict[str, list[list[str]]]:
  """Returns the commands of each stage, as arguments of `python -m`."""
  benchmark = [
    "experiments.benchmark",
    f"--data={data}",
    f"--tokenizer={tokenizer}",
    "--rounds=1",
    "--as-installed",
    "--row-length=2048",
  ]
  pairs = [
    f"--config.data.path={data}",
    "--config.row_length=2048",
    "--config.batch_size=64",
    "--config.model.dtype=bfloat16",
  ]
  small = [
    *pairs,
    f"--config.tokenizer={tokenizer}",
    "--config.model.width=768",
    "--config.model.layers=12",
    "--config.model.heads=12",
  ]
  train = lambda kind, *rest: [
    "dpojax.train",
    f"--config=configs/hh_small.py:{kind}",
    f"--workdir={out}/{kind}",
    *rest,
  ]
  real = [
    train(
      "dpo",
      *pairs,
      f"--config.model.checkpoint={model}",
      "--config.steps=64",
      "--config.optimizer.learning_rate=2e-6",
      "--config.eval_every=16",
      "--config.profile_steps=20:22",
    )
  ]
  made = [train("sft", *small), train("dpo", *small, f"--config.model.checkpoint={out}/sft")]
  return {
    "attention": [["experiments.measurements.attention_speed", "--repeats=10"]],
    "head": [["experiments.measurements.head_speed", "--repeats=10"]],
    "smoke": [
      [
        *benchmark,
        "--case=tiny",
        "--batch-size=64",
        "--steps=3",
        "--micro=16",
        "--sides=dpojax,trl,torch",
        f"--out={out}/tiny",
      ]
    ],
    "benchmark": [
      [
        *benchmark,
        "--case=gpu-1b",
        "--batch-size=256",
        "--rows-at-once=7",
        "--chunk-size=384",
        "--scan-layers",
        "--steps=7",
        "--sides=dpojax,trl",
        "--micro=8,16,32",
        "--peer-steps=2",
        f"--out={out}/benchmark",
      ]
    ],
    "run": real if model else made,
    "displacement": [["experiments.paper.displacement", f"--model={model}", f"--workdir={out}/displacement"]],
    "trajectory": [
      [
        "experiments.benchmark",
        "--case=smollm2",
        f"--data={data}",
        f"--model={model}",
        "--rounds=0",
        "--trajectory-batch=8",
        "--trajectory-length=256",
        f"--out={out}/trajectory",
      ]
    ],
    "beta": [
      [
        "experiments.paper.beta_real",
        f"--pairs={data}",
        f"--model={model}",
        "--dtype=bfloat16",
        "--longest=512",
        "--longest_prompt=256",
        "--row_length=2048",
        "--batch_size=32",
        "--steps=54",
        "--held_out=256",
        "--sampled=64",
        "--samples=4",
        "--max_new_tokens=64",
        f"--workdir={out}/beta_real",
      ]
    ],
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True, help="HH pairs, .jsonl or .jsonl.gz")
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--model", default="", help="a Hugging Face folder, for one real run")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--stages", default="attention,head,benchmark,run")
  parser.add_argument("--limit", type=float, default=500, help="seconds for all of them")
  options = parser.parse_args()
  options.out.mkdir(parents=True, exist_ok=True)
  started = time.perf_counter()
  kept = {
    "JAX_COMPILATION_CACHE_DIR": str(options.out.absolute() / "compiled"),
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false " + os.environ.get("XLA_FLAGS", ""),
  }
  for stage in options.stages.split(","):
    with open(options.out / f"{stage}.log", "w") as log:
      for command in commands(options.data, options.tokenizer, options.model, options.out)[stage]:
        left = options.limit - (time.perf_counter() - started)
        try:
          code = subprocess.run(
            [sys.executable, "-u", "-m", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=max(1, left),
            env=os.environ | kept,
            check=False,
          ).returncode
        except subprocess.TimeoutExpired:
          code = "out of time"
        log.write(f"\n{command[0]}: {code}, {time.perf_counter() - started:.0f} s since the start\n")
        log.flush()
    print(f"== {stage}", *open(log.name).read().splitlines()[-30:], sep="\n", flush=True)


if __name__ == "__main__":
  main()
