"""Record to example: a table of readers, one a published form, and the steps they share.

A reader says which keys of a record are prompt and responses (`Parts`); what follows is the same for
all: text or messages, the prompt where it stands twice, system, tools, and the checks.
"""

import collections
import itertools
from typing import Any, Callable, Iterator, NamedTuple

from dpojax.data import examples, files
from dpojax.data import messages as messages_lib
from dpojax.data.examples import ASSISTANT, DataError, Example, RecordError, of_kind, require
from dpojax.data.fields import Fields, is_json
from dpojax.data.messages import assistant, user

SYSTEM = ("system", "system_prompt", "system_message")
LABELS = {True: ("true", "1", "yes", "desirable", "good", "chosen", "positive", "upvote"),
          False: ("false", "0", "no", "undesirable", "bad", "rejected", "negative", "downvote")}
"""What a label in text is called."""

VALUE = (str, list, dict)
"""A text, messages, or one message."""


class Parts(NamedTuple):
  """What a form's keys are.

  Attributes:
    prompt: text or messages; None where it stands in front of each response.
    sides: the responses, best first; none of a record that is a prompt alone.
    names: what to call each of them.
    desirable: of one that was judged by itself, how; else None.
    tools: what stands where the form has its tools.
  """

  prompt: Any
  sides: list
  names: list[str]
  desirable: bool | None = None
  tools: Any = None


class Reading(NamedTuple):
  """An example and how it was read: the form, the keys ignored, and what was changed, as in `Fields`."""

  example: Example
  form: str
  ignored: list[str]
  notes: dict[tuple[str, str], int]


class Form(NamedTuple):
  """A published form: whether a record's keys are its, and its reader."""

  fits: Callable[[dict], bool]
  read: Callable[[Fields], Parts]


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
  name = form or next(name for name, each in FORMS.items() if each.fits and each.fits(record))
  example = _example(fields, FORMS[name].read(fields))
  return Reading(example, name, fields.ignored(), fields.notes)


