"""The true reward of a film review in the paper: p(positive) by siebert/sentiment-roberta-large-english.

    --reward=experiments.paper.siebert:p_positive

It is a classifier of `transformers` and runs in PyTorch, which dpojax does not need otherwise:
pip install torch. $DPOJAX_SENTIMENT names a folder with it, where the hub is out of reach.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import transformers

from dpojax.runtime.errors import ConfigError

Classify = Callable[[list[str]], list[list[dict[str, Any]]]]
"""Texts -> of each every label with its score."""

MODEL = "siebert/sentiment-roberta-large-english"
LONGEST = 512


def p_positive(prompt: str, response: str) -> float:
  """Returns p(positive | prompt and response), from the first 512 tokens of both."""
  return positive(classifier(os.environ.get("DPOJAX_SENTIMENT", MODEL)), prompt + response)


def positive(classify: Classify, text: str) -> float:
  """Returns the score that a classifier gives to the label POSITIVE.

  Raises:
    ConfigError: it has no such label.
  """
  scores = {each["label"].upper(): float(each["score"]) for each in classify([text])[0]}
  if "POSITIVE" not in scores:
    raise ConfigError(
      f"the classifier has the labels {', '.join(scores)}, not POSITIVE; name one of sentiment"
    )
  return scores["POSITIVE"]


@functools.cache
def classifier(name: str) -> Classify:
  """Returns the classifier of a hub name or folder; on the accelerator that PyTorch finds, else on the CPU.

  Raises:
    ConfigError: there is no PyTorch, or no such classifier.
  """
  if importlib.util.find_spec("torch") is None:
    raise ConfigError(
      f"{name} runs in PyTorch, which is not installed; pip install torch, or give another "
      "--reward=module:function of a prompt and a response"
    )
  try:
    return transformers.pipeline(
      "text-classification", model=name, top_k=None, truncation=True, max_length=LONGEST
    )
  except (OSError, ValueError) as error:
    raise ConfigError(
      f"the classifier {name} cannot be loaded ({error}); set DPOJAX_SENTIMENT to a folder with it"
    ) from error
