"""Ids of texts, and where each id stands in its text, whatever the tokenizer does to a text that begins.

A SentencePiece-like tokenizer puts a space before a text that begins. There a text that goes on is tokenized
behind an anchor, whose ids are taken off again, so that " yes" keeps its space and "yes" gets none.
"""

import bisect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpojax.data.conversations import MARK, Names
from dpojax.data.examples import DataError

_ANCHORS = ("\n", "\ue000", "=")
_SPACE = "Ġ"
"""How byte-level tokenizers write a space, which is then left out of where a token stands."""


class Pieces(NamedTuple):
  """Ids of a text, and the characters each is of: [start, end)."""

  ids: list[int]
  offsets: list[tuple[int, int]]


class Ids:
  """A tokenizer with its habits found out: whether it adds BOS and a space before a text."""

  def __init__(self, tokenizer: Any):
    self._tokenizer, added = tokenizer, tokenizer.added_tokens_decoder
    # Asked and not read from the tokenizer's settings: each kind keeps them elsewhere, under other names.
    alone, behind, newline = self.of(["a", "\na", "\n"], special=False)
    self.adds_space = behind[len(newline) :] != alone
    self.bos = tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] != alone[:1] else None
    self.names = Names(
      set(tokenizer.all_special_tokens) | {str(each) for each in added.values() if each.special},
      tokenizer.eos_token,
    )
    self.special = {i for i, each in added.items() if each.special} | set(tokenizer.all_special_ids)
    self._apart = {
      str(each) for each in added.values() if each.special and not (each.lstrip or each.single_word)
    }
    self._trims = tokenizer.is_fast and _trims(tokenizer.backend_tokenizer.post_processor)

  def of(self, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Returns ids of texts; `special` tells whether special tokens' names are special tokens."""
    return self._call(texts, special)["input_ids"] if texts else []

  def behind(self, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Returns ids of texts that stand behind another."""
    if not self.adds_space:
      return self.of(texts, special)
    return [each.ids for each in self._pieces_behind(texts, special)]

  def pieces(self, texts: Sequence[tuple[str, Sequence[int]]]) -> list[Pieces]:
    """Returns pieces of rendered texts, in which names without a MARK are special tokens.

    Args:
      texts: and places in them that are asked for later: where a tokenizer cannot say what its tokens are of,
        it is cut there.
    """
    usual = [i for i, (text, _) in enumerate(texts) if MARK not in text and self._tokenizer.is_fast]
    found = dict(zip(usual, self._pieces([texts[i][0] for i in usual], special=True)))
    return [found[i] if i in found else self._cut_apart(*each) for i, each in enumerate(texts)]

  def pieces_behind(self, text: str, places: Sequence[int]) -> Pieces:
    """Returns the pieces of a rendered text that stands behind another."""
    if MARK not in text and self._tokenizer.is_fast:
      return self._pieces_behind([text], special=True)[0]
    return self._cut_apart(text, places, begins=False)

  def cut_before(self, text: str, place: int) -> int:
    """Returns the last place up to `place` where a special token starts: both sides have ids of their own."""
    cut = 0
    for match in self.names.pattern.finditer(text, max(0, place - 2000), place):
      if match[0] in self._apart:
        cut = match.start()
    return cut

  def first_at(self, pieces: Pieces, place: int) -> tuple[int, bool]:
    """Returns which id is the first that starts at a place or behind it, and whether one spans the place."""
    ids, offsets = pieces
    i = bisect.bisect_left(offsets, (place, -1))
    if self._trims:  # spaces at the ends of a token are not in its offsets
      while i < len(ids) and self._extent(pieces, i)[1] <= place and self._extent(pieces, i)[0] < place:
        i += 1
    inside = i < len(ids) and self._extent(pieces, i)[0] < place
    spans = inside or (i > 0 and self._extent(pieces, i - 1)[1] > place)
    return i, spans

  def _extent(self, pieces: Pieces, i: int) -> tuple[int, int]:
    start, end = pieces.offsets[i]
    if not self._trims:
      return start, end
    token = self._tokenizer.convert_ids_to_tokens(pieces.ids[i])
    bare = token.strip(_SPACE)
    if not bare:
      return end - len(token), end
    return start - (len(token) - len(token.lstrip(_SPACE))), end + len(token) - len(token.rstrip(_SPACE))

  def _call(self, texts: Sequence[str], special: bool) -> Any:
    return self._tokenizer(
      list(texts),
      add_special_tokens=False,
      split_special_tokens=not special,
      verbose=False,
      return_attention_mask=False,
      return_token_type_ids=False,
    )

  def _pieces(self, texts: Sequence[str], special: bool) -> list[Pieces]:
    if not texts:
      return []
    called = self._call(texts, special)
    offsets = [each.offsets for each in called.encodings] if self._tokenizer.is_fast else [[]] * len(texts)
    return list(map(Pieces, called["input_ids"], offsets))

  def _pieces_behind(self, texts: Sequence[str], special: bool) -> list[Pieces]:
    if not self.adds_space:
      return self._pieces(texts, special)
    for anchor in _ANCHORS:
      (head, _), *found = self._pieces([anchor, *(anchor + text for text in texts)], special)
      # An anchor serves only where no token joins it with what follows; one of these three does for all
      # tokenizers met.
      if all(each.ids[: len(head)] == head for each in found):
        return [
          Pieces(
            ids[len(head) :],
            [(max(0, start - len(anchor)), end - len(anchor)) for start, end in offsets[len(head) :]],
          )
          for ids, offsets in found
        ]
    raise DataError(
      f"tokenizer {self._tokenizer.name_or_path!r} merges the start of a response with whatever "
      "stands before it; use another tokenizer"
    )

  def _cut_apart(self, text: str, places: Sequence[int], begins: bool = True) -> Pieces:
    """Returns pieces of a text in which some names of special tokens are marked as text."""
    out, at = Pieces([], []), 0
    for piece in re.split(f"({self.names.pattern.pattern})", text):
      cuts = (
        [] if self._tokenizer.is_fast else [place - at for place in places if at < place < at + len(piece)]
      )
      for start, stop in zip([0, *cuts], [*cuts, len(piece)]):
        part = piece[start:stop]
        ids, offsets = self._one(part, begins and not at and not start)
        out.ids.extend(ids)
        out.offsets.extend((at + start + low, at + start + high) for low, high in offsets)
      at += len(piece)
    return out

  def _one(self, text: str, begins: bool) -> Pieces:
    if not text:
      return Pieces([], [])
    if self.names.pattern.fullmatch(text):
      return Pieces([self._tokenizer.convert_tokens_to_ids(text)], [(0, len(text))])
    # Tokenized without the marks, and told where it stood with them.
    place = [i for i, letter in enumerate(text) if letter != MARK]
    bare = text.replace(MARK, "")
    ids, offsets = (self._pieces if begins else self._pieces_behind)([bare], special=False)[0]
    if not self._tokenizer.is_fast:
      return Pieces(ids, [(0, len(text))] * len(ids))
    there = lambda low, high: (
      (place[low], place[high - 1] + 1) if low < high else (place[min(low, len(place) - 1)],) * 2
    )
    return Pieces(ids, [there(*each) for each in offsets])


def _trims(post_processor: Any) -> bool:
  """Returns whether a tokenizer leaves spaces out of where its tokens stand."""
  return post_processor is not None and b'"trim_offsets":true' in post_processor.__getstate__()
