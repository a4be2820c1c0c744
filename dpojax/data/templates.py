"""Conversations as a tokenizer's chat template writes them: what `apply_chat_template` gives, whole.

Nothing is rendered here that `transformers` would render otherwise. Its function is called with all that a
record has, on the tokenizer's own template, with the run's arguments and its day in place of the clock.
"""

import dataclasses
import datetime
import functools
import json
import re
from typing import Any, NamedTuple

import jinja2

from dpojax.data import sandbox
from dpojax.data.examples import DataError, RecordError

SPECIAL_TOKENS = ("text", "parse", "raise")
SCORES = ("all", "last")
_OURS = (
  "conversation",
  "chat_template",
  "tools",
  "add_generation_prompt",
  "continue_final_message",
  "tokenize",
  "return_dict",
  "return_tensors",
  "return_assistant_tokens_mask",
  "padding",
  "truncation",
  "max_length",
  "sanitize_control_tokens",
  "tokenizer_kwargs",
)
"""Arguments of `apply_chat_template` that are not the template's."""


@dataclasses.dataclass(frozen=True)
class Reading:
  """How texts and conversations are read.

  Attributes:
    date: the day a chat template's clock says, YYYY-MM-DD; '' is today.
    arguments: what a chat template gets besides messages and tools, such as {"enable_thinking": False}.
    special_tokens: what a special token's name in a text is: "text"; "parse": that token; "raise": an error.
    score: which of the assistant's messages in a response are scored: "all", or the "last".
  """

  date: str = ""
  arguments: dict = dataclasses.field(default_factory=dict)
  special_tokens: str = "text"
  score: str = "all"

  def __post_init__(self):
    for name, allowed in (("special_tokens", SPECIAL_TOKENS), ("score", SCORES)):
      if getattr(self, name) not in allowed:
        raise DataError(
          f"data.{name} is {getattr(self, name)!r}; it is one of {', '.join(map(repr, allowed))}"
        )
    try:
      self.day()
    except ValueError as error:
      raise DataError(f"data.template_date is {self.date!r}; give a day as YYYY-MM-DD") from error
    for name in self.arguments:
      if name in _OURS:
        raise DataError(
          f"data.template_arguments has {name!r}, which is not the template's to read; leave it out"
        )

  def day(self) -> datetime.date:
    """Returns the day a template is told."""
    return datetime.date.fromisoformat(self.date) if self.date else datetime.date.today()

  @classmethod
  def of(cls, settings: Any) -> "Reading":
    """Returns what the group `data` of a run's config says; keys that older runs lack are as before them."""
    arguments = settings.get("template_arguments") or {}
    return cls(
      settings.get("template_date") or "",
      arguments.to_dict() if hasattr(arguments, "to_dict") else dict(arguments),
      settings.get("special_tokens") or "text",
      settings.get("score") or "all",
    )


class Rendering(NamedTuple):
  """What a template has written, and its {% generation %} spans, in characters."""

  text: str
  spans: list[tuple[int, int]]


class TemplateError(DataError):
  """A chat template cannot be used at all: it is missing, is none, or asks for too much."""


