"""Which learning rate each optimizer wants: DPO on Anthropic HH in small, one sweep an optimizer.

python -m experiments.measurements.learning_rates --pairs=FILE --workdir=runs/learning_rates

FILE holds Anthropic HH pairs. A byte-pair tokenizer and a small language model are trained on the chosen
responses; then every optimizer trains DPO from it at as many learning rates as every other, side by side.
A killed run continues with the first optimizer that is not finished. Writes learning_rates.jsonl and prints
the table: held-out loss and accuracy, means over seeds.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure
from experiments.paper import beta_ablation

AXIS = "optimizer.learning_rate"

SIZES = beta_ablation.Sizes(
  vocabulary=2000,
  width=64,
  layers=1,
  sft_steps=100,
  dpo_steps=30,
  batch_size=16,
  held_out=192,
  prompt_tokens=48,
  max_length=96,
)
SEEDS = (0, 1)


class Case(NamedTuple):
  """An optimizer, what else its config has, and the learning rates that are tried."""

  name: str
  changes: dict[str, Any] = {}
  rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)

  @property
  def label(self) -> str:
    """What it is called in the table."""
    return self.name + "".join(f", {key} {value:g}" for key, value in self.changes.items())


CASES = (
  Case("adamw"),
  Case("adamw", {"ema": 0.9}),
  Case("adamw_bfloat16"),
  Case("rmsprop"),
  Case("rmsprop", {"ema": 0.9}),
  Case("adafactor"),
  Case("lion", rates=(3e-5, 1e-4, 3e-4, 1e-3)),
  Case("muon"),
  Case("schedule_free", rates=(3e-4, 1e-3, 3e-3, 1e-2)),
  Case("sgd", rates=(3e-2, 1e-1, 3e-1, 1.0)),
)
"""Every optimizer of `dpojax.training.step.OPTIMIZERS`, two of them with a running mean of params besides."""


def run(
  pairs: str,
  workdir: pathlib.Path,
  sizes: beta_ablation.Sizes = SIZES,
  *,
  cases: Sequence[Case] = CASES,
  seeds: Sequence[int] = SEEDS,
) -> list[dict]:
  """Returns a line for each optimizer, learning rate and seed: the held-out metrics of its last step."""
  start = beta_ablation.start(pairs, workdir, sizes)
  lines = []
  for case in cases:
    config = start.copy_and_resolve_references()
    config.optimizer.name = case.name
    config.optimizer.update(case.changes)
    config.eval_every = config.log_every = config.steps
    table = sweep.run(
      config,
      workdir / case.label.replace(", ", "_").replace(" ", "_"),
      seeds=seeds,
      axis=AXIS,
      values=case.rates,
    )
    lines += [{"optimizer": case.label} | line for line in figures.last_lines(table, "eval")]
  return lines


def show(lines: Sequence[dict]) -> None:
  """Prints a row an optimizer: loss and accuracy at each learning rate, the lowest loss in bold."""
  print("\n| optimizer | learning rate: held-out loss (accuracy) |")
  print("|---|---|")
  for name in dict.fromkeys(line["optimizer"] for line in lines):
    ours = [line for line in lines if line["optimizer"] == name]
    cells = {}
    for rate in dict.fromkeys(line[AXIS] for line in ours):
      of = [line for line in ours if line[AXIS] == rate]
      mean = lambda metric: measure.mean_and_error([line[metric] for line in of])[0]
      cells[rate] = mean("loss"), mean("rewards/accuracies")
    best = min(cells, key=lambda rate: cells[rate][0])
    texts = (
      f"**{text}**" if rate == best else text
      for rate, (loss, accuracy) in cells.items()
      for text in [f"{rate:g}: {loss:.4f} ({accuracy:.3f})"]
    )
    print(f"| `{name}` | " + ", ".join(texts) + " |")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--pairs", required=True)
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/learning_rates"))
  arguments = parser.parse_args()
  workdir = arguments.workdir.absolute()
  with command(workdir):
    lines = run(arguments.pairs, workdir)
    sweep.write_lines(workdir / "learning_rates.jsonl", lines)
  show(lines)
  print(f"\nwritten: {workdir}/learning_rates.jsonl")


if __name__ == "__main__":
  main()
