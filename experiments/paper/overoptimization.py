"""Does the true reward fall again as the policy leaves the reference, and by which law?

python -m experiments.paper.overoptimization --workdir=runs/overoptimization --sentences=FILE
    [--sizes=32x1,64x2,128x3] [--losses=dpo,ipo,hinge]
    [--learning_rate=2e-3] [--make_only] [--small]

After Rafailov et al. 2024 (arXiv 2406.02900): losses, betas and model sizes (width x layers) in the
sentiment world, each run measured along one epoch, in which a pair is seen once at most (a completion
stands in up to three pairs). To the gain over the reference against d = sqrt(KL) the law
R(d) = d (a - b log d) is fitted, a loss and a size at a time. Every size has a reference of its own, trained
on the same sentences for as many steps, and pairs of its own samples; one classifier labels all of them and
is the true reward. All sizes and losses have one learning rate.

A size and a loss are a stage in a folder of their own, and a process may be given some of them, as
`--sizes=64x2 --losses=ipo`: processes share the workdir, and the world of a size is made by the first that
needs it (--make_only makes the worlds and trains nothing). A killed run goes on. Writes
overoptimization.jsonl and overoptimization.png of all stages that are finished, and prints tables of them.
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpojax.runtime.errors import ConfigError
from dpojax.runtime.ownership import owned
from dpojax.training.metrics import read_metrics
from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure
from experiments.paper import methods, sentiment
from experiments.paper.methods import Line

LOSSES = ("dpo", "ipo", "hinge")
SIZES = "32x1,64x2,128x3"


class Plan(NamedTuple):
  """What every stage trains and measures.

  Attributes:
    text: the world's sizes but for width and layers; its `dpo_steps` are not used, an epoch is trained.
    betas, seeds: of the runs; a seed is the order of the pairs, and of the samples that measure.
    looks: measurements along the epoch behind the one at its start.
    learning_rate: of all.
    at_once: runs side by side; 0 is all of a stage.
  """

  text: sentiment.Sizes = sentiment.Sizes(
    vocabulary=600,
    sft_steps=300,
    prefixes=1000,
    held_out_pairs=64,
    held_out=128,
    samples=4,
    max_new_tokens=12,
    batch_size=32,
  )
  betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.25, 0.5, 1.0)
  seeds: tuple[int, ...] = (0, 1)
  looks: int = 10
  learning_rate: float = 2e-3
  at_once: int = 0


SMALL = Plan(
  sentiment.Sizes(
    vocabulary=320,
    sft_steps=20,
    prefixes=80,
    held_out_pairs=8,
    held_out=16,
    samples=4,
    max_new_tokens=8,
    batch_size=16,
  ),
  betas=(0.01, 0.5),
  looks=4,
  learning_rate=3e-3,
)
"""A smoke test."""


class Size(NamedTuple):
  """A model's."""

  width: int
  layers: int

  def __str__(self):
    return f"{self.width}x{self.layers}"


def size_of(text: str) -> Size:
  """Returns the size of "WIDTHxLAYERS".

  Raises:
    ConfigError: it is none.
  """
  width, _, layers = text.partition("x")
  if not (width.isdecimal() and layers.isdecimal() and int(width) % 4 == 0 < int(width) and int(layers)):
    raise ConfigError(f"size is {text!r}; give WIDTHxLAYERS, a width of two even heads, as in 64x2")
  return Size(int(width), int(layers))


def make_world(folder: pathlib.Path, sentences: str, size: Size, plan: Plan) -> sentiment.Made:
  """Returns a size's world; of several processes one at a time makes or reads it."""
  sizes = plan.text._replace(width=size.width, layers=size.layers)
  path = folder / str(size) / "world"
  with owned(path, f"the world of size {size}", wait=True):
    return sentiment.make(path, sentences, sizes)


def run(
  folder: pathlib.Path, sentences: str, plan: Plan, sizes: Sequence[Size], losses: Sequence[str]
) -> list[Line]:
  """Trains every loss at every size, as far as that is not done; returns their lines."""
  lines = []
  for size in sizes:
    for loss in losses:
      about = plan._asdict() | {"text": plan.text._asdict(), "size": str(size), "loss": loss}
      stage = lambda: _stage(folder, sentences, plan, size, loss)
      lines += methods.stage(folder / str(size) / loss, about, stage)
  return lines


