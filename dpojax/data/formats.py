"""The table of published forms of records: which keys of each are prompt, responses, tools and label.

As read in TRL's "Dataset formats and types" (huggingface.co/docs/trl/dataset_formats), OpenAI's guide to
direct preference optimization (developers.openai.com), data/README.md of LLaMA-Factory,
docs/source_en/Customization/Custom-dataset.md of ms-swift, and the cards of Intel/orca_dpo_pairs and its kin.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dpojax.data import examples
from dpojax.data import messages as messages_lib
from dpojax.data.examples import ASSISTANT, require
from dpojax.data.fields import Fields, is_json
from dpojax.data.messages import assistant, user

LABELS = {
  True: ("true", "1", "yes", "desirable", "good", "chosen", "positive", "upvote"),
  False: ("false", "0", "no", "undesirable", "bad", "rejected", "negative", "downvote"),
}
"""What a label in text is called."""

VALUE = (str, list, dict)
"""A text, messages, or one message."""


class Split(NamedTuple):
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


class Form(NamedTuple):
  """A published form: whether a record's keys are its, and its reader."""

  fits: Callable[[dict], bool]
  read: Callable[[Fields], Split]


def tools_of(fields: Fields, of_form: Any) -> list[dict] | None:
  """Returns the tools of a form, or else those under "tools": a list, or JSON text."""
  value = fields.raw("tools") if of_form is None else of_form
  if isinstance(value, str) and value.strip():
    value = messages_lib.parsed(value, '"tools"')
  if not value or isinstance(value, str):
    return None
  require(
    isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "wrong_type",
    '"tools" is not a list of objects; write each as {"type": "function", "function": {...}}',
  )
  require(is_json(value), "not_json", '"tools" holds what JSON lacks; write it as text')
  return value


def _sides(fields: Fields, *keys: str) -> tuple[list, list[str]]:
  """Returns the responses under some keys and their names; of a prompt alone those that are there."""
  there = [key for key in keys if key in fields or not fields.prompt_only]
  return [fields.get(key, VALUE) for key in there], [fields.name(key) for key in there]


def _desirable(fields: Fields, *, needed: bool) -> bool | None:
  """Returns whether a response that was judged by itself is good, of "label" or "kto_tag"."""
  key = "kto_tag" if "kto_tag" in fields and "label" not in fields else "label"
  value = fields.raw(key)
  if value is None:
    require(
      not needed or fields.prompt_only,
      "missing_key",
      '"label" is missing: true for a desirable "completion", false for another; demonstrations '
      "without one are read with data.form='prompt_completion'",
    )
    return None
  if isinstance(value, str):
    found = [truth for truth, names in LABELS.items() if value.strip().lower() in names]
    require(
      bool(found),
      "wrong_label",
      f"{fields.name(key)} is {value[:40]!r}, not one of {', '.join(LABELS[True] + LABELS[False])}; rename "
      "the key if it says something else",
    )
    return found[0]
  require(
    isinstance(value, (bool, int, float)),
    "wrong_type",
    f"{fields.name(key)} is {examples.kind_of(value)}, not true or false, 1 or 0",
  )
  require(
    # A rating of 1 to 5 under the same key would make all answers good.
    value in (0, 1),
    "wrong_label",
    f"{fields.name(key)} is {value}, not true or false, 1 or 0; rename the key if it says something else",
  )
  return bool(value)


def _preference(fields: Fields) -> Split:
  """{"prompt", "chosen", "rejected"} in text or messages; without "prompt" whole conversations (TRL)."""
  # Some publish the prompt's messages apart, beside whole conversations or answers alone.
  sides, names = _sides(fields, "chosen", "rejected")
  if "prompt" in fields or "messages" not in fields:
    return Split(fields.raw("prompt"), sides, names)
  whole = [
    side
    for side in sides
    if isinstance(side, list) and side and isinstance(side[0], dict) and side[0].get("role") != "assistant"
  ]
  return Split(None if whole else fields.get("messages", (list, str)), sides, names)


