"""Messages in whatever form to those a chat template reads; conversations to a prompt and what follows it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from dpojax.data.examples import RecordError, check_strings, kind_of, require
from dpojax.data.fields import is_json, refuse_media

ROLES = {
  "system": "system",
  "developer": "developer",
  "user": "user",
  "human": "user",
  "assistant": "assistant",
  "gpt": "assistant",
  "tool": "tool",
  "function": "function",
  "ipython": "ipython",
  "observation": "tool",
  "tool_response": "tool",
  "function_call": "assistant",
  "tool_call": "assistant",
}
"""Roles as published forms name them, and as chat templates do."""

CALLS = ("function_call", "tool_call")
"""Roles whose content is a call, in JSON."""

READ_BY_TEMPLATES = frozenset(
  (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_plan",
    "tools",
    "documents",
    "citations",
    "prefix",
    "channel",
    "recipient",
    "content_type",
    "refusal",
  )
)
"""Keys of a message that published chat templates read."""

TEXT_PARTS = ("text", "input_text", "output_text")
UNSCORED = ("weight", "loss", "train")
"""Keys by which other trainers are told not to learn a message."""

Note = Callable[[str, str], None]
"""(kind, what): keeps in mind what was changed."""


def conversation(value: Any, name: str, note: Note) -> list[dict]:
  """Returns messages as a chat template reads them.

  ShareGPT's "from" and "value" become "role" and "content", its roles those of templates, parts of
  type text one text, a call in JSON an entry of "tool_calls". All other keys stay.

  Args:
    value: a list of messages, one message, or either in JSON text.
    name: what to call it in an error.
    note: is told what was changed.

  Raises:
    RecordError: something is no message, or is none that a text model reads.
  """
  if isinstance(value, str):
    value = parsed(value, name)
    note("converted", "json_text_to_messages")
  if isinstance(value, dict):
    note("converted", "message_to_list")
    value = [value]
  require(isinstance(value, list), "wrong_type", f"{name} is {kind_of(value)}, not a list of messages")
  return [_message(message, f"{name}[{i}]", note) for i, message in enumerate(value)]


def text_or_messages(value: Any, name: str, note: Note) -> str | list[dict]:
  """Returns a text, or the messages that stand there or that the text holds as JSON."""
  if isinstance(value, str):
    start = value.lstrip()[:40].replace(" ", "")
    if start.startswith(("[{'role'", "[{'from'", "[{'content'", "[{'value'")):
      raise RecordError(
        "python_text", f"{name} is a list of messages as Python prints it; write it as JSON or Parquet"
      )
    if not start.startswith(('[{"role"', '[{"from"', '[{"content"', '[{"value"')):
      return value
  return conversation(value, name, note)


def parsed(text: str, name: str) -> Any:
  """Returns the value of JSON text; raises RecordError if it is none."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise RecordError(
      "broken_json", f"{name} is text that is not JSON ({error}); write a list or JSON"
    ) from error
  check_strings(value)
  return value


def user(text: str) -> dict:
  return {"role": "user", "content": text}


def assistant(text: str) -> dict:
  return {"role": "assistant", "content": text}


def same(one: Sequence[dict], other: Sequence[dict]) -> bool:
  """Returns whether a chat template reads the same of both; keys of its user's own do not count."""
  read = lambda messages: [
    {key: each for key, each in message.items() if key in READ_BY_TEMPLATES and each is not None}
    for message in messages
  ]
  return read(one) == read(other)


