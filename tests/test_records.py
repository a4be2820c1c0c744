"""Records in published forms become the same examples, or are refused by name."""

import json
import re

import pytest
from hypothesis import given, settings, strategies

from dpojax.data import records
from dpojax.data.examples import DataError, Example, RecordError
from tests import conftest

USER = {"role": "user", "content": "Which way is north?"}
SYSTEM = {"role": "system", "content": "You are a compass."}
CALL = {"id": "c1", "type": "function", "function": {"name": "needle", "arguments": {"wait": 2}}}
LOOK = {"role": "assistant", "content": None, "tool_calls": [CALL]}
GIVES = {"role": "tool", "tool_call_id": "c1", "content": "up"}
TOOLS = [{"type": "function", "function": {"name": "needle", "parameters": {"type": "object"}}}]


def answer(text):
  return {"role": "assistant", "content": text}


UP, DOWN = [answer("Up.")], [answer("Down.")]
ASKED = Example([USER], (UP, DOWN))
WITH_SYSTEM = Example([SYSTEM, USER], (UP, DOWN))


def human(text=USER["content"]):
  return {"from": "human", "value": text}


def gpt(text):
  return {"from": "gpt", "value": text}


FORMS = {
  # The project's own and TRL's.
  "plain": ("preference", {"prompt": "Q", "chosen": "yes", "rejected": "no"}, Example("Q", ("yes", "no"))),
  "ranked": ("ranking", {"prompt": "Q", "responses": ["yes", "no"]}, Example("Q", ("yes", "no"))),
  "no prompt": ("ranking", {"prompt": "", "responses": ["a"]}, Example("", ("a",))),
  "implicit": ("preference", {"chosen": [SYSTEM, USER, *UP], "rejected": [SYSTEM, USER, *DOWN]}, WITH_SYSTEM),
  "explicit": ("preference", {"prompt": [SYSTEM, USER], "chosen": UP, "rejected": DOWN}, WITH_SYSTEM),
  "ranked messages": ("ranking", {"prompt": [SYSTEM, USER], "responses": [UP, DOWN]}, WITH_SYSTEM),
  "desirable": ("unpaired", {"prompt": "Q", "completion": "yes", "label": True}, Example("Q", ("yes", ""))),
  "undesirable": (
    "unpaired",
    {"prompt": "Q", "completion": "yes", "label": False},
    Example("Q", ("", "yes")),
  ),
  "undesirable messages": (
    "unpaired",
    {"prompt": [USER], "completion": UP, "label": False},
    Example([USER], ([], UP)),
  ),
  "whole": (
    "conversation",
    {"messages": [SYSTEM, USER, *UP, USER, *DOWN]},
    Example([SYSTEM, USER], ([*UP, USER, *DOWN],)),
  ),
  "hh": (
    "hh",
    {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
    Example("\n\nHuman: Q\n\nAssistant:", (" a", " b")),
  ),
  # The same said twice.
  "text beside whole conversations": (
    "preference",
    {"prompt": USER["content"], "chosen": [USER, *UP], "rejected": [USER, *DOWN]},
    ASKED,
  ),
  "text beside answers": ("preference", {"prompt": USER["content"], "chosen": UP, "rejected": DOWN}, ASKED),
  "messages beside whole conversations": (
    "preference",
    {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, *UP], "rejected": DOWN},
    WITH_SYSTEM,
  ),
  "whole conversations without the system message": (
    "preference",
    {"prompt": [SYSTEM, USER], "chosen": [USER, *UP], "rejected": [USER, *DOWN]},
    WITH_SYSTEM,
  ),
  "one whole conversation and one answer": (
    "preference",
    {"prompt": USER["content"], "chosen": [USER, *UP], "rejected": "Down."},
    ASKED,
  ),
  "one whole conversation and no prompt": ("preference", {"chosen": "Up.", "rejected": [USER, *DOWN]}, ASKED),
  "a system message in the conversations alone": (
    "preference",
    {"prompt": [USER], "chosen": [SYSTEM, USER, *UP], "rejected": [SYSTEM, USER, *DOWN]},
    WITH_SYSTEM,
  ),
  "one message": ("preference", {"prompt": USER, "chosen": UP[0], "rejected": DOWN[0]}, ASKED),
  "text answers": ("preference", {"prompt": [USER], "chosen": "Up.", "rejected": "Down."}, ASKED),
  "an answer in the prompt": ("preference", {"prompt": [USER, *UP], "chosen": UP, "rejected": DOWN}, ASKED),
  "messages as the prompt": ("preference", {"messages": [USER], "chosen": "Up.", "rejected": "Down."}, ASKED),
  "keys of one's own": (
    "preference",
    {"chosen": [USER | {"id": 1}, *UP], "rejected": [USER | {"id": 2}, *DOWN]},
    Example([USER | {"id": 1}], (UP, DOWN)),
  ),
  "messages in JSON text": (
    "preference",
    {"prompt": json.dumps([USER]), "chosen": json.dumps(UP), "rejected": json.dumps(DOWN)},
    ASKED,
  ),
  "a system key": (
    "preference",
    {"system": SYSTEM["content"], "prompt": [USER], "chosen": UP, "rejected": DOWN},
    WITH_SYSTEM,
  ),
  "a system key twice": (
    "preference",
    {"system": SYSTEM["content"], "prompt": [SYSTEM, USER], "chosen": UP, "rejected": DOWN},
    WITH_SYSTEM,
  ),
  "text parts": (
    "preference",
    {
      "prompt": [
        USER | {"content": [{"type": "text", "text": "Which way "}, {"type": "text", "text": "is north?"}]}
      ],
      "chosen": UP,
      "rejected": DOWN,
    },
    ASKED,
  ),
  # Tools.
  "calls": (
    "preference",
    {"prompt": [USER], "chosen": [LOOK], "rejected": DOWN, "tools": TOOLS},
    Example([USER], ([LOOK], DOWN), TOOLS),
  ),
  "tools in JSON text": (
    "preference",
    {
      "prompt": [USER, LOOK, GIVES],
      "chosen": UP,
      "rejected": DOWN,
      "tools": json.dumps(TOOLS),
      "chat_template_kwargs": {"enable_thinking": False},
    },
    Example([USER, LOOK, GIVES], (UP, DOWN), TOOLS, {"enable_thinking": False}),
  ),
  "a response of several messages": (
    "preference",
    {"prompt": [USER], "chosen": [LOOK, GIVES, *UP], "rejected": DOWN},
    Example([USER], ([LOOK, GIVES, *UP], DOWN)),
  ),
  "pairs that part before their last turn": (
    "preference",
    {"chosen": [USER, *UP, USER, *UP], "rejected": [USER, *DOWN, USER, *UP]},
    Example([USER], ([*UP, USER, *UP], [*DOWN, USER, *UP])),
  ),
  "pairs that part at the user's turn": (
    "preference",
    {"chosen": [USER, LOOK, GIVES, *UP], "rejected": [USER, LOOK, USER, *UP]},
    Example([USER], ([LOOK, GIVES, *UP], [LOOK, USER, *UP])),
  ),
  "shared calls": (
    "preference",
    {"chosen": [USER, LOOK, GIVES, *UP], "rejected": [USER, LOOK, GIVES, *DOWN]},
    Example([USER, LOOK, GIVES], (UP, DOWN)),
  ),
  # Published forms under their own names.
  "calls in JSON text": (
    "preference",
    {"prompt": [USER], "chosen": [LOOK | {"tool_calls": json.dumps([CALL])}], "rejected": DOWN},
    Example([USER], ([LOOK], DOWN)),
  ),
  "openai": (
    "openai",
    {
      "input": {"messages": [USER], "tools": TOOLS, "parallel_tool_calls": True},
      "preferred_output": [
        LOOK | {"tool_calls": [CALL | {"function": {"name": "needle", "arguments": '{"wait": 2}'}}]}
      ],
      "non_preferred_output": DOWN,
    },
    Example([USER], ([LOOK], DOWN), TOOLS),
  ),
  "openai with tools outside": (
    "openai",
    {
      "input": {"messages": [USER]},
      "preferred_output": UP[0],
      "non_preferred_output": "Down.",
      "tools": TOOLS,
    },
    Example([USER], (UP, DOWN), TOOLS),
  ),
  "sharegpt ranking": (
    "sharegpt",
    {"conversations": [human()], "chosen": gpt("Up."), "rejected": gpt("Down."), "system": SYSTEM["content"]},
    WITH_SYSTEM,
  ),
  "sharegpt": (
    "sharegpt",
    {"conversations": [human(), gpt("Up."), human(), gpt("Down.")]},
    Example([USER], ([*UP, USER, *DOWN],)),
  ),
  "a greeting shared": (
    "preference",
    {"chosen": [answer("Ahoy!"), USER, *UP], "rejected": [answer("Ahoy!"), USER, *DOWN]},
    Example([answer("Ahoy!"), USER], (UP, DOWN)),
  ),
  "sharegpt that greets first": (
    "sharegpt",
    {"conversation": [gpt("Ahoy!"), human(), gpt("Up.")]},
    Example([answer("Ahoy!"), USER], (UP,)),
  ),
  "sharegpt calls": (
    "sharegpt",
    {
      "conversations": [
        human(),
        {"from": "function_call", "value": '{"name": "needle", "arguments": {"wait": 2}}'},
        {"from": "observation", "value": "up"},
        gpt("Up."),
      ],
      "tools": json.dumps([TOOLS[0]["function"]]),
    },
    Example(
      [USER],
      (
        [
          {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL["function"]}],
          },
          {"role": "tool", "content": "up"},
          *UP,
        ],
      ),
      TOOLS,
    ),
  ),
  "sharegpt judged": (
    "sharegpt",
    {"conversations": [human(), gpt("Up."), human(), gpt("Down.")], "kto_tag": False},
    Example([USER, *UP, USER], ([], DOWN)),
  ),
  "swift": ("swift", {"messages": [SYSTEM, USER, *UP], "rejected_response": "Down."}, WITH_SYSTEM),
  "swift messages": (
    "swift",
    {"messages": [SYSTEM, USER, *UP], "rejected_messages": [SYSTEM, USER, *DOWN]},
    WITH_SYSTEM,
  ),
  "swift judged": ("conversation", {"messages": [USER, *UP], "label": True}, Example([USER], (UP, []))),
  "alpaca": (
    "alpaca",
    {"instruction": "Which way", "input": "is north?", "chosen": "Up.", "rejected": "Down."},
    Example([{"role": "user", "content": "Which way\nis north?"}], (UP, DOWN)),
  ),
  "alpaca with history": (
    "alpaca",
    {
      "instruction": USER["content"],
      "input": "",
      "output": "Down.",
      "system": SYSTEM["content"],
      "history": [[USER["content"], "Up."]],
    },
    Example([SYSTEM, USER], ([*UP, USER, *DOWN],)),
  ),
  "alpaca pair with history": (
    "alpaca",
    {"instruction": USER["content"], "chosen": "Up.", "rejected": "Down.", "history": [["Hm?", "Hm."]]},
    Example([{"role": "user", "content": "Hm?"}, answer("Hm."), USER], (UP, DOWN)),
  ),
  "alpaca judged": (
    "alpaca",
    {"instruction": USER["content"], "output": "Up.", "kto_tag": True},
    Example([USER], (UP, [])),
  ),
  "alpaca's older pair": (
    "alpaca",
    {"instruction": USER["content"], "input": "", "output": ["Up.", "Down."]},
    ASKED,
  ),
  "orca": (
    "orca",
    {"system": SYSTEM["content"], "question": USER["content"], "chosen": "Up.", "rejected": "Down."},
    WITH_SYSTEM,
  ),
  "query": ("query", {"query": USER["content"], "response": "Up."}, Example([USER], (UP,))),
}
"""Of each the form that is recognised, the record, and its example by hand."""


