"""Record to example: what the forms share once `formats` has said which keys are prompt and responses.

Text or messages, the prompt where it stands twice, system, tools, and the checks.
"""

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dpojax.data import examples, files
from dpojax.data import messages as messages_lib
from dpojax.data.examples import DataError, Example, RecordError, of_kind, require
from dpojax.data.fields import Fields, is_json
from dpojax.data.formats import FORMS, VALUE, Split, tools_of
from dpojax.data.messages import assistant, user

SYSTEM = ("system", "system_prompt", "system_message")
"""Keys of a text that stands in front of a conversation."""


class Reading(NamedTuple):
  """An example and how it was read: the form, the keys ignored, and what was changed, as in `Fields`."""

  example: Example
  form: str
  ignored: list[str]
  notes: dict[tuple[str, str], int]


def parse_record(record: Any, form: str = "") -> Example:
  """Returns the example of a record in one of the forms of `FORMS`; see `read`."""
  return read(record, form).example


def parse_prompt(record: Any, form: str = "") -> Example:
  """Returns the example of a record without its responses; there may be none."""
  return read(record, form, prompt_only=True).example


def read(record: Any, form: str = "", *, prompt_only: bool = False) -> Reading:
  """Returns the example of a record, and how it was read.

  Args:
    record: an object as JSON or Parquet have it.
    form: a name in `FORMS`; '' recognises it by the record's keys.
    prompt_only: whether responses are left out; they may then be missing or empty.

  Raises:
    RecordError: the record is not of the form, contradicts itself, or cannot be compared.
    DataError: there is no such form.
  """
  if form and form not in FORMS:
    raise DataError(f"data.form is {form!r}; it is one of {', '.join(FORMS)}, or empty")
  fields = Fields(record, prompt_only=prompt_only)
  examples.check_strings(record)
  # In the table's order: a form with rarer keys stands before those that share its others.
  name = form or next(name for name, each in FORMS.items() if each.fits and each.fits(record))
  example = _example(fields, FORMS[name].read(fields))
  return Reading(example, name, fields.ignored(), fields.notes)


def read_file(
  path: files.Path, parse: Callable[[Any], Any], *, given: str = "data.path", left_out: list | None = None
) -> Iterator[tuple[int, Any]]:
  """Yields the number, from 0, of each record of files, and what `parse` makes of it.

  Args:
    path: as of `files.local_files`.
    parse: takes a record; for prompts `parse_prompt`, for comparisons `parse_record`.
    given: what the user gave the path as.
    left_out: gets the errors of unusable records, with their places; None raises the first.

  Raises:
    DataError: a file cannot be used, or a record; it says which.
  """
  number = itertools.count()
  try:
    for file in files.local_files(path):
      for where, record in files.read_records(file):
        i = next(number)
        try:
          if isinstance(record, RecordError):
            raise record
          value = parse(record)
        except RecordError as error:
          problem = f"{file} {where}: {error}"
          if left_out is None:
            raise DataError(f"{problem}; correct the record or drop it") from error
          left_out.append(RecordError(error.reason, problem))
          continue
        yield i, value
  except DataError as error:
    raise DataError(str(error).replace("data.path", given)) from error


def counted(left_out: list[RecordError]) -> str:
  """Returns how many records were left out, by reason, and the first of them; '' if none was."""
  if not left_out:
    return ""
  reasons = collections.Counter(error.reason for error in left_out)
  counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
  return f"{len(left_out)} records left out: {counts}; first: {left_out[0]}"


def prompt_record(example: Example) -> dict[str, Any]:
  """Returns a record that is read as the example's prompt, in the project's own form."""
  given = {"tools": example.tools, "chat_template_kwargs": example.arguments}
  return {"prompt": example.prompt} | {key: value for key, value in given.items() if value}


def _example(fields: Fields, parts: Split) -> Example:
  """Brings a form's parts to a prompt and responses, checked."""
  prompt = parts.prompt
  if prompt is not None:
    prompt = messages_lib.text_or_messages(of_kind(prompt, '"prompt"', VALUE), '"prompt"', fields.note)
  sides = [
    messages_lib.text_or_messages(of_kind(side, name, VALUE), name, fields.note)
    for side, name in zip(parts.sides, parts.names)
  ]
  if any(isinstance(each, list) for each in (prompt, *sides)):
    prompt, sides = _conversation(fields, prompt, sides, parts.names)
  else:
    require(prompt is not None, "missing_key", '"prompt" is missing')
  prompt = _with_system(fields, prompt)
  tools, arguments = tools_of(fields, parts.tools), _arguments(fields)
  if isinstance(prompt, str):
    for key, value in (("tools", tools), ("chat_template_kwargs", arguments)):
      require(
        not value,
        f"{key}_beside_text",
        f'"{key}" stands beside a plain text prompt, which no '
        'chat template writes; write "prompt" as messages, or drop the key',
      )
  if fields.prompt_only:
    return Example(prompt, (), tools, arguments)
  # Chosen and rejected that are equal, or empty, are refused there.
  example = examples.compared(prompt, sides, parts.names)
  if parts.desirable is not None:
    # A response judged by itself is half a pair: its place says whether it was good.
    absent = "" if isinstance(prompt, str) else []
    (response,) = sides
    example = example._replace(responses=(response, absent) if parts.desirable else (absent, response))
  return example._replace(tools=tools, arguments=arguments)