def shared_beginning(sides: Sequence[list[dict]], names: Sequence[str]) -> int:
  """Returns how many first messages are the prompt: the most that all share before an assistant's.

  Raises:
    RecordError: a conversation does not end with the assistant, or nothing stands before it.
  """
  for side, name in zip(sides, names):
    require(bool(side), "no_assistant_turn", f"{name} has no messages")
    require(
      side[-1]["role"] == "assistant",
      "no_assistant_turn",
      f'the last message of {name} is of role "{side[-1]["role"]}", not "assistant"',
    )
  found = None
  # The longest beginning that all share, and only up to an answer: a question belongs to the prompt.
  for n in range(min(map(len, sides))):
    if all(side[n]["role"] == "assistant" for side in sides):
      found = n
    if not all(same(sides[0][n : n + 1], side[n : n + 1]) for side in sides[1:]):
      break
  require(
    found is not None,
    "different_prompts",
    f"the messages before the assistant's differ between {' and '.join(names)}",
  )
  require(bool(found), "empty_prompt", f"no message stands before the assistant's in {names[0]}")
  return found


def without_shared(sides: Sequence[list[dict]], names: Sequence[str]) -> tuple[list[dict], list[list[dict]]]:
  """Returns the prompt that whole conversations share, and what follows it in each.

  What starts with the assistant follows it already.
  """
  whole = [(side, name) for side, name in zip(sides, names) if side[0]["role"] != "assistant"]
  shared = shared_beginning(*zip(*whole))
  prompt = whole[0][0][:shared]
  return prompt, [side if side[0]["role"] == "assistant" else side[shared:] for side in sides]


def with_system_of(sides: Sequence[list[dict]], prompt: list[dict]) -> list[dict]:
  """Returns prompt messages behind the system message that stands in front of them in all `sides`."""
  if not sides or sides[0][0]["role"] not in ("system", "developer"):
    return prompt
  whole = [sides[0][0], *prompt]
  return whole if all(same(side[: len(whole)], whole) for side in sides) else prompt


def behind_prompt(prompt: list[dict], side: list[dict], name: str, note: Note) -> list[dict]:
  """Returns a response to prompt messages: what stands there, less the prompt where it stands there too.

  Raises:
    RecordError: it is another conversation, or does not go on with the assistant.
  """
  # Trainers write the prompt into the response with its system message or without; both are seen in published
  # data.
  without_system = prompt[1:] if prompt[0]["role"] in ("system", "developer") else prompt
  for beginning in (prompt, without_system):
    if beginning and same(side[: len(beginning)], beginning):
      note("converted", "prompt_stood_in_response_too")
      side = side[len(beginning) :]
      break
  else:
    require(
      not side or side[0]["role"] not in ("system", "developer", "user"),
      "prompt_contradicts",
      f'{name} does not begin with the messages of "prompt"; make them the same, or leave one out',
    )
  check_response(side, name)
  return side


def check_response(response: list[dict], name: str):
  """Raises RecordError unless a response starts and ends with the assistant, who is to learn all of it."""
  require(bool(response), "no_assistant_turn", f"{name} has no messages of the assistant")
  for place, message in (("first", response[0]), ("last", response[-1])):
    require(
      message["role"] == "assistant",
      "no_assistant_turn",
      f'the {place} message of {name} is of role "{message["role"]}", not "assistant"',
    )
  for message in response:
    unscored = [
      key
      for key in UNSCORED
      if key in message and message["role"] == "assistant" and message[key] in (0, False)
    ]
    require(
      not unscored,
      "unscored_message",
      f'a message of {name} has "{(unscored or [""])[0]}": it is not to be learned, and all of a '
      "response is; move the messages up to it into the prompt",
    )


def _message(value: Any, name: str, note: Note) -> dict:
  require(isinstance(value, dict), "wrong_type", f"{name} is {kind_of(value)}, not a message")
  message = dict(value)
  if "role" not in message and "from" in message:
    message = {"role": message.pop("from"), "content": message.pop("value", None)} | message
    note("converted", "sharegpt_message")
  role = message.get("role")
  message["role"] = _role(role, name)
  if message["role"] != role:
    note("converted", f"role_{role}_to_{message['role']}")
  for key in list(message):
    refuse_media(message, key, f'{name}["{key}"]')
    # What no template reads can be dropped; what one reads would be missing.
    if not is_json(message[key]):
      require(
        key not in READ_BY_TEMPLATES,
        "not_json",
        f'{name}["{key}"] holds {kind_of(message[key])}, which JSON lacks; write it as text',
      )
      note("dropped_values", key)
      del message[key]
  if "tool_calls" in message:
    _set_calls(message, name, note)
  # ShareGPT has a call as a turn of its own; templates want it inside a message of the assistant.
  if role in CALLS:
    message |= {"content": "", "tool_calls": calls(message.get("content"), name)}
  else:
    _set_content(message, name, note)
  return message


