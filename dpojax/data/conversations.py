"""What of a rendered conversation is scored: the assistant's tokens of the response, as its template says.

Where the template marks what is generated, its marks decide. Otherwise it is asked: what it writes up to the
assistant's message, generation prompt included, and what it writes with the message. A template may write
the conversation before an answer otherwise once the answer is there (a system message that moves, reasoning
that is left out); then another answer is put in its place, and what stays the same around it is not of it.
"""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dpojax.data.examples import Example, RecordError
from dpojax.data.templates import Reading, Rendering, Templates

MARK = "\ufdd0"
"""A code point that Unicode keeps free for uses inside a program; it hides special tokens' names."""

_OTHER = "\ue000"
"""An answer of one private character, to be found again in what a template writes."""


class Written(NamedTuple):
  """A conversation as its template writes it.

  Attributes:
    text: the whole; names of special tokens that the record brought have a MARK in them.
    spans: what is scored, (start, end) in characters.
    ended: whether the template ends the last span, with a special token or by its own marks.
    marked: whether the spans are the template's own marks.
  """

  text: str
  spans: list[tuple[int, int]]
  ended: bool
  marked: bool


class Names:
  """The names of a tokenizer's special tokens, to be found in texts."""

  def __init__(self, names: Iterable[str], eos: str):
    self.all = sorted(set(filter(None, names)), key=len, reverse=True)
    self.eos = eos
    self.pattern = re.compile(_any_of(self.all))
    self._longest = len(self.all[0]) if self.all else 0
    self._at_start = re.compile(rf"\s*(?:{self.pattern.pattern})")
    self._at_end = re.compile(rf"(?:{self.pattern.pattern})\s*\Z")

  def found_in(self, value: Any) -> set[str]:
    """Returns the names that stand in a text, or in the texts of a list or an object."""
    return {match[0] for text in _texts(value) for match in self.pattern.finditer(text)}

  def hidden(self, value: Any, names: set[str]) -> Any:
    """Returns the value with a MARK behind the first character of each of these names in its texts."""
    if isinstance(value, str):
      return self.pattern.sub(lambda m: m[0][0] + MARK + m[0][1:] if m[0] in names else m[0], value)
    if isinstance(value, dict):
      return {key: self.hidden(each, names) for key, each in value.items()}
    return [self.hidden(each, names) for each in value] if isinstance(value, (list, tuple)) else value

  def end_of(self, text: str) -> int | None:
    """Returns where a turn ends: behind its last EOS, or another special token that only space follows."""
    # The last EOS and not the first: a response may be several messages, each with an end of its own.
    eos = text.rfind(self.eos)
    if eos >= 0:
      return eos + len(self.eos)
    # Only the end is searched: in long answers a name of a special token may stand anywhere as text.
    start = len(text.rstrip()) - self._longest
    match = self._at_end.search(text, max(start, 0))
    return None if match is None else len(text[: match.end()].rstrip())

  def start_of(self, text: str) -> int:
    """Returns how much of a text is space and a special token at its start."""
    match = self._at_start.match(text)
    return match.end() if match else 0