class Templates:
  """A tokenizer's chat templates, compiled once each."""

  def __init__(self, tokenizer: Any, reading: Reading):
    self._tokenizer, self._reading = tokenizer, reading
    self._day = reading.day()
    self._compiled = functools.lru_cache(maxsize=8)(self._compile)

  def of(self, tools: list[dict] | None) -> str:
    """Returns the template for conversations with these tools, or without.

    Raises:
      TemplateError: there is none.
    """
    if not self._tokenizer.chat_template:
      raise TemplateError(
        f"the data are conversations but tokenizer {self._tokenizer.name_or_path!r} has no chat "
        "template; take a chat model's tokenizer, or give plain text prompts"
      )
    try:
      return self._tokenizer.get_chat_template(None, tools)
    except ValueError as error:
      raise TemplateError(f"tokenizer {self._tokenizer.name_or_path!r}: {error}") from error

  def marks(self, tools: list[dict] | None) -> bool:
    """Returns whether the template says itself what is generated."""
    return self._compiled(self.of(tools))[1]

  def render(
    self,
    messages: list[dict],
    *,
    tools: list[dict] | None,
    arguments: dict | None,
    generation_prompt: bool = False,
  ) -> Rendering:
    """Returns what the template writes of a conversation.

    Raises:
      RecordError: it refuses this one; the message has its own words.
      TemplateError: it cannot be used for any.
    """
    text = self.of(tools)
    key, _, compiled = self._compiled(text)
    # transformers keeps the last few templates, and what it would compile anew has no bounds of ours.
    if _compiled_by_transformers(key) is not compiled:  # pushed out of its cache
      self._compiled.cache_clear()
      key, *_ = self._compiled(text)
    given = {**self._reading.arguments, **(arguments or {})}
    for name in given:
      if name in _OURS:
        raise RecordError(
          "template_arguments", f"its template argument {name!r} is not the template's to read"
        )
    try:
      with sandbox.Budget([messages, tools, given]) as budget:
        rendered = self._tokenizer.apply_chat_template(
          messages,
          tools=tools,
          chat_template=key,
          tokenize=False,
          add_generation_prompt=generation_prompt,
          **given,
        )
    except sandbox.LimitError as error:
      raise TemplateError(
        f"the chat template of tokenizer {self._tokenizer.name_or_path!r} does not come to an end: "
        f"{error}; correct it, or leave out the conversation that starts with {first_text(messages)}"
      ) from error
    except Exception as error:  # a template refuses with jinja's errors, and fails with any
      raise RecordError("refused_by_template", f"the chat template says: {error}") from error
    try:
      rendered.encode()
    except UnicodeEncodeError as error:
      raise RecordError("broken_unicode", "a text has half of a surrogate pair") from error
    return Rendering(rendered, budget.spans)

  def _compile(self, text: str) -> tuple["_Key", bool, Any]:
    # transformers compiles what it is given and keeps it by its text: an empty one of our own is what it
    # finds.
    key = _Key()
    compiled = _compiled_by_transformers(key)
    try:
      bounded = sandbox.compile_in(compiled.environment, text, self._day)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
      raise TemplateError(
        f"the chat template of tokenizer {self._tokenizer.name_or_path!r} is not valid Jinja ({error}); "
        "correct it"
      ) from error
    # transformers holds this very object by now: it is turned into the bounded one where it stands.
    sandbox.become(compiled, type(bounded), vars(bounded))
    return key, bool(re.search(r"\{%[-+]?\s*generation\b", text)), compiled


class _Key(str):
  """An empty template, equal to no other, that `transformers` knows one of ours by."""

  __hash__ = object.__hash__

  def __eq__(self, other: object) -> bool:
    return self is other

  def __ne__(self, other: object) -> bool:
    return self is not other


def _compiled_by_transformers(key: _Key) -> Any:
  from transformers.utils import chat_template_utils  # slow to import

  return chat_template_utils._compile_jinja_template(key)


def reads_the_clock(tokenizer: Any) -> bool:
  """Returns whether a chat template of the tokenizer asks for the date."""
  templates = tokenizer.chat_template or ""
  return "strftime_now" in (templates if isinstance(templates, str) else json.dumps(list(templates.values())))


def first_text(messages: str | list[dict]) -> str:
  """Returns the start of a prompt's first text, in quotes, as an error names a record."""
  texts = (
    [messages]
    if isinstance(messages, str)
    else [message.get("content") for message in messages if isinstance(message, dict)]
  )
  text = next((each for each in texts if isinstance(each, str) and each.strip()), "")
  return json.dumps(text.strip()[:60] + ("..." if len(text.strip()) > 60 else ""), ensure_ascii=False)
