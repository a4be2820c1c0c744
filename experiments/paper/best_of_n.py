"""What the best of N samples are worth (the paper's Figure 4), and what their choice over-optimises.

python -m experiments.paper.best_of_n --workdir=runs/sentiment --sentences=FILE

N samples of the reference to each held-out prefix; the best is chosen by the reward model, and by the
true reward beside it. Writes best_of_n.jsonl and best_of_n.png: true reward against N; true and learned
reward along the KL that N stands for; and the same along PPO on the learned reward, from the runs that
`experiments.paper.frontier` left in the workdir. Every N is computed from one draw of the largest.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.paper import frontier, methods, sentiment
from experiments.paper.methods import Line

TEMPERATURES = (0.25, 0.7, 1.0)


def run(
  made: sentiment.Made,
  model: methods.RewardModel,
  *,
  sizes: Sequence[int] = methods.BEST_OF,
  temperatures: Sequence[float] = TEMPERATURES,
) -> list[Line]:
  """Returns a line for each temperature, size, and way to choose."""
  lines = []
  for temperature in temperatures:
    for chosen_by in (model, None):
      lines += methods.best_of_n_lines(
        made.world,
        made.held_out.prompts,
        made.held_out.lengths,
        chosen_by,
        sizes=sizes,
        temperature=temperature,
      )
  return lines


def show(lines: Sequence[Line]) -> None:
  """Prints a row a size."""
  print("\n| chosen by | T | N | true reward | learned or true score | KL bound, nats |")
  print("|---|---|---|---|---|---|")
  for line in lines:
    print(
      f"| {line['method']} | {line['temperature']:g} | {line['setting']} | {line['reward']:.3f} +- "
      f"{line['reward_error']:.3f} | {line['score']:.3f} | {line['kl']:.2f} |"
    )


def of_ppo(lines: Sequence[Line]) -> list[Line]:
  """Returns the measurements of PPO on the learned reward at the largest target, first seed, by KL."""
  ours = [line for line in lines if line["method"] == frontier.PPO and line["step"]]
  farthest = max((line["setting"] for line in ours), default=0.0)
  first = min((line["seed"] for line in ours), default=0)
  return sorted(
    (line for line in ours if (line["setting"], line["seed"]) == (farthest, first)),
    key=lambda line: line["kl"],
  )


def plot(lines: Sequence[Line], path: pathlib.Path, ppo: Sequence[Line] = ()) -> None:
  """Draws true reward against N, and along KL what the learned reward thinks beside what is true."""
  figure, (left, right, along) = figures.panels(3, columns=3, size=(4.2, 3.4))
  curves = list(dict.fromkeys((line["method"], line["temperature"]) for line in lines))
  for number, (method, temperature) in enumerate(curves):
    points = [line for line in lines if (line["method"], line["temperature"]) == (method, temperature)]
    left.errorbar(
      [line["setting"] for line in points],
      [line["reward"] for line in points],
      yerr=[line["reward_error"] for line in points],
      capsize=2,
      markersize=4,
      label=f"{method}, T = {temperature:g}",
      **figures.style(number),
    )
  left.set_xscale("log", base=2)
  left.set_xlabel("N")
  left.set_ylabel("true reward")
  left.legend(frameon=False, fontsize=6)
  points = [line for line in lines if line["method"] == "Best of N" and line["temperature"] == 1]
  kl = [line["kl"] for line in points]
  standard = lambda name: (
    (np.array([line[name] for line in points]) - points[0][name]) / (points[1][name] - points[0][name])
  )
  for number, (name, label) in enumerate((("reward", "true reward"), ("score", "learned reward"))):
    right.plot(kl, standard(name), label=label, markersize=4, **figures.style(number))
  right.set_xlabel("KL of the best of N, nats")
  right.set_ylabel("gain, in units of N = 2's")
  right.legend(frameon=False, fontsize=8)
  beside = along.twinx()
  for number, (panel, name, label) in enumerate(
    ((along, "reward", "true reward"), (beside, "train/objective/scores", "learned reward"))
  ):
    panel.plot(
      [line["kl"] for line in ppo],
      [line[name] for line in ppo],
      label=label,
      markersize=4,
      **figures.style(number),
    )
    panel.set_ylabel(label)
    panel.legend(frameon=False, fontsize=8, loc=("upper left", "lower right")[number])
  along.set_xlabel("KL of PPO on the learned reward, nats")
  figures.save(figure, path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, required=True)
  parser.add_argument("--sentences", required=True)
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  beside = of_ppo(frontier.read(folder))
  with command(folder):
    made = sentiment.make(folder, arguments.sentences)
    lines = run(made, methods.reward_model(made.world, frontier.SENTIMENT.reward_model))
    sweep.write_lines(folder / "best_of_n.jsonl", lines)
    plot(lines, folder / "best_of_n.png", beside)
  show(lines)
  print(f"\nwritten: {folder}/best_of_n.jsonl and best_of_n.png")


if __name__ == "__main__":
  main()
