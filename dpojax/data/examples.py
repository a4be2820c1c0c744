"""One record to a prompt and its responses, or an error that says what is wrong with it."""

from typing import Any, NamedTuple

from dpojax.errors import UserError

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
  """

  prompt: str | list[dict]
  responses: tuple[str, ...] | tuple[list[dict], ...]
  tools: list[dict] | None = None
  arguments: dict | None = None


class DataError(UserError, ValueError):
  """Data cannot be used; the message names the thing, the value and the fix."""


class RecordError(DataError):
  """A record cannot be used. `reason` is the short name it is counted under."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


class LeftOut(RecordError):
  """A sound record that the data set's own rule leaves out: counted, never an error of the run."""


def parse_record(record: Any) -> Example:
  """Returns the example of a JSONL record in one of its four forms.

  {"prompt": str, "chosen": str, "rejected": str}; the same with lists of messages, with or without
  "prompt" (then the messages before the last one, which chosen and rejected share);
  {"prompt": str or messages, "responses": [...]}, best first, where one response is enough to be
  fine-tuned on; and {"prompt": ..., "completion": ..., "label": bool}, a response judged by itself,
  for losses that need no pairs. Other keys are ignored.

  Raises:
    RecordError: the record has none of the forms, or its responses cannot be compared.
  """
  _require(isinstance(record, dict), "wrong_type", f"the record is {_kind(record)}, not an object")
  if "responses" in record:
    _require("chosen" not in record and "rejected" not in record, "ambiguous_keys",
             'the record has both "responses" and "chosen"/"rejected"; keep one form')
    responses = get(record, "responses", list)
    _require(bool(responses), "too_few_responses", '"responses" is an empty list')
    prompt = _prompt(record)
    names = [f'"responses"[{k}]' for k in range(len(responses))]
    return checked(prompt, [_response(*pair, prompt) for pair in zip(responses, names)], names)

  if "completion" in record and "chosen" not in record:
    desirable = record.get("label")
    _require(isinstance(desirable, bool), "wrong_type" if "label" in record else "missing_key",
             f'"label" is {_kind(desirable)}, not true or false' if "label" in record
             else '"label" is missing: true for a desirable "completion", false for another')
    prompt = _prompt(record)
    completion = _response(get(record, "completion", (str, list)), '"completion"', prompt)
    example = checked(prompt, [completion], ['"completion"'])
    return example._replace(responses=(completion, "") if desirable else ("", completion))

  chosen, rejected = (get(record, key, (str, list)) for key in ("chosen", "rejected"))
  if "prompt" not in record and isinstance(chosen, list) and isinstance(rejected, list):
    (prompt, chosen), (other, rejected) = (
        _last_turn(value, key) for value, key in ((chosen, '"chosen"'), (rejected, '"rejected"')))
    _require(bool(prompt), "empty_prompt", 'no message stands before the assistant\'s last')
    _require(prompt == other, "different_prompts",
             'the messages before the last differ between "chosen" and "rejected"')
  else:
    _require("prompt" in record or ASSISTANT not in chosen, "missing_key",
             '"prompt" is missing; whole HH dialogues are read with data.source=\'hh\'')
    prompt = _prompt(record)
    chosen = _response(chosen, '"chosen"', prompt)
    rejected = _response(rejected, '"rejected"', prompt)
  return checked(prompt, [chosen, rejected], ['"chosen"', '"rejected"'])


def parse_prompt(record: Any) -> str | list[dict]:
  """Returns what stands under "prompt" in a record: text, or the messages of a conversation.

  Raises:
    RecordError: nothing does, or something else.
  """
  prompt = _prompt(record)
  messages = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
  _require(all(map(_encodes, messages)), "broken_unicode", "a text has half of a surrogate pair")
  return prompt


