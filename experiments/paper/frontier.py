"""Reward against KL, every method in one picture (the paper's Figure 2, left).

python -m experiments.paper.frontier --world=enumerable --workdir=runs/enumerable
python -m experiments.paper.frontier --world=sentiment --workdir=runs/sentiment --sentences=FILE

FILE has lines of {"text", "label"}. Each method is measured along training; a killed run continues
with the first unfinished stage. Writes frontier.jsonl, a line a measurement, frontier.png, and prints
where every method ended, and how many points of the others some point of DPO beats on both axes.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.ppo import loop as ppo
from dpojax.training.metrics import read_lines
from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.paper import enumerable, methods, sentiment
from experiments.paper.methods import Line, World

DPO, PPO, PPO_GT = "DPO", "PPO", "PPO-GT"
UNLIKELIHOOD, PREFERRED_FT = "Unlikelihood", "Preferred-FT"
SHUFFLED = "DPO, labels shuffled"


class Plan(NamedTuple):
  """The runs of each method.

  `ppo_axis` is 'target_kl' or 'beta', and `ppo_values` are of it. Methods are
  measured every `measure_every` steps, DPO every `dpo_measure_every` where that is not 0. `short_dpo` is what
  the control and the tuning train; the control has `shuffled_beta`, where that is not 0.
  `preferred_ft_seeds` are those of the others where there are none.
  """

  seeds: tuple[int, ...]
  betas: tuple[float, ...]
  alphas: tuple[float, ...]
  ppo_axis: str
  ppo_values: tuple[float, ...]
  ppo_seeds: tuple[int, ...]
  ppo: ppo.Settings
  reward_model: dict[str, Any]
  dpo: dict[str, Any]
  unlikelihood: dict[str, Any]
  preferred_ft: dict[str, Any]
  measure_every: int = 0
  dpo_measure_every: int = 0
  ppo_measure_every: int = 10
  at_once: int = 0
  shuffled_beta: float = 0.0
  short_dpo: dict[str, Any] = {}
  preferred_ft_seeds: tuple[int, ...] = ()


ENUMERABLE = Plan(
  seeds=(0, 1, 2, 3, 4),
  betas=(0.25, 0.5, 1.0, 2.0),
  alphas=(0.05, 0.1, 0.5, 1.0),
  ppo_axis="beta",
  ppo_values=(0.25, 0.5, 1.0, 2.0),
  ppo_seeds=(0, 1, 2, 3, 4),
  ppo=ppo.Settings(
    steps=60,
    prompts_per_step=64,
    num_samples=16,
    epochs=2,
    minibatches=2,
    normalize_rewards=False,
    learning_rate=2e-3,
    critic_learning_rate=1e-2,
    schedule="linear",
    value_clip=1.0,
  ),
  reward_model={"optimizer.learning_rate": 1e-3},
  dpo={},
  unlikelihood={"steps": 300, "optimizer.learning_rate": 3e-3},
  preferred_ft={"steps": 300, "optimizer.learning_rate": 3e-3},
  ppo_measure_every=60,
  at_once=5,
  shuffled_beta=0.5,
)

SENTIMENT = Plan(
  seeds=(0, 1),
  betas=(0.05, 0.1, 1.0, 5.0),
  alphas=(0.05, 0.1, 0.5, 1.0),
  ppo_axis="target_kl",
  ppo_values=(3.0, 6.0, 9.0, 12.0),
  ppo_seeds=(0,),
  ppo=ppo.Settings(
    steps=25,
    prompts_per_step=128,
    num_samples=8,
    epochs=2,
    minibatches=4,
    beta=0.05,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    rows_at_once=32,
  ),
  reward_model={"steps": 1200, "eval_every": 200, "checkpoint_every": 200, "optimizer.learning_rate": 1e-3},
  dpo={"steps": 1600, "eval_every": 400, "checkpoint_every": 400},
  unlikelihood={"optimizer.learning_rate": 1e-3},
  preferred_ft={"steps": 200, "optimizer.learning_rate": 1e-3},
  measure_every=100,
  dpo_measure_every=200,
  ppo_measure_every=5,
  at_once=4,
  shuffled_beta=0.1,
)


def run(world: World, plan: Plan) -> list[Line]:
  """Trains and measures every method; returns the measurements of all."""
  common = dict(seeds=plan.seeds, measure_every=plan.measure_every, at_once=plan.at_once)
  lines = methods.trained(
    world,
    DPO,
    plan.dpo,
    values=plan.betas,
    **common | {"measure_every": plan.dpo_measure_every or plan.measure_every},
  )
  if plan.shuffled_beta:
    lines += methods.trained(
      world, SHUFFLED, plan.short_dpo | {"data.shuffle_labels": True}, values=(plan.shuffled_beta,), **common
    )
  lines += methods.trained(
    world, UNLIKELIHOOD, unlikelihood_changes(plan), axis="loss_options.alpha", values=plan.alphas, **common
  )
  lines += methods.trained(
    world,
    PREFERRED_FT,
    preferred_ft_changes(plan),
    axis="",
    **common | {"seeds": plan.preferred_ft_seeds or plan.seeds},
  )
  models = {seed: methods.reward_model(world, plan.reward_model, seed=seed) for seed in plan.ppo_seeds}
  runs = dict(
    seeds=plan.ppo_seeds, axis=plan.ppo_axis, values=plan.ppo_values, measure_every=plan.ppo_measure_every
  )
  lines += methods.ppo_runs(world, PPO_GT, lambda seed: world.reward, plan.ppo, **runs)
  lines += methods.ppo_runs(
    world,
    PPO,
    lambda seed: methods.learned(world, models[seed], num_samples=plan.ppo.num_samples),
    plan.ppo,
    **runs,
  )
  accuracies = ", ".join(f"{model.accuracy:.3f}" for model in models.values())
  print(f"held-out accuracy of the reward models: {accuracies}")
  return lines


def read(folder: pathlib.Path) -> list[Line]:
  """Returns the measurements that this command wrote into a folder; without them, exits and says how."""
  path = folder / "frontier.jsonl"
  if not path.exists():
    sys.exit(f"error: {path} is not there; run python -m experiments.paper.frontier --workdir={folder} first")
  return read_lines(path)


def unlikelihood_changes(plan: Plan) -> dict[str, Any]:
  """Returns what unlikelihood changes in a world's config."""
  return {
    "loss": "unlikelihood",
    "reference.mode": "none",
    "loss_options.alpha": plan.alphas[0],
  } | plan.unlikelihood