class Conversations:
  """Examples in messages as a tokenizer's template writes them."""

  def __init__(self, templates: Templates, reading: Reading, names: Names, counts: collections.Counter):
    self._templates, self._reading, self._names, self._counts = templates, reading, names, counts

  def prompt(self, example: Example) -> str:
    """Returns the prompt with the generation prompt behind it.

    Raises:
      RecordError: the template refuses it.
    """
    example = self._hidden(example)
    return self._renderer(example)(example.prompt, True).text

  def written(self, example: Example) -> list[Written]:
    """Returns the whole conversation with each of the example's responses.

    Raises:
      RecordError: the template refuses it, or it cannot be told what of it is the assistant's.
    """
    example = self._hidden(example)
    render = self._renderer(example)
    # Some templates refuse a conversation that does not end with the assistant; what they write with the
    # answer still tells where it is.
    before = _or_none(lambda: render(example.prompt, True))
    written = [self._of_response(example, response, render, before) for response in example.responses]
    texts = [each.text for each in written]
    if before is not None and not all(text.startswith(before.text) for text in texts):
      self._counts["prompts_rendered_otherwise_with_an_answer"] += 1
    self._counts.update(
      {f"with_{what}_that_the_template_leaves_out": 1 for what in _left_out(texts, example)}
    )
    return written

  def _of_response(
    self, example: Example, response: list[dict], render: Callable, before: Rendering | None
  ) -> Written:
    messages = [*example.prompt, *response]
    whole = render(messages, False)
    turns = [j for j in range(len(example.prompt), len(messages)) if messages[j].get("role") == "assistant"]
    if not turns:
      raise RecordError("no_assistant_turn", "a response has no message of the assistant")
    if self._reading.score == "last":
      turns = turns[-1:]
    if self._templates.marks(example.tools):
      return Written(whole.text, self._marked(messages, turns[0], whole, render), True, True)
    spans = []
    for j in turns:
      known = before if j == len(example.prompt) else _or_none(lambda: render(messages[:j], True))
      start, end = self._span(messages, j, whole.text, known, render)
      stop = self._names.end_of(whole.text[start:end])
      spans.append((start, end if stop is None else start + stop))
    if any(start >= end for start, end in spans):
      raise RecordError("empty_response", "the chat template writes nothing of a response")
    return Written(whole.text, spans, stop is not None, False)

  def _marked(
    self, messages: list[dict], first: int, whole: Rendering, render: Callable
  ) -> list[tuple[int, int]]:
    """Returns the template's marks from a message on: those it does not make of the messages before."""
    # Counted and not compared: the spans before may have moved with what the template writes differently now.
    earlier = len(render(messages[:first], False).spans) if first else 0
    spans = [(start, end) for start, end in whole.spans[earlier:] if start < end]
    if not spans:
      raise RecordError("nothing_marked", "the chat template marks nothing of a response as generated")
    return spans

  def _span(
    self, messages: list[dict], j: int, whole: str, before: Rendering | None, render: Callable
  ) -> tuple[int, int]:
    """Returns where the j-th message stands, from behind the generation prompt on."""
    start = len(before.text) if before is not None and whole.startswith(before.text) else None
    last = j == len(messages) - 1
    through = whole if last else getattr(_or_none(lambda: render(messages[: j + 1], False)), "text", None)
    end = len(through) if through is not None and whole.startswith(through) else None
    if start is None or end is None:
      left, right = self._around(messages, j, whole, render)
      if start is None:
        start = _behind_header(whole[:left], before.text if before else "")
      if end is None:
        end = right + self._names.start_of(whole[right:])
    return start, end

  def _around(self, messages: list[dict], j: int, whole: str, render: Callable) -> tuple[int, int]:
    """Returns where what stays the same ends and starts again with another answer in a message's place."""
    # Another answer in its place: what stays the same on both sides is not the answer's, whatever the
    # template does.
    other = [*messages[:j], {"role": "assistant", "content": _OTHER}, *messages[j + 1 :]]
    left, found, right = render(other, False).text.partition(_OTHER)
    # Some templates write an answer twice, or cut it up: then no span of it can be told.
    clear = found and _OTHER not in right and _OTHER not in whole and len(left) + len(right) < len(whole)
    if not (clear and whole.startswith(left) and whole.endswith(right)):
      raise RecordError(
        "no_clear_span",
        "the chat template writes what is around an answer differently with each answer, and does not mark "
        "what is generated: where the answer stands cannot be told",
      )
    return len(left), len(whole) - len(right)

  def _hidden(self, example: Example) -> Example:
    """Returns the example with special tokens' names in its texts made text, where they are to be text.

    Names that the template looks for itself, as in content.split('</think>'), stay what they are.
    """
    parts = [example.prompt, list(example.responses), example.tools]
    if any(MARK in text for text in _texts(parts)):
      raise RecordError("noncharacter", "a text has the code point U+FDD0, which is no character")
    names = self._names.found_in(parts)
    if names:
      self._counts["with_special_tokens_in_text"] += 1
    if not names or self._reading.special_tokens == "parse":
      return example
    if self._reading.special_tokens == "raise":
      raise RecordError("special_token_in_text", refusal(names))
    # One name at a time, by what the template writes: its source need not be understood.
    read = {name for name in names if not self._same(example, {name})}
    if read:
      self._counts["with_special_tokens_that_the_template_reads"] += 1
    return self._with_hidden(example, names - read)

  def _same(self, example: Example, names: set[str]) -> bool:
    """Returns whether the template writes the same where names are hidden from it."""
    hidden = self._with_hidden(example, names)
    whole = lambda example: [
      self._renderer(example)([*example.prompt, *response], False).text
      for response in example.responses or ((),)
    ]
    return [text.replace(MARK, "") for text in whole(hidden)] == whole(example)

  def _with_hidden(self, example: Example, names: set[str]) -> Example:
    prompt, responses, tools = self._names.hidden(
      [example.prompt, list(example.responses), example.tools], names
    )
    return example._replace(prompt=prompt, responses=tuple(responses), tools=tools)

  def _renderer(self, example: Example) -> Callable[[list[dict], bool], Rendering]:
    return lambda messages, generation_prompt: self._templates.render(
      messages, tools=example.tools, arguments=example.arguments, generation_prompt=generation_prompt
    )