def _stage(folder: pathlib.Path, sentences: str, plan: Plan, size: Size, loss: str) -> list[Line]:
  """Trains a loss at all betas and seeds; returns what was measured along it."""
  made = make_world(folder, sentences, size, plan)
  world = made.world._replace(folder=folder / str(size) / loss)
  pairs = len(world.data(world.config).train)
  batch = plan.text.batch_size
  steps = pairs // batch // plan.looks * plan.looks  # all of one epoch, less what would break the looks
  if not steps:
    raise ConfigError(f"{pairs} pairs are fewer than {plan.looks} batches of {batch}; take more prefixes")
  changes = {
    "loss": loss,
    "steps": steps,
    "optimizer.learning_rate": plan.learning_rate,
    "optimizer.warmup_steps": 10,
    "rows_at_once": 4,  # steps of any number of rows are one program
    # What is held out is not looked at: samples to prefixes of their own measure.
    "eval_every": 0,
    "log_every": steps // plan.looks,
    "checkpoint_every": steps // min(plan.looks, 4),
    "data.cache_dir": str(world.folder / "prepared"),  # of a process alone
  }
  *_, reference = (line for line in read_metrics(made.world.folder / "sft") if line["split"] == "eval")
  about = {
    "size": str(size),
    "loss": loss,
    "pairs": pairs,
    "seen": steps * batch,
    "steps": steps,
    "reference_loss": reference["loss"],
    "classifier": made.classifier.accuracy,
  }
  return [
    about | {"beta": line["setting"]} | {k: v for k, v in line.items() if k not in ("method", "setting")}
    for line in methods.trained(
      world,
      loss,
      changes,
      seeds=plan.seeds,
      values=plan.betas,
      measure_every=steps // plan.looks,
      at_once=plan.at_once,
      kind="runs",
    )
  ]


def finished(folder: pathlib.Path) -> list[Line]:
  """Returns the lines of all stages of a workdir that are finished, small models first."""
  stages = [path.parent for path in folder.glob("*x*/*/finished") if path.parent.name in LOSSES]
  stages.sort(key=lambda path: (size_of(path.parent.name), LOSSES.index(path.name)))
  return [line for path in stages for line in sweep.read_table(path)]


# The law.


class Fit(NamedTuple):
  """R(d) = d (a - b log d) as fitted, and how well.

  The errors of a and b are of a jackknife over runs, whose own points hang together; nan of a single run.
  """

  a: float
  b: float
  a_error: float
  b_error: float
  r_squared: float
  rmse: float

  def __call__(self, distances: Sequence[float]) -> np.ndarray:
    return law(distances, self.a, self.b)

  @property
  def hump(self) -> float:
    """The d at which the law is highest, exp(a / b - 1); nan where b is not positive and there is none."""
    exponent = self.a / self.b - 1 if self.b > 0 else math.nan
    return math.exp(exponent) if not exponent > 700 else math.inf


def law(distances: Sequence[float], a: float, b: float) -> np.ndarray:
  """Returns d (a - b log d) (Rafailov et al. 2024, after Gao et al. 2023), 0 at 0."""
  return _columns(distances) @ np.array([a, b])


def _columns(distances: Sequence[float]) -> np.ndarray:
  """[n, 2], what a and b are multiplied with."""
  distances = np.asarray(distances, np.float64)
  logs = np.log(distances, out=np.zeros_like(distances), where=distances > 0)
  return np.stack([distances, -distances * logs], axis=1)


def fit_law(distances: Sequence[float], gains: Sequence[float], runs: Sequence) -> Fit:
  """Fits the law by least squares.

  Args:
    distances: [n] sqrt(KL).
    gains: [n] true reward less the reference's.
    runs: [n], which run each is of.
  """
  columns, gains = _columns(distances), np.asarray(gains, np.float64)
  solve = lambda kept: np.linalg.lstsq(columns[kept], gains[kept], rcond=None)[0]
  a, b = solve(slice(None))
  names = list(dict.fromkeys(runs))
  without = np.array([solve([run != name for run in runs]) for name in names if len(names) > 1])
  errors = (
    np.sqrt((len(names) - 1) * np.mean((without - without.mean(axis=0)) ** 2, axis=0))
    if len(without)
    else (math.nan, math.nan)
  )
  residuals, spread = gains - columns @ [a, b], np.sum((gains - gains.mean()) ** 2)
  return Fit(
    float(a),
    float(b),
    *map(float, errors),
    float(1 - np.sum(residuals**2) / spread) if spread else math.nan,
    float(np.sqrt(np.mean(residuals**2))),
  )


class Points(NamedTuple):
  """A loss at a size, step 0 left out: lines, [n] sqrt(KL), [n] gain, the reference's reward, and the fit."""

  lines: list[Line]
  distances: np.ndarray
  gains: np.ndarray
  reference: float
  fit: Fit

  @property
  def residuals(self) -> np.ndarray:
    """[n], how far above the law."""
    return self.gains - self.fit(self.distances)