def _conversation(fields, prompt, sides, names) -> tuple[list[dict], list[list[dict]]]:
  """Returns prompt messages and, of each side, those behind them.

  Without prompt messages those of whole conversations are taken, of which a text must be what the user
  says first or last.
  """
  if any(isinstance(side, str) for side in sides):
    fields.note("converted", "text_answer_to_message")
  sides = [[assistant(side)] if isinstance(side, str) else side for side in sides]
  for side, name in zip(sides, names):
    require(bool(side), "no_assistant_turn", f"{name} has no messages")
  if isinstance(prompt, list):
    require(bool(prompt), "empty_prompt", '"prompt" has no messages')
    prompt = messages_lib.with_system_of(sides, _without_answer(fields, prompt, sides))
    sides = [messages_lib.behind_prompt(prompt, *each, fields.note) for each in zip(sides, names)]
  elif any(side[0]["role"] != "assistant" for side in sides):
    text = prompt
    prompt, sides = messages_lib.without_shared(sides, names)
    if text is not None:
      _check_asked(text, prompt, names[0])
      fields.note("converted", "prompt_stood_in_response_too")
  # What all sides begin with was said before they differ.
  elif prompt is None:  # the assistant greets
    shared = messages_lib.shared_beginning(sides, names)
    prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
  else:
    require(bool(prompt.strip()), "empty_prompt", '"prompt" is empty beside messages')
    fields.note("converted", "text_prompt_to_user_message")
    prompt = [user(prompt)]
  for side, name in zip(sides, names):
    messages_lib.check_response(side, name)
  return prompt, sides


def _check_asked(text: str, prompt: list[dict], name: str):
  said = [message["content"].strip() for message in prompt if message["role"] == "user"]
  require(
    text.strip() in said[:1] + said[-1:],
    "prompt_contradicts",
    f'"prompt" is {text[:40]!r} but {name} asks {(said or ["nothing"])[-1][:40]!r}; drop one of them',
  )


def _without_answer(fields, prompt, sides) -> list[dict]:
  """Returns prompt messages up to the last that is not an answer already."""
  last = prompt[-1]
  if last["role"] != "assistant" or last.get("tool_calls"):
    return prompt
  known = any(messages_lib.same([last], side[-1:]) for side in sides)
  require(
    known and len(prompt) > 1,
    "prompt_ends_with_answer",
    'the last message of "prompt" is the assistant\'s already; drop it, or make it the start of '
    "each response",
  )
  fields.note("converted", "answer_stood_in_prompt_too")
  return prompt[:-1]


def _with_system(fields: Fields, prompt: str | list[dict]) -> str | list[dict]:
  """Puts a system text that stands beside the prompt in front of it."""
  found = {key: text for key in SYSTEM if (text := fields.optional(key, str)) and text.strip()}
  for key, text in found.items():
    require(
      isinstance(prompt, list),
      "system_beside_text",
      f'"{key}" stands beside a plain text prompt; write "prompt" as messages, or put the text of '
      f'"{key}" into it',
    )
    first = prompt[0]
    if first["role"] in ("system", "developer"):
      require(
        first["content"].strip() == text.strip(),
        "system_contradicts",
        f'"{key}" is not what the system message of the prompt says; keep one of them',
      )
    else:
      prompt = [{"role": "system", "content": text}, *prompt]
      fields.note("converted", f"{key}_put_in_front")
  return prompt


def _arguments(fields: Fields) -> dict | None:
  value = fields.raw("chat_template_kwargs")
  if isinstance(value, str) and value.strip():
    value = messages_lib.parsed(value, '"chat_template_kwargs"')
  if not value or isinstance(value, str):
    return None
  of_kind(value, '"chat_template_kwargs"', dict)
  require(is_json(value), "not_json", '"chat_template_kwargs" holds what JSON lacks; write it as text')
  return value
