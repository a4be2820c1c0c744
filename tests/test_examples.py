"""Records become prompts and responses, or errors that say what is wrong."""

import pytest
from hypothesis import given, settings, strategies

from dpojax.data import examples
from dpojax.data.examples import Example, RecordError

USER = {"role": "user", "content": "Which way is north?"}
SYSTEM = {"role": "system", "content": "You are a compass."}


def answer(text):
  return {"role": "assistant", "content": text}


def test_the_three_forms_give_the_same_comparison():
  plain = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
  ranked = {"prompt": "Q", "responses": ["yes", "no"], "id": 7}
  for record in (plain, ranked):
    assert examples.parse_record(record) == Example("Q", ("yes", "no"))

  conversation = Example([SYSTEM, USER], ("Up.", "Down."))
  whole = {"chosen": [SYSTEM, USER, answer("Up.")], "rejected": [SYSTEM, USER, answer("Down.")]}
  explicit = {"prompt": [SYSTEM, USER], "chosen": [answer("Up.")], "rejected": [answer("Down.")]}
  ranked = {"prompt": [SYSTEM, USER], "responses": [[answer("Up.")], [answer("Down.")]]}
  for record in (whole, explicit, ranked):
    assert examples.parse_record(record) == conversation


def test_a_response_judged_by_itself_stands_on_the_side_of_its_label():
  alone = {"prompt": "Q", "completion": "yes", "label": True}
  assert examples.parse_record(alone) == Example("Q", ("yes", ""))
  assert examples.parse_record(alone | {"label": False}) == Example("Q", ("", "yes"))
  chat = {"prompt": [USER], "completion": [answer("Up.")], "label": False}
  assert examples.parse_record(chat) == Example([USER], ("", "Up."))


def test_an_empty_prompt_and_a_single_response_are_allowed():
  assert examples.parse_record({"prompt": "", "responses": ["a"]}) == Example("", ("a",))


@pytest.mark.parametrize("record, reason, words", [
    (["prompt"], "wrong_type", "a list, not an object"),
    ({"prompt": "Q", "chosen": "a"}, "missing_key", '"rejected" is missing'),
    ({"chosen": "a", "rejected": "b"}, "missing_key", '"prompt" is missing'),
    ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "b"}, "missing_key",
     "data.source='hh'"),
    ({"prompt": "Q"}, "missing_key", '"chosen" is missing'),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong_type", '"prompt" is a number'),
    ({"prompt": "Q", "chosen": None, "rejected": "b"}, "wrong_type", '"chosen" is null'),
    ({"prompt": "Q", "chosen": True, "rejected": "b"}, "wrong_type", '"chosen" is true or false'),
    ({"prompt": "Q", "chosen": [answer("a")], "rejected": "b"}, "wrong_type", '"prompt" a string'),
    ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "wrong_type", "a list of messages"),
    ({"prompt": "Q", "chosen": "", "rejected": "b"}, "empty_response", '"chosen" is empty'),
    ({"prompt": "Q", "chosen": "a", "rejected": " \n"}, "empty_response", '"rejected" is empty'),
    ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "identical_responses", "the same text"),
    ({"prompt": "Q", "responses": ["a", "b", "a"]}, "identical_responses", '"responses"[2]'),
    ({"prompt": "Q", "completion": "a"}, "missing_key", '"label" is missing'),
    ({"prompt": "Q", "completion": "a", "label": 1}, "wrong_type", "a number, not true or false"),
    ({"prompt": "Q", "completion": " ", "label": True}, "empty_response", '"completion" is empty'),
    ({"prompt": "Q", "responses": []}, "too_few_responses", "empty list"),
    ({"prompt": "Q", "responses": ["a", 1]}, "wrong_type", '"responses"[1] is a number'),
    ({"prompt": "Q", "responses": "a"}, "wrong_type", '"responses" is a string'),
    ({"prompt": "Q", "responses": ["a"], "chosen": "a"}, "ambiguous_keys", "keep one form"),
    ({"prompt": "Q\ud800", "chosen": "a", "rejected": "b"}, "broken_unicode", "surrogate"),
    ({"chosen": [USER, answer("a")], "rejected": [SYSTEM, answer("b")]}, "different_prompts",
     "differ"),
    ({"chosen": [answer("a")], "rejected": [answer("b")]}, "empty_prompt", "no message"),
    ({"chosen": [USER], "rejected": [USER, answer("b")]}, "no_assistant_turn", 'of role "user"'),
    ({"chosen": [], "rejected": [USER, answer("b")]}, "no_assistant_turn", "no messages"),
    ({"prompt": [], "chosen": [answer("a")], "rejected": [answer("b")]}, "empty_prompt",
     "no messages"),
    ({"prompt": [{"role": "user"}], "chosen": [answer("a")], "rejected": [answer("b")]},
     "wrong_type", '{"role": str, "content": str}'),
    ({"prompt": [USER], "chosen": [USER, answer("a")], "rejected": [answer("b")]},
     "wrong_type", "not the assistant's one"),
])
def test_an_unusable_record_says_why(record, reason, words):
  with pytest.raises(RecordError) as caught:
    examples.parse_record(record)
  assert caught.value.reason == reason
  assert words in str(caught.value)


@settings(deadline=None)
@given(strategies.text(), strategies.text(), strategies.text())
def test_a_dialogue_is_split_behind_its_last_assistant_turn(before, chosen, rejected):
  prompt = before + examples.ASSISTANT
  whole = [prompt + response for response in (chosen, rejected)]
  usable = chosen.strip() and rejected.strip() and chosen != rejected and all(
      text.rindex(examples.ASSISTANT) + len(examples.ASSISTANT) == len(prompt) for text in whole)
  try:
    assert examples.split_dialogue(*whole) == Example(prompt, (chosen, rejected))
    assert usable
  except RecordError:
    assert not usable


def test_a_prompt_that_differs_is_not_guessed_at():
  turn = "\n\nHuman: Q\n\nAssistant:"
  with pytest.raises(RecordError) as caught:
    examples.split_dialogue(f"{turn} a", f"{turn} b\n\nAssistant: c")
  assert caught.value.reason == "different_prompts"
  with pytest.raises(RecordError) as caught:
    examples.split_dialogue(f"{turn} a", "Human: Q")
  assert caught.value.reason == "no_assistant_turn"