def _behind_header(left: str, before: str) -> int:
  """Returns where an answer starts: what is before it, with as much space as a generation prompt has."""
  bare = len(left.rstrip())
  return max(range(bare, len(left) + 1), key=lambda i: (_shared_end(left[:i], before), i))


def _shared_end(one: str, other: str) -> int:
  most = min(len(one), len(other))
  return next((n for n in range(most) if one[-1 - n] != other[-1 - n]), most)


def _or_none(render: Callable[[], Rendering]) -> Rendering | None:
  """Returns a rendering, or None where the template refuses a part of what it may take as a whole."""
  try:
    return render()
  except RecordError:
    return None


_SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")
"""Keys of a message whose text a template is expected to write."""


def _left_out(written: Sequence[str], example: Example) -> set[str]:
  """Returns what does not stand in what was written: "text" of a message, "calls" in one, "tools"."""
  left_out = set()
  if not all(name in whole for whole in written for name in _called(example.tools)):
    left_out.add("tools")
  for whole, response in zip(written, example.responses):
    for message in (*example.prompt, *response):
      texts = [message[key] for key in _SPOKEN if isinstance(message.get(key), str)]
      if not all(text.strip() in whole for text in texts):
        left_out.add("text")
      if not all(name in whole for name in _called(message.get("tool_calls"))):
        left_out.add("calls")
  return left_out


def _called(functions: Any) -> list[str]:
  """Returns the names of tools or of calls, which stand under "function" or by themselves."""
  each = functions if isinstance(functions, (list, tuple)) else ()
  found = [one.get("function", one) for one in each if isinstance(one, dict)]
  return [one["name"] for one in found if isinstance(one, dict) and isinstance(one.get("name"), str)]


def refusal(names: set[str]) -> str:
  """Returns why a record with names of special tokens in its texts is refused."""
  return (
    f"a text has {', '.join(sorted(names))}, the name of a special token; take it out, or set "
    "data.special_tokens to 'text' (it is text) or 'parse' (it is the token)"
  )


def _texts(value: Any) -> Iterable[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    for each in value.values():
      yield from _texts(each)
  elif isinstance(value, (list, tuple)):
    for each in value:
      yield from _texts(each)


def _any_of(names: Sequence[str]) -> str:
  """Returns a pattern of any of the names, the longest first; they share starts, so thousands are fast."""
  if not names:
    return "(?!)"
  tree: dict = {}
  for name in names:
    node = tree
    for letter in name:
      node = node.setdefault(letter, {})
    node[""] = {}

  def pattern(node: dict) -> str:
    chain = ""
    while len(node) == 1 and "" not in node:  # without branches, no nesting
      ((letter, node),) = node.items()
      chain += re.escape(letter)
    branches = [re.escape(letter) + pattern(below) for letter, below in node.items() if letter]
    if not branches:
      return chain
    return f"{chain}(?:{'|'.join(branches)})" + ("?" if "" in node else "")

  return pattern(tree)
