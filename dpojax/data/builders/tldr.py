"""TL;DR: which of two summaries of a Reddit post people prefer (Stiennon et al. 2020)."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from dpojax.data import examples
from dpojax.data.builders import base

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"
BATCHES = (*range(3, 21), 22)
SPLITS = {"train": ("train",), "test": ("valid1", "valid2")}


class TLDR(base.ComparisonBuilder, skip_registration=True):
  """Summaries from human feedback: a Reddit post and two summaries, one of them preferred.

  Train and test are the published "train" and "valid1" with "valid2". The prompt is
  "SUBREDDIT: r/...", "TITLE: ...", "POST: ...", "TL;DR:", a line each.
  """

  name = "tldr"
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="all")]

  def urls(self) -> dict[str, list[str]]:
    return {split: [f"{URL}/batch{number}.json" for number in BATCHES] for split in SPLITS}

  def records(self, split: str, paths: list[str]) -> Iterator[tuple[str, Any]]:
    for where, record in super().records(split, paths):
      published = record.get("split") if isinstance(record, dict) else None
      local = isinstance(self.builder_config, base.LocalFiles)
      # A batch mixes splits. What names none is passed on, for `parse` to say what is wrong.
      if local or published in SPLITS[split] or not isinstance(published, str):
        yield where, record

  def parse(self, record: Any) -> list[examples.Example]:
    info = examples.get(record, "info", dict)
    subreddit, title, post = (examples.get(info, key, str) for key in ("subreddit", "title", "post"))
    summaries = [examples.get(summary, "text", str) for summary in examples.get(record, "summaries", list)]
    choice = examples.get(record, "choice", int)
    if len(summaries) != 2 or choice not in (0, 1):
      raise examples.RecordError(
        "wrong_type", f"{len(summaries)} summaries and choice {choice}, not 2 and 0 or 1"
      )
    prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
    pair = [f" {summaries[k].strip()}" for k in (choice, 1 - choice)]
    return [examples.checked(prompt, pair, ["the chosen summary", "the other summary"])]
