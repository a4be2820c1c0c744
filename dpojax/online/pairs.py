"""What was said of a prompt's samples, as comparisons: pure functions of numbers and words.

Samples are named by their number, 0 to K - 1. Ties are no comparisons: they are left out and counted.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Paired(NamedTuple):
  """The comparisons of a round.

  Attributes:
    comparisons: (prompt, numbers of its samples, best first) of each.
    counts: of what was left out: 'ties', and by 'choice' 'refused' and 'unparseable'.
  """

  comparisons: list[tuple[int, tuple[int, ...]]]
  counts: dict[str, int]


def paired(pairing: str, said: Sequence[Sequence]) -> Paired:
  """Returns the comparisons of a round's prompts.

  Args:
    pairing: 'best_worst', 'ranking' or 'choice'.
    said: of each prompt the scores of its samples [K]; or, by 'choice' of a judge, what became of the first
      of samples 0 and 1, 2 and 3, ... [K / 2]: 'win', 'loss', 'tie', 'refused' or 'unparseable'.
  """
  comparisons, counts = [], collections.Counter(ties=0)
  for prompt, each in enumerate(said):
    if pairing == "choice":
      outcomes = each if each and isinstance(each[0], str) else outcomes_of(each)
      found = by_choice(outcomes)
      counts.update({"tie": "ties"}.get(name, name) for name in outcomes if name not in ("win", "loss"))
    else:
      order = (best_and_worst if pairing == "best_worst" else ranking)(each)
      found = [order] if len(order) > 1 else []
      counts["ties"] += not found
    comparisons += [(prompt, order) for order in found]
  return Paired(comparisons, dict(counts))


def best_and_worst(scores: Sequence[float]) -> tuple[int, ...]:
  """Returns those with the highest and the lowest score, of equals the first; none where all are equal."""
  best, worst = int(np.argmax(scores)), int(np.argmin(scores))
  # Equal scores say nothing of which is better: such a pair would teach noise.
  return (best, worst) if scores[best] > scores[worst] else ()


def ranking(scores: Sequence[float]) -> tuple[int, ...]:
  """Returns the samples from the highest score to the lowest, of equal ones the first alone."""
  first = [k for k, score in enumerate(scores) if score not in scores[:k]]
  return tuple(sorted(first, key=lambda k: -scores[k]))


def outcomes_of(scores: Sequence[float]) -> list[str]:
  """Returns what becomes of the first of samples 0 and 1, 2 and 3, ... when the higher score wins."""
  return [
    "win" if first > second else "loss" if second > first else "tie"
    for first, second in zip(scores[::2], scores[1::2], strict=True)
  ]


def by_choice(outcomes: Sequence[str]) -> list[tuple[int, int]]:
  """Returns winner and loser of samples 0 and 1, 2 and 3, ..., of those that have both."""
  order = {"win": lambda i: (2 * i, 2 * i + 1), "loss": lambda i: (2 * i + 1, 2 * i)}
  return [order[outcome](i) for i, outcome in enumerate(outcomes) if outcome in order]


def offline_beside(own: int, offline: int, share: float, rng: np.random.Generator) -> np.ndarray:
  """Returns which offline comparisons stand beside own ones, so that they are a share of all.

  None comes twice while there are others.

  Args:
    own: comparisons of the round.
    offline: how many there are to draw from.
    share: below 1.
    rng: draws.
  """
  return np.resize(rng.permutation(offline), round(own * share / (1 - share)))