def points_of(lines: Sequence[Line]) -> dict[tuple[str, str], Points]:
  """Returns by size and loss what was measured, and the law that is fitted to it."""
  groups = {}
  for line in lines:
    groups.setdefault((line["size"], line["loss"]), []).append(line)
  points = {}
  for key, every in groups.items():
    reference = float(np.mean([line["reward"] for line in every if not line["step"]]))
    ours = [line for line in every if line["step"]]
    distances = np.sqrt(np.maximum([line["kl"] for line in ours], 0))
    gains = np.array([line["reward"] for line in ours]) - reference
    fit = fit_law(distances, gains, [(line["beta"], line["seed"]) for line in ours])
    points[key] = Points(ours, distances, gains, reference, fit)
  return points


class Beta(NamedTuple):
  """A loss at a size and a beta, over seeds.

  `fall` is the reward at the step that the other seeds call best, less that at the end: the highest of many
  noisy numbers is not a fair one, of another seed it is.
  """

  kl: float
  best: float
  best_at: float
  best_kl: float
  end: float
  end_error: float
  fall: float
  fall_error: float


def beta_of(lines: Sequence[Line]) -> Beta:
  """Returns what became of the runs of one beta, step 0 left out."""
  seeds = sorted({line["seed"] for line in lines})
  steps = sorted({line["step"] for line in lines})
  at = {(line["seed"], line["step"]): line for line in lines}
  reward, kl = (np.array([[at[seed, t][name] for t in steps] for seed in seeds]) for name in ("reward", "kl"))
  best = int(np.argmax(reward.mean(axis=0)))
  falls = [
    reward[i, np.argmax(np.delete(reward, i, axis=0).mean(axis=0))] - reward[i, -1]
    for i in range(len(seeds))
    if len(seeds) > 1
  ]
  return Beta(
    float(kl[:, -1].mean()),
    float(reward[:, best].mean()),
    steps[best] / lines[0]["steps"],
    float(kl[:, best].mean()),
    *measure.mean_and_error(reward[:, -1]),
    *(measure.mean_and_error(falls) if falls else (math.nan, math.nan)),
  )


# Tables and picture.


def show(lines: Sequence[Line]) -> None:
  """Prints the law of each size and loss, what became of each beta, and the gain by KL."""
  points = points_of(lines)
  print(
    "\n| size | loss | pairs, seen once | SFT loss | reference's reward | a | b | R^2 | RMSE | "
    "law's hump, KL | best reward | smallest beta at the end | largest residual |\n|" + "---|" * 13
  )
  for (size, loss), of in points.items():
    fit, betas = of.fit, betas_of(of)
    best_beta = max(betas, key=lambda beta: betas[beta].best)
    best, last = betas[best_beta], betas[min(betas)]
    worst = int(np.argmax(np.abs(of.residuals)))
    first = of.lines[0]
    print(
      f"| {size} | {loss} | {first['seen']} of {first['pairs']} | {first['reference_loss']:.3f} | "
      f"{of.reference:.3f} | {fit.a:.3f} +- {fit.a_error:.3f} | {fit.b:.3f} +- {fit.b_error:.3f} | "
      f"{fit.r_squared:.3f} | {fit.rmse:.3f} | {hump_text(of)} | "
      f"{best.best:.3f} (beta {best_beta:g}, {best.best_at:.2f} epoch, KL {best.best_kl:.1f}) | "
      f"{last.end:.3f} (beta {min(betas):g}, KL {last.kl:.1f}) | "
      f"{of.residuals[worst]:+.3f} ({_where(of.lines[worst])}) |"
    )
  print(
    "\n| size | loss | beta | KL at the end | best reward, mean of seeds | at, of the epoch | KL there | "
    "at the end | fall from the best step of other seeds |\n|" + "---|" * 9
  )
  for (size, loss), of in points.items():
    for beta, each in betas_of(of).items():
      print(
        f"| {size} | {loss} | {beta:g} | {each.kl:.2f} | {each.best:.3f} | {each.best_at:.2f} | "
        f"{each.best_kl:.2f} | {each.end:.3f} +- {each.end_error:.3f} | "
        f"{each.fall:+.3f} +- {each.fall_error:.3f} |"
      )
  edges = edges_of(points)
  print(
    "\n| mean gain by KL (points; how far above the law): loss | size | "
    + " | ".join(f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:]))
    + " |\n|---|---|"
    + "---|" * (len(edges) - 1)
  )
  for (size, loss), of in sorted(points.items(), key=lambda item: LOSSES.index(item[0][1])):
    print(f"| {loss} | {size} | " + " | ".join(binned(of, edges)) + " |")


def betas_of(of: Points) -> dict[float, Beta]:
  """Returns by beta what became of it."""
  groups = {}
  for line in of.lines:
    groups.setdefault(line["beta"], []).append(line)
  return {beta: beta_of(lines) for beta, lines in sorted(groups.items())}


