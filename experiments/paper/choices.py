"""Whether what the sentiment frontier says hangs on what the paper leaves open, and on whose samples it is.

python -m experiments.paper.choices --workdir=runs/sentiment --sentences=FILE

Reads the frontier.jsonl that `experiments.paper.frontier` wrote there, and trains DPO again with one
choice made otherwise at a time: labels drawn by Bradley-Terry instead of always the better one; pairs of
nearly equal reward left out; fewer prefixes; and, what sets PPO apart from it, comparisons of its own
samples: in rounds, each on completions that the policy itself draws as it stands, always against the same
reference. These have a quarter of the frontier's steps, and are held against its DPO up to there; one
more goes on three times as long as the frontier's at a large beta. Writes choices.jsonl and choices.png,
and prints what each is worth beside PPO.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import sweep
from experiments.command import command, folder_argument
from experiments.paper import frontier, methods, sentiment
from experiments.paper.methods import Line
from experiments.paper.tuning import reward_at

BETAS = (0.05, 0.1, 1.0)
KLS = (2.0, 4.0, 6.0, 9.0)
OWN_SAMPLES = "DPO, its own samples"


class Choice(NamedTuple):
  """A choice made otherwise: `labels` of the world, the share of its prefixes, how many times the steps.

  `betas` are its own; none are those of all.
  """

  name: str
  labels: str = "argmax"
  share: float = 1.0
  times: int = 1
  betas: tuple[float, ...] = ()


CHOICES = (
  Choice("DPO, labels drawn", labels="bradley_terry"),
  Choice("DPO, clear pairs only", labels="clear"),
  Choice("DPO, 30 % of the prefixes", share=0.3),
  Choice("DPO, 4,800 steps", times=12, betas=(1.0,)),
)


class Rounds(NamedTuple):
  """Rounds of DPO on its own samples: how many, of how many steps, and on as many prefixes each."""

  count: int = 8
  steps: int = 50
  prefixes: int = 600


class Start(NamedTuple):
  """The policy that a round starts from, and what its config says of it."""

  params: Any
  changes: dict[str, Any]


def run(
  make: Callable[..., sentiment.Made],
  plan: frontier.Plan,
  sizes: sentiment.Sizes,
  *,
  choices: Sequence[Choice] = CHOICES,
  rounds: Rounds = Rounds(),
  betas: Sequence[float] = BETAS,
) -> list[Line]:
  """Returns the measurements of DPO under every choice, at seed 0.

  Args:
    make: (sizes, labels) -> the world; see `sentiment.make`.
    plan: DPO's settings.
    sizes: of the world as the frontier has it.
    choices, rounds: what is trained.
    betas: at which.
  """
  lines = []
  for choice in choices:
    made = make(sizes._replace(prefixes=int(choice.share * sizes.prefixes)), labels=choice.labels)
    steps = choice.times * sizes.dpo_steps
    longer = (
      {"steps": steps, "eval_every": 0, "checkpoint_every": sizes.dpo_steps} if choice.times > 1 else {}
    )
    lines += methods.trained(
      _apart(made.world),
      choice.name,
      plan.short_dpo | longer,
      seeds=(0,),
      values=choice.betas or betas,
      measure_every=max(-(-sizes.dpo_steps // 4), steps // 12),
    )
  made = make(sizes)
  for beta in betas:
    lines += own_samples(made, plan.short_dpo, rounds, beta=beta)
  return lines


def own_samples(made: sentiment.Made, changes: dict[str, Any], rounds: Rounds, *, beta: float) -> list[Line]:
  """Trains DPO in rounds on comparisons of its own samples, each round at prefixes of its own."""
  world, start, lines = _apart(made.world), Start(made.world.model.params, {}), []
  for number in range(rounds.count):
    first = number * rounds.prefixes % (len(world.prompts) - rounds.prefixes + 1)
    part = slice(first, first + rounds.prefixes)
    prompts, lengths = world.prompts[part], world.prompt_lengths[part]

    def compared(config, params=start.params, prompts=prompts, lengths=lengths, number=number):
      answers = made.bench.answers(params, prompts, lengths, seed=1000 + number)
      return made.compared(config, prompts, lengths, answers)

    kind = f"own_samples/beta_{beta:g}_round_{number}"
    ours = methods.trained(
      world._replace(data=compared),
      OWN_SAMPLES,
      changes | start.changes | {"steps": rounds.steps, "optimizer.warmup_steps": rounds.steps // 10},
      seeds=(0,),
      values=(beta,),
      measure_every=rounds.steps,
      kind=kind,
    )
    lines += [
      line | {"step": line["step"] + number * rounds.steps} for line in ours if line["step"] or not number
    ]
    start = Start(
      methods.load_policy(world, kind, beta, 0),
      {
        "model.checkpoint": str(methods.policy_folder(world, kind, beta, 0)),
        "model.scan_layers": world.model.config.scan_layers,
        "reference.checkpoint": world.config.model.checkpoint,
        "reference.may_differ": True,
      },
    )
  return lines


def _apart(world: methods.World) -> methods.World:
  """The world with a folder beside those of the frontier's methods."""
  return world._replace(folder=world.folder / "choices")


