"""Win rate against sampling temperature (the paper's Figures 2 right and 3 left), judged by the true reward.

python -m experiments.paper.win_rate --workdir=runs/sentiment --sentences=FILE [--pairs=FILE]

Reads the policies that `experiments.paper.frontier` left in the workdir. A policy wins at a held-out prefix
where its sample has a higher true reward than the sentence's own end; ties are half a win. Errors are
binomial, as in the paper. With --pairs, Anthropic HH, the same policies are asked what they were never
trained on, questions of people (the paper's Table 1). Writes win_rate.jsonl and win_rate.png.
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpojax.data import tokenization
from dpojax.data.examples import ASSISTANT, HUMAN
from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.paper import beta_ablation, frontier, methods, sentiment
from experiments.paper.methods import Line

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
BEST_OF = 128
ELSEWHERE = (0.0, 0.25)
"""The temperatures of Table 1."""


def wins(rewards: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Returns 1 where a reward is above the other's, one half where they are equal, else 0."""
  return np.where(rewards == theirs, 0.5, rewards > theirs)


def line(method: str, setting: float, temperature: float, won: np.ndarray) -> Line:
  """Returns a line of the table: won comparisons [n], the error binomial."""
  rate = float(np.mean(won))
  return {
    "method": method,
    "setting": setting,
    "temperature": temperature,
    "win_rate": rate,
    "error": math.sqrt(rate * (1 - rate) / len(won)),
    "n": len(won),
  }


def run(
  made: sentiment.Made,
  asked: sentiment.Asked,
  policies: Sequence[tuple[str, float, Any]],
  model: methods.RewardModel | None,
  *,
  temperatures: Sequence[float] = TEMPERATURES,
  best_of: int = BEST_OF,
) -> list[Line]:
  """Judges every policy at every temperature against the texts themselves.

  Args:
    made: the world.
    asked: the texts.
    policies: (method, setting, params).
    model: the reward model that the best of N is chosen by; None leaves best-of-N out.
    temperatures: to sample at.
    best_of: N.
  """
  theirs, prompts = made.classifier(asked.texts), (asked.prompts, asked.lengths)
  lines = []
  for temperature in temperatures:
    for method, setting, params in policies:
      answers = made.bench.answers(params, *prompts, seed=0, temperature=temperature)
      lines.append(line(method, setting, temperature, wins(answers.rewards[:, 0], theirs)))
    if model:
      drawn = methods.draw(made.world, *prompts, num_samples=best_of, temperature=temperature)
      chosen = methods.scores_of(made.world, model, *prompts, drawn)
      best = np.take_along_axis(drawn.scores, chosen.argmax(axis=1)[:, None], axis=1)[:, 0]
      lines.append(line(f"Best of {best_of}", best_of, temperature, wins(best, theirs)))
  return lines


def questions(folder: pathlib.Path, pairs: str, count: int) -> sentiment.Asked:
  """Returns what people ask first in dialogues of HH: no two alike, and of at least eight words."""
  asked = (
    text.partition(ASSISTANT)[0].removeprefix(HUMAN.rstrip()) for text in beta_ablation.chosen_texts(pairs)
  )
  texts = [" ".join(words) for words in map(str.split, dict.fromkeys(asked)) if len(words) >= 8]
  tokenizer = tokenization.load_tokenizer(str(folder / "tokenizer"))
  return sentiment.asked(tokenizer, texts[:count], np.random.default_rng(2))


def show(lines: Sequence[Line], axis: str = "temperature") -> None:
  """Prints a row a policy, a column a temperature or whatever the axis is."""
  places = sorted({each[axis] for each in lines})
  print("\n| method | setting | " + " | ".join(f"{axis} {place:g}" for place in places) + " |")
  print("|---|---|" + "---|" * len(places))
  of = {(each["method"], each["setting"], each[axis]): each for each in lines}
  for method, setting in dict.fromkeys((each["method"], each["setting"]) for each in lines):
    cells = [of[method, setting, place] for place in places]
    print(
      f"| {method} | {setting:g} | "
      + " | ".join(f"{cell['win_rate']:.3f} +- {cell['error']:.3f}" for cell in cells)
      + " |"
    )


def plot(
  lines: Sequence[Line],
  path: pathlib.Path,
  *,
  axis: str = "temperature",
  label: str = "sampling temperature",
  against: str = "the sentence's own end",
  scale: str = "linear",
) -> None:
  """Draws win rate against temperature, or another number of the lines, a curve a policy."""
  figure, (panel,) = figures.panels(1, size=(5.6, 4.0))
  for number, (method, setting) in enumerate(
    dict.fromkeys((each["method"], each["setting"]) for each in lines)
  ):
    points = [each for each in lines if (each["method"], each["setting"]) == (method, setting)]
    panel.errorbar(
      [each[axis] for each in points],
      [each["win_rate"] for each in points],
      yerr=[each["error"] for each in points],
      capsize=2,
      markersize=4,
      linewidth=1.2,
      label=method,
      **figures.style(number),
    )
  panel.axhline(0.5, color="black", linewidth=0.6)
  panel.set_xscale(scale)
  panel.set_xlabel(label)
  panel.set_ylabel(f"win rate against {against}")
  panel.legend(frameon=False, fontsize=8)
  figures.save(figure, path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, required=True)
  parser.add_argument("--sentences", required=True)
  parser.add_argument("--pairs", default="", help="Anthropic HH, for texts of another kind")
  parser.add_argument("--beta", type=float, default=0.1, help="of the DPO that is judged")
  parser.add_argument("--target_kl", type=float, default=6.0, help="of the PPO that is judged")
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  with command(folder):
    made = sentiment.make(folder, arguments.sentences)
    plan = frontier.SENTIMENT
    settings = (
      (frontier.DPO, arguments.beta),
      (frontier.PPO, arguments.target_kl),
      (frontier.PPO_GT, arguments.target_kl),
      (frontier.PREFERRED_FT, 0.0),
    )
    policies = [("SFT", 0.0, made.world.model.params)] + [
      (method, setting, methods.load_policy(made.world, method, setting, 0)) for method, setting in settings
    ]
    lines = run(made, made.held_out, policies, methods.reward_model(made.world, plan.reward_model))
    elsewhere = []
    if arguments.pairs:
      asked = questions(folder, arguments.pairs, len(made.held_out.texts))
      elsewhere = run(made, asked, policies, None, temperatures=ELSEWHERE)
    sweep.write_lines(
      folder / "win_rate.jsonl", lines + [each | {"texts": "questions"} for each in elsewhere]
    )
    plot(lines, folder / "win_rate.png")
  show(lines)
  if elsewhere:
    print("\nasked what people ask, which they were not trained on:")
    show(elsewhere)
  methods.show_configurations(lines)
  print(f"\nwritten: {folder}/win_rate.jsonl and win_rate.png")


if __name__ == "__main__":
  main()
