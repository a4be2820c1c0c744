"""Every pairwise loss in the enumerable world, at matched KL: how much of the best reward it finds.

python -m experiments.paper.loss_ablation --workdir=runs/loss_ablation

Each loss is trained at several strengths of its own knob, side by side, on the same comparisons, with the
same learning rate and steps. Beta means something else to every loss, so losses are compared where they
are as far from the reference: the share of the best reward is read off at the same KL, between a loss's
own points. Writes losses.jsonl and losses.png.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax import losses
from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure
from experiments.paper import enumerable, methods
from experiments.paper.methods import Line, World

BETAS = (0.1, 0.3, 1.0, 3.0)
KLS = (0.1, 0.3, 1.0)


class Swept(NamedTuple):
  """How a loss is trained: the knob that is swept, its values, and what else it is given."""

  axis: str = "beta"
  values: tuple[float, ...] = BETAS
  changes: dict[str, Any] = {}


SWEPT = {name: Swept() for name in (*losses.PAIRWISE_LOSSES, "aot", "aot_unpaired")} | {
  "robust_dpo": Swept(changes={"loss_options.label_smoothing": 0.1}),
  "exo_pair": Swept(changes={"loss_options.label_smoothing": 1e-3}),
  "odpo": Swept(changes={"loss_options.margin": 0.5}),
  "beta_dpo": Swept(),
  "mappo": Swept(changes={"loss_options.gap": 0.5}),
  "h_dpo": Swept(changes={"loss_options.alpha": 0.9}),
  "r_dpo": Swept(changes={"loss_options.alpha": 0.02}),
  "tdpo1": Swept(),
  "tdpo2": Swept(),
  "epsilon_dpo": Swept(),
  "simpo": Swept(values=(1.0, 2.0, 4.0, 8.0), changes={"loss_options.gamma": 0.5, "reference.mode": "none"}),
  "alphapo": Swept(
    values=(1.0, 2.0, 4.0, 8.0),
    changes={"loss_options.gamma": 0.1, "loss_options.alpha": 0.25, "reference.mode": "none"},
  ),
  "cpo": Swept(changes={"reference.mode": "none"}),
  "orpo": Swept(
    "loss_options.weight", (0.1, 0.5, 1.0, 4.0), {"reference.mode": "none", "loss_options.weight": 1.0}
  ),
  "unlikelihood": Swept(
    "loss_options.alpha", (0.05, 0.1, 0.5, 1.0), {"reference.mode": "none", "loss_options.alpha": 1.0}
  ),
}
"""Every loss between two responses but XPO, whose pairs are of samples. The steps, batches and learning rate
are those of the world."""


def run(world: World, names: Sequence[str], changes: dict[str, Any], *, seeds: Sequence[int]) -> list[Line]:
  """Trains the losses with these names; returns where each run ended."""
  lines = []
  for name in names:
    swept = SWEPT[name]
    lines += methods.trained(
      world,
      name,
      {"loss": name} | swept.changes | changes,
      seeds=seeds,
      axis=swept.axis,
      values=swept.values,
      at_once=len(swept.values),
      kind=f"loss_{name}",
    )
  return methods.final(lines)


def share_at(points: Sequence[Line], kl: float, best: Callable[[float], float]) -> float:
  """Returns the share of the best reward that a loss finds at a KL; nan where it was not on both sides of it.

  Between two points of the loss it is their shares that are drawn straight, each of the best at its own KL:
  a line between the rewards would fall below a frontier that bends, even for a loss that lies on it.
  """
  ordered = sorted((point["kl"], point["reward"] / best(point["kl"])) for point in points)
  kls, shares = np.transpose(ordered) if ordered else ((), ())
  return float(np.interp(kl, kls, shares)) if len(kls) and kls[0] <= kl <= kls[-1] else float("nan")


def show(lines: Sequence[Line], table: enumerable.Table) -> None:
  """Prints for every loss the share of the best reward at each KL, over seeds."""
  best = lambda kl: enumerable.best_reward(table, kl)
  print(
    "\n| loss | KL of its runs, nats | " + " | ".join(f"share of the best at KL {kl:g}" for kl in KLS) + " |"
  )
  print("|---|---|" + "---|" * len(KLS))
  for name in dict.fromkeys(line["method"] for line in lines):
    ours = [line for line in lines if line["method"] == name]
    kls = [line["kl"] for line in ours]
    cells = []
    for kl in KLS:
      shares = [
        share_at([line for line in ours if line["seed"] == seed], kl, best)
        for seed in sorted({line["seed"] for line in ours})
      ]
      mean, error = measure.mean_and_error(shares)
      cells.append(
        "not reached" if np.isnan(mean) else f"{mean:.3f}" + ("" if np.isnan(error) else f" +- {error:.3f}")
      )
    print(f"| `{name}` | {min(kls):.2f} to {max(kls):.2f} | " + " | ".join(cells) + " |")


def plot(lines: Sequence[Line], table: enumerable.Table, path: pathlib.Path) -> None:
  """Draws the losses' points in panels of four, each with the optimum."""
  names = list(dict.fromkeys(line["method"] for line in lines))
  groups = [names[i : i + 4] for i in range(0, len(names), 4)]
  reward, kl = np.transpose(
    [enumerable.reward_and_kl(table, enumerable.optimum(table, beta)) for beta in np.geomspace(0.2, 100, 100)]
  )
  figure, axes = figures.panels(len(groups), columns=3)
  for panel, group in zip(axes, groups):
    panel.plot(kl, reward, color="black", linewidth=1)
    for number, name in enumerate(group):
      points = sorted((line["kl"], line["reward"]) for line in lines if line["method"] == name)
      panel.plot(*np.transpose(points), markersize=3, linewidth=0.8, label=name, **figures.style(number))
    panel.set_xlim(0, kl.max())
    panel.set_xlabel("KL to the reference, nats")
    panel.set_ylabel("true reward")
    panel.legend(frameon=False, fontsize=6)
  figures.save(figure, path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/loss_ablation"))
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--seeds", default="0")
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  with command(folder):
    world, table = enumerable.make(folder)
    lines = run(
      world,
      list(SWEPT),
      {"steps": arguments.steps, "log_every": 100},
      seeds=[int(seed) for seed in arguments.seeds.split(",")],
    )
    sweep.write_lines(folder / "losses.jsonl", lines)
    plot(lines, table, folder / "losses.png")
  show(lines, table)
  print(f"\nwritten: {folder}/losses.jsonl and losses.png")


if __name__ == "__main__":
  main()
