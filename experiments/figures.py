"""How the pictures look: readable in print, one marker and shade a curve, errors shown."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.measurements import measure

SHADES = (
  "#0b3c5d",
  "#d9822b",
  "#3a8f5c",
  "#8e3b6f",
  "#555555",
  "#b03a2e",
  "#2e86c1",
  "#7d6608",
  "#117a65",
  "#a569bd",
)
MARKERS = "osD^vP*X<>"

AGAINST_AXIS = (
  ("eval", "loss", "held-out loss"),
  ("eval", "rewards/accuracies", "held-out accuracy"),
  ("eval", "rewards/margins", "held-out margin"),
  ("eval", "log_ratios/chosen", "log-ratio of chosen, nats"),
  ("eval", "log_ratios/rejected", "log-ratio of rejected, nats"),
  ("measured", "kl", "KL to the reference, nats"),
  ("measured", "reward", "true reward"),
  ("train", "loss", "training loss"),
  ("train", "rewards/margins", "training margin"),
)
"""(split, metric, name) of what is drawn against the axis of a sweep, as far as a table has it."""


class Spread(NamedTuple):
  """Mean over seeds and its standard error, [values] each."""

  values: np.ndarray
  mean: np.ndarray
  error: np.ndarray


def style(number: int) -> dict:
  """Returns marker and shade of the n-th curve."""
  return dict(marker=MARKERS[number % len(MARKERS)], color=SHADES[number % len(SHADES)])


def panels(count: int, *, columns: int = 3, size: tuple[float, float] = (3.7, 2.9)):
  """Returns a figure and its `count` axes, with a light grid."""
  columns = min(columns, count)
  rows = -(-count // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(size[0] * columns, size[1] * rows), dpi=150, squeeze=False
  )
  for panel in axes.flat[count:]:
    panel.set_visible(False)
  for panel in axes.flat[:count]:
    panel.grid(alpha=0.3)
  return figure, list(axes.flat[:count])


def save(figure, path: pathlib.Path) -> None:
  """Writes the picture and lets go of it."""
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


def last_lines(table: Sequence[dict], split: str) -> list[dict]:
  """Returns each member's last line of a split."""
  last = {}
  for line in table:
    if line["split"] == split:
      last[line["member"]] = line
  return list(last.values())


def over_seeds(lines: Sequence[dict], axis: str, metric: str) -> Spread:
  """Returns a metric by value of the axis, over seeds; the error of a single seed is nan."""
  values = sorted({line[axis] for line in lines})
  of = [
    measure.mean_and_error([line[metric] for line in lines if line[axis] == value and metric in line])
    for value in values
  ]
  return Spread(np.array(values), *np.transpose(of))


def show_against(table: Sequence[dict], axis: str, shown: Sequence[tuple[str, str, str]]) -> None:
  """Prints means and standard errors over seeds, a line a value of the axis.

  Args:
    table: lines of a sweep.
    axis: its key.
    shown: split, metric and heading of each column.
  """
  columns = [over_seeds(last_lines(table, split), axis, metric) for split, metric, _ in shown]
  print(f"\n| {axis} | " + " | ".join(name for *_, name in shown) + " |\n|---|" + "---|" * len(shown))
  for i, value in enumerate(columns[0].values):
    print(f"| {value:g} | " + " | ".join(f"{c.mean[i]:.3f} +- {c.error[i]:.3f}" for c in columns) + " |")


def against_axis(table: Sequence[dict], axis: str, path: pathlib.Path) -> None:
  """Draws the last step's metrics of a sweep against its axis, with the error over seeds."""
  there = [(last_lines(table, split), metric, name) for split, metric, name in AGAINST_AXIS]
  there = [each for each in there if each[0] and all(each[1] in line for line in each[0])]
  figure, axes = panels(len(there))
  for number, (panel, (lines, metric, name)) in enumerate(zip(axes, there)):
    spread = over_seeds(lines, axis, metric)
    error = np.where(np.isnan(spread.error), 0, spread.error)
    panel.errorbar(spread.values, spread.mean, yerr=error, capsize=2, markersize=4, **style(number))
    panel.set_xscale("log")
    panel.set_xlabel(axis)
    panel.set_ylabel(name)
  save(figure, path)
