"""Conversations get the ids that `transformers` gives them, and the assistant's tokens in them are scored."""

import datetime
import functools
import os

import pytest
from hypothesis import given, settings, strategies
from transformers.utils import chat_template_utils

from dpojax.data import pool, tokenization
from dpojax.data.encoder import Encoder
from dpojax.data.examples import DataError, Example, RecordError
from dpojax.data.tokenization import Reading, Truncation
from tests import chats

DAY = datetime.datetime(2024, 7, 26)
READING = Reading(date="2024-07-26")
ROOMY = Truncation(100_000, 50_000, "end")
BOUNDARY = {  # what a template writes right before an answer that it does not announce
  "system_moved": "<|end|>",
  "think_stripped": "<|start|>assistant\n",
}
END = {"system_moved": "</s>", "no_generation_prompt": "</s>", "bos": "</s>"}
AT_SPECIAL = ("system_moved", "bos", "other_turn_end")
"""Templates with a special token right before the answer: there no token can span the boundary."""

user = lambda content: {"role": "user", "content": content}
assistant = lambda content, **more: {"role": "assistant", "content": content, **more}
WORDS = strategies.lists(
  strategies.sampled_from(
    ["way", "the sea", "Left,", "naïve", "12", "x\ny", "</think", "🙂", "  ", "<", "user"]
  ),
  min_size=1,
  max_size=5,
).map(lambda words: " ".join(words).strip() or "a")


@strategies.composite
def conversations(draw):
  """A prompt of a few turns, sometimes with a system message or two users in a row, and two answers to it."""
  messages = [{"role": "system", "content": draw(WORDS)}] if draw(strategies.integers(0, 2)) == 0 else []
  for _ in range(draw(strategies.integers(0, 2))):
    thought = f"<think>\n{draw(WORDS)}\n</think>\n\n" if draw(strategies.booleans()) else ""
    messages += [user(draw(WORDS)), assistant(thought + draw(WORDS))]
  messages += [user(draw(WORDS)) for _ in range(2 if draw(strategies.integers(0, 5)) == 0 else 1)]
  thought = f"<think>\n{draw(WORDS)}\n</think>\n\n" if draw(strategies.booleans()) else ""
  return messages, [thought + draw(WORDS) for _ in range(2)]


@pytest.fixture(scope="module", autouse=True)
def clock():
  """`transformers`' own clock on the day of READING."""

  class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return DAY

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chat_template_utils, "datetime", Clock)
    yield


@pytest.fixture(params=chats.KINDS)
def kind(request):
  return request.param


def theirs(tokenizer, messages, start, end, tools=None, **arguments):
  """Ids of a conversation by `transformers`, which of them overlap [start, end), whether one spans start."""
  whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **arguments)
  ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **arguments)
  untrimmed = tokenizer.backend_tokenizer
  kept, untrimmed.post_processor = untrimmed.post_processor, chats.processors.Sequence([])
  offsets = untrimmed.encode(whole, add_special_tokens=False).offsets
  untrimmed.post_processor = kept
  low, high = start(whole), end(whole)
  return ids, [a < high and b > low for a, b in offsets], any(a < low < b for a, b in offsets)


def refused(tokenizer, messages):
  try:
    tokenizer.apply_chat_template(messages, tokenize=False)
  except Exception as error:
    return str(error)
  return None


@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_ids_and_scores_are_those_of_transformers(name, kind):
  tokenizer = chats.tokenizer(kind, chats.TEMPLATES[name])
  encoder, seen = Encoder(tokenizer, READING), []

  @settings(max_examples=30, deadline=None, derandomize=True, database=None)
  @given(conversations())
  def check(conversation):
    prompt, answers = conversation
    (encoded,) = encoder.encode([Example(prompt, tuple([assistant(answer)] for answer in answers))])
    why = refused(tokenizer, [*prompt, assistant("a")])
    if why:
      assert (
        isinstance(encoded, RecordError) and encoded.reason == "refused_by_template" and why in str(encoded)
      )
      return
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    for answer, response, scored in zip(answers, encoded.responses, encoded.scored):
      messages = [*prompt, assistant(answer)]
      start = lambda whole: (
        len(before)
        if whole.startswith(before)
        else (
          whole.rindex(BOUNDARY[name] + (" " if name == "system_moved" else "") + answer)
          + len(BOUNDARY[name])
        )
      )
      end = lambda whole: (
        whole.index(
          END.get(name, "<|end|>"), start(whole) + (len("<|start|>") if name == "no_generation_prompt" else 0)
        )
        + len(END.get(name, "<|end|>"))
      )
      ids, mask, spans = theirs(tokenizer, messages, start, end)
      ours, mine = encoded.prompt + response, [False] * len(encoded.prompt) + scored
      if name == "generation_marks":
        called = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        history = sum(
          tokenizer.apply_chat_template(prompt, return_dict=True, return_assistant_tokens_mask=True)[
            "assistant_masks"
          ]
        )
        marked = [i for i, each in enumerate(called["assistant_masks"]) if each][history:]
        mask, spans = [i in marked for i in range(len(ids))], False
      if spans:
        assert (
          name not in AT_SPECIAL
          and tokenizer.decode(ours) == tokenizer.decode(ids[: len(mask)])[: len(tokenizer.decode(ours))]
        )
        continue
      last = max(i for i, each in enumerate(mask) if each) + 1
      assert (ours, mine) == (ids[:last], mask[:last])
      seen.append(len(ids))

  check()
  assert len(seen) > 8


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Aberg"}}}


