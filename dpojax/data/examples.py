"""What a record becomes: a prompt and its responses, or an error that says what is wrong with it."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpojax.runtime.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"
"""What stands before each turn of an HH dialogue."""


class Example(NamedTuple):
  """A comparison: a prompt and its responses, in text or in messages.

  Attributes:
    prompt: plain text, or the messages of a conversation with every key that a chat template may
      read: role, content, name, tool_calls, tool_call_id, reasoning_content, ...
    responses: [K], best first: texts to a text; to messages lists of messages, which start and end
      with one of the assistant's. Of a response alone that was judged by itself the absent
      counterpart is "" or []: (response, "") is desirable, ("", response) is not.
    tools: what a chat template gets as `tools`.
    arguments: the record's own further arguments of the template, above all others.
    knobs: knobs of losses that the record brings, by name; see `data.columns`.
  """

  prompt: str | list[dict]
  responses: tuple[str, ...] | tuple[list[dict], ...]
  tools: list[dict] | None = None
  arguments: dict | None = None
  knobs: dict[str, float] | None = None


class DataError(UserError, ValueError):
  """Data cannot be used; the message names the thing, the value and the fix."""


class RecordError(DataError):
  """A record cannot be used. `reason` is the short name it is counted under."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


class LeftOut(RecordError):
  """A sound record that the data set's own rule leaves out: counted, never an error of the run."""


def split_dialogue(chosen: str, rejected: str) -> Example:
  """Returns the example of two HH dialogues: the prompt ends with the last "\\n\\nAssistant:".

  Raises:
    RecordError: a dialogue has no such turn, the prompts differ, or a response is unusable.
  """
  prompts, responses = [], []
  for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
    before, turn, response = dialogue.rpartition(ASSISTANT)
    require(bool(turn), "no_assistant_turn", f'"{name}" has no "\\n\\nAssistant:" turn')
    prompts.append(before + turn)
    responses.append(response)
  require(
    prompts[0] == prompts[1],
    "different_prompts",
    'the text up to the last "\\n\\nAssistant:" differs between "chosen" and "rejected"',
  )
  return checked(prompts[0], responses, ['"chosen"', '"rejected"'])


def human_and_assistant(question: str, answers: list[str]) -> Example:
  """Returns a question and its answers, best first, as a dialogue of one turn in HH's form."""
  names = [f"answer {k + 1} of {len(answers)}" for k in range(len(answers))]
  return checked(f"{HUMAN}{question}{ASSISTANT}", [f" {answer}" for answer in answers], names)


def checked(prompt: str | list[dict], responses: Sequence[str | list[dict]], names: Sequence[str]) -> Example:
  """Returns the example if its responses say something and differ and all of it is valid Unicode.

  Args:
    prompt: text or messages.
    responses: best first, each a text or a list of messages.
    names: what to call each response in an error.

  Raises:
    RecordError: otherwise.
  """
  check_strings([prompt, *responses])
  return compared(prompt, responses, names)


def compared(
  prompt: str | list[dict], responses: Sequence[str | list[dict]], names: Sequence[str]
) -> Example:
  """Returns what `checked` does, of strings that were checked before."""
  for name, response in zip(names, responses):
    require(_says_something(response), "empty_response", f"{name} is empty")
  for k, response in enumerate(responses):
    first = list(responses).index(response)
    # Of equal responses neither is better: their gradients cancel, and the loss stays where it is.
    require(first == k, "identical_responses", f"{names[first]} and {names[k]} are the same text")
  return Example(prompt, tuple(responses))


def response_text(response: str | list[dict]) -> str:
  """Returns a response as one reads it: of one message its content, of several each with its role.

  Tool calls are written as name(arguments); reasoning is left out.
  """
  if isinstance(response, str):
    return response
  if len(response) == 1:
    return _message_text(response[0])
  return "\n\n".join(f"{message['role']}: {_message_text(message)}" for message in response)


def messages_text(messages: Sequence[dict]) -> str:
  """Returns a conversation as one reads it, each message behind its role."""
  return "\n\n".join(f"{message['role']}: {_message_text(message)}" for message in messages)


def get(record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
  """Returns what stands under `key`; raises RecordError if it is missing or not a `kind`."""
  require(isinstance(record, dict), "wrong_type", f"the record is {kind_of(record)}, not an object")
  require(key in record, "missing_key", f'"{key}" is missing')
  return of_kind(record[key], f'"{key}"', kind)


def of_kind(value: Any, name: str, kind: type | tuple[type, ...]) -> Any:
  """Returns the value; raises RecordError if it is not a `kind`."""
  kinds = kind if isinstance(kind, tuple) else (kind,)
  # Python's true and false are integers: a score of true would be read as 1.
  sound = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
  if not sound:
    wanted = " or ".join(dict.fromkeys(_KINDS[each] for each in kinds))
    raise RecordError("wrong_type", f"{name} is {kind_of(value)}, not {wanted}")
  return value


def require(condition: bool, reason: str, message: str):
  """Raises RecordError unless the condition holds."""
  if not condition:
    raise RecordError(reason, message)


def kind_of(value: Any) -> str:
  """Returns what to call a value's type in an error."""
  return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def check_strings(value: Any, deepest: int = 64):
  """Refuses half surrogate pairs, which no tokenizer takes, in any string, keys included.

  Args:
    value: anything; what is neither a list nor an object nor a string is passed over.
    deepest: how far lists and objects may be nested.

  Raises:
    RecordError: there is one, or they are nested deeper.
  """
  # A list and no recursion, so that depth is a rule of ours and no crash of Python's.
  waiting = [(value, 0)]
  while waiting:
    value, depth = waiting.pop()
    if isinstance(value, str):
      if not value.isascii() and not _encodes(value):
        raise RecordError(
          "broken_unicode", f"the text {value[:40]!r} has half of a surrogate pair; write the whole character"
        )
    elif isinstance(value, (dict, list, tuple)):
      require(depth < deepest, "too_deep", f"lists and objects are nested more than {deepest} deep")
      inside = (*value, *value.values()) if isinstance(value, dict) else value
      waiting += [(each, depth + 1) for each in inside]


def _says_something(response: str | list[dict]) -> bool:
  if isinstance(response, str):
    return bool(response.strip())
  spoken = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
  return bool(response) and all(
    any(_filled(message.get(key)) for key in spoken) for message in response if message["role"] == "assistant"
  )


def _filled(value: Any) -> bool:
  return bool(value.strip() if isinstance(value, str) else value)


def _message_text(message: dict) -> str:
  content = message.get("content")
  text = (
    [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)]
    if _filled(content)
    else []
  )
  for call in message.get("tool_calls") or ():
    of = call.get("function", call) if isinstance(call, dict) else {}
    arguments = of.get("arguments", "")
    shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    text.append(f"{of.get('name', '')}({shown})")
  return "\n".join(text)


def _encodes(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


_KINDS = {
  str: "a string",
  list: "a list",
  dict: "an object",
  int: "a number",
  float: "a number",
  bool: "true or false",
  type(None): "null",
}