def read_file(
    path: files.Path, parse: Callable[[Any], Any], *, given: str = "data.path", left_out: list | None = None,
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


def _example(fields: Fields, parts: Parts) -> Example:
  """Brings a form's parts to a prompt and responses, checked."""
  prompt = parts.prompt
  if prompt is not None:
    prompt = messages_lib.text_or_messages(
        of_kind(prompt, '"prompt"', VALUE), '"prompt"', fields.note)
  sides = [messages_lib.text_or_messages(of_kind(side, name, VALUE), name, fields.note)
           for side, name in zip(parts.sides, parts.names)]
  if any(isinstance(each, list) for each in (prompt, *sides)):
    prompt, sides = _conversation(fields, prompt, sides, parts.names)
  else:
    require(prompt is not None, "missing_key", '"prompt" is missing')
  prompt = _with_system(fields, prompt)
  tools, arguments = _tools(fields, parts.tools), _arguments(fields)
  if isinstance(prompt, str):
    for key, value in (("tools", tools), ("chat_template_kwargs", arguments)):
      require(not value, f"{key}_beside_text", f'"{key}" stands beside a plain text prompt, which no '
              'chat template writes; write "prompt" as messages, or drop the key')
  if fields.prompt_only:
    return Example(prompt, (), tools, arguments)
  example = examples.compared(prompt, sides, parts.names)
  if parts.desirable is not None:
    absent = "" if isinstance(prompt, str) else []
    response, = sides
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
  require(text.strip() in said[:1] + said[-1:], "prompt_contradicts",
          f'"prompt" is {text[:40]!r} but {name} asks {(said or ["nothing"])[-1][:40]!r}; drop one of them')


def _without_answer(fields, prompt, sides) -> list[dict]:
  """Returns prompt messages up to the last that is not an answer already."""
  last = prompt[-1]
  if last["role"] != "assistant" or last.get("tool_calls"):
    return prompt
  known = any(messages_lib.same([last], side[-1:]) for side in sides)
  require(known and len(prompt) > 1, "prompt_ends_with_answer",
          'the last message of "prompt" is the assistant\'s already; drop it, or make it the start of '
          "each response")
  fields.note("converted", "answer_stood_in_prompt_too")
  return prompt[:-1]


def _with_system(fields: Fields, prompt: str | list[dict]) -> str | list[dict]:
  """Puts a system text that stands beside the prompt in front of it."""
  found = {key: text for key in SYSTEM if (text := fields.optional(key, str)) and text.strip()}
  for key, text in found.items():
    require(isinstance(prompt, list), "system_beside_text",
            f'"{key}" stands beside a plain text prompt; write "prompt" as messages, or put the text of '
            f'"{key}" into it')
    first = prompt[0]
    if first["role"] in ("system", "developer"):
      require(first["content"].strip() == text.strip(), "system_contradicts",
              f'"{key}" is not what the system message of the prompt says; keep one of them')
    else:
      prompt = [{"role": "system", "content": text}, *prompt]
      fields.note("converted", f"{key}_put_in_front")
  return prompt


def _tools(fields: Fields, of_form: Any) -> list[dict] | None:
  value = fields.raw("tools") if of_form is None else of_form
  if isinstance(value, str) and value.strip():
    value = messages_lib.parsed(value, '"tools"')
  if not value or isinstance(value, str):
    return None
  require(isinstance(value, list) and all(isinstance(each, dict) for each in value), "wrong_type",
          '"tools" is not a list of objects; write each as {"type": "function", "function": {...}}')
  require(is_json(value), "not_json", '"tools" holds what JSON lacks; write it as text')
  return value


def _arguments(fields: Fields) -> dict | None:
  value = fields.raw("chat_template_kwargs")
  if isinstance(value, str) and value.strip():
    value = messages_lib.parsed(value, '"chat_template_kwargs"')
  if not value or isinstance(value, str):
    return None
  of_kind(value, '"chat_template_kwargs"', dict)
  require(is_json(value), "not_json", '"chat_template_kwargs" holds what JSON lacks; write it as text')
  return value


# Readers: fields -> Parts.


def _sides(fields: Fields, *keys: str) -> tuple[list, list[str]]:
  """Returns the responses under some keys and their names; of a prompt alone those that are there."""
  there = [key for key in keys if key in fields or not fields.prompt_only]
  return [fields.get(key, VALUE) for key in there], [fields.name(key) for key in there]


def _desirable(fields: Fields, *, needed: bool) -> bool | None:
  """Returns whether a response that was judged by itself is good, of "label" or "kto_tag"."""
  key = "kto_tag" if "kto_tag" in fields and "label" not in fields else "label"
  value = fields.raw(key)
  if value is None:
    require(not needed or fields.prompt_only, "missing_key",
            '"label" is missing: true for a desirable "completion", false for another; demonstrations '
            "without one are read with data.form='prompt_completion'")
    return None
  if isinstance(value, str):
    found = [truth for truth, names in LABELS.items() if value.strip().lower() in names]
    require(bool(found), "wrong_label",
            f'{fields.name(key)} is {value[:40]!r}, not one of {", ".join(LABELS[True] + LABELS[False])}')
    return found[0]
  require(isinstance(value, (bool, int, float)), "wrong_type",
          f"{fields.name(key)} is {examples.kind_of(value)}, not true or false, 1 or 0")
  require(value in (0, 1), "wrong_label", f"{fields.name(key)} is {value}, not true or false, 1 or 0")
  return bool(value)


def _preference(fields: Fields) -> Parts:
  """{"prompt", "chosen", "rejected"} in text or messages; without "prompt" whole conversations (TRL)."""
  sides, names = _sides(fields, "chosen", "rejected")
  if "prompt" in fields or "messages" not in fields:
    return Parts(fields.raw("prompt"), sides, names)
  whole = [side for side in sides if isinstance(side, list) and side and isinstance(side[0], dict)
           and side[0].get("role") != "assistant"]
  return Parts(None if whole else fields.get("messages", (list, str)), sides, names)


def _ranking(fields: Fields) -> Parts:
  """{"prompt", "responses": [best, ..., worst]}; one is enough to be fine-tuned on."""
  require("chosen" not in fields and "rejected" not in fields, "ambiguous_keys",
          'the record has both "responses" and "chosen"/"rejected"; keep one form')
  responses = fields.get("responses", list)
  require(bool(responses), "too_few_responses", '"responses" is an empty list')
  prompt = fields.get("prompt", VALUE)
  return Parts(prompt, responses, [f'"responses"[{k}]' for k in range(len(responses))])


def _unpaired(fields: Fields) -> Parts:
  """{"prompt", "completion", "label"}: a response judged by itself (TRL), for losses without pairs."""
  desirable = _desirable(fields, needed=True)
  return Parts(fields.raw("prompt"), *_sides(fields, "completion"), desirable)


def _prompt_completion(fields: Fields) -> Parts:
  """{"prompt", "completion"}: a demonstration (TRL)."""
  return Parts(fields.raw("prompt"), *_sides(fields, "completion"))


def _turns(fields: Fields, found: list[dict], name: str) -> Parts:
  """Returns a conversation to be learned from its first answer on, or judged by its last turn."""
  require(bool(found), "no_assistant_turn" if not fields.prompt_only else "empty_prompt",
          f"{name} has no messages")
  answers = [i for i, message in enumerate(found) if message["role"] == "assistant"]
  if fields.prompt_only and not answers:
    return Parts(found, [], [])
  require(bool(answers), "no_assistant_turn", f"{name} has no message of the assistant")
  last = answers[-1]
  asked = [i for i in range(last) if found[i]["role"] == "user"] or ([] if 0 in answers else [0])
  require(bool(asked), "empty_prompt", f"no message stands before the assistant's in {name}")
  desirable = _desirable(fields, needed=False)
  first = next(i for i in answers if i > asked[0 if desirable is None else -1])
  if desirable is not None:
    require(last == len(found) - 1, "no_assistant_turn",
            f'the last message of {name} is of role "{found[-1]["role"]}", not "assistant"')
  elif first > answers[0]:
    fields.note("left_out", "answers_before_the_first_question")
  if last < len(found) - 1:
    fields.note("left_out", "messages_behind_the_last_answer")
  return Parts(found[:first], [found[first:last + 1]], [name], desirable)


def _conversation_form(fields: Fields) -> Parts:
  """{"messages"}: a whole conversation (OpenAI, TRL); with "label" its last turn is judged (ms-swift)."""
  found = messages_lib.conversation(fields.get("messages", VALUE), '"messages"', fields.note)
  return _turns(fields, found, '"messages"')


def _openai(fields: Fields) -> Parts:
  """OpenAI's preference form: developers.openai.com/api/docs/guides/direct-preference-optimization."""
  given = fields.inside("input")
  sides, names = _sides(fields, "preferred_output", "non_preferred_output")
  read = lambda value, name: value if isinstance(value, str) else [
      _with_object_arguments(fields, message)
      for message in messages_lib.conversation(value, name, fields.note)]
  return Parts(read(given.get("messages", list), '"input.messages"'), list(map(read, sides, names)), names,
               tools=given.raw("tools") or [])


def _with_object_arguments(fields: Fields, message: dict) -> dict:
  """Returns a message whose calls have objects as arguments: OpenAI's have JSON text, templates none."""
  calls = message.get("tool_calls")
  if not isinstance(calls, list):
    return message
  read = [messages_lib.as_object(call) for call in calls]
  if read != calls:
    fields.note("converted", "call_arguments_to_objects")
  return message | {"tool_calls": read}


def _swift(fields: Fields) -> Parts:
  """ms-swift's: "messages" with "rejected_response" or "rejected_messages" (Custom-dataset.md there)."""
  found = messages_lib.conversation(fields.get("messages", VALUE), '"messages"', fields.note)
  if "rejected_messages" in fields:
    rejected = fields.get("rejected_messages", VALUE)
    return Parts(None, [found, rejected], ['"messages"', '"rejected_messages"'])
  rejected = fields.get("rejected_response", VALUE)
  require(bool(found) and found[-1]["role"] == "assistant", "no_assistant_turn",
          'the last message of "messages" is not the assistant\'s, which "rejected_response" is compared to')
  return Parts(found[:-1], [found[-1:], rejected], ['"messages"', '"rejected_response"'])


def _sharegpt(fields: Fields) -> Parts:
  """ShareGPT's "conversations" of "from" and "value": whole, ranked or with "kto_tag" (LLaMA-Factory)."""
  key = "conversation" if "conversation" in fields and "conversations" not in fields else "conversations"
  found = messages_lib.conversation(fields.get(key, VALUE), fields.name(key), fields.note)
  tools = _as_functions(fields)
  if "chosen" in fields or "rejected" in fields:
    return Parts(found, *_sides(fields, "chosen", "rejected"), tools=tools)
  return _turns(fields, found, fields.name(key))._replace(tools=tools)


def _as_functions(fields: Fields) -> list[dict]:
  """Returns LLaMA-Factory's tools, functions in JSON text, as chat templates read them."""
  tools = _tools(fields, None) or []
  bare = [each for each in tools if "function" not in each and "name" in each]
  if bare:
    fields.note("converted", "functions_to_tools")
  return [{"type": "function", "function": each} if each in bare else each for each in tools]


def _instruction(question: str, answer: str) -> Callable[[Fields], Parts]:
  """Returns the reader of a form that has one question and one answer, or a pair of them, in text.

  As LLaMA-Factory's data/README.md has it: "input" stands a line below the instruction, "history" is
  pairs of earlier turns, and without a pair or a label the earlier answers are learned too.
  """
  def reader(fields: Fields) -> Parts:
    text = fields.get(question, str)
    more = fields.optional("input", str) if question == "instruction" else None
    turns = [*_history(fields), user(f"{text}\n{more}" if more else text)]
    if "chosen" in fields or "rejected" in fields:
      return Parts(turns, *_sides(fields, "chosen", "rejected"), tools=_as_functions(fields))
    if isinstance(fields.raw(answer), list):  # the older form: best first
      responses = fields.get(answer, list)
      return Parts(turns, responses, [f'"{answer}"[{k}]' for k in range(len(responses))])
    if answer in fields:
      turns.append(assistant(fields.get(answer, str)))
    else:
      require(fields.prompt_only, "missing_key", f'"{answer}" is missing')
    return _turns(fields, turns, f'"{answer}"')._replace(tools=_as_functions(fields))

  return reader


def _history(fields: Fields) -> Iterator[dict]:
  for i, pair in enumerate(fields.optional("history", list) or []):
    require(isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair),
            "wrong_type", f'"history"[{i}] is not a pair of texts, an instruction and its answer')
    yield user(pair[0])
    yield assistant(pair[1])


