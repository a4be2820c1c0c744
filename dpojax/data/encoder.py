"""Examples to ids: the prompt's, each response's, and which of these are scored.

Plain text: prompt and responses are tokenized apart and joined by ids, so no token spans the boundary and the
prompt's ids are the same in every branch. Joined, they are the text's own ids as nearly as that allows: a
response is tokenized as text that goes on, never as text that begins.

Conversations: the ids are those of the whole, as `transformers` gives them, up to the end of the answer. They
are cut where the answer starts; where a token would span that place both sides are tokenized apart, unless
the template itself marks what is generated. What the branches of a comparison do not share stands in each
branch and is not scored there.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpojax.data.conversations import Conversations, Written, refusal
from dpojax.data.examples import Example, RecordError
from dpojax.data.ids import Ids, Pieces
from dpojax.data.shortening import Room, Shortening, long_enough
from dpojax.data.templates import Reading, Templates


class Encoded(NamedTuple):
  """A comparison in ids: `scored` tells which of a response's ids are, `whole` is False of a cut text."""

  prompt: list[int]
  responses: list[list[int]]
  scored: list[list[bool]]
  whole: bool = True


class Encoder:
  """A tokenizer and how texts are read."""

  def __init__(self, tokenizer: Any, reading: Reading = Reading()):
    self.tokenizer, self.eos, self.reading = tokenizer, tokenizer.eos_token_id, reading
    self.counts = collections.Counter()
    self.ids = Ids(tokenizer)
    self.bos = self.ids.bos
    self._parse = reading.special_tokens == "parse"
    self._shortening = Shortening(tokenizer, self.ids)
    self._conversations = Conversations(Templates(tokenizer, reading), reading, self.ids.names, self.counts)

  def encode(self, examples: Sequence[Example], room: Room | None = None) -> list[Encoded | RecordError]:
    """Returns ids of each example, or what is wrong with it; no ids for an absent response.

    Args:
      examples: a response to messages may be the text of the assistant's one message.
      room: of texts that are cut anyway.
    """
    present = [_with_messages(example) for example in examples]
    out: list[Any] = [None] * len(examples)
    for chat, encode in ((False, self._texts), (True, self._chats)):
      chosen = [i for i, example in enumerate(present) if isinstance(example.prompt, str) != chat]
      for i, each in zip(chosen, encode([present[i] for i in chosen], room)):
        out[i] = _with_absent(examples[i], each)
    return out

  def prompts(self, examples: Sequence[Example], room: Room | None = None) -> list[list[int] | RecordError]:
    """Returns ids of the examples' prompts, those of conversations with the generation prompt behind them."""
    return [self._prompt(example._replace(responses=()), room) for example in examples]

  def decode(self, prompt: list[int], response: list[int]) -> str:
    """Returns the text of a prompt and a response, BOS and EOS left out."""
    frame = 1 if prompt[:1] in ([self.bos], [self.eos]) else 0
    return self.tokenizer.decode(prompt[frame:] + response[:-1], clean_up_tokenization_spaces=False)

  def _prompt(self, example: Example, room: Room | None) -> list[int] | RecordError:
    if isinstance(example.prompt, str):
      (encoded,) = self._texts([example], room)
      return encoded if isinstance(encoded, RecordError) else encoded.prompt
    try:
      text = self._conversations.prompt(example)
    except RecordError as error:
      return error
    written = Written(text, [(len(text), len(text))], True, False)
    short = self._shortening.of_conversation(written, room)
    ids = self.ids.pieces([(short.text, ())])[0].ids
    if short.text != text and len(ids) < room.enough:
      ids = self.ids.pieces([(text, ())])[0].ids
    return ids or [self.eos if self.bos is None else self.bos]

  def _texts(self, examples: Sequence[Example], room: Room | None) -> list[Encoded | RecordError]:
    """Returns ids of examples in plain text."""
    refused = [self._special_in(example) for example in examples]
    texts = [[] if error else self._as_texts(example) for example, error in zip(examples, refused)]
    short = [self._shortening.of_texts(each, room) for each in texts]
    flat = iter(self.ids.behind([text for each in short for text in each], self._parse))
    out = []
    for example, error, whole, cut in zip(examples, refused, texts, short):
      ids = [next(flat) for _ in whole]
      same = [a is b for a, b in zip(whole, cut)]
      # Cut by characters, and yet too few tokens: a tokenizer that drops or joins characters. Once more,
      # whole.
      if not all(kept or len(each) >= room.enough for kept, each in zip(same, ids)):
        out += self._again(self._texts, example)
      else:
        out.append(error or self._framed(ids, all(same)))
    return out

  def _special_in(self, example: Example) -> RecordError | None:
    """Counts a text with a special token's name in it, and says what is wrong where that is not allowed."""
    names = self.ids.names.found_in([example.prompt, list(example.responses)])
    self.counts["with_special_tokens_in_text"] += bool(names)
    if names and self.reading.special_tokens == "raise":
      return RecordError("special_token_in_text", refusal(names))
    return None

  def _as_texts(self, example: Example) -> list[str]:
    """Returns the prompt and the responses as they are to be tokenized."""
    # A text that starts with a special token has begun already: a space would stand between the two.
    begun = self._parse and self.ids.names.pattern.match(example.prompt or "".join(example.responses[:1]))
    beginning = lambda text: text if begun or not self.ids.adds_space else f" {text}"
    if example.prompt:
      return [beginning(example.prompt), *example.responses]  # a space more, even if it has one already
    return ["", *map(beginning, example.responses)]

  def _framed(self, ids: list[list[int]], whole: bool) -> Encoded | RecordError:
    """Puts BOS in front of the prompt, or EOS in place of nothing, and EOS behind each response."""
    prompt, *responses = ids
    # Unless it stands there: published prompts hold the BOS of some template as text.
    if self.bos is not None and prompt[:1] != [self.bos]:
      prompt = [self.bos, *prompt]
    if self._parse:
      responses = [each[: self._end(each)] for each in responses]
    elif any(self.eos in each for each in ids):
      return RecordError("eos_in_text", "the tokenizer makes EOS of plain text")
    if not all(responses):
      return RecordError("empty_response", "the tokenizer leaves nothing of a response")
    ended = lambda each: self._parse and each[-1] in self.ids.special
    responses = [each if ended(each) else [*each, self.eos] for each in responses]
    return Encoded(prompt or [self.eos], responses, [[True] * len(each) for each in responses], whole)

  def _end(self, response: list[int]) -> int:
    """Returns where a response that was rendered already ends: at a special token that only space follows."""
    last = max((i for i, each in enumerate(response) if each in self.ids.special), default=None)
    if last is None or self.tokenizer.decode(response[last + 1 :]).strip():
      return len(response)
    return last + 1

  def _chats(self, examples: Sequence[Example], room: Room | None) -> list[Encoded | RecordError]:
    """Returns ids of examples in messages."""
    out: list[Any] = []
    for example in examples:
      try:
        out.append(self._conversations.written(example))
      except RecordError as error:
        out.append(error)
    whole = [[] if isinstance(each, RecordError) else each for each in out]
    short = [[self._shortening.of_conversation(each, room) for each in of] for of in whole]
    branches = [
      [_Branch(each, self.ids.cut_before(each.text, each.spans[0][0])) for each in of] for of in short
    ]
    # Each text once: the branches of a comparison share their head.
    texts = dict.fromkeys(key for of in branches for each in of for key in (each.head, each.tail))
    pieces = dict(zip(texts, self.ids.pieces(list(texts))))
    for i, of in enumerate(branches):
      if isinstance(out[i], RecordError):
        continue
      out[i] = self._joined([self._branch(each, pieces) for each in of], short[i] == whole[i])
      if not out[i].whole and not long_enough(out[i].prompt, out[i].responses, whole[i], short[i], room):
        (out[i],) = self._again(self._chats, examples[i])
    return out

  def _again(self, encode: Callable, example: Example) -> list[Encoded | RecordError]:
    """Returns ids of an example that was cut too short by characters, whole this time; it is counted once."""
    counted = dict(self.counts)
    encoded = encode([example], None)
    self.counts.clear()
    self.counts.update(counted)
    return encoded

  def _branch(self, branch: "_Branch", pieces: dict) -> tuple[list[int], list[bool]]:
    """Returns ids of a conversation, up to the last that is scored, and which are."""
    head, tail, spans = pieces[branch.head].ids, pieces[branch.tail], branch.spans
    if branch.written.marked:
      scored = _overlapping(tail, spans)
    else:
      if self.ids.first_at(tail, spans[0][0])[1]:
        tail = self._apart(branch.tail[0], spans)
      scored = [False] * len(tail.ids)
      for start, end in spans:
        first, (stop, inside) = self.ids.first_at(tail, start)[0], self.ids.first_at(tail, end)
        scored[first : stop + inside] = [True] * len(scored[first : stop + inside])
    last = max((i for i, each in enumerate(scored) if each), default=-1) + 1
    ids, scored = [*head, *tail.ids[:last]], [False] * len(head) + scored[:last]
    # A policy that never sees an end would not learn to stop.
    if last and not branch.written.ended:
      self.counts["responses_ended_with_eos_that_the_template_lacks"] += 1
      ids, scored = [*ids, self.eos], [*scored, True]
    return ids, scored

  def _apart(self, text: str, spans: Sequence[tuple[int, int]]) -> Pieces:
    """Returns pieces of a text of which none is of both sides of the first span's start."""
    start = spans[0][0]
    (left,) = self.ids.pieces([(text[:start], ())])
    right = self.ids.pieces_behind(text[start:], [place - start for span in spans for place in span])
    return Pieces(
      [*left.ids, *right.ids], [*left.offsets, *((low + start, high + start) for low, high in right.offsets)]
    )

  def _joined(self, branches: list[tuple[list[int], list[bool]]], whole: bool) -> Encoded | RecordError:
    """Returns the comparison of branches that share what stands before the first scored token of any."""
    if not all(any(scored) for _, scored in branches):
      return RecordError("empty_response", "the tokenizer leaves nothing of a response")
    shared = min((scored.index(True) for _, scored in branches), default=0)
    first = branches[0][0][:shared] if branches else []
    if branches and self.bos is not None and branches[0][0][:1] != [self.bos]:
      self.counts["without_bos"] += 1
    for ids, _ in branches:
      # Tokens may join over the place where answers begin: then what is shared ends before it.
      if ids[:shared] != first[:shared]:
        shared = next(i for i, (one, other) in enumerate(zip(ids, first)) if one != other)
    return Encoded(
      first[:shared],
      [ids[shared:] for ids, _ in branches],
      [scored[shared:] for _, scored in branches],
      whole,
    )