def preferred_ft_changes(plan: Plan) -> dict[str, Any]:
  """Returns what Preferred-FT changes in a world's config: SFT on the chosen."""
  return {"objective": "sft", "loss": "sequence_sum", "reference.mode": "inline"} | plan.preferred_ft


def report(lines: Sequence[Line], best: Any = None) -> None:
  """Prints where each method ended, over seeds, and what DPO's points beat; `best` is of a KL."""
  ends = methods.final(lines)
  reward, kl = (methods.over_seeds(ends, name) for name in ("reward", "kl"))
  share = (
    methods.over_seeds([line | {"share": line["reward"] / best(line["kl"])} for line in ends], "share")
    if best
    else {}
  )
  print(
    "\n| method | setting | true reward | KL, nats |" + (" share of the best at its KL |" if best else "")
  )
  print("|---|---|---|---|" + ("---|" if best else ""))
  show = lambda pair: f"{pair[0]:.3f}" + ("" if np.isnan(pair[1]) else f" +- {pair[1]:.3f}")
  for group in reward:
    print(
      f"| {group[0]} | {group[1]:g} | {show(reward[group])} | {show(kl[group])} |"
      + (f" {show(share[group])} |" if best else "")
    )
  ours = [line for line in lines if line["method"] == DPO]
  for method in dict.fromkeys(line["method"] for line in lines):
    theirs = [line for line in lines if line["method"] == method and line["step"]]
    if method not in (DPO, SHUFFLED) and theirs:
      print(
        f"{method}: DPO beats {methods.dominated(theirs, ours)} of {len(theirs)} points on both "
        f"axes; {method} beats {methods.dominated(ours, theirs)} of DPO's {len(ours)}"
      )
  methods.show_configurations(lines)