@pytest.mark.parametrize("name", FORMS)
def test_a_record_is_read_in_the_form_it_has(name):
  form, record, example = FORMS[name]
  before = json.dumps(record)
  for asked in ("", form):
    read = records.read(record, asked)
    assert (read.form, read.example) == (form, example)
  assert json.dumps(record) == before
  assert records.parse_prompt(record) == example._replace(responses=())


@pytest.mark.parametrize("name", ["plain", "explicit", "calls", "tools in JSON text"])
def test_the_record_of_a_prompt_is_read_as_the_prompt(name):
  example = FORMS[name][2]
  assert records.parse_prompt(records.prompt_record(example)) == example._replace(responses=())


@pytest.mark.parametrize(
  "record, prompt",
  [
    ({"prompt": "Q"}, "Q"),
    ({"prompt": [USER]}, [USER]),
    ({"messages": [USER]}, [USER]),
    ({"conversations": [human()]}, [USER]),
    ({"instruction": USER["content"]}, [USER]),
    ({"question": USER["content"], "system": SYSTEM["content"]}, [SYSTEM, USER]),
    ({"input": {"messages": [USER]}}, [USER]),
    ({"prompt": "Q", "completion": "a"}, "Q"),
  ],
)
def test_a_prompt_needs_no_response(record, prompt):
  assert records.parse_prompt(record) == Example(prompt, ())