def text_of(tokenizer, ids, scored):
  """Text of ids, with [ ] around runs that are scored."""
  out, before = "", False
  for i, each in zip(ids, scored):
    out += ("[[" if each and not before else "]]" if before and not each else "") + tokenizer.decode([i])
    before = each
  return out + ("]]" if before else "")


def test_tools_calls_and_every_key_that_a_template_reads_are_in_the_ids(kind):
  tokenizer = chats.tokenizer(kind, chats.TEMPLATES["tools"])
  history = [
    user("Is it raining?"),
    assistant(None, tool_calls=[CALL]),
    {"role": "tool", "name": "weather", "content": "no"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes"},
  ]
  answers = ([assistant("a", tool_calls=[CALL])], [assistant("a")], [assistant("a", reasoning_content="hm")])
  (encoded, alone) = Encoder(tokenizer).encode(
    [Example(history, answers, [WEATHER]), Example(history, answers[:1], None)]
  )
  for answer, ids, scored in zip(answers, encoded.responses, encoded.scored):
    whole = tokenizer.apply_chat_template([*history, *answer], tools=[WEATHER], return_dict=False)
    assert encoded.prompt + ids == whole[: len(encoded.prompt) + len(ids)]
    assert tokenizer.decode(whole[len(encoded.prompt) + len(ids) :]).strip() == "" and all(scored)
  assert len(set(map(tuple, encoded.responses))) == 3
  assert alone.prompt != encoded.prompt and len(alone.prompt) < len(encoded.prompt)


@pytest.mark.parametrize("score", ["all", "last"])
def test_of_a_response_of_several_messages_the_assistant_s_are_scored(score):
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["tools"])
  side = lambda last: [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "no"}, assistant(last)]
  (encoded,) = Encoder(tokenizer, Reading(score=score)).encode(
    [Example([user("Is it raining?")], (side("It is not."), side("Yes.")), [WEATHER])]
  )
  call = '\n[call] weather {"town": "Aberg"}<|end|>'
  between = "\n<|start|>tool\nno<|end|>\n<|start|>assistant\n"
  for ids, which, last in zip(encoded.responses, encoded.scored, ("It is not.", "Yes.")):
    expected = f"[[{call}]]{between}[[{last}<|end|>]]" if score == "all" else f"[[{last}<|end|>]]"
    assert text_of(tokenizer, ids, which) == expected
    whole = tokenizer.apply_chat_template(
      [user("Is it raining?"), *side(last)], tools=[WEATHER], return_dict=False
    )
    assert encoded.prompt + ids == whole[: len(encoded.prompt) + len(ids)]


def test_a_whole_conversation_is_scored_at_all_turns_or_the_last(kind):
  tokenizer = chats.tokenizer(kind, chats.TEMPLATES["generation_marks"])
  turns = [assistant("one"), user("and"), assistant("two")]
  whole = tokenizer.apply_chat_template(
    [user("Q"), *turns], return_dict=True, return_assistant_tokens_mask=True
  )
  last = max(i for i, each in enumerate(whole["assistant_masks"]) if each) + 1
  for score in ("all", "last"):
    (encoded,) = Encoder(tokenizer, Reading(score=score)).encode([Example([user("Q")], (turns,))])
    (ids,), (scored,) = encoded.responses, encoded.scored
    assert encoded.prompt + ids == whole["input_ids"][:last]
    marks = [bool(each) for each in whole["assistant_masks"][:last]]
    if score == "all":
      assert [False] * len(encoded.prompt) + scored == marks
    else:
      assert all(scored) and tokenizer.decode(ids) == "two<|end|>"


