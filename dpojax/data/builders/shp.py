"""Stanford Human Preferences: answers to Reddit posts, by their score (Ethayarajh et al. 2022)."""

from typing import Any

import tensorflow_datasets as tfds

from dpojax.data import examples
from dpojax.data.builders import base

URL = "https://huggingface.co/datasets/stanfordnlp/SHP/resolve/main"
SUBREDDITS = (
  "askacademia",
  "askanthropology",
  "askbaking",
  "askcarguys",
  "askculinary",
  "askdocs",
  "askengineers",
  "askhistorians",
  "askhr",
  "askphilosophy",
  "askphysics",
  "askscience",
  "asksciencefiction",
  "asksocialscience",
  "askvet",
  "changemyview",
  "explainlikeimfive",
  "legaladvice",
)
SCORE_RATIO = 2


class SHP(base.ComparisonBuilder, skip_registration=True):
  """Stanford Human Preferences: pairs of answers of which one scores at least twice as high.

  The others are left out, as in the paper's code. A post is one human turn of a dialogue.
  """

  name = "shp"
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("all", *SUBREDDITS)]

  def urls(self) -> dict[str, list[str]]:
    chosen = self.builder_config.name
    subreddits = SUBREDDITS if chosen == "all" else (chosen,)
    return {
      split: [f"{URL}/{subreddit}/{split}.json" for subreddit in subreddits]
      for split in ("train", "validation", "test")
    }

  def parse(self, record: Any) -> list[examples.Example]:
    post, *answers = (examples.get(record, key, str) for key in ("history", "human_ref_A", "human_ref_B"))
    scores = [examples.get(record, key, (int, float)) for key in ("score_A", "score_B")]
    if max(scores) < SCORE_RATIO * min(scores):
      raise examples.LeftOut("score_ratio", f"scores {scores} are within a factor {SCORE_RATIO}")
    first = 0 if examples.get(record, "labels", int) == 1 else 1
    return [examples.human_and_assistant(post, [answers[first], answers[1 - first]])]
