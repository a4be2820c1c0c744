"""Time and memory of ten million comparisons: prepared, tokenized, planned, and taken up again.

python -m experiments.measurements.data_scale --tokenizer=FOLDER --workdir=DIR [--comparisons=10000000]
python -m experiments.measurements.data_scale --workdir=DIR [--comparisons=10000000]

Comparisons are made up, 12 words each. Every stage runs in a process of its own, whose peak is what it holds
besides the files it maps (private memory, as the system counts it); `again` is a start that finds all of it
made, up to batches in the middle of an epoch, and `host` the same on one of eight hosts, which reads its own
rows alone. Without a tokenizer ids are made up, as long as those of such words, and what comes before them is
left out: an hour of ten.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np

from dpojax.data import builders, loader, tokenization, tokenized

OF_IDS = ("planned", "again", "host")
STAGES = ("made", "prepared", "tokenized", "made_ids", *OF_IDS)
HOSTS = 8
WORDS = 4096


def make(path: pathlib.Path, count: int) -> None:
  """Writes a file of made-up comparisons; prompts recur now and then, as they do in real ones."""
  rng = np.random.default_rng(0)
  words = np.array(["".join(map(chr, 97 + rng.integers(26, size=rng.integers(2, 8)))) for _ in range(WORDS)])
  with open(path, "w") as file:
    for start in range(0, count, 100_000):
      size = min(100_000, count - start)
      prompts = rng.integers(WORDS, size=(size, 4))
      prompts[rng.random(size) < 0.1] = prompts[0]
      answers = rng.integers(WORDS, size=(size, 2, 4))
      for prompt, (chosen, rejected) in zip(words[prompts], words[answers]):
        record = {
          "prompt": " ".join(prompt),
          "chosen": " " + " ".join(chosen),
          "rejected": " " + " ".join(rejected),
        }
        file.write(json.dumps(record) + "\n")


def stage(name: str, options: argparse.Namespace) -> None:
  """Does one stage; those before it are found done."""
  folder = pathlib.Path(options.workdir)
  path = folder / "comparisons.jsonl"
  if not options.tokenizer:
    if not (folder / "ids").exists():
      make_ids(folder / "ids", options.comparisons)
    read(name, tokenized.load(folder / "ids"))
    return
  if name == "made":
    make(path, options.comparisons)
    return
  comparisons = builders.prepare("jsonl", path=str(path), data_dir=folder / "prepared")
  if name == "prepared":
    return
  data = tokenization.tokenize(
    comparisons,
    tokenization.load_tokenizer(options.tokenizer),
    truncation=tokenization.Truncation(64, 32, "end"),
    num_responses=2,
    cache_dir=folder / "tokenized",
  )
  read(name, data)


def make_ids(folder: pathlib.Path, count: int) -> None:
  """Writes a tokenized data set of made-up ids."""
  rng = np.random.default_rng(0)
  with tokenized.unfinished(folder) as path:
    ids, lengths, prompts = tokenized.Growing(np.int32, path / "ids.npy"), [], []
    for start in range(0, count, 100_000):
      lengths.append(rng.integers(8, 18, size=(min(100_000, count - start), 3), dtype=np.int32))
      values = rng.integers(50_000, size=lengths[-1].sum(), dtype=np.int32)
      first = lengths[-1].sum(axis=1).cumsum() - lengths[-1].sum(axis=1)
      prompts.append(
        tokenized.prompt_digests(values[at : at + size] for at, size in zip(first, lengths[-1][:, 0]))
      )
      ids.append(values)
    ids, lengths = ids.finish(), np.concatenate(lengths)
    made = tokenized.arrays(
      lengths,
      ids,
      ids,
      np.arange(count, dtype=np.int32),
      {},
      scored_count=int(lengths[:, 1:].sum(dtype=np.int64)),
      prompts=np.concatenate(prompts),
    )
    tokenized.write(made, path, folder)


def read(name: str, data: tokenized.Tokenized) -> None:
  """Does a stage of comparisons in ids."""
  if name not in OF_IDS:
    return
  train, _ = loader.hold_out(loader.all_of(data), 1000)
  span = {"host": lambda rows: (rows // HOSTS, rows // HOSTS)}.get(name, lambda rows: (0, rows))
  batches = loader.Loader(train, seed=0, batch_size=64, row_length=512, shards=HOSTS, span=span)
  batches.plan()
  if name == "planned":
    return
  for _ in batches.training(batches.steps_per_epoch // 2, batches.steps_per_epoch // 2 + 8):
    pass


def measured(name: str, options: argparse.Namespace) -> dict[str, float]:
  """Returns seconds and the largest private memory, in MiB, of a stage and the processes it starts."""
  command = [sys.executable, "-m", "experiments.measurements.data_scale", f"--stage={name}", *sys.argv[1:]]
  start = time.perf_counter()
  process = subprocess.Popen(command)
  most = [0.0]

  def watch():
    while process.poll() is None:
      most[0] = max(most[0], sum(map(private_mib, [process.pid, *children(process.pid)])))
      time.sleep(0.2)

  watcher = threading.Thread(target=watch)
  watcher.start()
  code = process.wait()
  watcher.join()
  if code:
    raise SystemExit(f"{name} ended with {code}")
  return {"seconds": time.perf_counter() - start, "private_mib": most[0]}


def children(pid: int) -> list[int]:
  """Returns the processes that a process has started."""
  try:
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
  except OSError:
    return []
  return [int(each) for each in text.split()]


def private_mib(pid: int) -> float:
  """Returns the memory of a process that is no file's, in MiB; 0 when it is gone."""
  try:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  except OSError:
    return 0.0
  return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**10


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokenizer", default="", help="without one ids are made up")
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--comparisons", type=int, default=10_000_000)
  parser.add_argument("--stage", default="", choices=["", *STAGES])
  options = parser.parse_args()
  if options.stage:
    stage(options.stage, options)
    return
  folder = pathlib.Path(options.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  results = folder / "results.json"
  found = json.loads(results.read_text()) if results.exists() else {}
  for name in STAGES[STAGES.index("made_ids") :] if not options.tokenizer else STAGES:
    if options.tokenizer and name == "made_ids":
      continue
    if name not in found:
      found[name] = measured(name, options)
      results.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name:10} {found[name]['seconds']:8.1f} s  {found[name]['private_mib']:8.0f} MiB", flush=True)


if __name__ == "__main__":
  main()