def report(lines: Sequence[Line], beside: Sequence[Line]) -> None:
  """Prints a row a choice: the best reward at a KL, and the points of PPO that it beats on both axes.

  Args:
    lines: of `run`.
    beside: those of the frontier: DPO as it is there, and both PPOs.
  """
  of = lambda method: [line for line in beside if line["method"] == method]
  last = min(line["step"] for line in methods.final(lines))
  rows = {
    frontier.DPO: of(frontier.DPO),
    f"{frontier.DPO}, to step {last}": [line for line in of(frontier.DPO) if line["step"] <= last],
  }
  rows |= {
    method: [line for line in lines if line["method"] == method]
    for method in dict.fromkeys(line["method"] for line in lines)
  }
  ppos = {method: [line for line in of(method) if line["step"]] for method in (frontier.PPO, frontier.PPO_GT)}
  at = lambda ours: " | ".join(f"{best_at(ours, kl):.3f}" for kl in KLS)
  print(
    "\n| method | "
    + " | ".join(f"true reward at {kl:g} nats" for kl in KLS)
    + " | "
    + " | ".join(
      f"beats of {method}'s {len(points)} points | beaten by {method}" for method, points in ppos.items()
    )
    + " |"
  )
  print("|---|" + "---|" * (len(KLS) + 2 * len(ppos)))
  for name, ours in rows.items():
    print(
      f"| {name} | {at(ours)} | "
      + " | ".join(
        f"{methods.dominated(points, ours)} | {methods.dominated(ours, points)} of {len(ours)}"
        for points in ppos.values()
      )
      + " |"
    )
  for method, points in ppos.items():
    print(f"| {method} | {at(points)} |" + " |" * 2 * len(ppos))


def best_at(lines: Sequence[Line], kl: float) -> float:
  """Returns the highest reward at a KL of all runs that go so far; nan where none does."""
  runs = {}
  for line in lines:
    runs.setdefault((line["setting"], line["seed"]), []).append(line)
  return max(
    (reward_at(points, kl) for points in runs.values() if max(point["kl"] for point in points) >= kl),
    default=math.nan,
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, required=True)
  parser.add_argument("--sentences", required=True)
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  beside = [
    line for line in frontier.read(folder) if line["method"] in (frontier.DPO, frontier.PPO, frontier.PPO_GT)
  ]
  with command(folder):
    lines = run(
      lambda sizes, labels="argmax": sentiment.make(folder, arguments.sentences, sizes, labels=labels),
      frontier.SENTIMENT,
      sentiment.Sizes(),
    )
    sweep.write_lines(folder / "choices.jsonl", lines)
    frontier.plot([*beside, *lines], folder / "choices.png")
  report(lines, beside)
  print(f"\nwritten: {folder}/choices.jsonl and choices.png")


if __name__ == "__main__":
  main()
