"""Prepared comparisons as they lie on disk, and read at random."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, overload

from dpojax.data.examples import Example

_AT_ONCE = 1024
"""Comparisons of a read while all are walked through."""


class Comparisons(Sequence[Example]):
  """The comparisons of one split, read from ArrayRecord as they are asked for.

  Attributes:
    source: the builder's name.
    fingerprint: SHA-256 over the builder's name and version and the source files' contents.
    report: how many examples are used, how many records were dropped, by reason, and of local files in
      how many records something was so: "forms", "ignored_keys", "converted", "dropped_values",
      "left_out".
    problems: of each reason the first record that was dropped for it: its place and what is wrong.
  """

  def __init__(
    self, records: Any, *, source: str, fingerprint: str, report: dict, problems: dict[str, str] | None = None
  ):
    self._records = records
    self.source = source
    self.fingerprint = fingerprint
    self.report = report
    self.problems = problems or {}

  def __len__(self) -> int:
    return len(self._records)

  @overload
  def __getitem__(self, i: int) -> Example: ...

  @overload
  def __getitem__(self, i: slice) -> list[Example]: ...

  def __getitem__(self, i: int | slice) -> Example | list[Example]:
    if isinstance(i, slice):
      # In one call: record by record ArrayRecord takes forty times as long.
      return list(map(decode, self._records.__getitems__(range(*i.indices(len(self))))))
    if not -len(self) <= i < len(self):
      raise IndexError(f"comparison {i} of {len(self)}")
    return decode(self._records[i % len(self)])

  def __iter__(self) -> Iterator[Example]:
    for start in range(0, len(self), _AT_ONCE):
      yield from self[start : start + _AT_ONCE]


def encode(example: Example) -> dict:
  """Returns an example as features: those of a conversation, and what a template gets, as JSON text."""
  conversational = not isinstance(example.prompt, str)
  text = json.dumps if conversational else str
  return {
    "prompt": text(example.prompt),
    "responses": list(map(text, example.responses)),
    "conversational": conversational,
    "tools": json.dumps(example.tools),
    "arguments": json.dumps(example.arguments),
  } | ({"knobs": json.dumps(example.knobs)} if example.knobs else {})


def decode(features: dict) -> Example:
  """Returns the example of its features."""
  text = json.loads if features["conversational"] else str
  return Example(
    text(features["prompt"].decode()),
    tuple(text(response.decode()) for response in features["responses"]),
    json.loads(features["tools"]),
    json.loads(features["arguments"]),
    json.loads(features["knobs"]) if "knobs" in features else None,
  )
