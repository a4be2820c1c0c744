"""How the learning rate of every method was chosen: as many candidates for each, by one rule.

python -m experiments.paper.tuning --world=sentiment --workdir=runs/sentiment --sentences=FILE
python -m experiments.paper.tuning --world=enumerable --workdir=runs/enumerable

Every method is trained at each candidate, in the middle of its own axis and with a seed that no other
experiment uses, and measured along training. The best has the highest true reward at a KL that all are
allowed, read off the straight lines between measurements; a run that never goes so far counts with its
end. The reward model's best has the highest held-out accuracy; PPO with a learned reward is given what
is best with the true one. What was chosen stands in `experiments.paper.frontier`. Writes tuning.jsonl and
prints the table.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import sweep
from experiments.command import command, folder_argument
from experiments.paper import enumerable, frontier, methods, sentiment
from experiments.paper.methods import Line, World

SEED = 100
RATE = "optimizer.learning_rate"


class Search(NamedTuple):
  """Candidates of the methods trained on comparisons and of PPO, each method's middle, and the KL allowed."""

  rates: tuple[float, ...]
  ppo_rates: tuple[float, ...]
  beta: float
  alpha: float
  ppo_value: float
  kl: float
  measure_every: int
  ppo_measure_every: int


SEARCHES = {
  "enumerable": Search((1e-3, 3e-3, 1e-2), (2e-3, 5e-3, 1e-2), 0.5, 0.1, 0.5, 1.0, 500, 15),
  "sentiment": Search((1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3), 0.1, 0.1, 6.0, 6.0, 100, 10),
}


def run(world: World, plan: frontier.Plan, search: Search) -> list[Line]:
  """Returns a line for each method and candidate: the reward at the KL allowed, and what was best."""

  def on_comparisons(method, changes):
    return methods.trained(
      world,
      method,
      {name: value for name, value in changes.items() if name != RATE},
      seeds=(SEED,),
      axis=RATE,
      values=search.rates,
      measure_every=search.measure_every,
      kind=f"tuning {method}",
    )

  curves = on_comparisons(frontier.DPO, plan.short_dpo | {"beta": search.beta})
  curves += on_comparisons(
    frontier.UNLIKELIHOOD, frontier.unlikelihood_changes(plan) | {"loss_options.alpha": search.alpha}
  )
  curves += on_comparisons(frontier.PREFERRED_FT, frontier.preferred_ft_changes(plan))
  curves += methods.ppo_runs(
    world,
    frontier.PPO_GT,
    lambda seed: world.reward,
    dataclasses.replace(plan.ppo, **{plan.ppo_axis: search.ppo_value}),
    seeds=(SEED,),
    axis="learning_rate",
    values=search.ppo_rates,
    measure_every=search.ppo_measure_every,
    kind=f"tuning {frontier.PPO_GT}",
  )
  models = {
    rate: methods.reward_model(world, plan.reward_model | {RATE: rate}, seed=SEED, kind=f"{rate:g}")
    for rate in search.rates
  }

  runs = {}
  for line in curves:
    runs.setdefault((line["method"], line["setting"]), []).append(line)
  lines = [
    {"method": method, "rate": rate, "reward": reward_at(points, search.kl), "kl": points[-1]["kl"]}
    for (method, rate), points in runs.items()
  ]
  lines += [
    {"method": "Reward model", "rate": rate, "accuracy": model.accuracy} for rate, model in models.items()
  ]
  return lines


def reward_at(points: Sequence[Line], kl: float) -> float:
  """Returns the true reward of a run at a KL, between its measurements in the order of their KL."""
  kls, rewards = np.transpose(sorted((point["kl"], point["reward"]) for point in points))
  return float(np.interp(kl, kls, rewards))


def show(lines: Sequence[Line], kl: float) -> None:
  """Prints a row a method: what its candidates are worth."""
  print(f"\n| method | learning rate: true reward at {kl:g} nats (KL at the end), or held-out accuracy |")
  print("|---|---|")
  for method in dict.fromkeys(line["method"] for line in lines):
    ours = [line for line in lines if line["method"] == method]
    worth = lambda line: line.get("accuracy", line.get("reward"))
    best = max(ours, key=worth)
    cells = (
      f"{line['rate']:g}: {worth(line):.3f}" + (f" ({line['kl']:.2f})" if "kl" in line else "")
      for line in ours
    )
    print(
      f"| {method} | "
      + ", ".join(f"**{cell}**" if line is best else cell for line, cell in zip(ours, cells))
      + " |"
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--world", choices=tuple(SEARCHES), required=True)
  parser.add_argument("--workdir", type=folder_argument, required=True)
  parser.add_argument("--sentences", default="", help="file of sentences, for the sentiment world")
  arguments = parser.parse_args()
  folder, search = arguments.workdir.absolute(), SEARCHES[arguments.world]
  with command(folder):
    if arguments.world == "enumerable":
      world, plan = enumerable.make(folder)[0], frontier.ENUMERABLE
    else:
      world, plan = sentiment.make(folder, arguments.sentences).world, frontier.SENTIMENT
    lines = run(world, plan, search)
    sweep.write_lines(folder / "tuning.jsonl", lines)
  show(lines, search.kl)
  print(f"\nwritten: {folder}/tuning.jsonl")


if __name__ == "__main__":
  main()