def _role(role: Any, name: str) -> str:
  if not isinstance(role, str):
    raise RecordError(
      "wrong_type", f'{name} is not {{"role": str, "content": str}}: its "role" is {kind_of(role)}'
    )
  if role not in ROLES:
    raise RecordError(
      "unknown_role", f'{name} is of role "{role[:40]}"; known are {", ".join(ROLES)}: rename it'
    )
  return ROLES[role]


def _set_calls(message: dict, name: str, note: Note) -> None:
  """Reads calls in JSON text, and refuses those that are no objects."""
  found = message["tool_calls"]
  if isinstance(found, str) and found.strip():
    message["tool_calls"] = found = parsed(found, f'{name}["tool_calls"]')
    note("converted", "json_text_to_calls")
  if found and not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
    raise RecordError(
      "wrong_type",
      f'{name}["tool_calls"] is no list of objects; write each as '
      '{"type": "function", "function": {"name": str, "arguments": object}}',
    )


def _set_content(message: dict, name: str, note: Note) -> None:
  """Makes one text of parts, and refuses content that is none."""
  content = message.get("content")
  if isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content):
    message["content"] = content = "".join(_part(part, f'{name}["content"]') for part in content)
    note("converted", "text_parts_joined")
  if message["role"] in ("tool", "ipython", "function"):  # templates write what a tool gives in JSON
    return
  if content is None and message["role"] == "assistant":
    return
  if not isinstance(content, str):
    found = kind_of(content) if "content" in message else "missing"
    raise RecordError(
      "wrong_type", f'{name} is not {{"role": str, "content": str}}: its "content" is {found}'
    )


def _part(part: Any, name: str) -> str:
  require(
    isinstance(part, dict) and isinstance(part.get("type"), str),
    "wrong_type",
    f'a part of {name} is not {{"type": "text", "text": str}}',
  )
  require(
    part["type"] in TEXT_PARTS,
    "media",
    f'a part of {name} is of type "{part["type"][:40]}", and dpojax trains on text alone; drop the '
    "record or the part",
  )
  require(isinstance(part.get("text"), str), "wrong_type", f'a part of {name} has no "text"')
  return part["text"]


def calls(content: Any, name: str) -> list[dict]:
  """Returns the "tool_calls" of calls in JSON text: {"name", "arguments"}, or a list of such."""
  value = parsed(content, name) if isinstance(content, str) else content
  found = value if isinstance(value, list) else [value]
  for call in found:
    require(
      isinstance(call, dict) and isinstance(call.get("name"), str),
      "wrong_type",
      f'{name} is of a role of calls, but holds no {{"name": str, "arguments": object}}',
    )
  require(bool(found), "wrong_type", f"{name} is of a role of calls, but holds none")
  return [
    as_object(
      {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
    )
    for call in found
  ]


def as_object(call: dict) -> dict:
  """Returns a tool call whose arguments are an object, as templates expect, where they are JSON text."""
  function = call.get("function") if isinstance(call, dict) else None
  arguments = function.get("arguments") if isinstance(function, dict) else None
  if not isinstance(arguments, str):
    return call
  # A template that loops over arguments would write text letter by letter, or quote it once more.
  try:
    value = parsed(arguments, "arguments")
  except RecordError:
    return call
  return call | {"function": function | {"arguments": value}} if isinstance(value, dict) else call
