"""Does a beta that moves, a reference that moves, or a repaired loss beat plain DPO at the same KL?

python -m experiments.paper.kl_matched --workdir=runs/kl_matched [--sentences=FILE] [--worlds=enumerable,text]
    [--methods=DPO,TR-DPO]

In the enumerable world, where the best reward at every KL is known, and with --sentences on real text. Every
method is tuned alike: as many candidates as every other, learning rates times values of a knob of its own, at
a seed that nothing else uses; then it is trained at several betas and at five seeds or more. Methods are
compared where they are as far from the reference, each seed read off between its own points. A killed run
continues with the first stage that is not finished; --methods trains these alone, so that several processes
share the work, and a last call without it writes kl_matched.jsonl and kl_matched.png, and prints a table a
world: a method beats plain DPO where its difference, over seeds, is above two standard errors.
"""

import argparse
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax import losses
from dpojax.runtime.errors import ConfigError
from dpojax.runtime.ownership import owned
from dpojax.training import step as step_lib
from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure
from experiments.paper import enumerable, exact, methods, sentiment
from experiments.paper.methods import Line
from experiments.paper.tuning import reward_at

DPO = "DPO"
TUNING_SEED = 100
RATE = "optimizer.learning_rate"


# The enumerable world.


class Sizes(NamedTuple):
  """How deep the policy is, how long and on how much every run is trained, and at which seeds."""

  layers: int = 1
  steps: int = 300
  batch_size: int = 512
  comparisons: int = 32_768
  seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)


class Contender(NamedTuple):
  """A method and how it is tuned.

  Attributes:
    method: how it is trained.
    knob: its own knob, and the values tried.
    betas: at which it is compared; it is tuned at the two in the middle.
    rates: learning rates that are tried.
  """

  method: exact.Method
  knob: tuple[str, tuple[float, ...]] = ("", ())
  betas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.5)
  rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)

  def candidates(self) -> list[dict[str, float]]:
    """Returns every learning rate at every value of the knob."""
    name, values = self.knob
    knobs = [{name: value} for value in values] or [{}]
    return [{"rate": rate} | knob for rate, knob in itertools.product(self.rates, knobs)]


def of_pairs(loss: Callable) -> exact.Loss:
  """Returns an elementwise loss of policy and reference as one of a `exact.View`."""
  return lambda view, memory, **knobs: (loss(view.policy, view.reference, **knobs), {})


def margins_of(view: exact.View) -> jax.Array:
  """Returns h of each pair."""
  chosen, rejected = (p - r for p, r in zip(view.policy, view.reference))
  return chosen - rejected


def scheduled(steps: int) -> exact.Loss:
  """Returns DPO whose beta goes from `start` times itself to itself, geometrically."""

  def loss(view, memory, *, beta, start):
    factor = step_lib.make_beta_factor((0, steps), (start, 1.0), "geometric")(view.step)
    return losses.dpo_loss(view.policy, view.reference, beta=beta * factor), {}

  return loss


def by_batch(view, memory, *, beta, alpha, kept):
  """Beta-DPO, its beta by the batch; `kept` is the share of the pairs that its filter keeps."""
  margins = margins_of(view)
  running = losses.running_margins(losses.RunningMargins(**memory), margins)
  moved, weights = losses.beta_dpo_batch(margins, view.noise, running, beta=beta, alpha=alpha, share=kept)
  return losses.dpo_loss(view.policy, view.reference, beta=moved) * weights, running._asdict()


def by_pair(view, memory, *, beta, alpha):
  """Beta-DPO with a beta of each pair by its own margin, all pairs kept."""
  margins = margins_of(view)
  running = losses.running_margins(losses.RunningMargins(**memory), margins)
  moved = losses.beta_dpo_beta(margins[:, None], beta=beta, alpha=alpha, center=running.center)[:, 0]
  return losses.dpo_loss(view.policy, view.reference, beta=moved), running._asdict()


