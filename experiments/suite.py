"""All experiments of the paper that a CPU can run, as many side by side as there are cores.

python -m experiments.suite --sentences=FILE --pairs=FILE [--workdir=runs/suite] [--jobs=N]
python -m experiments.suite --real --sentences=FILE --pairs=FILE [--model=FOLDER] [...]

With --real what users ask about instead: beta and displacement on a published model, SmolLM2-135M-Instruct
from its package or any folder with a chat template, the second quickstart, and overoptimization; beta comes
last, on all cores. Each one continues where it was killed and is skipped where it is finished; the pictures
and tables are drawn again. What an experiment prints goes into NAME.log, its tables here as well, with the
time it took. Where one fails the others of its chain are left out, and the same command continues.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from dpojax.runtime.command import command
from dpojax.runtime.disk import disk_errors
from experiments import smollm2
from experiments.command import folder_argument


def chains(workdir: pathlib.Path, sentences: str, pairs: str) -> list[list[list[str]]]:
  """Returns the experiments, of each its module and arguments; those of a chain need the earlier."""
  text = [f"--workdir={workdir / 'sentiment'}", f"--sentences={sentences}"]
  return [
    [
      ["paper.frontier", "--world=sentiment", *text],
      ["paper.training_curve", f"--workdir={workdir / 'sentiment'}"],
      ["paper.best_of_n", *text],
      ["paper.win_rate", *text, f"--pairs={pairs}"],
    ],
    [["paper.frontier", "--world=enumerable", f"--workdir={workdir / 'enumerable'}"]],
    [["paper.loss_ablation", f"--workdir={workdir / 'loss_ablation'}"]],
    [["paper.beta_ablation", f"--workdir={workdir / 'beta_ablation'}", f"--pairs={pairs}"]],
  ]


def real_chains(workdir: pathlib.Path, sentences: str, pairs: str, model: str) -> list[list[list[str]]]:
  """Returns what is asked about real weights, and overoptimization, as `chains` does."""
  given = [f"--pairs={pairs}", f"--model={model}"]
  return [
    [["paper.overoptimization", f"--workdir={workdir / 'overoptimization'}", f"--sentences={sentences}"]],
    [
      ["smollm2", f"--workdir={workdir / 'smollm2'}", *given],
      ["paper.displacement", f"--workdir={workdir / 'displacement'}", f"--model={model}"],
    ],
  ]


def longest_of_real(workdir: pathlib.Path, pairs: str, model: str) -> list[list[list[str]]]:
  """Returns beta, which takes longer than all others: on one core it would be waited for by the rest."""
  given = [f"--pairs={pairs}", f"--model={model}"]
  return [[["paper.beta_real", f"--workdir={workdir / 'beta_real'}", *given]]]


def run_chain(chain: Sequence[Sequence[str]], workdir: pathlib.Path) -> str:
  """Runs the experiments of a chain; returns the one that failed, or nothing."""
  for name, *arguments in chain:
    world = [value for key, _, value in (each.partition("=") for each in arguments) if key == "--world"]
    label = "_".join([name.rpartition(".")[2], *world])
    log, start = workdir / f"{label}.log", time.monotonic()
    print(f"== {label} has started: {log}", flush=True)
    with open(log, "w") as file:
      failed = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        stdout=file,
        stderr=subprocess.STDOUT,
        check=False,
      ).returncode
    lines = log.read_text().splitlines()
    print(
      f"== {label} {'failed after' if failed else 'took'} {(time.monotonic() - start) / 60:.1f} minutes",
      *(lines[-5:] if failed else [line for line in lines if line.startswith("|")]),
      sep="\n",
      flush=True,
    )
    if failed:
      return label
  return ""


def run_chains(todo: list[list[list[str]]], workdir: pathlib.Path, cores: list[int], jobs: int) -> list[str]:
  """Runs chains side by side, each on its share of the cores; returns what failed."""
  jobs = min(jobs, len(todo))
  shares = [cores[i::jobs] for i in range(jobs)]
  with concurrent.futures.ThreadPoolExecutor(jobs, initializer=take_share, initargs=(shares,)) as pool:
    return list(filter(None, pool.map(lambda chain: run_chain(chain, workdir), todo)))


def take_share(shares: list[list[int]]) -> None:
  """Keeps this thread, and what it starts, to a share of the cores: small arrays are fastest on one."""
  if share := shares.pop():
    os.sched_setaffinity(0, share)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/suite"))
  parser.add_argument("--sentences", required=True)
  parser.add_argument("--pairs", required=True)
  parser.add_argument("--real", action="store_true", help="what is asked about real weights, and no others")
  parser.add_argument("--model", default="", help="with --real: a folder; by default made of the package")
  parser.add_argument("--jobs", type=int, default=0, help="chains at once; 0: one a core")
  arguments = parser.parse_args()
  for path in (arguments.sentences, arguments.pairs):
    if not pathlib.Path(path).exists():
      sys.exit(f"error: {path} is not there; give files of sentences and of pairs")
  workdir = arguments.workdir.absolute()
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  jobs = arguments.jobs or len(cores) or os.cpu_count()
  start = time.monotonic()
  with disk_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  if arguments.real:
    with command():
      model = arguments.model or smollm2.model_folder(workdir / "model")
    failed = run_chains(
      real_chains(workdir, arguments.sentences, arguments.pairs, model), workdir, cores, jobs
    )
    failed += run_chains(longest_of_real(workdir, arguments.pairs, model), workdir, cores, jobs)
  else:
    failed = run_chains(chains(workdir, arguments.sentences, arguments.pairs), workdir, cores, jobs)
  print(f"== all took {(time.monotonic() - start) / 60:.1f} minutes")
  if failed:
    sys.exit(f"error: {', '.join(failed)} failed; mend what the log says, and the same command continues")


if __name__ == "__main__":
  main()