def split_dialogue(chosen: str, rejected: str) -> Example:
  """Returns the example of two HH dialogues: the prompt ends with the last "\\n\\nAssistant:".

  Raises:
    RecordError: a dialogue has no such turn, the prompts differ, or a response is unusable.
  """
  prompts, responses = [], []
  for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
    before, turn, response = dialogue.rpartition(ASSISTANT)
    _require(bool(turn), "no_assistant_turn", f'"{name}" has no "\\n\\nAssistant:" turn')
    prompts.append(before + turn)
    responses.append(response)
  _require(prompts[0] == prompts[1], "different_prompts",
           'the text up to the last "\\n\\nAssistant:" differs between "chosen" and "rejected"')
  return checked(prompts[0], responses, ['"chosen"', '"rejected"'])


def human_and_assistant(question: str, answers: list[str]) -> Example:
  """Returns a question and its answers, best first, as a dialogue of one turn in HH's form."""
  names = [f"answer {k + 1} of {len(answers)}" for k in range(len(answers))]
  return checked(f"{HUMAN}{question}{ASSISTANT}", [f" {answer}" for answer in answers], names)


def get(record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
  """Returns what stands under `key`; raises RecordError if it is missing or not a `kind`."""
  _require(isinstance(record, dict), "wrong_type", f"the record is {_kind(record)}, not an object")
  _require(key in record, "missing_key", f'"{key}" is missing')
  kinds = kind if isinstance(kind, tuple) else (kind,)
  sound = isinstance(record[key], kinds) and not isinstance(record[key], bool)
  wanted = " or ".join(dict.fromkeys(_KINDS[each] for each in kinds))
  _require(sound, "wrong_type", f'"{key}" is {_kind(record[key])}, not {wanted}')
  return record[key]


def checked(prompt: str | list[dict], responses: list[str], names: list[str]) -> Example:
  """Returns the example if its responses have text and differ and all of it is valid Unicode.

  Args:
    prompt: text or messages.
    responses: best first.
    names: what to call each response in an error.

  Raises:
    RecordError: otherwise.
  """
  for name, response in zip(names, responses):
    _require(bool(response.strip()), "empty_response", f"{name} is empty")
  for k, response in enumerate(responses):
    first = responses.index(response)
    _require(first == k, "identical_responses", f"{names[first]} and {names[k]} are the same text")
  messages = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
  for text in (*messages, *responses):
    _require(_encodes(text), "broken_unicode", "a text has half of a surrogate pair")
  return Example(prompt, tuple(responses))


def _prompt(record: dict) -> str | list[dict]:
  prompt = get(record, "prompt", (str, list))
  return prompt if isinstance(prompt, str) else _messages(prompt, '"prompt"')


def _response(value: Any, name: str, prompt: str | list[dict]) -> str:
  """Returns a response's text: a string, or in a conversation the assistant's one message."""
  if isinstance(prompt, str):
    _require(isinstance(value, str), "wrong_type",
             f'{name} is {_kind(value)} but "prompt" a string')
    return value
  _require(isinstance(value, list), "wrong_type",
           f'{name} is {_kind(value)} but "prompt" a list of messages')
  before, content = _last_turn(value, name)
  _require(not before, "wrong_type", f"{name} has {len(value)} messages, not the assistant's one")
  return content


def _last_turn(value: list, name: str) -> tuple[list[dict], str]:
  """Splits a conversation into the messages before the assistant's last one, and its content."""
  *before, last = _messages(value, name)
  _require(last["role"] == "assistant", "no_assistant_turn",
           f'the last message of {name} is of role "{last["role"]}", not "assistant"')
  return before, last["content"]


def _messages(value: list, name: str) -> list[dict]:
  _require(bool(value), "no_assistant_turn" if name != '"prompt"' else "empty_prompt",
           f"{name} has no messages")
  for message in value:
    sound = isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content"))
    _require(sound, "wrong_type", f'a message of {name} is not {{"role": str, "content": str}}')
  return value


_KINDS = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number",
          bool: "true or false", type(None): "null"}


def _kind(value: Any) -> str:
  return _KINDS.get(type(value), type(value).__name__)


def _encodes(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _require(condition: bool, reason: str, message: str):
  if not condition:
    raise RecordError(reason, message)
