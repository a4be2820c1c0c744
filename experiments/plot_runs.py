"""Draws metrics of several runs against their steps, training thin and held-out bold.

python -m experiments.plot_runs OUT.png RUN [RUN ...] [--metrics loss rewards/accuracies ...]
"""

import argparse
import pathlib
import sys

import matplotlib

from dpojax.training.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0b3c5d", "#d9822b", "#3a8f5c", "#8e3b6f", "#555555")


def plot(out: pathlib.Path, runs: list[pathlib.Path], metrics: list[str]) -> None:
  """Writes a picture with one panel a metric and one colour a run."""
  figure, panels = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 3.0), dpi=150, squeeze=False)
  for axes, metric in zip(panels[0], metrics):
    for run, colour in zip(runs, COLOURS):
      for split, style in (
        ("train", dict(linewidth=0.9, alpha=0.6)),
        ("eval", dict(linewidth=2.0, marker="o", markersize=3.5)),
      ):
        points = [
          (line["step"], line[metric])
          for line in read_metrics(run)
          if line["split"] == split and metric in line
        ]
        if points:
          label = f"{run.name}, {'held out' if split == 'eval' else 'training'}"
          axes.plot(*zip(*points), color=colour, label=label, **style)
    axes.set_xlabel("step")
    axes.set_title(metric, fontsize=10)
    axes.grid(alpha=0.3)
  panels[0][0].legend(frameon=False, fontsize=7)
  figure.tight_layout()
  figure.savefig(out)
  plt.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("runs", type=pathlib.Path, nargs="+")
  parser.add_argument("--metrics", nargs="+", default=["loss", "rewards/accuracies", "rewards/margins"])
  arguments = parser.parse_args()
  for run in arguments.runs:
    if not read_metrics(run):
      sys.exit(f"error: {run} has no metrics.jsonl; name the workdir of a run")
  plot(arguments.out, arguments.runs, arguments.metrics)


if __name__ == "__main__":
  main()
