"""Prompts to sample from: read from a file, in ids, as the policy was trained to read them."""

import collections
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from dpojax.data import records, tokenization
from dpojax.data.examples import DataError, Example, RecordError
from dpojax.data.truncation import end_kept
from dpojax.runtime import paths
from dpojax.runtime.command import say
from dpojax.runtime.errors import ConfigError
from dpojax.sample.generator import Generator
from dpojax.training import weights


def read_prompts(
  path: str | os.PathLike, limit: int = 0, form: str = "", on_error: str = "raise"
) -> dict[int, Example]:
  """Returns the prompts of a file, without responses, by the number of their record, from 0.

  Args:
    path: in any form that can be trained on.
    limit: how many are read, the first; 0 is all.
    form: a name in `records.FORMS`; '' recognises it by the records' keys.
    on_error: "skip" leaves records without a prompt out, counts them and says so; "raise" stops at
      the first.

  Raises:
    DataError: the file is not there or has no prompt, or a record has none; it says which.
  """
  if on_error not in ("skip", "raise"):
    raise DataError(f"--on_error is {on_error!r}; it is 'skip' or 'raise'")
  left_out = [] if on_error == "skip" else None
  every = records.read_file(
    path, lambda record: records.parse_prompt(record, form), given="--prompts", left_out=left_out
  )
  prompts = dict(itertools.islice(every, limit or None))
  if left_out:
    say(records.counted(left_out))
  if not prompts:
    raise DataError(f'{path} has no records with a prompt; give one object with "prompt" a line')
  return prompts


def encode(
  prompts: Sequence[str | list[dict] | Example],
  tokenizer: Any,
  *,
  longest: int,
  keep: str,
  path: Any,
  reading: tokenization.Reading = tokenization.Reading(),
  vocab_size: int | None = None,
  left_out: list | None = None,
) -> tuple[list[list[int] | None], int]:
  """Returns the ids of prompts and how many were cut; None of one that is left out.

  `left_out` gets what is wrong with prompts that cannot be tokenized; None raises the first.

  Raises:
    DataError: one cannot be tokenized, or none can, or one has an id that the model has no embedding
      of; it says which.
  """
  ids, cuts, counts = [], 0, collections.Counter()
  encoded = tokenization.encode_prompts(
    prompts, tokenizer, longest=longest, keep=keep, reading=reading, counts=counts
  )
  if named := counts["with_special_tokens_in_text"]:
    say(
      f"{named} of {len(prompts)} prompts of {path} have a special token's name in their text, which is read "
      f"as data.special_tokens={reading.special_tokens!r} says"
    )
  for i, each in enumerate(encoded):
    if isinstance(each, RecordError):
      problem = f"{path} prompt {i + 1}: {each}"
      if left_out is None:
        raise DataError(problem) from each
      left_out.append(RecordError(each.reason, problem))
      ids.append(None)
      continue
    largest = max(each[0], default=0)
    if vocab_size is not None and largest >= vocab_size:
      raise DataError(
        f"{path} prompt {i + 1} has id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the "
        f"model has embeddings of {vocab_size} ids; take its own tokenizer, or leave out that token"
      )
    ids.append(each[0])
    cuts += each[1]
  if all(each is None for each in ids):
    raise DataError(f"none of {len(ids)} prompts can be tokenized; {records.counted(left_out)}")
  return ids, cuts


def reading_of(policy: weights.Loaded, out: str | os.PathLike = "") -> tokenization.Reading:
  """Returns how prompts are read: as the run's data were; of another model on the day its file was begun."""
  if policy.settings is not None:
    return tokenization.Reading.of(policy.settings.data)
  about = paths.of(out).with_suffix(".config.json") if out else None
  try:
    kept = json.loads(about.read_text())["reading"]["date"] if about else ""
  except (OSError, ValueError, KeyError, TypeError):
    kept = ""
  # A template that tells the day would else read the same prompts differently after midnight.
  return tokenization.Reading(date=kept or str(tokenization.Reading().day()))


def prompt_room(policy: weights.Loaded, generator: Generator, max_prompt_length: int = 0) -> tuple[int, str]:
  """Returns how many tokens of a prompt are kept, and of which end.

  Raises:
    ConfigError: the model has no positions left for a prompt.
  """
  keep, longest = "end", max_prompt_length
  if policy.settings is not None:
    data = policy.settings.data
    keep = end_kept(data)
    longest = longest or data.max_prompt_length
  room = generator.longest_prompt
  if room is not None and room < max(1, max_prompt_length):
    raise ConfigError(
      f"the model has {room + generator.draw.max_new_tokens} positions, of which "
      f"--max_new_tokens={generator.draw.max_new_tokens} leaves {max(room, 0)} for a prompt; lower "
      "it, or --max_prompt_length"
    )
  # A model without a bound and a run without one: 2**20 stands for none.
  return min(each for each in (longest or 2**20, room or 2**20)), keep
