"""All experiments of the paper that a CPU can run, one after another.

python -m experiments.suite --sentences=FILE --pairs=FILE [--workdir=runs/suite]

Each one continues where it was killed and is skipped where it is finished; the pictures and tables
are drawn again. Prints how long each took, and stops at the first that fails.
"""

import argparse
import pathlib
import subprocess
import sys
import time


def commands(workdir: pathlib.Path, sentences: str, pairs: str) -> list[list[str]]:
  """Returns the arguments of each experiment, its module first."""
  text = [f"--workdir={workdir / 'sentiment'}", f"--sentences={sentences}"]
  return [
      ["frontier", "--world=enumerable", f"--workdir={workdir / 'enumerable'}"],
      ["frontier", "--world=sentiment", *text],
      ["training_curve", f"--workdir={workdir / 'sentiment'}"],
      ["best_of_n", *text],
      ["win_rate", *text],
      ["beta_ablation", f"--workdir={workdir / 'beta_ablation'}", f"--pairs={pairs}"],
      ["loss_ablation", f"--workdir={workdir / 'loss_ablation'}"]]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/suite"))
  parser.add_argument("--sentences", required=True)
  parser.add_argument("--pairs", required=True)
  arguments = parser.parse_args()
  for path in (arguments.sentences, arguments.pairs):
    if not pathlib.Path(path).exists():
      sys.exit(f"error: {path} is not there; give files of sentences and of pairs")
  for name, *rest in commands(arguments.workdir.absolute(), arguments.sentences, arguments.pairs):
    start = time.monotonic()
    print(f"== {name} {' '.join(rest)}", flush=True)
    result = subprocess.run([sys.executable, "-m", f"experiments.{name}", *rest], check=False)
    print(f"== {name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    if result.returncode:
      sys.exit(f"error: {name} failed; mend what it says, and the same command continues")


if __name__ == "__main__":
  main()