def _ranking(fields: Fields) -> Split:
  """{"prompt", "responses": [best, ..., worst]}; one is enough to be fine-tuned on."""
  require(
    "chosen" not in fields and "rejected" not in fields,
    "ambiguous_keys",
    'the record has both "responses" and "chosen"/"rejected"; keep one form',
  )
  responses = fields.get("responses", list)
  require(bool(responses), "too_few_responses", '"responses" is an empty list')
  prompt = fields.get("prompt", VALUE)
  return Split(prompt, responses, [f'"responses"[{k}]' for k in range(len(responses))])


def _unpaired(fields: Fields) -> Split:
  """{"prompt", "completion", "label"}: a response judged by itself (TRL), for losses without pairs."""
  desirable = _desirable(fields, needed=True)
  return Split(fields.raw("prompt"), *_sides(fields, "completion"), desirable)


def _prompt_completion(fields: Fields) -> Split:
  """{"prompt", "completion"}: a demonstration (TRL)."""
  return Split(fields.raw("prompt"), *_sides(fields, "completion"))


def _turns(fields: Fields, found: list[dict], name: str) -> Split:
  """Returns a conversation to be learned from its first answer on, or judged by its last turn."""
  require(
    bool(found), "no_assistant_turn" if not fields.prompt_only else "empty_prompt", f"{name} has no messages"
  )
  answers = [i for i, message in enumerate(found) if message["role"] == "assistant"]
  if fields.prompt_only and not answers:
    return Split(found, [], [])
  require(bool(answers), "no_assistant_turn", f"{name} has no message of the assistant")
  last = answers[-1]
  asked = [i for i in range(last) if found[i]["role"] == "user"] or ([] if 0 in answers else [0])
  require(bool(asked), "empty_prompt", f"no message stands before the assistant's in {name}")
  desirable = _desirable(fields, needed=False)
  first = next(i for i in answers if i > asked[0 if desirable is None else -1])
  if desirable is not None:
    require(
      last == len(found) - 1,
      "no_assistant_turn",
      f'the last message of {name} is of role "{found[-1]["role"]}", not "assistant"',
    )
  elif first > answers[0]:
    fields.note("left_out", "answers_before_the_first_question")
  # What nobody answered is no demonstration, and is counted.
  if last < len(found) - 1:
    fields.note("left_out", "messages_behind_the_last_answer")
  return Split(found[:first], [found[first : last + 1]], [name], desirable)


def _conversation_form(fields: Fields) -> Split:
  """{"messages"}: a whole conversation (OpenAI, TRL); with "label" its last turn is judged (ms-swift)."""
  found = messages_lib.conversation(fields.get("messages", VALUE), '"messages"', fields.note)
  return _turns(fields, found, '"messages"')


def _openai(fields: Fields) -> Split:
  """OpenAI's preference form; its outputs are one message each, in a list."""
  given = fields.inside("input")
  sides, names = _sides(fields, "preferred_output", "non_preferred_output")
  read = lambda value, name: (
    value
    if isinstance(value, str)
    else [
      _with_object_arguments(fields, message)
      for message in messages_lib.conversation(value, name, fields.note)
    ]
  )
  return Split(
    read(given.get("messages", list), '"input.messages"'),
    list(map(read, sides, names)),
    names,
    tools=given.raw("tools") or None,
  )


def _with_object_arguments(fields: Fields, message: dict) -> dict:
  """Returns a message whose calls have objects as arguments: OpenAI's have JSON text, templates none."""
  calls = message.get("tool_calls")
  if not isinstance(calls, list):
    return message
  read = [messages_lib.as_object(call) for call in calls]
  if read != calls:
    fields.note("converted", "call_arguments_to_objects")
  return message | {"tool_calls": read}