def hump_text(of: Points) -> str:
  """Returns where the law turns, whether that was measured, and what the points past it say."""
  hump, farthest = of.fit.hump, float(of.distances.max())
  if math.isnan(hump):
    return "none (b <= 0)"
  if hump > farthest:
    return f"{hump * hump:.3g}, beyond the {farthest**2:.1f} measured"
  past = of.distances > hump
  return (
    f"{hump**2:.2f}; {past.sum()} of {len(past)} points past it, "
    f"{of.gains[past].mean() - of.fit([hump])[0]:+.3f} against its top, "
    f"{of.residuals[past].mean():+.3f} against the law"
  )


def edges_of(points: dict[tuple[str, str], Points]) -> list[float]:
  """Returns edges of KL, each twice the one before, from 0.5 or less to beyond the farthest point."""
  farthest = max(of.distances.max() for of in points.values()) ** 2
  return [0.0, *(2.0**k for k in range(-1, max(0, math.ceil(math.log2(max(farthest, 1e-9)))) + 1))]


def binned(of: Points, edges: Sequence[float]) -> list[str]:
  """Returns, between edges of KL, mean gain, its error over points, their number and mean residual."""
  texts = []
  for low, high in zip(edges, edges[1:]):
    inside = (of.distances**2 >= low) & (of.distances**2 < high)
    mean, error = measure.mean_and_error(of.gains[inside]) if inside.any() else (math.nan, math.nan)
    texts.append(
      f"{mean:+.3f} +- {error:.3f} ({inside.sum()}; {of.residuals[inside].mean():+.3f})"
      if inside.any()
      else "-"
    )
  return texts


def _where(line: Line) -> str:
  """Which run a line is of, and how far along it."""
  run_of = f"beta {line['beta']:g}, seed {line['seed']}"
  return f"{run_of}, {line['step'] / line['steps']:.2f} epoch, KL {line['kl']:.1f}"


def plot(lines: Sequence[Line], path: pathlib.Path) -> None:
  """Draws, a panel a loss, gain against sqrt(KL) and the law, a shade a size; a star is the law's hump."""
  points = points_of(lines)
  losses = [loss for loss in LOSSES if any(loss == each for _, each in points)]
  sizes = list(dict.fromkeys(size for size, _ in points))
  figure, axes = figures.panels(len(losses), size=(4.2, 3.6))
  for panel, loss in zip(axes, losses):
    for number, size in enumerate(sizes):
      if (size, loss) not in points:
        continue
      of, style = points[size, loss], figures.style(number)
      panel.plot(of.distances, of.gains, linestyle="none", markersize=2.5, alpha=0.5, **style)
      grid = np.linspace(0, of.distances.max(), 200)
      label = f"{size}: a {of.fit.a:.2f}, b {of.fit.b:.2f}, $R^2$ {of.fit.r_squared:.2f}"
      panel.plot(grid, of.fit(grid), color=style["color"], label=label)
      if of.fit.hump <= grid[-1]:
        top = of.fit([of.fit.hump])[0]
        panel.plot(of.fit.hump, top, marker="*", markersize=11, color=style["color"], markeredgecolor="white")
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set_title(loss, fontsize=9)
    panel.set_xlabel(r"$\sqrt{\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{ref}})}$")
    panel.set_ylabel("true reward, less the reference's")
    panel.legend(frameon=False, fontsize=7)
  figures.save(figure, path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/overoptimization"))
  parser.add_argument("--sentences", required=True, help="file of sentences")
  parser.add_argument("--sizes", default=SIZES, help="WIDTHxLAYERS, separated by commas")
  parser.add_argument("--losses", default=",".join(LOSSES))
  parser.add_argument("--learning_rate", type=float, default=0.0, help="of all; by default the plan's")
  parser.add_argument("--make_only", action="store_true", help="make the worlds, and train nothing in them")
  parser.add_argument("--small", action="store_true", help="a smoke test")
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  plan = SMALL if arguments.small else Plan()
  if arguments.learning_rate:
    plan = plan._replace(learning_rate=arguments.learning_rate)
  with command(folder):
    losses, sizes = arguments.losses.split(","), [size_of(each) for each in arguments.sizes.split(",")]
    if set(losses) - set(LOSSES):
      raise ConfigError(f"--losses={arguments.losses}; give some of {', '.join(LOSSES)}")
    if arguments.make_only:
      for size in sizes:
        make_world(folder, arguments.sentences, size, plan)
      return
    run(folder, arguments.sentences, plan, sizes, losses)
    with owned(folder / "overoptimization.jsonl", "the table", wait=True):
      lines = finished(folder)
      sweep.write_lines(folder / "overoptimization.jsonl", lines)
      plot(lines, folder / "overoptimization.png")
  show(lines)
  print(
    f"\nwritten: {folder}/overoptimization.jsonl and overoptimization.png, of {len(points_of(lines))} stages"
  )


if __name__ == "__main__":
  main()
