"""Judges: what they are asked, how answers are read, kept and counted, and a server that fails."""

import collections
import json
import threading
import time
import urllib.parse

import numpy as np
import pytest

from dpojax.evaluate import judging
from dpojax.evaluate.judging import Answers, Endpoint, JudgeError, Pair


def longer(request, headers):
  """The judge who prefers the longer response."""
  text = request["messages"][0]["content"]
  first, second = text.split("Response A:\n")[1].split("\n\nFIRST")[0].split("\n\nResponse B:\n")
  letter = "A" if len(first) > len(second) else "B"
  return f"Comparison: {letter} says more.\nMore helpful: {letter}"


def endpoint_of(server, **changes):
  return Endpoint(
    **dict(url=server.url, model="m", question=judging.QUESTIONS["dialogue"], patience=0.01) | changes
  )


def pairs_of(count, better=lambda i: i % 4):
  """Ours is longer in three pairs of four."""
  return [Pair(f"question {i}", "x" * (3 if better(i) else 1), "xx") for i in range(count)]


def judged(endpoint, pairs, path, seed=0):
  answers = Answers(path)
  try:
    return judging.compare(judging.endpoint_judge(endpoint, answers), pairs, range(len(pairs)), seed=seed)
  finally:
    answers.close()


def test_the_win_rate_of_a_server_is_right_whatever_the_order(serve, tmp_path):
  server = serve(longer)
  for seed in (0, 1):
    result = judged(endpoint_of(server), pairs_of(40), tmp_path / "answers.jsonl", seed)
    assert result.win_rate.value == 0.75 and result.outcomes.count("win") == 30
    assert result.win_rate.low < 0.75 < result.win_rate.high
  assert len({text.index("xxx") > text.index("xx\n") for text in server.asked if "xxx" in text}) == 2


def test_a_judge_who_always_says_a_comes_to_one_half(serve, tmp_path):
  server = serve(lambda *_: "Comparison: the first.\nMore helpful: A")
  result = judged(endpoint_of(server), pairs_of(400), tmp_path / "answers.jsonl")
  assert result.win_rate.low < 0.5 < result.win_rate.high and abs(result.win_rate.value - 0.5) < 0.1
  assert result.said_a.value == 1.0


def test_nothing_is_asked_twice_after_an_interruption(serve, tmp_path):
  path, dead = tmp_path / "answers.jsonl", threading.Event()

  def dies(request, headers):
    if len(server.asked) > 12:
      dead.set()
    return (401, {}, {"error": {"message": "no more"}}) if dead.is_set() else longer(request, headers)

  server = serve(dies)
  with pytest.raises(JudgeError, match=r"answers 401 \(no more\); check the API key \(\d+ answers are kept"):
    judged(endpoint_of(server, workers=2), pairs_of(40), path)
  kept = {json.loads(line)["request"]["messages"][0]["content"] for line in path.read_text().splitlines()}
  assert 10 <= len(kept) < 40
  path.write_text(path.read_text() + '{"key": "cut o')  # as a kill in the middle of a line leaves it

  server.asked.clear()
  server.answer = longer
  result = judged(endpoint_of(server), pairs_of(40), path)
  assert result.win_rate.value == 0.75
  assert not kept & server.asked.keys() and len(server.asked) == 40 - len(kept)
  server.asked.clear()
  assert judged(endpoint_of(server), pairs_of(40), path) == result and not server.asked


def test_too_many_requests_and_errors_of_the_server_are_waited_out(serve, tmp_path):
  def busy(request, headers):
    count = server.asked[request["messages"][0]["content"]]
    if count == 1:
      return 429, {"Retry-After": "0.2"}, {"error": {"message": "slow down"}}
    return (503, {}, {}) if count == 2 else longer(request, headers)

  server = serve(busy)
  start = time.perf_counter()
  result = judged(endpoint_of(server), pairs_of(4), tmp_path / "answers.jsonl")
  assert result.win_rate.value == 0.75 and set(server.asked.values()) == {3}
  assert time.perf_counter() - start > 0.2