@pytest.mark.parametrize(
  "label, good",
  [
    (True, True),
    (False, False),
    (1, True),
    (0, False),
    (1.0, True),
    ("true", True),
    ("False", False),
    ("1", True),
    ("desirable", True),
    ("Undesirable ", False),
    ("good", True),
    ("bad", False),
  ],
)
def test_a_label_is_read_as_it_is_written(label, good):
  record = {"prompt": "Q", "completion": "a", "label": label}
  assert records.parse_record(record).responses == (("a", "") if good else ("", "a"))


def test_demonstrations_without_a_label_are_read_where_the_form_is_named():
  record = {"prompt": "Q", "completion": "a"}
  assert records.parse_record(record, "prompt_completion") == Example("Q", ("a",))
  with pytest.raises(RecordError, match="\"label\" is missing.*data.form='prompt_completion'"):
    records.parse_record(record)


def test_what_was_ignored_and_changed_is_told():
  read = records.read(
    {
      "prompt": USER["content"],
      "prompt_id": "p",
      "chosen": [USER, *UP],
      "rejected": [USER, *DOWN],
      "score": 8.0,
    }
  )
  assert read.ignored == ["prompt_id", "score"]
  assert read.notes == {("converted", "prompt_stood_in_response_too"): 1}
  read = records.read(FORMS["openai"][1])
  assert read.ignored == ["input.parallel_tool_calls"]
  assert read.notes == {("converted", "call_arguments_to_objects"): 1}
  read = records.read({"messages": [*DOWN, USER, *UP]})
  assert read.notes == {("left_out", "answers_before_the_first_question"): 1}
  read = records.read({"messages": [USER, *UP, USER]})
  assert read.example.responses == (UP,)
  assert read.notes == {("left_out", "messages_behind_the_last_answer"): 1}


