"""Stack Exchange: answers to questions, by their score (Lambert et al. 2023)."""

import html.parser
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpojax.data import examples, files
from dpojax.data.builders import base

URL = "https://huggingface.co/api/datasets/HuggingFaceH4/stack-exchange-preferences/parquet/default/train"
"""Lists the Parquet files."""

TEST_SHARE, TEST_SEED = 0.01, 42


class StackExchange(base.ComparisonBuilder, skip_registration=True):
  """Stack Exchange preferences: every pair of a question's answers whose scores differ.

  The score is `pm_score`; pairs that tie are left out. HTML is stripped. The test split is 1 % of
  the questions, the first of a permutation with seed 42, as in the paper's code.
  """

  name = "stack_exchange"
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="all")]

  def urls(self) -> dict[str, list[str]]:
    return {"train": [URL], "test": [URL]}

  def download(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[str]]:
    listed = json.loads(pathlib.Path(dl_manager.download(URL)).read_text())
    paths = dl_manager.download(listed)
    return {"train": paths, "test": paths}

  def records(self, split: str, paths: list[str]) -> Iterator[tuple[str, Any]]:
    records = super().records(split, paths)
    if isinstance(self.builder_config, base.LocalFiles):
      return records
    # Drawn of all questions, hence they are counted before the first is read.
    in_test = _in_test(sum(files.count_rows(path) for path in paths))
    return itertools.compress(records, in_test if split == "test" else ~in_test)

  def parse(self, record: Any) -> Iterator[examples.Example | examples.RecordError]:
    question = strip_html(examples.get(record, "question", str))
    answers = [
      (examples.get(answer, "pm_score", (int, float)), strip_html(examples.get(answer, "text", str)))
      for answer in examples.get(record, "answers", list)
    ]
    # Every pair of a question, as in the paper's code, and not the best against the rest.
    if len(answers) < 2:
      raise examples.RecordError("too_few_responses", f"{len(answers)} answers are not a pair")
    for (one, text), (other, other_text) in itertools.combinations(answers, 2):
      if one == other:
        yield examples.LeftOut("equal_score", f"both answers score {one}")
        continue
      pair = [text, other_text] if one > other else [other_text, text]
      try:
        yield examples.human_and_assistant(question, pair)
      except examples.RecordError as error:
        yield error


def strip_html(text: str) -> str:
  """Returns the text of HTML: paragraphs apart by an empty line, code blocks in <code> tags.

  Code keeps its white space. The tags around it stay, as in the paper's code.
  """
  stripper = _Stripper()
  stripper.feed(text)
  stripper.close()
  return stripper.text()


class _Stripper(html.parser.HTMLParser):
  """Collects blocks of text; `text` joins them."""

  BLOCKS = frozenset("p pre div blockquote ul ol li table tr h1 h2 h3 h4 h5 h6 hr dl dt dd".split())

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self._blocks, self._parts, self._pre = [], [], False

  def handle_starttag(self, tag: str, attrs: list):
    if tag in self.BLOCKS:
      self._end_block()
      self._pre = self._pre or tag == "pre"
    elif tag == "br":
      self._parts.append("\n")

  def handle_endtag(self, tag: str):
    if tag in self.BLOCKS:
      self._end_block()
      self._pre = self._pre and tag != "pre"

  def handle_data(self, data: str):
    self._parts.append(data)

  def text(self) -> str:
    self._end_block()
    return "\n\n".join(self._blocks)

  def _end_block(self):
    block, self._parts = "".join(self._parts), []
    if block.strip():
      self._blocks.append(f"<code>{block}</code>" if self._pre else block.strip())


def _in_test(questions: int) -> np.ndarray:
  chosen = np.random.default_rng(TEST_SEED).permutation(questions)[: int(questions * TEST_SHARE)]
  in_test = np.zeros(questions, bool)
  in_test[chosen] = True
  return in_test
