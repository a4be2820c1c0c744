"""Texts far longer than what is kept of them, cut by characters before they are tokenized.

A token has so many characters at most, so a text has at least so many tokens. What is cut stands so far
behind what is kept that no id of that changes; where a text turns out to have fewer tokens than that, because
a tokenizer drops or joins characters, it is tokenized whole.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpojax.data.conversations import Written
from dpojax.data.ids import Ids

_MARGIN = 64
"""Tokens that stay beyond a `Room`."""


class Room(NamedTuple):
  """Tokens of a prompt or a response behind which nothing matters, and which end of a prompt is kept."""

  tokens: int
  keep: str

  @property
  def enough(self) -> int:
    """Tokens that a cut text must have."""
    return self.tokens + _MARGIN // 2


class Shortening:
  """Cuts texts of one tokenizer."""

  def __init__(self, tokenizer: Any, ids: Ids):
    self._tokenizer, self._ids = tokenizer, ids

  def of_texts(self, texts: Sequence[str], room: Room | None) -> list[str]:
    """Returns a prompt and its responses, each without what is far beyond the room."""
    return [
      self._of_text(text, "start" if k else room.keep, room) if room else text for k, text in enumerate(texts)
    ]

  def of_conversation(self, written: Written, room: Room | None) -> Written:
    """Returns a conversation without what is far beyond the room in its prompt and its response."""
    most = self._most(len(written.text), room)
    if most is None:
      return written
    text, start = written.text, written.spans[0][0]
    # Twice: a text only a little longer is not worth the risk of having to be tokenized again.
    if len(text) - start > 2 * most:
      text = text[: _word_end(text, start + most)]
    spans = [(low, min(high, len(text))) for low, high in written.spans if low <= len(text)]
    if start > 2 * most:
      # Cut where a special token starts, so that no token spans the cut on the side that is kept.
      left, right = (
        (self._ids.names.start_of(text), start - most)
        if room.keep == "end"
        else (most, max(self._ids.cut_before(text, start), start - most // 2))
      )
      text = text[:left] + text[right:]
      spans = [(low - right + left, high - right + left) for low, high in spans]
    return written._replace(text=text, spans=spans)

  def _of_text(self, text: str, keep: str, room: Room) -> str:
    most = self._most(len(text), room)
    if most is None or len(text) <= 2 * most:
      return text
    if keep == "start":
      return text[: _word_end(text, most)]
    # A thousand more, for the search of a space between words goes that far.
    return text[_word_end(text, len(text) - most - 1000) :]

  def _most(self, length: int, room: Room | None) -> int | None:
    """Returns how many characters are more than enough, or None for a text that is short in any case."""
    return None if room is None or length <= room.tokens else (room.tokens + _MARGIN) * self._longest

  @functools.cached_property
  def _longest(self) -> int:
    """Characters of the longest token."""
    return max(map(len, self._tokenizer.get_vocab()), default=1)


def long_enough(
  prompt: list[int],
  responses: Sequence[list[int]],
  whole: Sequence[Written],
  short: Sequence[Written],
  room: Room,
) -> bool:
  """Returns whether what was cut by characters would have been cut by tokens."""
  start = lambda each: each.spans[0][0]
  of_prompt = any(start(a) != start(b) for a, b in zip(whole, short))
  of_response = [len(a.text) - start(a) != len(b.text) - start(b) for a, b in zip(whole, short)]
  return (not of_prompt or len(prompt) >= room.enough) and all(
    len(ids) >= room.enough for ids, cut in zip(responses, of_response) if cut
  )


def _word_end(text: str, place: int) -> int:
  """Returns the next place where one space stands between words, if there is one near."""
  for i in range(max(place, 1), min(place + 1000, len(text) - 1)):
    if text[i] == " " and not (text[i - 1].isspace() or text[i + 1].isspace()):
      return i
  return place