def bare(**keys):
  return {"prompt": [USER], "chosen": UP, "rejected": DOWN} | keys


@pytest.mark.parametrize(
  "record, reason, words",
  [
    (["prompt"], "wrong_type", "a list, not an object"),
    ({"prompt": "Q", "chosen": "a"}, "missing_key", '"rejected" is missing'),
    ({"chosen": "a", "rejected": "b"}, "missing_key", '"prompt" is missing'),
    (
      {"chosen": "a", "rejected": DOWN},
      "empty_prompt",
      'no message stands before the assistant\'s in "chosen"',
    ),
    ({"prompt": "Q"}, "missing_key", '"chosen" is missing'),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong_type", '"prompt" is a number'),
    ({"prompt": "Q", "chosen": None, "rejected": "b"}, "wrong_type", '"chosen" is null'),
    ({"prompt": "Q", "chosen": True, "rejected": "b"}, "wrong_type", '"chosen" is true or false'),
    ({"prompt": "Q", "chosen": "", "rejected": "b"}, "empty_response", '"chosen" is empty'),
    ({"prompt": "Q", "chosen": "a", "rejected": " \n"}, "empty_response", '"rejected" is empty'),
    ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "identical_responses", "the same text"),
    ({"prompt": "Q", "responses": ["a", "b", "a"]}, "identical_responses", '"responses"[2]'),
    ({"prompt": "Q", "completion": "a"}, "missing_key", '"label" is missing'),
    ({"prompt": "Q", "completion": "a", "label": 2}, "wrong_label", '"label" is 2, not true or false'),
    ({"prompt": "Q", "completion": "a", "label": "maybe"}, "wrong_label", "'maybe', not one of true, 1"),
    ({"prompt": "Q", "completion": "a", "label": [1]}, "wrong_type", '"label" is a list'),
    ({"prompt": "Q", "completion": " ", "label": True}, "empty_response", '"completion" is empty'),
    ({"prompt": "Q", "responses": []}, "too_few_responses", "empty list"),
    ({"prompt": "Q", "responses": ["a", 1]}, "wrong_type", '"responses"[1] is a number'),
    ({"prompt": "Q", "responses": "a"}, "wrong_type", '"responses" is a string'),
    ({"prompt": "Q", "responses": ["a"], "chosen": "a"}, "ambiguous_keys", "keep one form"),
    ({"chosen": [USER, *UP], "rejected": [SYSTEM, *DOWN]}, "different_prompts", "differ"),
    ({"chosen": UP, "rejected": DOWN}, "empty_prompt", "no message"),
    ({"chosen": [USER], "rejected": [USER, *DOWN]}, "no_assistant_turn", 'of role "user"'),
    ({"chosen": [], "rejected": [USER, *DOWN]}, "no_assistant_turn", "no messages"),
    (bare(prompt=[]), "empty_prompt", "no messages"),
    (bare(prompt=[{"role": "user"}]), "wrong_type", '"prompt"[0] is not {"role": str, "content": str}'),
    (bare(prompt=[USER | {"content": 3}]), "wrong_type", 'its "content" is a number'),
    (bare(prompt=[USER | {"content": None}]), "wrong_type", 'its "content" is null'),
    (bare(prompt=["north?"]), "wrong_type", '"prompt"[0] is a string, not a message'),
    (
      bare(prompt=[USER | {"role": "narrator"}]),
      "unknown_role",
      '"prompt"[0] is of role "narrator"; known are',
    ),
    (bare(chosen=[USER]), "no_assistant_turn", '"chosen" has no messages of the assistant'),
    (bare(chosen=[*UP, USER]), "no_assistant_turn", 'the last message of "chosen" is of role "user"'),
    (
      bare(chosen=[SYSTEM, USER, *UP]),
      "prompt_contradicts",
      '"chosen" does not begin with the messages of "prompt"',
    ),
    (bare(chosen=[USER | {"content": "South?"}, *UP]), "prompt_contradicts", "make them the same"),
    (
      bare(prompt="South?", chosen=[USER, *UP], rejected=[USER, *DOWN]),
      "prompt_contradicts",
      "drop one of them",
    ),
    (
      bare(prompt="South?", chosen=[USER, *UP]),
      "prompt_contradicts",
      "'South?' but \"chosen\" asks 'Which way",
    ),
    (bare(prompt=" ", chosen=UP), "empty_prompt", '"prompt" is empty beside messages'),
    (bare(chosen=[LOOK | {"tool_calls": ["needle"]}]), "wrong_type", '["tool_calls"] is no list of objects'),
    (
      bare(chosen=[LOOK | {"tool_calls": "needle"}]),
      "broken_json",
      '["tool_calls"] is text that is not JSON',
    ),
    (bare(prompt=[USER, answer("Hm.")]), "prompt_ends_with_answer", "start of each response"),
    (bare(chosen=[answer(" ")]), "empty_response", '"chosen" is empty'),
    (bare(chosen=[answer(None)]), "empty_response", '"chosen" is empty'),
    (bare(chosen=DOWN), "identical_responses", "the same text"),
    (
      bare(chosen=[answer("Up.") | {"weight": 0}, USER, *UP]),
      "unscored_message",
      "move the messages up to it",
    ),
    (bare(images=["a.png"]), "media", '"images" holds images, and dpojax trains on text alone'),
    (bare(audio="a.wav"), "media", '"audio" holds audio'),
    (bare(videos=["a"]), "media", '"videos"'),
    (
      bare(chosen=[answer([{"type": "image_url", "image_url": {"url": "a"}}])]),
      "media",
      '"chosen"[0]["content"] is of type "image_url"',
    ),
    (bare(prompt=[USER | {"images": ["a.png"]}]), "media", '"prompt"[0]["images"] holds images'),
    (bare(history=[["a", "b"]]), "unread_key", 'data.form="alpaca"'),
    (bare(documents=[{"text": "a"}]), "unread_key", '"documents" changes what is asked'),
    (bare(system="Be a map.", prompt=[SYSTEM, USER]), "system_contradicts", "keep one of them"),
    (
      {"system": "S", "prompt": "Q", "chosen": "a", "rejected": "b"},
      "system_beside_text",
      '"system" stands beside a plain text prompt; write "prompt" as messages',
    ),
    ({"tools": TOOLS, "prompt": "Q", "chosen": "a", "rejected": "b"}, "tools_beside_text", "or drop the key"),
    (bare(tools="weather"), "broken_json", '"tools" is text that is not JSON'),
    (bare(tools=["weather"]), "wrong_type", '"tools" is not a list of objects'),
    (bare(chat_template_kwargs=[1]), "wrong_type", '"chat_template_kwargs" is a list, not an object'),
    (bare(prompt=str([USER])), "python_text", "as Python prints it; write it as JSON"),
    ({"messages": [SYSTEM, USER]}, "no_assistant_turn", '"messages" has no message of the assistant'),
    ({"messages": UP}, "empty_prompt", 'before the assistant\'s in "messages"'),
    ({"messages": [USER, *UP, USER], "label": True}, "no_assistant_turn", 'of role "user"'),
    (
      {"messages": [USER], "rejected_response": "Down."},
      "no_assistant_turn",
      '"rejected_response" is compared to',
    ),
    (
      {"input": {"messages": [USER]}, "preferred_output": UP},
      "missing_key",
      '"non_preferred_output" is missing',
    ),
    (
      {"conversations": [human(), {"from": "function_call", "value": "now"}, gpt("a")]},
      "broken_json",
      '"conversations"[1] is text that is not JSON',
    ),
    ({"instruction": "Q", "output": "a", "history": ["b"]}, "wrong_type", '"history"[0] is not a pair'),
    ({"instruction": "Q"}, "missing_key", '"output" is missing'),
    (
      {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: P\n\nAssistant: b"},
      "different_prompts",
      'the last "\\n\\nAssistant:" differs',
    ),
  ],
)
def test_an_unusable_record_says_why(record, reason, words):
  with pytest.raises(RecordError) as caught:
    records.parse_record(record)
  assert caught.value.reason == reason
  assert words in str(caught.value)