def test_preference_sides_that_part_before_their_last_turn_share_what_is_before_it(kind):
  tokenizer = chats.tokenizer(kind, chats.TEMPLATES["bos"])
  sides = [[assistant(first), user("why"), assistant("so")] for first in ("Left", "Right")]
  (encoded,) = Encoder(tokenizer, Reading(score="last")).encode([Example([user("Q")], tuple(sides))])
  for side, ids, scored in zip(sides, encoded.responses, encoded.scored):
    whole = tokenizer.apply_chat_template([user("Q"), *side], return_dict=False)
    assert encoded.prompt + ids == whole[: len(encoded.prompt) + len(ids)]
    assert tokenizer.decode([i for i, each in zip(ids, scored) if each]).strip() == "so</s>"
    assert not any(scored[: scored.index(True)]) and all(scored[scored.index(True) :])


def test_reasoning_that_the_generation_prompt_opens_is_prompt(kind):
  tokenizer = chats.tokenizer(kind, chats.TEMPLATES["think_stripped"])
  encoder = Encoder(tokenizer)
  example = Example([user("Q")], ([assistant("<think>\nhm\n</think>\n\nyes")],))
  (encoded,) = encoder.encode([example])
  assert encoded.prompt == encoder.prompts([example])[0]
  assert tokenizer.decode(encoded.prompt).endswith("<|start|>assistant\n<think>\n")
  assert tokenizer.decode(encoded.responses[0]) == "hm\n</think>\n\nyes<|end|>"
  (without,) = encoder.encode([Example([user("Q")], ([assistant("yes")],))])
  assert (
    tokenizer.decode(without.prompt).endswith("assistant\n")
    and tokenizer.decode(without.responses[0]) == "yes<|end|>"
  )
  assert encoder.counts["prompts_rendered_otherwise_with_an_answer"] == 1


def test_a_template_that_drops_a_message_is_counted():
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["system_moved"])
  encoder = Encoder(tokenizer)
  prompt = [{"role": "system", "content": "Be brief."}, user("Q")]
  (encoded,) = encoder.encode([Example(prompt, ([assistant("a")], [assistant("b")]))])
  assert "Be brief." in tokenizer.decode(encoder.prompts([Example(prompt, ())])[0])
  whole = tokenizer.apply_chat_template([*prompt, assistant("a")], return_dict=False)
  assert encoded.prompt + encoded.responses[0] == whole  # as `transformers` has it: no system message
  assert dict(encoder.counts) == {
    "prompts_rendered_otherwise_with_an_answer": 1,
    "with_text_that_the_template_leaves_out": 1,
  }


@pytest.mark.parametrize(
  "write, left_out",
  [
    ("", ["calls", "text", "tools"]),
    ("{{ m.reasoning_content }}", ["calls", "tools"]),
    ("{{ m.reasoning_content }}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}", ["tools"]),
    ("{{ m.reasoning_content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ tools | tojson }}", []),
  ],
)
def test_what_of_a_conversation_a_template_does_not_write_is_counted(write, left_out):
  tokenizer = chats.tokenizer(
    "byte_level", "{% for m in messages %}" + write + "{{ m.content }}<|end|>{% endfor %}"
  )
  function = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Aberg"}}}
  calling = assistant("Let me look.") | {"tool_calls": [function], "reasoning_content": "Rain?"}
  encoder = Encoder(tokenizer)
  encoder.encode([Example([user("Q")], ([calling], [assistant("No.")]), tools=[function])])
  assert sorted(encoder.counts) == [f"with_{what}_that_the_template_leaves_out" for what in left_out]


def test_a_token_that_would_span_the_start_of_an_answer_is_two():
  template = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
  )
  tokenizer = chats.tokenizer("byte_level", template)
  whole = tokenizer.apply_chat_template([user("Q"), assistant("\n\nhm")], return_dict=False)
  assert "ĊĊ" in tokenizer.convert_ids_to_tokens(whole)
  encoder = Encoder(tokenizer)
  (encoded,) = encoder.encode([Example([user("Q")], ([assistant("\n\nhm")], [assistant("hm")]))])
  assert encoded.prompt == encoder.prompts([Example([user("Q")], ())])[0]
  assert tokenizer.decode(encoded.prompt + encoded.responses[0]) == tokenizer.decode(whole)
  assert tokenizer.convert_ids_to_tokens(encoded.responses[0])[0] == "Ċ"