class Curve(NamedTuple):
  """What points are held against: [n] KL and reward, and its name."""

  kl: Sequence[float]
  reward: Sequence[float]
  label: str


def plot(lines: Sequence[Line], path: pathlib.Path, *, curve: Curve | None = None) -> None:
  """Draws every measurement as a point, as far as DPO and PPO go; how many are beyond, the legend says."""
  figure, (panel,) = figures.panels(1, size=(5.6, 4.2))
  if curve is not None:
    panel.plot(curve.kl, curve.reward, color="black", linewidth=1, label=curve.label)
  farthest = 1.05 * max(line["kl"] for line in lines if line["method"] in (DPO, PPO, PPO_GT))
  panel.set_xlim(-0.02 * farthest, farthest)
  for number, method in enumerate(dict.fromkeys(line["method"] for line in lines)):
    points = [line for line in lines if line["method"] == method]
    beyond = sum(line["kl"] > farthest for line in points)
    panel.errorbar(
      [line["kl"] for line in points],
      [line["reward"] for line in points],
      yerr=[line["reward_error"] for line in points],
      xerr=[line["kl_error"] for line in points],
      linestyle="none",
      markersize=4,
      elinewidth=0.6,
      label=f"{method} ({beyond} beyond)" if beyond else method,
      **figures.style(number),
    )
  panel.set_xlabel(r"KL($\pi\,\|\,\pi_{\mathrm{ref}}$), nats")
  panel.set_ylabel("true reward")
  panel.legend(frameon=False, loc="lower right", fontsize=8)
  figures.save(figure, path)


def best_by_true_reward(made: sentiment.Made) -> Curve:
  """Returns the best of up to 128 samples, chosen by the true reward: no policy, but of the reference."""
  best = methods.best_of_n_lines(
    made.world, made.held_out.prompts, made.held_out.lengths, None, sizes=methods.BEST_OF
  )
  return Curve(
    [line["kl"] for line in best],
    [line["reward"] for line in best],
    f"best of 1 to {methods.BEST_OF[-1]} by the true reward",
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--world", choices=("enumerable", "sentiment"), required=True)
  parser.add_argument("--workdir", type=folder_argument, required=True)
  parser.add_argument("--sentences", default="", help="file of sentences, for the sentiment world")
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  with command(folder):
    best = curve = None
    if arguments.world == "enumerable":
      world, table = enumerable.make(folder)
      lines = run(world, ENUMERABLE)
      best = lambda kl: enumerable.best_reward(table, kl)
      reward, kl = np.transpose(
        [
          enumerable.reward_and_kl(table, enumerable.optimum(table, beta))
          for beta in np.geomspace(0.15, 100, 200)
        ]
      )
      curve = Curve(kl, reward, r"optimum $\pi_{ref}\,e^{r/\beta}/Z$")
    else:
      made = sentiment.make(folder, arguments.sentences)
      print(f"held-out accuracy of the classifier, the true reward: {made.classifier.accuracy:.3f}")
      lines = run(made.world, SENTIMENT)
      curve = best_by_true_reward(made)
    sweep.write_lines(folder / "frontier.jsonl", lines)
    plot(lines, folder / "frontier.png", curve=curve)
  report(lines, best)
  print(f"\nwritten: {folder}/frontier.jsonl and frontier.png")


if __name__ == "__main__":
  main()