def test_a_form_that_is_named_is_the_only_one_tried():
  with pytest.raises(RecordError, match='"question" is missing'):
    records.parse_record(bare(), "orca")
  with pytest.raises(DataError, match="data.form is 'oral'; it is one of openai, swift"):
    records.parse_record(bare(), "oral")


@pytest.mark.parametrize("name", FORMS)
def test_half_a_surrogate_pair_anywhere_is_an_error_of_the_record(name):
  def spoiled(value):
    """Every value that differs from this one by a half of a pair at one place."""
    if isinstance(value, str):
      yield value + "\ud800"
    elif isinstance(value, list):
      for i, each in enumerate(value):
        yield from ([*value[:i], other, *value[i + 1 :]] for other in spoiled(each))
    elif isinstance(value, dict):
      for key, each in value.items():
        yield from (value | {key: other} for other in spoiled(each))
      yield value | {"\udfff": 1}

  for record in spoiled(FORMS[name][1]):
    for read in (records.parse_record, records.parse_prompt):
      with pytest.raises(RecordError) as caught:
        read(record)
      assert caught.value.reason == "broken_unicode"
      str(caught.value).encode()


ANY = strategies.recursive(
  strategies.none()
  | strategies.booleans()
  | strategies.integers()
  | strategies.floats()
  | strategies.text(strategies.characters(exclude_categories=()), max_size=8)
  | strategies.sampled_from(
    ["user", "assistant", "human", "gpt", "function_call", json.dumps([USER]), "[{'role'"]
  ),
  lambda inside: (
    strategies.lists(inside, max_size=3)
    | strategies.dictionaries(
      strategies.sampled_from(
        [
          "role",
          "content",
          "from",
          "value",
          "type",
          "text",
          "tool_calls",
          "name",
          "function",
          "arguments",
          "messages",
        ]
      )
      | strategies.text(max_size=2),
      inside,
      max_size=4,
    )
  ),
  max_leaves=12,
)
MESSAGE = strategies.fixed_dictionaries(
  {
    "role": strategies.sampled_from(["user", "assistant", "system", "tool", "gpt", "function_call"]),
    "content": ANY,
  }
)
KEYS = sorted({key for _, record, _ in FORMS.values() for key in record} | {"images", "label", "documents"})


