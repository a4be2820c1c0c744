"""Some comparisons to arrays: what one process does of a data set at a time."""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.data.encoder import Encoder
from dpojax.data.examples import DataError, Example, RecordError
from dpojax.data.shortening import Room
from dpojax.data.templates import Reading, TemplateError, first_text
from dpojax.data.tokenized import prompt_digests
from dpojax.data.truncation import Truncation, cut

CHECKED = 512
"""Comparisons of which it is seen whether their ids decode to their text."""

SLOW = 5.0
"""Seconds after which a comparison is named as slow."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides the ids of a data set, besides the tokenizer and the records.

  Attributes:
    truncation: how long comparisons may be.
    reading: how texts and conversations are read.
    num_responses: `K`, how many responses to keep, the best; None keeps all of them.
    fewest: comparisons with fewer responses among those are dropped.
  """

  truncation: Truncation
  reading: Reading
  num_responses: int | None
  fewest: int


class Part(NamedTuple):
  """Some comparisons in ids.

  Attributes:
    lengths: [n, 1 + K] int32 tokens of the prompt and of each response, K those of the longest list here.
    ids: int32, prompts and responses one after another.
    scored: bool, of `ids` which are scored; nothing of a prompt is.
    example: [n] int32 index of each comparison.
    prompts: [n] uint64, see `tokenized.prompt_digests`.
    counts: of what was cut and seen.
    dropped: how many comparisons were left out, by reason.
    first: of each reason, the first such comparison in words.
    knobs: by name those that the comparisons' records bring, float32; none where there are no comparisons.
  """

  lengths: np.ndarray
  ids: np.ndarray
  scored: np.ndarray
  example: np.ndarray
  prompts: np.ndarray
  counts: collections.Counter
  dropped: collections.Counter
  first: dict[str, str]
  knobs: dict[str, np.ndarray]


class Tokenizing:
  """Tokenizes parts of a data set, which it reads itself: one process alone would not read for all cores."""

  def __init__(self, tokenizer: Any, settings: Settings, comparisons: Sequence[Example]):
    self._encoder, self._settings = Encoder(tokenizer, settings.reading), settings
    self._comparisons = comparisons
    self._room = Room(settings.truncation.max_length, settings.truncation.keep)

  def __reduce__(self):  # what the encoder has found out is found out again
    return Tokenizing, (self._encoder.tokenizer, self._settings, self._comparisons)

  def __call__(self, first: int, end: int) -> Part:
    """Returns the part of the comparisons from `first` up to `end`.

    Raises:
      DataError: the tokenizer or its template cannot be used, or a text may not have special tokens.
    """
    counts = self._encoder.counts
    counts.clear()
    examples = [
      each._replace(responses=each.responses[: self._settings.num_responses])
      for each in self._comparisons[first:end]
    ]
    dropped, named = collections.Counter(), {}
    lengths, ids, scored, index, prompts, knobs = [], [], [], [], [], []
    for i, (example, encoded) in enumerate(zip(examples, self._encode(first, examples, named)), first):
      try:
        kept = self._kept(i, example, encoded)
      except RecordError as error:
        where = f"record {i} ({first_text(example.prompt)})"
        # The config asks to stop here: it is no record to be dropped.
        if error.reason == "special_token_in_text":
          raise DataError(f"{where}: {error}") from error
        dropped[error.reason] += 1
        named.setdefault(error.reason, f"{where}: {error}")
        continue
      index.append(i)
      prompts.append(kept.prompt)
      knobs.append(example.knobs or {})
      lengths.append([len(kept.prompt), *map(len, kept.responses)])
      ids.append(np.array([token for part in (kept.prompt, *kept.responses) for token in part], np.int32))
      scored.append(
        np.array([*[False] * len(kept.prompt), *(each for of in kept.scored for each in of)], bool)
      )
    whole = lambda arrays, dtype: np.concatenate([np.zeros(0, dtype), *arrays])
    padded = np.zeros((len(lengths), max(map(len, lengths), default=1)), np.int32)
    for row, each in zip(padded, lengths):
      row[: len(each)] = each
    return Part(
      padded,
      whole(ids, np.int32),
      whole(scored, bool),
      np.array(index, np.int32),
      prompt_digests(prompts),
      collections.Counter(counts),
      dropped,
      named,
      {name: np.array([each[name] for each in knobs], np.float32) for name in (knobs[0] if knobs else ())},
    )

  def _encode(self, first: int, examples: list[Example], named: dict[str, str]) -> list:
    """Returns what the encoder makes of examples; very long ones by themselves, to see which are slow."""
    out, usual = [None] * len(examples), []
    for i, example in enumerate(examples):
      # Together the others take one call; a text this long is timed by itself, to be named.
      if _characters(example) < 1_000_000:
        usual.append(i)
        continue
      start = time.perf_counter()
      (out[i],) = self._encoder_of([example], first + i)
      seconds = time.perf_counter() - start
      if seconds > SLOW:
        self._encoder.counts["slow"] += 1
        named.setdefault(
          "slow",
          f"record {first + i} ({first_text(example.prompt)}): {_characters(example):,} "
          f"characters took {seconds:.0f} s",
        )
    for i, each in zip(usual, self._encoder_of([examples[i] for i in usual], first)):
      out[i] = each
    return out

  def _encoder_of(self, examples: list[Example], first: int) -> list:
    try:
      return self._encoder.encode(examples, self._room)
    except TemplateError as error:
      if len(examples) == 1:
        raise DataError(f"record {first} ({first_text(examples[0].prompt)}): {error}") from error
    # One by one: the first that the template cannot be used for is to be named.
    return [each for i, example in enumerate(examples, first) for each in self._encoder_of([example], i)]

  def _kept(self, i: int, example: Example, encoded: Any) -> Any:
    """Returns what is kept of a comparison; raises RecordError where nothing is."""
    encoder, counts = self._encoder, self._encoder.counts
    present = [k for k, response in enumerate(example.responses) if response]
    if len(present) < self._settings.fewest:
      raise RecordError("too_few_responses", f"it has {len(present)} responses")
    if isinstance(encoded, RecordError):
      raise encoded
    bos = encoder.bos if isinstance(example.prompt, str) else encoder.tokenizer.bos_token_id
    kept = cut(encoded, self._settings.truncation, bos=bos, ends=encoder.ids.special, counts=counts)
    if isinstance(example.prompt, str):
      counts["prompts_started_with_eos"] += encoder.bos is None and encoded.prompt == [encoder.eos]
      if i < CHECKED and encoded.whole and encoder.reading.special_tokens != "parse":
        k = present[0]
        # A tokenizer that lower-cases or drops letters gives ids of another text, and no error.
        text = encoder.decode(encoded.prompt, encoded.responses[k])
        counts["checked"] += 1
        counts["changed_by_tokenizer"] += text != example.prompt + example.responses[k]
    for response, uncut in zip(kept.responses, encoded.responses):
      if response and encoded.whole and len(response) == len(uncut) and response[-1] in encoder.ids.special:
        counts["ended_by", response[-1]] += 1
    return kept


def _characters(value: Any) -> int:
  """Returns how many characters an example has, about."""
  if isinstance(value, str):
    return len(value)
  if isinstance(value, dict):
    return sum(map(_characters, value.values()))
  return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0