def epsilon_dpo(view, memory, *, beta, epsilon):
  """Epsilon-DPO."""
  nearer, farther = view.mixed(epsilon), view.mixed(-epsilon)
  loss = losses.epsilon_dpo_loss(view.policy, view.reference, nearer, farther, beta=beta, epsilon=epsilon)
  return loss, {}


def contenders(sizes: Sizes) -> dict[str, Contender]:
  """Returns what is compared: six candidates each."""
  nothing_yet = {"center": 0.0, "spread": 0.0}
  plain = exact.Method(of_pairs(losses.dpo_loss))
  moving = exact.Method(of_pairs(losses.dpo_loss), sync_every=sizes.steps // 4)
  rates = (1e-3, 2e-3, 4e-3, 6e-3, 8e-3, 1.2e-2)
  return {
    DPO: Contender(plain, rates=rates),
    "beta rising": Contender(exact.Method(scheduled(sizes.steps)), ("start", (1 / 3, 0.1))),
    "beta falling": Contender(exact.Method(scheduled(sizes.steps)), ("start", (3.0, 10.0))),
    "beta-DPO, by batch": Contender(
      exact.Method(functools.partial(by_batch, alpha=0.6), nothing_yet), ("kept", (0.8, 1.0))
    ),
    "beta-DPO, by pair": Contender(exact.Method(by_pair, nothing_yet), ("alpha", (0.1, 0.6))),
    "epsilon-DPO": Contender(exact.Method(epsilon_dpo), ("epsilon", (0.01, 0.1))),
    "TR-DPO": Contender(moving, ("sync_alpha", (0.6, 1.0)), betas=(0.8, 1.6, 3.2, 8.0)),
    "DPOP": Contender(exact.Method(of_pairs(losses.dpop_loss)), ("weight", (1.0, 50.0))),
    "Cal-DPO": Contender(
      exact.Method(of_pairs(losses.cal_dpo_loss)), ("weight", (0.5, 1.0)), betas=(0.1, 0.25, 0.5, 1.0)
    ),
    "BDPO": Contender(exact.Method(of_pairs(losses.bdpo_loss)), ("mix", (0.5, 0.9))),
    "MaPPO": Contender(exact.Method(of_pairs(losses.mappo_loss)), ("gap", (0.5, 0.9))),
  }


def run_exact(folder: pathlib.Path, sizes: Sizes, names: Sequence[str] = ()) -> list[Line]:
  """Tunes and trains every method in the enumerable world; returns where each run ended.

  Lines have the method, the knobs that were chosen, the seed, beta, and exact reward, KL and share of the
  best reward at that KL; those of the tuning are kept in the folders of the stages.
  """
  world, table = enumerable.make(folder / "world", enumerable.Sizes(layers=sizes.layers))
  chances = exact.Chances(world.model.config, world.prompts)
  lines = []
  for name, contender in contenders(sizes).items():
    if names and name not in names:
      continue
    trained = _Trained(chances, table, world.model.params, contender.method, sizes)
    stage = lambda kind, settings, make: methods.stage(folder / kind / _slug(name), settings, make)
    about = {"sizes": sizes._asdict(), "candidates": contender.candidates(), "betas": contender.betas}
    middle = contender.betas[1:3]
    tuned = stage(
      "tuning",
      about,
      lambda: trained([(TUNING_SEED, beta, each) for each in contender.candidates() for beta in middle]),
    )
    chosen = best_candidate(tuned)
    lines += [
      {"world": "enumerable", "method": name} | line
      for line in stage(
        "runs",
        about | {"chosen": chosen},
        lambda: trained([(seed, beta, chosen) for seed in sizes.seeds for beta in contender.betas]),
      )
    ]
  return lines


class _Trained:
  """Runs of one method, a dozen side by side in one compiled program."""

  AT_ONCE = 12

  def __init__(self, chances, table, params, method: exact.Method, sizes: Sizes):
    self._chances, self._table, self._params, self._sizes = chances, table, params, sizes
    self._train = exact.make_train(chances, method)

  def __call__(self, runs: Sequence[tuple[int, float, dict[str, float]]]) -> list[Line]:
    """Returns a line for each (seed, beta, candidate)."""
    lines = []
    for first in range(0, len(runs), self.AT_ONCE):
      part = list(runs[first : first + self.AT_ONCE])
      every = (part * self.AT_ONCE)[: self.AT_ONCE]  # filled up, so that all are one program
      seeds = sorted({seed for seed, *_ in every})
      drawn = exact.draw(
        self._table,
        (seeds * self.AT_ONCE)[: self.AT_ONCE],
        steps=self._sizes.steps,
        batch_size=self._sizes.batch_size,
        size=self._sizes.comparisons,
      )
      numbers = lambda values: np.array(values, np.float32)
      members = exact.Members(
        np.array([seeds.index(seed) for seed, *_ in every]),
        numbers([each["rate"] for *_, each in every]),
        numbers([beta for _, beta, _ in every]),
        {name: numbers([each[name] for *_, each in every]) for name in every[0][2] if name != "rate"},
      )
      params = self._train(self._params, drawn, members)
      ends = exact.measure(self._chances, self._table, params)
      for (seed, beta, each), (reward, kl) in zip(part, ends):
        share = reward / enumerable.best_reward(self._table, kl)
        lines.append({"seed": seed, "beta": beta} | each | {"reward": reward, "kl": kl, "share": share})
    return lines


OF_RUN = ("world", "method", "seed", "beta", "reward", "kl", "share")
"""Keys of a line that are no knob of its candidate."""


def best_candidate(lines: Sequence[Line]) -> dict[str, float]:
  """Returns the candidate whose runs have the largest mean share of the best reward at their KLs."""
  of = {}
  for line in lines:
    candidate = tuple((name, value) for name, value in line.items() if name not in OF_RUN)
    of.setdefault(candidate, []).append(line["share"])
  return dict(max(of, key=lambda candidate: np.mean(of[candidate])))


# Real text.


class Text(NamedTuple):
  """How the text world is trained: its sizes, betas, seeds, and learning rates that are tried.

  `kl` is where a learning rate is chosen, and `measure_every` are the steps between measurements.
  """

  sizes: sentiment.Sizes = sentiment.Sizes(
    vocabulary=600,
    width=48,
    layers=1,
    sft_steps=250,
    prefixes=1200,
    held_out_pairs=64,
    held_out=192,
    samples=4,
    max_new_tokens=12,
    dpo_steps=144,
    batch_size=32,
  )
  betas: tuple[float, ...] = (0.1, 0.5)
  seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
  rates: tuple[float, ...] = (4e-4, 8e-4, 1.6e-3, 3e-3)
  kl: float = 3.0
  measure_every: int = 36


def text_methods(steps: int) -> dict[str, dict[str, Any]]:
  """Returns what every method changes in the config of the text world."""
  inline = {"reference.mode": "inline"}
  schedule = lambda start: {
    "beta_schedule.steps": (0, steps),
    "beta_schedule.factors": (start, 1.0),
    "beta_schedule.between": "geometric",
  }
  return {
    DPO: {},
    "beta rising": schedule(0.1),
    "beta falling": schedule(10.0),
    "beta-DPO": {"loss": "beta_dpo"},
    "TR-DPO": inline | {"reference.sync_every": steps // 4},
    "DPOP": {"loss": "dpop", "loss_options.weight": 1.0},
  }


def run_text(folder: pathlib.Path, sentences: str, text: Text, names: Sequence[str] = ()) -> list[Line]:
  """Tunes and trains every method on text; returns what was measured along training, one line each."""
  with owned(
    folder, "the world of film reviews", wait=True
  ):  # of several processes one at a time makes or reads it
    made = sentiment.make(folder, sentences, text.sizes)
  # What is held out is not looked at: samples to prefixes of their own measure.
  common = {"eval_every": 0, "log_every": text.sizes.dpo_steps, "checkpoint_every": text.sizes.dpo_steps}
  common |= {"data.cache_dir": str(folder / "prepared"), "optimizer.warmup_steps": 10}
  lines = []
  for name, changes in text_methods(text.sizes.dpo_steps).items():
    if names and name not in names:
      continue
    tuned = methods.trained(
      made.world,
      name,
      common | changes | {"beta": text.betas[0]},
      seeds=(TUNING_SEED,),
      axis=RATE,
      values=text.rates,
      measure_every=text.measure_every,
      kind=f"tuning/{_slug(name)}",
    )
    rate = best_rate(tuned, text.kl)
    lines += [
      {"world": "text", "rate": rate, "beta": line["setting"]} | line
      for line in methods.trained(
        made.world,
        name,
        common | changes | {RATE: rate},
        seeds=text.seeds,
        values=text.betas,
        measure_every=text.measure_every,
        at_once=len(text.seeds),
        kind=f"runs/{_slug(name)}",
      )
    ]
  return lines


def best_rate(lines: Sequence[Line], kl: float) -> float:
  """Returns the learning rate with the highest reward at a KL, or at its end if that is nearer."""
  runs = {}
  for line in lines:
    runs.setdefault(line["setting"], []).append(line)
  return max(runs, key=lambda rate: reward_at(runs[rate], kl))


# What comes of it.


def reward_of_seed(lines: Sequence[Line], kl: float) -> float:
  """Returns the highest reward at a KL of a seed's runs that go so far; nan where none does."""
  runs = {}
  for line in lines:
    runs.setdefault(line["beta"], []).append(line)
  reached = [points for points in runs.values() if max(point["kl"] for point in points) >= kl]
  return max((reward_at(points, kl) for points in reached), default=math.nan)


def share_of_seed(lines: Sequence[Line], kl: float) -> float:
  """Returns the share of the best reward at a KL between a seed's runs; nan where they do not embrace it.

  It is their shares that are drawn straight, as `loss_ablation.share_at` says why, and over the logarithm of
  the KL: betas, too, are apart by factors.
  """
  kls, shares = np.transpose(sorted((line["kl"], line["share"]) for line in lines))
  return float(np.interp(math.log(kl), np.log(kls), shares)) if kls[0] <= kl <= kls[-1] else math.nan


class World(NamedTuple):
  """How a world's lines are read: at which KLs, (lines of a seed, KL) -> number, and what it is called."""

  kls: tuple[float, ...]
  at: Callable[[Sequence[Line], float], float]
  number: str


WORLDS = {
  "enumerable": World((0.2, 0.4, 1.0), share_of_seed, "share of the best reward"),
  "text": World((1.0, 2.0, 4.0), reward_of_seed, "true reward"),
}
"""How each world is read."""


class Cell(NamedTuple):
  """A method at a KL: mean and error over seeds, and of the differences to plain DPO, seed by seed."""

  mean: float
  error: float
  difference: float
  difference_error: float

  @property
  def verdict(self) -> str:
    """'above' or 'below' plain DPO by two standard errors, or ''."""
    if not abs(self.difference) > 2 * self.difference_error:
      return ""
    return "above" if self.difference > 0 else "below"


def compare(lines: Sequence[Line], world: World) -> dict[str, list[Cell]]:
  """Returns of each method a cell a KL."""
  at = {}
  for line in lines:
    at.setdefault((line["method"], line["seed"]), []).append(line)
  values = {key: [world.at(of, kl) for kl in world.kls] for key, of in at.items()}
  seeds = sorted({seed for _, seed in values})
  cells = {}
  for name in dict.fromkeys(line["method"] for line in lines):
    ours = np.array([values[name, seed] for seed in seeds])
    apart = ours - np.array([values[DPO, seed] for seed in seeds])
    cells[name] = [
      Cell(*measure.mean_and_error(ours[:, k]), *measure.mean_and_error(apart[:, k]))
      for k in range(len(world.kls))
    ]
  return cells


def show(lines: Sequence[Line]) -> None:
  """Prints a table a world."""
  for name, world in WORLDS.items():
    ours = [line for line in lines if line["world"] == name]
    if not ours:
      continue
    cells = compare(ours, world)
    print(
      f"\n| {name}: method | chosen | "
      + " | ".join(f"{world.number} at KL {kl:g} (less DPO's)" for kl in world.kls)
      + " |"
    )
    print("|---|---|" + "---|" * len(world.kls))
    for method, of in cells.items():
      print(
        f"| {method} | {_chosen(ours, method)} | " + " | ".join(_text(cell, method) for cell in of) + " |"
      )


def _chosen(lines: Sequence[Line], method: str) -> str:
  """What the tuning chose: the learning rate, and the method's own knob."""
  line = next(line for line in lines if line["method"] == method)
  if line["world"] == "text":
    return f"rate {line['rate']:g}"
  return ", ".join(f"{name} {value:.3g}" for name, value in line.items() if name not in OF_RUN)


def _text(cell: Cell, method: str) -> str:
  if math.isnan(cell.mean):
    return "not reached by all seeds"
  text = f"{cell.mean:.3f} +- {cell.error:.3f}"
  if method != DPO and not math.isnan(cell.difference):
    text += f" ({cell.difference:+.4f} +- {cell.difference_error:.4f})"
  return f"**{text}** {cell.verdict}" if method != DPO and cell.verdict else text


def plot(lines: Sequence[Line], path: pathlib.Path) -> None:
  """Draws, a panel a world and KL, every method's difference to plain DPO with two standard errors."""
  shown = [
    (name, world, k)
    for name, world in WORLDS.items()
    if any(line["world"] == name for line in lines)
    for k in range(len(world.kls))
  ]
  found = {
    name: compare([line for line in lines if line["world"] == name], WORLDS[name]) for name, *_ in shown
  }
  drawn = lambda name, k: any(not math.isnan(of[k].difference) for m, of in found[name].items() if m != DPO)
  shown = [(name, world, k) for name, world, k in shown if drawn(name, k)] or shown
  figure, axes = figures.panels(len(shown), columns=3, size=(4.2, 3.4))
  for panel, (name, world, k) in zip(axes, shown):
    cells = found[name]
    names = [each for each in cells if each != DPO]
    panel.axvline(0, color="black", linewidth=0.8)
    for place, each in enumerate(names):
      cell = cells[each][k]
      if not math.isnan(cell.difference):
        panel.errorbar(
          cell.difference,
          -place,
          xerr=2 * cell.difference_error,
          capsize=2,
          markersize=4,
          **figures.style(place),
        )
    panel.set_yticks([-place for place in range(len(names))], names, fontsize=7)
    panel.set_title(f"{name}, KL {world.kls[k]:g}", fontsize=8)
    panel.set_xlabel(f"{world.number}, less plain DPO's", fontsize=8)
  figures.save(figure, path)


def _slug(name: str) -> str:
  return name.lower().replace(",", "").replace(" ", "_")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/kl_matched"))
  parser.add_argument("--sentences", default="", help="file of sentences, for the comparison on text")
  parser.add_argument("--worlds", default="enumerable,text", help="the latter only with --sentences")
  parser.add_argument("--methods", default="", help="train these alone and write no table, by default all")
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  worlds, names = arguments.worlds.split(","), list(filter(None, arguments.methods.split(",")))
  with command(folder):
    known = {*contenders(Sizes()), *text_methods(Text().sizes.dpo_steps)}
    if worlds == ["text"] and not arguments.sentences:
      raise ConfigError("--worlds=text needs --sentences, a file of them")
    if set(names) - known or set(worlds) - set(WORLDS):
      raise ConfigError(
        f"--worlds={arguments.worlds} and --methods={arguments.methods}: worlds are {', '.join(WORLDS)}; "
        f"methods {', '.join(sorted(known))}"
      )
    lines = []
    if "enumerable" in worlds:
      lines += run_exact(folder / "enumerable", Sizes(), names)
    if "text" in worlds and arguments.sentences:
      lines += run_text(folder / "text", arguments.sentences, Text(), names)
    if names:
      return
    sweep.write_lines(folder / "kl_matched.jsonl", lines)
    plot(lines, folder / "kl_matched.png")
  show(lines)
  print(f"\nwritten: {folder}/kl_matched.jsonl and kl_matched.png")


if __name__ == "__main__":
  main()