@pytest.mark.parametrize(
  "template, words",
  [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "10,000,000 steps"),
    ("{{ 'a' * 10**9 }}", "a text or list of 1,000,000,000"),
    ("{{ messages * 10**9 }}", "a text or list of 1,000,000,000"),
    ("{{ 10 ** (10 ** 9) }}", "a number of 4,000,000,000 bits"),
    (
      "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
      "a text or list",
    ),
    (
      "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
      "a text or list",
    ),
    ("{{ 'a' | center(10**9) }}", "a text or list"),
    ("{{ 'a'.ljust(10**9) }}", "a text or list"),
    ("{{ '%1000000000d' % 1 }}", "a text or list"),
    ("{{ '{:1000000000}'.format(1) }}", "a text or list"),
    ("{{ ('a' * 10**7).replace('a', 'b' * 10**6) }}", "a text or list"),
    ("{{ range(99999) | join('x' * 10**7) }}", "a text or list"),
    (
      "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
      "10,000,000 steps",
    ),
  ],
)
def test_a_template_without_end_is_refused_once_with_its_record(template, words):
  tokenizer = chats.tokenizer("byte_level", template)
  data = Memory([Example([user("Which way?")], ([assistant("a")], [assistant("b")]))] * 50)
  with pytest.raises(
    DataError, match=r'record 0 \("Which way\?"\): the chat template of tokenizer .* does not come to an end'
  ) as caught:
    tokenization.tokenize(data, tokenizer, truncation=ROOMY)
  assert words in str(caught.value)


def test_the_record_that_a_template_has_no_end_for_is_named():
  tokenizer = chats.tokenizer(
    "byte_level",
    "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
  )
  data = Memory(
    [Example([user("loop" if i == 7 else f"Q{i}")], ([assistant("a")], [assistant("b")])) for i in range(20)]
  )
  with pytest.raises(DataError, match=r'record 7 \("loop"\): the chat template'):
    tokenization.tokenize(data, tokenizer, truncation=ROOMY)


def test_limits_change_nothing_that_a_template_writes():
  template = (
    "{% set ns = namespace(n=0) %}"
    "{% for m in messages recursive %}{{ loop.length }}{{ loop.last }}{{ loop.nextitem }}"
    "{% set ns.n = ns.n + loop.index * 2 ** 3 %}{% endfor %}{{ ns.n }}{{ '%s-%d' % ('a', 3) }}"
    "{{ [1] + [2] * 2 }}{{ 7 % 4 }}{{ 2.5 * 2 }}{{ 'a' ~ 1 ~ none }}{{ 'x' | indent(2, true) }}"
    "{{ ', '.join(['a', 'b']) }}{{ messages | map(attribute='content') | join('|') }}"
    "{{ '{:>4}'.format('b') }}{{ messages | tojson(indent=1) }}"
    "{% for k, v in messages[0].items() %}{{ k }}{% endfor %}"
    "{% for x in nothing %}{% else %}none{% endfor %}"
    "{% for c in 'abc' if c != 'b' %}{{ loop.length }}{{ c }}{% endfor %}"
    "{% macro q(a) %}<{{ a }}>{% endmacro %}{{ q(1) }}"
  )
  tokenizer = chats.tokenizer("byte_level", template)
  encoder = Encoder(tokenizer)
  messages = [user("one"), assistant("two")]
  assert encoder.prompts([Example(messages, ())])[0] == tokenizer.apply_chat_template(
    messages, return_dict=False, add_generation_prompt=True
  )


def test_draws_and_broken_templates_are_refused():
  for template, words in (
    ("{{ [1, 2] | random }}", "random draws at random"),
    ("{{ lipsum() }}", "lipsum draws"),
    ("{% if %}", "is not valid Jinja"),
  ):
    with pytest.raises(DataError, match=words):
      tokenization.encode(
        [Example([user("Q")], ([assistant("a")],))], chats.tokenizer("byte_level", template)
      )


class Memory(list):
  """Comparisons that were never on disk."""

  fingerprint = "memory"


def dated(date, cache=None, **more):
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["dates"])
  return tokenization.tokenize(
    Memory([Example([user("Q")], ([assistant("a")], [assistant("b")]))]),
    tokenizer,
    truncation=ROOMY,
    reading=Reading(date=date, **more),
    cache_dir=cache,
  )