def test_a_server_that_never_recovers_is_named(serve, tmp_path):
  server = serve(lambda *_: (500, {}, {"error": {"message": "out of order"}}))
  with pytest.raises(JudgeError, match=r"answers 500 \(out of order\), 3 times; start the same command"):
    judged(endpoint_of(server, attempts=3), pairs_of(3), tmp_path / "answers.jsonl")
  with pytest.raises(JudgeError, match="gives no answer"):
    judged(endpoint_of(server, attempts=2, url="http://127.0.0.1:9"), pairs_of(1), tmp_path / "b.jsonl")


def test_another_form_of_answer_is_named(serve, tmp_path):
  server = serve(lambda *_: (200, {}, {"text": "A"}))
  with pytest.raises(JudgeError, match="answers in another form than chat completions"):
    judged(endpoint_of(server), pairs_of(1), tmp_path / "answers.jsonl")


def test_the_key_is_sent_and_never_written(serve, tmp_path):
  seen = []
  server = serve(
    lambda request, headers: (seen.append(headers["Authorization"]), longer(request, headers))[1]
  )
  endpoint = endpoint_of(server, api_key="secret")
  judged(endpoint, pairs_of(2), tmp_path / "answers.jsonl")
  assert seen == ["Bearer secret"] * 2 and "secret" not in repr(endpoint)
  assert "secret" not in (tmp_path / "answers.jsonl").read_text()


KEY = 'sk-Zm9v+/=b"ar'


@pytest.mark.parametrize(
  "said",
  [
    lambda key: (401, {}, {"error": {"message": f"Incorrect API key provided: {key}."}}),
    lambda key: (400, {}, {"error": {"message": "no", "key": key}}),
    lambda key: (500, {}, {"detail": f"while asked by {urllib.parse.quote(key, safe='')}"}),
    lambda key: (200, {}, {"text": f"Bearer {key}"}),
    lambda key: (200, {}, {"choices": [{"message": {"content": f"your key is {key}\nMore helpful: A"}}]}),
    lambda key: (200, {}, {"choices": [{"message": {"refusal": f"not with {key}"}}]}),
    lambda key: (307, {"Location": f"http://{key}@127.0.0.1:9/"}, {}),
    lambda key: (307, {"Location": f"gopher://{key}/"}, {}),
  ],
)
def test_a_key_that_a_server_says_back_is_written_nowhere(said, serve, tmp_path, capfd, caplog):
  server = serve(lambda *_: said(KEY))
  caplog.set_level("DEBUG")
  told = ""
  try:
    judged(endpoint_of(server, api_key=KEY, attempts=2), pairs_of(2), tmp_path / "answers.jsonl")
  except JudgeError as error:
    told = str(error)
  written = told + "".join(capfd.readouterr()) + (tmp_path / "answers.jsonl").read_text() + caplog.text
  for form in (KEY, json.dumps(KEY)[1:-1], urllib.parse.quote(KEY, safe=""), "Zm9v"):
    assert form not in written


@pytest.mark.parametrize(
  "changes",
  [
    {"url": f"https://me:{KEY}@host/v1"},
    {"url": f"https://host/v1?key={KEY}"},
    {"url": f"https://host/v1#{KEY}"},
    {"url": f"ftp://{KEY}@host"},
    {"url": f"http://[{KEY}"},
    {"options": {"api_key": KEY}},
    {"options": {"user": KEY}},
    {"options": {"extra": {"deep": [KEY]}}},
    {"api_key": KEY + "\n", "options": {}},
    {"api_key": f"{KEY} twice", "options": {}},
    {"options": {"Authorization": f"Bearer {KEY}"}},
  ],
)
def test_a_key_where_it_would_be_written_is_refused_without_being_told(changes):
  with pytest.raises(JudgeError) as caught:
    Endpoint(**{"url": "https://host/v1", "model": "m", "question": "q", "api_key": KEY} | changes)
  assert "Zm9v" not in str(caught.value)


def test_an_answer_that_was_changed_on_the_disk_is_asked_for_again(serve, tmp_path, capsys):
  path, server = tmp_path / "answers.jsonl", serve(longer)
  result = judged(endpoint_of(server), pairs_of(6), path)
  lines = path.read_text().splitlines()
  changed = {
    0: lines[0].replace('"refused": false', '"refused": true'),
    1: lines[1].replace("helpful", "helqful"),
    2: lines[2][:-9],
    3: lines[3].replace('"key": "', '"key": "0'),
  }
  assert all(changed[i] != lines[i] for i in changed)
  path.write_text("\n".join(changed.get(i, line) for i, line in enumerate(lines)) + "\n")
  server.asked.clear()
  assert judged(endpoint_of(server), pairs_of(6), path) == result and len(server.asked) == 4
  assert [
    f"line {i} is no answer" in capsys_line
    for i, capsys_line in enumerate(capsys.readouterr().err.splitlines(), 1)
  ] == [True] * 4


