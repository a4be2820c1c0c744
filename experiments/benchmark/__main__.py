"""dpojax, TRL and a plain PyTorch step side by side, in alternating runs.

python -m experiments.benchmark --case=small --data=FILE --tokenizer=FOLDER --out=runs/benchmark

python -m experiments.benchmark --case=smollm2 --data=FILE --model=FOLDER --out=runs/benchmark_smollm2

Needs `pip install -e '.[parity]'`. The second is of a real chat model: first both sides take the same steps
and what parts them is written to trajectory.md (see `trajectory`), then they are timed. Writes CASE.json,
CASE.md and a plot into --out. Every side runs in its own process, one after the other and over again; the
first step of a peer's run, and steps that dpojax compiles, are left out of the times. Peers are tried with
several part sizes and the fastest counts.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import numpy as np

CASES = {
  "tiny": dict(width=64, layers=2, heads=2, vocab_size=50257),
  "small": dict(width=256, layers=4, heads=4, vocab_size=50257),
  "large": dict(width=768, layers=12, heads=12, vocab_size=50257),
  "gpu-1b": dict(width=2048, layers=16, heads=32, vocab_size=50257, dtype="bfloat16"),
  "smollm2": {},  # of --model, on chat pairs, and the same trajectory first
}

# glibc gives large buffers back to the system and pays a page fault for each 4 KiB when it gets
# them again; kept and in huge pages they cost nothing.
KEEP_MEMORY = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": "34359738368",
  "MALLOC_TOP_PAD_": "268435456",
  "THP_MEM_ALLOC_ENABLE": "1",
}


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--case", choices=CASES, default="small")
  parser.add_argument("--data", required=True, help="HH pairs, .jsonl or .jsonl.gz")
  parser.add_argument("--tokenizer", default="", help="by default the model's")
  parser.add_argument(
    "--model", default="", help="a Hugging Face folder; by default random weights of the case"
  )
  parser.add_argument("--trajectory-steps", type=int, default=30, help="of --case=smollm2; 0: none")
  parser.add_argument("--trajectory-batch", type=int, default=4, help="pairs of such a step")
  parser.add_argument("--trajectory-length", type=int, default=128, help="tokens of its longest pairs")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--sides", default="dpojax,dpojax-stored,trl,trl-stored,torch")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=4, help="of a run of dpojax")
  parser.add_argument("--peer-steps", type=int, default=2, help="of a run of a peer")
  parser.add_argument("--batch-size", type=int, default=64)
  parser.add_argument("--max-length", type=int, default=512)
  parser.add_argument("--pairs", type=int, default=0, help="chat pairs that are read; 0: all of the data's")
  parser.add_argument("--longest-prompt", type=int, default=0, help="of chat pairs; 0: half of --max-length")
  parser.add_argument("--answer-tokens", type=int, default=0, help="of chat pairs, each made as long")
  parser.add_argument("--row-length", type=int, default=1152)
  parser.add_argument("--rows-at-once", type=int, default=1)
  parser.add_argument("--chunk-size", type=int, default=0, help="see config.chunk_size")
  parser.add_argument("--remat", default="none", help="see config.model.remat")
  parser.add_argument(
    "--scan-layers",
    action="store_true",
    help="dpojax with one compiled block for all layers: slower on CPUs, compiled sooner",
  )
  parser.add_argument("--micro", default="4,8,16", help="part sizes peers are tried with")
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument(
    "--as-installed", action="store_true", help="every side with the allocator as it comes, not as suits it"
  )
  return parser.parse_args()


def run_side(side: str, settings: dict, folder: pathlib.Path, allocator: dict[str, str]) -> dict:
  """Runs one side once in its own process; a side that runs out of memory says so."""
  name, _, stored = side.partition("-")
  settings = settings | {"stored": bool(stored)}
  given, out = folder / "settings.json", folder / "result.json"
  given.write_text(json.dumps(settings))
  out.unlink(missing_ok=True)
  start = time.perf_counter()
  process = subprocess.run(
    [sys.executable, "-m", f"experiments.benchmark.{name}_side", str(given), str(out)],
    env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    | os.environ
    | allocator
    | {"TOKENIZERS_PARALLELISM": "false"},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    check=False,
  )
  (folder / f"{side}.log").write_text(process.stdout)
  if not out.exists():
    return {"failed": process.stdout.strip().splitlines()[-1:] or [f"exit {process.returncode}"]}
  return json.loads(out.read_text()) | {"process_seconds": time.perf_counter() - start}


def chat_file(args: argparse.Namespace) -> pathlib.Path:
  """Returns the file of the data's pairs as messages, written once."""
  from dpojax.data import tokenization
  from experiments import chat_pairs, sweep

  longest_prompt = args.longest_prompt or args.max_length // 2
  path = args.out / f"chat_{args.max_length}_{longest_prompt}_{args.answer_tokens}_{args.pairs}.jsonl"
  if not path.exists():
    tokenizer = tokenization.load_tokenizer(args.model)
    longest = dict(longest_prompt=longest_prompt, longest=args.max_length)
    records = chat_pairs.read(args.data, tokenizer, args.out / "cache", **longest)[0]
    records = records[: args.pairs or None]  # a stored reference is of all that is read
    if args.answer_tokens:
      records = chat_pairs.lengthened(records, tokenizer, args.answer_tokens)
    sweep.write_lines(path, records)
  return path