def test_a_template_s_clock_is_fixed_and_its_ids_are_the_identity(tmp_path):
  first, again, other = (dated(date, tmp_path) for date in ("2024-07-26", "2024-07-26", "2024-07-27"))
  assert first.fingerprint == again.fingerprint != other.fingerprint
  assert "Friday, 26 July 2024" in chats.tokenizer("byte_level").decode(first[0][0])
  assert len(list(tmp_path.iterdir())) == 2


def test_arguments_of_the_run_and_of_a_record_reach_the_template():
  template = "{{ mood }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
  tokenizer = chats.tokenizer("byte_level", template)
  texts = [
    tokenizer.decode(prompt)
    for prompt, _ in tokenization.encode(
      [
        Example([user("Q")], ([assistant("a")],)),
        Example([user("Q")], ([assistant("a")],), None, {"mood": "calm"}),
      ],
      tokenizer,
      Reading(arguments={"mood": "glad"}),
    )
  ]
  assert texts == ["gladQ</s>", "calmQ</s>"]
  with pytest.raises(DataError, match="data.template_arguments has 'tokenize'"):
    Reading(arguments={"tokenize": True})
  with pytest.raises(DataError, match="'add_generation_prompt' is not the template's to read"):
    tokenization.encode(
      [Example([user("Q")], ([assistant("a")],), None, {"add_generation_prompt": True})], tokenizer
    )


@pytest.mark.parametrize(
  "values, words",
  [
    (dict(date="26 July"), "data.template_date is '26 July'; give a day as YYYY-MM-DD"),
    (dict(special_tokens="keep"), "data.special_tokens is 'keep'; it is one of 'text', 'parse', 'raise'"),
    (dict(score="first"), "data.score is 'first'; it is one of 'all', 'last'"),
  ],
)
def test_impossible_readings_are_refused(values, words):
  with pytest.raises(DataError, match=words):
    Reading(**values)


def test_names_of_special_tokens_are_text_or_tokens_or_an_error(kind):
  tokenizer = chats.tokenizer(kind)
  rendered = Memory(
    [
      Example("<s><|start|>user\nQ<|end|>\n<|start|>assistant\n", ("a<|end|>\n", "b</s>")),
      Example("Q", (" a", " b")),
    ]
  )
  tokenize = lambda mode: tokenization.tokenize(
    rendered, tokenizer, truncation=ROOMY, reading=Reading(special_tokens=mode)
  )
  text, parsed = tokenize("text"), tokenize("parse")
  assert text.report["with_special_tokens_in_text"] == parsed.report["with_special_tokens_in_text"] == 1
  assert text.fingerprint != parsed.fingerprint
  assert not {tokenizer.convert_tokens_to_ids("<|start|>")} & set(text[0][0].tolist())
  prompt, (one, other) = parsed[0]
  whole = tokenizer("<s><|start|>user\nQ<|end|>\n<|start|>assistant\na<|end|>", add_special_tokens=False)[
    "input_ids"
  ]
  assert [*prompt, *one] == whole  # one BOS, no EOS behind the end of the turn
  assert tokenizer.decode(other) == "b</s>"
  assert parsed[1][0].tolist() == text[1][0].tolist() and parsed[1][1][0].tolist() == text[1][1][0].tolist()
  with pytest.raises(
    DataError, match=r"record 0 \(.*the name of a special token; take it out, or set data.special_tokens"
  ):
    tokenize("raise")


def test_a_name_that_the_template_looks_for_is_left_to_it():
  template = (
    "{% for m in messages %}<|start|>{{ m.content.split('<|end|>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
  )
  tokenizer = chats.tokenizer("byte_level", template)
  encoder = Encoder(tokenizer)
  messages = [user("Q"), assistant("hm<|end|>a")]
  (encoded,) = encoder.encode([Example(messages[:1], (messages[1:],))])
  assert encoded.prompt + encoded.responses[0] == tokenizer.apply_chat_template(messages, return_dict=False)
  assert encoder.counts["with_special_tokens_that_the_template_reads"] == 1


