"""All experiments of the paper that a CPU can run, as many side by side as there are cores.

python -m experiments.suite --sentences=FILE --pairs=FILE [--workdir=runs/suite] [--jobs=N]

Each one continues where it was killed and is skipped where it is finished; the pictures and tables
are drawn again. What an experiment prints goes into NAME.log, its tables here as well, with the time
it took. Where one fails the others of its chain are left out, and the same command continues.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
from typing import Sequence


def chains(workdir: pathlib.Path, sentences: str, pairs: str) -> list[list[list[str]]]:
  """Returns the experiments, of each its arguments with its module first; those of a chain need the earlier."""
  text = [f"--workdir={workdir / 'sentiment'}", f"--sentences={sentences}"]
  return [
      [["frontier", "--world=sentiment", *text],
       ["training_curve", f"--workdir={workdir / 'sentiment'}"],
       ["best_of_n", *text],
       ["win_rate", *text]],
      [["frontier", "--world=enumerable", f"--workdir={workdir / 'enumerable'}"]],
      [["loss_ablation", f"--workdir={workdir / 'loss_ablation'}"]],
      [["beta_ablation", f"--workdir={workdir / 'beta_ablation'}", f"--pairs={pairs}"]]]


def run_chain(chain: Sequence[Sequence[str]], workdir: pathlib.Path, cores: "Cores") -> list[str]:
  """Runs the experiments of a chain; returns the one that failed, if one did."""
  with cores.some():
    for name, *arguments in chain:
      label = "_".join([name, *(value for key, _, value in (a.partition("=") for a in arguments)
                                if key == "--world")])
      log, start = workdir / f"{label}.log", time.monotonic()
      print(f"== {label} has started: {log}", flush=True)
      with open(log, "w") as file:
        failed = subprocess.run([sys.executable, "-m", f"experiments.{name}", *arguments],
                                stdout=file, stderr=subprocess.STDOUT, check=False).returncode
      lines = log.read_text().splitlines()
      shown = lines[-5:] if failed else [line for line in lines if line.startswith("|")]
      print(f"== {label} {'failed after' if failed else 'took'} {(time.monotonic() - start) / 60:.1f} "
            "minutes", *shown, sep="\n", flush=True)
      if failed:
        return [label]
  return []


class Cores:
  """Cores shared out among jobs: a program of small arrays is faster on one of its own."""

  def __init__(self, jobs: int):
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    self._free = [every[i::jobs] for i in range(jobs)]

  def some(self):
    """Returns a context in which this thread, and what it starts, has a share of its own."""
    return _Share(self._free)


