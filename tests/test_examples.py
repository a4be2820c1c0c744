"""Dialogues are split where their last answer begins, and responses are shown as one reads them."""

import pytest
from hypothesis import given, settings, strategies

from dpojax.data import examples
from dpojax.data.examples import Example, RecordError


@settings(deadline=None)
@given(strategies.text(), strategies.text(), strategies.text())
def test_a_dialogue_is_split_behind_its_last_assistant_turn(before, chosen, rejected):
  prompt = before + examples.ASSISTANT
  whole = [prompt + response for response in (chosen, rejected)]
  usable = (
    chosen.strip()
    and rejected.strip()
    and chosen != rejected
    and all(text.rindex(examples.ASSISTANT) + len(examples.ASSISTANT) == len(prompt) for text in whole)
  )
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


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Øre"}}}


@pytest.mark.parametrize(
  "response, text",
  [
    (" yes", " yes"),
    ([{"role": "assistant", "content": "yes"}], "yes"),
    ([{"role": "assistant", "content": None, "tool_calls": [CALL]}], 'weather({"town": "Øre"})'),
    (
      [
        {"role": "assistant", "content": "Let me look.", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
      ],
      'assistant: Let me look.\nweather({"town": "Øre"})\n\ntool: rain\n\nassistant: Rain.',
    ),
  ],
)
def test_a_response_is_shown_with_its_calls(response, text):
  assert examples.response_text(response) == text