def test_names_in_calls_and_tools_are_text_too():
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["tools"])
  call = {"function": {"name": "f", "arguments": {"x": "</s>"}}}
  example = Example([user("Q <|end|>")], ([assistant("a", tool_calls=[call])],), [{"name": "<|start|>"}])
  (encoded,) = Encoder(tokenizer).encode([example])
  ids = encoded.prompt + encoded.responses[0]
  count = lambda name: ids.count(tokenizer.convert_tokens_to_ids(name))
  assert (count("<|start|>"), count("<|end|>"), count("</s>")) == (3, 3, 0)
  whole = tokenizer.apply_chat_template(
    [*example.prompt, *example.responses[0]], tools=example.tools, tokenize=False
  )
  assert tokenizer.decode(ids) == whole.rstrip("\n")


@pytest.mark.parametrize("keep", ["start", "end"])
def test_long_texts_get_the_ids_they_would_get_whole(kind, keep):
  tokenizer = chats.tokenizer(kind, chats.TEMPLATES["bos"])
  text = lambda words, count: " ".join(words[i % len(words)] for i in range(count))
  long, other = text(["the", "sea", "way", "is"], 60_000), text(["left", "then"], 40_000)
  data = Memory(
    [
      Example(long, (" a", " b")),
      Example("Q", (f" {long}", f" {other}")),
      Example(long, (f" {long}", " b")),
      Example([user(long)], ([assistant("a")], [assistant("b")])),
      Example([user("Q")], ([assistant(long)], [assistant(other)])),
      Example("a" * 300_000, (" a", " b")),
    ]
  )
  truncation = Truncation(60, 30, keep)
  tokens = tokenization.tokenize(data, tokenizer, truncation=truncation)
  encoder = Encoder(tokenizer)
  for i, example in enumerate(data):
    (whole,) = encoder.encode([example])
    prompt, responses = whole.prompt, whole.responses
    assert len(prompt) + max(map(len, responses)) > 60
    if len(prompt) > 30:
      prompt = (
        prompt[:30]
        if keep == "start"
        else ([prompt[0], *prompt[-29:]] if prompt[0] == tokenizer.bos_token_id else prompt[-30:])
      )
    if len(prompt) + max(map(len, responses)) > 60:
      responses = [each[:30] for each in responses]
    assert tokens[i][0].tolist() == prompt
    assert [each.tolist() for each in tokens[i][1]] == responses
  assert (tokens.report["prompts_cut"], tokens.report["responses_cut"]) == (4, 5)
  prompts = tokenization.encode_prompts([each.prompt for each in data], tokenizer, longest=30, keep=keep)
  assert prompts[0] == (tokens[0][0].tolist(), True)


def test_a_response_of_which_nothing_scored_is_left_is_dropped():
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["bos"])
  sides = lambda *last: tuple([assistant(f"way {each}" * 5), user("why"), assistant(each)] for each in last)
  data = Memory(
    [Example([user("Q")], sides("a", "b")), Example([user("Q")], ([assistant("a")], [assistant("b")]))]
  )
  tokens = tokenization.tokenize(
    data, tokenizer, truncation=Truncation(20, 8, "end"), reading=Reading(score="last")
  )
  assert tokens.report["dropped"] == {"nothing_scored_after_truncation": 1} and tokens.example.tolist() == [1]


def test_processes_give_the_ids_of_one_in_order():
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["generation_marks"])
  data = Memory(
    Example(
      [user(f"Q{i}")], tuple([assistant(f"a{i}"), user("and"), assistant(text)] for text in ("b", f"c{i}"))
    )
    if i % 7
    else Example([user("Q")], ([assistant("same")], [assistant("same")]))
    for i in range(2500)
  )
  one, many = (
    tokenization.tokenize(data, tokenizer, truncation=ROOMY, workers=workers) for workers in (0, 2)
  )
  assert one.fingerprint == many.fingerprint and one.report == many.report
  assert one.mask is not None and one.report["dropped"] == {"identical_responses": 358}
  assert functools.reduce(int.__add__, one.report["dropped"].values()) + len(one) == 2500


def test_answers_of_processes_come_in_order_and_a_death_is_told():
  assert list(pool.ordered(pow, ((i, 2) for i in range(20)), 2)) == [i * i for i in range(20)]
  with pytest.raises(DataError, match="has died .exit status 3.; it may have run out of memory"):
    list(pool.ordered(os._exit, [(3,)], 1))


def test_an_error_in_a_process_is_an_error_here():
  tokenizer = chats.tokenizer("byte_level")
  with pytest.raises(DataError, match="has no chat template"):
    tokenization.tokenize(
      Memory([Example([user("Q")], ([assistant("a")],))] * 1100), tokenizer, truncation=ROOMY, workers=2
    )
