"""Preference pairs as chat: any file of pairs becomes messages, short ones kept, split by prompt."""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpojax.data import builders
from dpojax.data.examples import ASSISTANT, HUMAN, DataError, Example
from dpojax.runtime.command import say

DEFAULT = "hh_harmless_base_test.jsonl.gz"
"""The file in the folder that DPOJAX_DATA names, where no other is given."""


def find(path: str) -> str:
  """Returns the file of pairs: the one that is given, or Anthropic HH in the folder of DPOJAX_DATA.

  Raises:
    DataError: neither is there.
  """
  folder = os.environ.get("DPOJAX_DATA", "")
  found = pathlib.Path(path).expanduser() if path else pathlib.Path(folder) / DEFAULT
  if not found.is_file():
    raise DataError(
      f"there are no pairs at {found}; give --pairs=FILE, or a folder with {DEFAULT} as DPOJAX_DATA"
    )
  return str(found)


def messages_of(dialogue: str) -> list[dict[str, str]]:
  """Returns the turns of a prompt in text: those of an HH dialogue, or all of it as one of the user."""
  turns = re.split(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})", dialogue.removesuffix(ASSISTANT))
  if len(turns) == 1 or turns[0].strip():
    return [{"role": "user", "content": dialogue.strip()}]
  roles = {HUMAN: "user", ASSISTANT: "assistant"}
  return [{"role": roles[mark], "content": text.strip()} for mark, text in zip(turns[1::2], turns[2::2])]


def record_of(example: Example) -> dict[str, Any]:
  """Returns the first two responses of an example as a record of messages."""
  if not isinstance(example.prompt, str):
    chosen, rejected = example.responses[:2]
    return {"prompt": example.prompt, "chosen": chosen, "rejected": rejected}
  say_ = lambda text: [{"role": "assistant", "content": text.strip()}]
  chosen, rejected = map(say_, example.responses[:2])
  return {"prompt": messages_of(example.prompt), "chosen": chosen, "rejected": rejected}


def text_of(messages: Sequence[dict]) -> str:
  """Returns what the messages of a response say."""
  return "\n".join(str(message["content"]) for message in messages)


def read(
  path: str, tokenizer: Any, cache: pathlib.Path, *, longest_prompt: int, longest: int
) -> tuple[list[dict], list[dict]]:
  """Returns the pairs of a file that are short enough, shuffled the same way every time, and the others.

  Args:
    path: in any form that can be trained on.
    tokenizer: with a chat template.
    cache: where prepared data are kept.
    longest_prompt: tokens a prompt may have.
    longest: tokens a prompt and each response may have together.

  Raises:
    DataError: the file cannot be read, or no pair is short enough.
  """
  examples = builders.prepare("jsonl", path=path, data_dir=cache)
  records = [record_of(each) for each in examples if len(each.responses) > 1 and all(each.responses[:2])]
  fitting, others = [], []
  for each in records:
    (fitting if _fits(each, tokenizer, longest_prompt, longest) else others).append(each)
  say(
    f"{path}: {len(fitting)} of {len(records)} pairs have prompts of at most {longest_prompt} tokens and "
    f"{longest} with each answer; the others are too long"
  )
  if not fitting:
    raise DataError(f"{path} has no pair of at most {longest} tokens; give shorter ones")
  return [fitting[i] for i in np.random.default_rng(0).permutation(len(fitting))], others


def _fits(record: dict, tokenizer: Any, longest_prompt: int, longest: int) -> bool:
  count = lambda messages, **options: len(
    tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
  )
  if count(record["prompt"], add_generation_prompt=True) > longest_prompt:
    return False
  return all(count(record["prompt"] + record[side]) <= longest for side in ("chosen", "rejected"))


def lengthened(records: Sequence[dict], tokenizer: Any, tokens: int) -> list[dict]:
  """Returns records whose answers go on with those of the records behind them, up to so many tokens each.

  What they say makes no sense then; how long a step of them takes does.
  """

  def answer(i: int, side: str) -> list[dict[str, str]]:
    ids: list[int] = []
    while len(ids) < tokens:
      ids += tokenizer(" " + text_of(records[i % len(records)][side]), add_special_tokens=False)["input_ids"]
      i += 1
    return [{"role": "assistant", "content": tokenizer.decode(ids[:tokens]).strip()}]

  return [
    record | {side: answer(i, side) for side in ("chosen", "rejected")} for i, record in enumerate(records)
  ]


def split(records: Sequence[dict], sizes: dict[str, int]) -> dict[str, list[dict]]:
  """Returns named parts of about those sizes, and of the rest; all pairs of a prompt are in one part.

  Args:
    records: in an order that does not matter to them.
    sizes: pairs of each part; the last may have 0, which is all that is left.

  Raises:
    DataError: there are too few.
  """
  by_prompt = {}
  for record in records:
    by_prompt.setdefault(json.dumps(record["prompt"]), []).append(record)
  groups, parts = iter(by_prompt.values()), {}
  for name, size in sizes.items():
    parts[name] = []
    while len(parts[name]) < (size or len(records)) and (group := next(groups, None)):
      parts[name] += group
    if not parts[name] or len(parts[name]) < size:
      raise DataError(f"{len(records)} short pairs are too few for {sizes}; give a larger file")
  return parts