def same_trajectory(args: argparse.Namespace, settings: dict) -> None:
  """Runs the trajectory of both sides on the shortest pairs, and writes and prints how far they are apart."""
  from dpojax.data import tokenization
  from experiments import chat_pairs, sweep
  from experiments.benchmark import trajectory

  longest = args.trajectory_length
  path = args.out / f"short_{longest}.jsonl"
  if not path.exists():
    tokenizer = tokenization.load_tokenizer(args.model)
    short = dict(longest_prompt=longest, longest=longest)
    sweep.write_lines(path, chat_pairs.read(args.data, tokenizer, args.out / "cache", **short)[0])
  given = settings | {
    "path": str(path),
    "steps": args.trajectory_steps,
    "batch_size": args.trajectory_batch,
    "max_length": 2 * longest,  # nothing is cut: a prompt may have half of it
    "row_length": max(3 * longest, 256),
  }
  # On an accelerator JAX multiplies float32 at less than its precision unless it is asked to; torch does not.
  exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  side = lambda name, settings, folder: run_side(name, settings, folder, exact)
  text = trajectory.table(trajectory.run(given, args.out / "trajectory", side), settings["beta"])
  (args.out / "trajectory.md").write_text(text)
  print(text, flush=True)


def matmul_rate() -> float:
  """Returns the machine's own rate in FLOP/s: the best of several large float32 products."""
  code = (
    "import jax, jax.numpy as jnp, time\n"
    "dtype = jnp.bfloat16 if jax.default_backend() == 'gpu' else jnp.float32\n"
    "n = 8192 if jax.default_backend() == 'gpu' else 2048\n"
    "x = jax.random.normal(jax.random.key(0), (n, n), dtype)\n"
    "f = jax.jit(lambda a, b: a @ b); f(x, x).block_until_ready()\n"
    "times = []\n"
    "for _ in range(10):\n"
    "  start = time.perf_counter(); f(x, x).block_until_ready()\n"
    "  times.append(time.perf_counter() - start)\n"
    "print(2 * n**3 / sorted(times)[5])\n"
  )
  return float(
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
  )


def main():
  import jax

  from dpojax.plan import needs
  from experiments.benchmark import inputs, report

  args = parse()
  jax.config.update("jax_platforms", "cpu")  # of this process: the sides need the GPU for themselves
  args.out.mkdir(parents=True, exist_ok=True)
  case = CASES[args.case]
  settings = {
    "beta": 0.1,
    "learning_rate": 1e-5,
    "dtype": "float32",
    "source": "hh",
    "path": args.data,
    "tokenizer": args.tokenizer or args.model,
    "batch_size": args.batch_size,
    "max_length": args.max_length,
    "row_length": args.row_length,
    "rows_at_once": args.rows_at_once,
    "scan_layers": args.scan_layers,
    "chunk_size": args.chunk_size,
    "remat": args.remat,
    "threads": args.threads,
    "steps": args.steps,
    "cache": str(args.out / "cache"),
    "model": args.model or str(args.out / f"model-{args.case}"),
  } | case
  if args.case == "smollm2":
    if not args.model:
      sys.exit("error: --case=smollm2 needs --model=FOLDER; python -m dpojax.models.from_gguf makes one")
    settings |= {"source": "jsonl", "path": str(chat_file(args))}
    if args.trajectory_steps:
      same_trajectory(args, settings)
  if not args.rounds:
    return
  model = inputs.make_model(settings, pathlib.Path(settings["model"]))
  batches = inputs.make_loader(inputs.run_config(settings))
  settings |= inputs.write_pairs(settings, batches, args.out)

  sides, allocator = args.sides.split(","), {} if args.as_installed else KEEP_MEMORY
  micros = [int(each) for each in args.micro.split(",")]
  chosen, results = {}, {side: [] for side in sides}
  for round_ in range(args.rounds):
    for side in sides:
      peer = not side.startswith("dpojax")
      tried = [settings]
      if peer:
        tried = [
          settings | {"steps": args.peer_steps, "micro": micro}
          for micro in (micros if side not in chosen else [chosen[side]])
        ]
      best = None
      for each in tried:
        result = run_side(side, each, args.out, allocator) | {"micro": each.get("micro")}
        if "failed" in result:
          print(f"round {round_ + 1} {side} {each.get('micro')}: {result['failed']}", flush=True)
          continue
        rate = args.batch_size / statistics.median(report.counted_seconds(side, result))
        print(
          f"round {round_ + 1} {side} part {each.get('micro')}: {rate:.2f} pairs/s, "
          f"{result['peak_bytes'] / 2**30:.2f} GiB, losses {result['losses'][:2]}",
          flush=True,
        )
        if best is None or rate > best[0]:
          best = rate, each.get("micro"), result
      if best is not None:
        chosen[side] = best[1]
        results[side].append(best[2])
  lengths = batches.lengths[batches.plan(0).index[: args.steps].ravel()]
  summary = {
    "case": args.case,
    "settings": {k: v for k, v in settings.items() if not str(v).startswith("/")},
    "date": time.strftime("%Y-%m-%d"),
    "python": platform.python_version(),
    "matmul_flops": matmul_rate(),
    "results": results,
    "tokens_per_pair": float(np.mean(2 * lengths[:, 0] + lengths[:, 1:].sum(1))),
    "flops": {
      side: args.batch_size * needs.necessary_flops(model, lengths, 3 if side.endswith("stored") else 4)
      for side in sides
    },
  }
  (args.out / f"{args.case}.json").write_text(json.dumps(summary, indent=1))
  print(report.write(summary, args.out))


if __name__ == "__main__":
  main()