def test_ties_refusals_and_what_cannot_be_read_are_counted_by_themselves(serve, tmp_path):
  said = [
    "More helpful: A",
    "More helpful: tie",
    "I like both of them very much indeed.",
    (200, {}, {"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}),
    (200, {}, {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}),
  ]

  def answer(request, headers):
    return said[int(request["messages"][0]["content"].split("question ")[1].split()[0]) % 5]

  result = judged(endpoint_of(serve(answer)), pairs_of(50), tmp_path / "answers.jsonl")
  count = collections.Counter(result.outcomes)
  assert count["tie"] == count["unparseable"] == 10 and count["refused"] == 20
  wins = count["win"]
  assert wins + count["loss"] == 10
  np.testing.assert_allclose(result.win_rate.value, (wins + 5) / 20)
  assert result.win_rate.count == 20


def test_a_file_of_something_else_is_no_file_of_answers(tmp_path):
  (tmp_path / "notes.jsonl").write_text('{"prompt": "mine"}\n')
  with pytest.raises(JudgeError, match="line 1 is no answer of a judge"):
    Answers(tmp_path / "notes.jsonl")


@pytest.mark.parametrize(
  "answer, verdict",
  [
    ("Comparison: B is short, A is better.\nPreferred: A", "A"),
    ('Comparison: both fine.\nMore helpful: "B"', "B"),
    ("**Comparison:** A rambles.\n\n**Preferred:** **B**.", "B"),
    ("Comparison: one line. More helpful: A", "A"),
    ("Preferred: Summary B", "B"),
    ("Comparison: A is more helpful: it answers.\nMore helpful: <B>", "B"),
    ("Comparison: both are the same.\n\nA", "A"),
    ("More helpful: Tie", "tie"),
    ("Preferred: neither", "tie"),
    ("Comparison: A is better.", "unparseable"),
    ("Preferred: A is better than B in most respects", "unparseable"),
    ("I'm sorry, but I can't help with that.", "unparseable"),
    ("", "unparseable"),
  ],
)
def test_an_answer_is_read_by_its_last_line(answer, verdict):
  assert judging.read_verdict(answer) == verdict


def test_a_question_holds_its_texts_as_they_are():
  text = judging.ask_about(judging.QUESTIONS["concise_summary"], Pair("use {a} and {b}", "{prompt}", "B\\1"))
  assert "Post:\nuse {a} and {b}\n" in text and "Summary A:\n{prompt}\n" in text
  assert "Summary B:\nB\\1\n" in text and text.endswith('Preferred: <"A" or "B">')
  assert "A good summary is both precise and concise." in text


def test_functions_judge_too():
  pairs = [Pair("p", "longer", "short"), Pair("p", "same", "size"), Pair("p", "a", "longer")]
  by_length = judging.scored_judge(lambda prompts, responses: [len(each) for each in responses])
  for seed in range(4):
    assert judging.compare(by_length, pairs, range(3), seed=seed).outcomes == ["win", "tie", "loss"]
  alphabetic = judging.paired_judge(lambda prompt, a, b: "A" if a < b else "B" if b < a else "?")
  assert judging.compare(alphabetic, pairs, range(3), seed=0).outcomes == ["win", "win", "win"]
  assert judging.compare(alphabetic, [Pair("p", "a", "a")], [0], seed=0).outcomes == ["unparseable"]


def test_samples_of_one_prompt_are_not_taken_for_independent():
  """Twenty prompts whose fifty samples all agree: the interval is that of 20, not of 1,000."""
  outcomes = [("win" if i % 2 else "loss") for i in range(20) for _ in range(50)]
  found = judging.win_rate(outcomes, np.repeat(np.arange(20), 50))
  assert found.value == 0.5 and found.count == 20 and found.high - found.low > 0.3
