"""IMDb: film reviews, cut into the beginning that is given and the rest (Maas et al. 2011)."""

import hashlib
import json
import pathlib
import re
from typing import Any

import tensorflow_datasets as tfds

from dpojax.data import examples
from dpojax.data.builders import base

URL = "https://huggingface.co/api/datasets/stanfordnlp/imdb/parquet/plain_text"
"""Lists the Parquet files of a split."""

SHORTEST, LONGEST = 2, 8


class IMDb(base.ComparisonBuilder, skip_registration=True):
  """IMDb: a review's first 2 to 8 words are the prompt, the rest is the one response.

  For fine-tuning and for prompts to sample from; the paper's comparisons are of samples and were
  never published. How many words are given follows from the review's digest. Line breaks written as
  <br /> become those of text.
  """

  name = "imdb"
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="all")]

  def urls(self) -> dict[str, list[str]]:
    return {split: [f"{URL}/{split}"] for split in ("train", "test")}

  def download(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[str]]:
    lists = dl_manager.download(self.urls())
    return {
      split: dl_manager.download(json.loads(pathlib.Path(path).read_text()))
      for split, (path,) in lists.items()
    }

  def parse(self, record: Any) -> list[examples.Example]:
    text = re.sub(r"<br\s*/?>", "\n", examples.get(record, "text", str))
    words = [word.end() for word in re.finditer(r"\S+", text)]
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    # By the review and no random number: the same in any order and on any machine.
    given = SHORTEST + digest[0] % (LONGEST - SHORTEST + 1)
    if len(words) <= given:
      raise examples.LeftOut("too_short", f"{len(words)} words, of which {given} would be given")
    end = words[given - 1]
    return [examples.checked(text[:end], [text[end:]], ["the rest of the review"])]
