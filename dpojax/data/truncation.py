"""How long a comparison may be, and what is cut of longer ones."""

import collections
import dataclasses
from collections.abc import Collection
from typing import Any

from dpojax.data.encoder import Encoded
from dpojax.data.examples import DataError, RecordError

TRUNCATION_SIDE = {
  "hh": "end",
  "imdb": "start",
  "jsonl": "end",
  "shp": "start",
  "stack_exchange": "start",
  "tldr": "start",
}
"""Which end of an over-long prompt is kept. HH as in the paper's code, where the others keep the
start; for local files the end, because a conversation's last turn is what is answered."""


def end_kept(data: Any) -> str:
  """Returns which end of an over-long prompt stays under a run's `config.data`: "end" or "start"."""
  return data.keep or TRUNCATION_SIDE.get(data.source, "start")


@dataclasses.dataclass(frozen=True)
class Truncation:
  """How long a comparison may be, in tokens, by the rule of the paper's code.

  If the prompt and the longest response exceed `max_length`, the prompt is cut to
  `max_prompt_length`; if they still do, every response is cut to the rest and so loses its EOS.

  Attributes:
    max_length: of the prompt and one response.
    max_prompt_length: of a prompt that is cut.
    keep: which part of it stays, "end" or "start". A BOS stays in front either way.
  """

  max_length: int
  max_prompt_length: int
  keep: str

  def __post_init__(self):
    if not 0 < self.max_prompt_length < self.max_length:
      raise DataError(
        f"data.max_prompt_length is {self.max_prompt_length} and data.max_length "
        f"{self.max_length}; leave room for responses"
      )
    if self.keep not in ("start", "end"):
      raise DataError(f"data.keep is {self.keep!r}; it is 'start' or 'end'")


def cut(
  encoded: Encoded,
  truncation: Truncation,
  *,
  bos: int | None,
  ends: Collection[int],
  counts: collections.Counter,
) -> Encoded:
  """Returns the ids as `Truncation` has them, and counts what was cut.

  Args:
    encoded: a comparison.
    truncation: how long it may be.
    bos: id that stays in front of a prompt.
    ends: ids that end a response.
    counts: of what was cut.

  Raises:
    RecordError: no comparison is left.
  """
  prompt, responses, scored, _ = encoded
  # By the longest response, so that all of a comparison stand behind the same prompt.
  longest = max(map(len, responses))
  most = truncation.max_prompt_length
  if len(prompt) + longest > truncation.max_length:
    prompt = cut_prompt(prompt, most, truncation.keep, bos)
  if len(prompt) + longest > truncation.max_length:
    # Not the prompt's own length: the paper's code takes its bound, so a short prompt buys nothing.
    room = truncation.max_length - most
    responses, scored = [each[:room] for each in responses], [each[:room] for each in scored]
  for ids, which in zip(responses, scored):
    if ids and not any(which):
      raise RecordError(
        "nothing_scored_after_truncation", "data.max_length cuts off all that is scored of a response"
      )
  # What told two answers apart may have been cut off.
  _check_different(encoded, responses, scored)
  shorter = [len(each) < len(whole) for each, whole in zip(responses, encoded.responses)]
  counts["prompts_cut"] += len(prompt) < len(encoded.prompt)
  counts["responses_cut"] += sum(shorter)
  counts["responses_without_eos"] += sum(
    bool(each) and (short or each[-1] not in ends) for each, short in zip(responses, shorter)
  )
  return Encoded(prompt, responses, scored)


def cut_prompt(prompt: list[int], most: int, keep: str, bos: int | None) -> list[int]:
  """Returns the first or the last `most` ids of a prompt; BOS stays in front."""
  if len(prompt) <= most:
    return prompt
  if keep == "start":
    return prompt[:most]
  # BOS stays in front: a model that was trained with it reads anything else as a text that goes on.
  head = prompt[:1] if prompt[0] == bos else []
  return head + prompt[len(prompt) - most + len(head) :]


def _check_different(encoded: Encoded, responses: list[list[int]], scored: list[list[bool]]) -> None:
  """Refuses responses that are the same, in ids and in what of them is scored."""
  different = lambda ids, which: len(set(zip(map(tuple, ids), map(tuple, which))))
  if different(responses, scored) == len(responses):
    return
  same = encoded.whole and different(encoded.responses, encoded.scored) < len(responses)
  raise RecordError(
    "identical_responses" if same else "identical_after_truncation", "two responses are the same ids"
  )