@settings(deadline=None, max_examples=500)
@given(
  ANY
  | strategies.dictionaries(
    strategies.sampled_from(KEYS), ANY | strategies.lists(MESSAGE, max_size=3) | strategies.text(max_size=3)
  ),
  strategies.sampled_from(["", *records.FORMS]),
)
def test_any_value_is_an_example_or_an_error_of_the_record(record, form):
  for read in (records.parse_record, records.parse_prompt):
    try:
      example = read(record, form)
    except RecordError as error:
      assert error.reason and str(error)
      continue
    json.dumps([example.prompt, *example.responses], ensure_ascii=False).encode()
    assert isinstance(example.prompt, str) or example.prompt
    for response in example.responses:
      assert isinstance(response, type(example.prompt))
      assert (
        isinstance(response, str)
        or not response
        or (response[0]["role"] == response[-1]["role"] == "assistant")
      )


def test_a_record_nested_too_deep_is_an_error_of_the_record():
  deep = "a"
  for _ in range(900):
    deep = [deep]
  with pytest.raises(RecordError, match="nested more than 64 deep"):
    records.parse_record(bare(notes=deep))
  with pytest.raises(RecordError, match="nested more than 64 deep"):
    records.parse_record(bare(tools=json.dumps(deep)))


def test_the_page_has_every_form_in_the_order_in_which_they_are_tried():
  page = (conftest.ROOT / "docs" / "data.md").read_text().partition("## Forms of records")[2]
  assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(records.FORMS)