class _Branch:
  """A conversation in two texts, before and from a special token on, which are tokenized each by itself."""

  def __init__(self, written: Written, cut: int):
    self.written, text = written, written.text
    self.spans = [(start - cut, end - cut) for start, end in written.spans]
    self.head = (text[:cut], ())
    self.tail = (text[cut:], tuple(place for span in self.spans for place in span))


def _overlapping(pieces: Pieces, spans: Sequence[tuple[int, int]]) -> list[bool]:
  """Returns which ids overlap a span, as `apply_chat_template(return_assistant_tokens_mask=True)` has it."""
  scored, k = [False] * len(pieces.ids), 0
  for i, (start, end) in enumerate(pieces.offsets):
    while k < len(spans) and start >= spans[k][1]:
      k += 1
    if k == len(spans):
      break
    scored[i] = end > spans[k][0]
  return scored


def _with_messages(example: Example) -> Example:
  """Returns the example without absent responses, those to messages as messages."""
  present = tuple(filter(None, example.responses))
  if isinstance(example.prompt, str):
    return example._replace(responses=present)
  return example._replace(
    responses=tuple(
      [{"role": "assistant", "content": each}] if isinstance(each, str) else each for each in present
    )
  )


def _with_absent(example: Example, encoded: Encoded | RecordError) -> Encoded | RecordError:
  if isinstance(encoded, RecordError):
    return encoded
  ids, scored = iter(encoded.responses), iter(encoded.scored)
  return encoded._replace(
    responses=[next(ids) if response else [] for response in example.responses],
    scored=[next(scored) if response else [] for response in example.responses],
  )
