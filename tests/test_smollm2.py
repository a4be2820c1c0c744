"""The second quickstart in small: any chat model, any pairs, one page that needs nothing else."""

import html.parser
import json
import shutil
import subprocess

import numpy as np
import pytest

from dpojax.data.examples import DataError, Example
from experiments import chat_pairs, page, smollm2
from tests import worlds

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  return worlds.write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", worlds.dialogues(60))


class Page(html.parser.HTMLParser):
  """What a page holds: its tags with attributes, its text, and whether every tag is closed."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.open = [], "", []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_an_hh_dialogue_becomes_the_messages_it_was_of():
  example = Example("\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant:", (" Because.", " No."))
  assert chat_pairs.record_of(example) == {
    "prompt": [
      {"role": "user", "content": "Why?"},
      {"role": "assistant", "content": "So."},
      {"role": "user", "content": "And?"},
    ],
    "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "No."}],
  }
  assert chat_pairs.messages_of("the film is") == [{"role": "user", "content": "the film is"}]


def test_no_prompt_is_in_two_parts():
  records = [{"prompt": [{"role": "user", "content": str(i // 3)}], "number": i} for i in range(60)]
  parts = chat_pairs.split(records, {"held_out": 10, "train": 20, "judge": 0})
  assert [len(part) for part in parts.values()] == [12, 21, 27]
  prompts = [{each["prompt"][0]["content"] for each in part} for part in parts.values()]
  assert sum(map(len, prompts)) == 20 == len(set.union(*prompts))
  with pytest.raises(DataError, match="60 short pairs are too few"):
    chat_pairs.split(records, {"held_out": 50, "train": 20})


def test_what_a_text_says_stays_text_on_the_page():
  text = "<script>alert(1)</script> & \"quotes\" 'too'\n</td>"
  made = Page(page.page(text, [page.table([["a"], [text]]), page.code(text), page.paragraphs([text])]))
  assert made.text.count(text) == 5 and not made.open  # title and heading, a cell, code, a paragraph
  assert {"script", "td"} & {tag for tag, _ in made.tags} == {"td"}


def test_the_judge_is_told_with_its_accuracy_and_a_win_rate_of_equal_answers_is_a_half():
  rng = np.random.default_rng(0)
  messages = lambda text: [{"role": "assistant", "content": text}]
  records = [
    each | {side: messages(each[side]) for side in ("chosen", "rejected")} for each in worlds.pairs(rng, 80)
  ]
  judge = smollm2.fit_judge(records[:60], records[60:])
  assert judge.accuracy.value > 0.9 and judge.accuracy.count == 20
  answers = [{"response": "warm"}, {"response": "dull"}]
  assert smollm2.win_rate(judge, answers, answers).value == 0.5
  assert smollm2.win_rate(judge, answers[:1], answers[1:]).value == 1.0


def test_the_experiment_in_small_writes_one_page_of_all_it_found_and_goes_on(
  chat_model, pairs, tmp_path, capsys
):
  summary = smollm2.run(tmp_path, pairs, chat_model, smollm2.SMALL)
  assert [point["step"] for point in summary["frontier"]] == [0, 1, 2]
  start, *_, last = summary["frontier"]
  assert start["kl"] == 0 and start["win_rate"] == 0.5 and last["kl"] != 0
  assert [line["step"] for line in summary["held_out"]] == [0, 1, 2]
  np.testing.assert_allclose(summary["held_out"][0]["loss"], np.log(2), atol=1e-5)
  assert summary["weights"] == "as published" and len(summary["answers"]) == 3

  text = (tmp_path / "report.html").read_text()
  made = Page(text)
  assert not made.open
  for line in [*smollm2.told(summary), *(each["after"] for each in summary["answers"])]:
    assert line in made.text
  for command in smollm2.commands(tmp_path, pairs, chat_model):
    assert command in made.text
  for tag, attributes in made.tags:
    for name in ("src", "href", "srcset", "action"):
      assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
  assert "url(" not in text and "@import" not in text and "<script" not in text

  smollm2.show(summary)
  assert "| step | sampled KL, nats |" in capsys.readouterr().out
  assert smollm2.run(tmp_path, pairs, chat_model, smollm2.SMALL) == summary
  assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_browser_shows_the_page_as_it_is_written(tmp_path):
  """By any browser there is; where there is none, the page as it is written."""
  text = page.page("A & B", [page.section("C", page.table([["d"], ["<e>"]]))])
  (tmp_path / "page.html").write_text(text)
  browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
  if browser:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    text = subprocess.run(
      [browser, *options, "--dump-dom", f"file://{tmp_path}/page.html"],
      capture_output=True,
      text=True,
      timeout=60,
    ).stdout
  assert "<title>A &amp; B</title>" in text and "<td>&lt;e&gt;</td>" in text