def _hh(fields: Fields) -> Parts:
  """Anthropic HH's pairs of whole dialogues in text, as data.source='hh' reads them."""
  prompt, responses, *_ = examples.split_dialogue(fields.get("chosen", str), fields.get("rejected", str))
  return Parts(prompt, list(responses), ['"chosen"', '"rejected"'])


def _is_dialogue(record: dict) -> bool:
  return record.get("prompt") is None and all(
      isinstance(record.get(key), str) and ASSISTANT in record[key] for key in ("chosen", "rejected"))


def _has(*keys: str, without: tuple[str, ...] = ()) -> Callable[[dict], bool]:
  return lambda record: any(record.get(key) is not None for key in keys) and not any(
      record.get(key) is not None for key in without)


_PROMPTS = ("prompt", "messages")
FORMS = {
    "openai": Form(lambda record: _has("preferred_output", "non_preferred_output")(record) or isinstance(
        record.get("input"), dict) and "prompt" not in record, _openai),
    "swift": Form(_has("rejected_response", "rejected_messages"), _swift),
    "sharegpt": Form(_has("conversations", "conversation", without=_PROMPTS), _sharegpt),
    "alpaca": Form(_has("instruction", without=_PROMPTS), _instruction("instruction", "output")),
    "orca": Form(_has("question", without=_PROMPTS), _instruction("question", "response")),
    "query": Form(_has("query", without=_PROMPTS), _instruction("query", "response")),
    "ranking": Form(_has("responses"), _ranking),
    "unpaired": Form(_has("completion", without=("chosen",)), _unpaired),
    "conversation": Form(_has("messages", without=("prompt", "chosen", "rejected")), _conversation_form),
    "hh": Form(_is_dialogue, _hh),
    "preference": Form(lambda record: True, _preference),
    "prompt_completion": Form(None, _prompt_completion),
}
"""Names that `data.form` takes, in the order in which they are tried; the last only by its name."""
