"""Anthropic HH: dialogues with a helpful and harmless assistant (Bai et al. 2022)."""

from typing import Any

import tensorflow_datasets as tfds

from dpojax.data import examples
from dpojax.data.builders import base

URL = "https://raw.githubusercontent.com/anthropics/hh-rlhf/master"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


class HH(base.ComparisonBuilder, skip_registration=True):
  """Anthropic HH: the prompt of a pair ends with its last "\\n\\nAssistant:".

  A prompt that has several pairs keeps them all, one comparison each.
  """

  name = "hh"
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("all", *SUBSETS)]

  def urls(self) -> dict[str, list[str]]:
    chosen = self.builder_config.name
    subsets = SUBSETS if chosen == "all" else (chosen,)
    return {split: [f"{URL}/{subset}/{split}.jsonl.gz" for subset in subsets] for split in ("train", "test")}

  def parse(self, record: Any) -> list[examples.Example]:
    chosen, rejected = (examples.get(record, key, str) for key in ("chosen", "rejected"))
    return [examples.split_dialogue(chosen, rejected)]
