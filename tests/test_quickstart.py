"""The quickstart at a tenth of its size, and the rule it is judged by."""

import json

import numpy as np
import pytest

from experiments import quickstart
from experiments import quickstart_world as world


@pytest.mark.parametrize(
  "text, score",
  [
    ("the film is brilliant .", 1.6),
    ("the film is awful .", -1.6),
    ("the film is not brilliant .", -0.7 * 1.6),
    ("the film is very dull .", -1.3),
    ("i loved the plot and the music was flat .", 1.5 - 0.7),
    ("i loved the plot but the music was flat .", 1.5 - 1.5 * 0.7),
    ("the film is .", 0.0),
    ("the film is not the plot is clever .", 1.0),
  ],
)
def test_the_true_reward_follows_its_rule(text, score):
  np.testing.assert_allclose(world.true_reward(text), 1 / (1 + np.exp(-score)), rtol=1e-12)


def test_the_grammar_speaks_its_vocabulary_and_prefixes_are_2_to_8_words(rng):
  words = set(world.vocabulary())
  for _ in range(300):
    text = world.review(rng)
    assert set(text.split()) <= words and text.endswith(" .")
    start = world.prefix(text, rng)
    assert text.startswith(start) and 2 <= len(start.split()) <= 8


def test_pairs_are_labelled_by_the_true_reward_and_ties_left_out():
  records = quickstart.preferences(
    ["the film"], [["is fine .", "is bad .", "is bad .", "is good ."]], np.array([[0.5, 0.2, 0.2, 0.9]])
  )
  assert [(r["chosen"], r["rejected"]) for r in records] == [
    (" is fine .", " is bad ."),
    (" is fine .", " is bad ."),
    (" is good .", " is fine ."),
    (" is good .", " is bad ."),
    (" is good .", " is bad ."),
  ]


def test_the_quickstart_in_small_raises_the_true_reward(tmp_path):
  sizes = quickstart.SMALL
  summary = quickstart.run(tmp_path, sizes)
  for name in ("summary.json", "frontier.png", "sft/metrics.jsonl", "dpo_beta_0.5/metrics.jsonl"):
    assert (tmp_path / name).stat().st_size > 0
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  reference, last = summary["reference"], summary["betas"]["0.5"][-1]
  assert reference["kl"] == reference["kl_error"] == 0
  assert last["kl"] > 2 * last["kl_error"] > 0
  assert last["reward"] > reference["reward"] + 2 * last["reward_error"]
  again = quickstart.run(tmp_path, sizes)
  assert again == summary