def _swift(fields: Fields) -> Split:
  """ms-swift's: "messages" with "rejected_response" or "rejected_messages"."""
  found = messages_lib.conversation(fields.get("messages", VALUE), '"messages"', fields.note)
  if "rejected_messages" in fields:
    rejected = fields.get("rejected_messages", VALUE)
    return Split(None, [found, rejected], ['"messages"', '"rejected_messages"'])
  rejected = fields.get("rejected_response", VALUE)
  require(
    bool(found) and found[-1]["role"] == "assistant",
    "no_assistant_turn",
    'the last message of "messages" is not the assistant\'s, which "rejected_response" is compared to',
  )
  return Split(found[:-1], [found[-1:], rejected], ['"messages"', '"rejected_response"'])


def _sharegpt(fields: Fields) -> Split:
  """ShareGPT's "conversations" of "from" and "value": whole, ranked or with "kto_tag" (LLaMA-Factory)."""
  key = "conversation" if "conversation" in fields and "conversations" not in fields else "conversations"
  found = messages_lib.conversation(fields.get(key, VALUE), fields.name(key), fields.note)
  tools = _as_functions(fields)
  if "chosen" in fields or "rejected" in fields:
    return Split(found, *_sides(fields, "chosen", "rejected"), tools=tools)
  return _turns(fields, found, fields.name(key))._replace(tools=tools)


def _as_functions(fields: Fields) -> list[dict]:
  """Returns LLaMA-Factory's tools, functions in JSON text, as chat templates read them."""
  tools = tools_of(fields, None) or []
  bare = [each for each in tools if "function" not in each and "name" in each]
  if bare:
    fields.note("converted", "functions_to_tools")
  return [{"type": "function", "function": each} if each in bare else each for each in tools]


def _instruction(question: str, answer: str) -> Callable[[Fields], Split]:
  """Returns the reader of a form that has one question and one answer, or a pair of them, in text.

  As LLaMA-Factory has it: "input" stands a line below the instruction, "history" is pairs of earlier
  turns, and without a pair or a label the earlier answers are learned too.
  """

  def reader(fields: Fields) -> Split:
    text = fields.get(question, str)
    more = fields.optional("input", str) if question == "instruction" else None
    # As LLaMA-Factory joins them: by a line break.
    turns = [*_history(fields), user(f"{text}\n{more}" if more else text)]
    if "chosen" in fields or "rejected" in fields:
      return Split(turns, *_sides(fields, "chosen", "rejected"), tools=_as_functions(fields))
    if isinstance(fields.raw(answer), list):  # the older form: best first
      responses = fields.get(answer, list)
      return Split(turns, responses, [f'"{answer}"[{k}]' for k in range(len(responses))])
    if answer in fields:
      turns.append(assistant(fields.get(answer, str)))
    else:
      require(fields.prompt_only, "missing_key", f'"{answer}" is missing')
    return _turns(fields, turns, f'"{answer}"')._replace(tools=_as_functions(fields))

  return reader


def _history(fields: Fields) -> Iterator[dict]:
  for i, pair in enumerate(fields.optional("history", list) or []):
    require(
      isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair),
      "wrong_type",
      f'"history"[{i}] is not a pair of texts, an instruction and its answer',
    )
    yield user(pair[0])
    yield assistant(pair[1])


def _hh(fields: Fields) -> Split:
  """Anthropic HH's pairs of whole dialogues in text, as data.source='hh' reads them."""
  prompt, responses, *_ = examples.split_dialogue(fields.get("chosen", str), fields.get("rejected", str))
  return Split(prompt, list(responses), ['"chosen"', '"rejected"'])


def _is_dialogue(record: dict) -> bool:
  return record.get("prompt") is None and all(
    isinstance(record.get(key), str) and ASSISTANT in record[key] for key in ("chosen", "rejected")
  )


def _has(*keys: str, without: tuple[str, ...] = ()) -> Callable[[dict], bool]:
  return lambda record: (
    any(record.get(key) is not None for key in keys)
    and not any(record.get(key) is not None for key in without)
  )


_PROMPTS = ("prompt", "messages")
FORMS = {
  "openai": Form(
    lambda record: (
      _has("preferred_output", "non_preferred_output")(record)
      or isinstance(record.get("input"), dict)
      and "prompt" not in record
    ),
    _openai,
  ),
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
