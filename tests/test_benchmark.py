"""The benchmark does what it says: the same pairs for all sides, a table of medians."""

import json
import pathlib

import numpy as np
import pytest

from dpojax.data import tokenization
from dpojax.models import peft
from dpojax.plan import needs
from experiments import chat_pairs
from experiments.benchmark import dpojax_side, inputs, report, trajectory
from tests import chats, worlds

pytestmark = pytest.mark.usefixtures("compiled")


def test_the_side_of_dpojax_runs_and_all_sides_get_the_same_pairs(words, tmp_path):
  records = worlds.pairs(np.random.default_rng(0), 40)
  settings = dict(
    beta=0.1,
    learning_rate=1e-3,
    dtype="float32",
    source="jsonl",
    max_length=32,
    row_length=64,
    path=worlds.write_jsonl(tmp_path / "pairs.jsonl", records),
    tokenizer=words,
    batch_size=8,
    steps=3,
    rows_at_once=1,
    cache=str(tmp_path / "cache"),
    model=str(tmp_path / "model"),
    width=32,
    layers=1,
    heads=2,
    vocab_size=20,
  )
  model = inputs.make_model(settings, tmp_path / "model")
  batches = inputs.make_loader(inputs.run_config(settings), rows_at_once=1)
  (tmp_path / "out").mkdir()
  given = inputs.write_pairs(settings, batches, tmp_path / "out")
  texts, ids = (
    [json.loads(line) for line in pathlib.Path(given[key]).read_text().splitlines()]
    for key in ("pairs", "ids")
  )
  assert len(texts) == len(ids) == 24 and all(text in records for text in texts)
  assert [len(prompt) for prompt, *_ in ids] == [len(t["prompt"].split()) for t in texts]

  result = dpojax_side.run(settings)
  stored = dpojax_side.run(settings | {"stored": True})
  np.testing.assert_allclose(stored["losses"], result["losses"], atol=1e-5)
  assert stored["row_fill"] == result["row_fill"]
  assert abs(result["losses"][0] - np.log(2)) < 1e-5 and result["losses"][-1] < result["losses"][0]
  assert result["compiles"] == 1 and len(result["seconds"]) == 2
  assert result["lengths"] == [[len(part) for part in each] for each in ids]
  rows = 8  # one on each device
  np.testing.assert_allclose(result["row_fill"], np.sum(result["lengths"]) / (3 * rows * 64))
  flops = 8 * needs.necessary_flops(model, np.array(result["lengths"]), 4)
  summary = {
    "case": "test",
    "date": "today",
    "python": "3",
    "matmul_flops": 1e11,
    "settings": {"batch_size": 8},
    "tokens_per_pair": 12.5,
    "flops": {"dpojax": flops, "torch": flops},
    "results": {"dpojax": [result], "torch": [result | {"seconds": [9.0, 4.0, 2.0, 8.0], "micro": 4}]},
  }
  sides = report.summarize(summary)
  assert sides["torch"]["tokens_per_second"] == 25.0
  assert sides["torch"]["pairs_per_second"] == 2.0 and sides["torch"]["steps"] == 3
  assert (sides["torch"]["slowest"], sides["torch"]["fastest"]) == (1.0, 4.0)
  text = report.write(summary, tmp_path)
  assert "| torch | 2.00 (1.00 to 4.00) |" in text and (tmp_path / "test.png").stat().st_size > 5000


def test_lengthened_answers_begin_as_they_did_and_have_as_many_tokens():
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["trim"])
  say = lambda text: [{"role": "assistant", "content": text}]
  records = [{"prompt": "a", "chosen": say(f"so {i}"), "rejected": say(f"no {i}")} for i in range(3)]
  for count in (1, 2, 40):
    made = chat_pairs.lengthened(records, tokenizer, count)
    for before, after in zip(records, made, strict=True):
      assert after["prompt"] == "a"
      for side in ("chosen", "rejected"):
        (text,) = (message["content"] for message in after[side])
        ids = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
        assert abs(len(ids) - count) <= 1  # a space at either end is no part of a message
        short, long = sorted((text, before[side][0]["content"]), key=len)
        assert long.startswith(short)


def test_both_sides_of_a_trajectory_start_from_one_folder_one_adapter_and_the_same_ids(chat_model, tmp_path):
  """Each side is dpojax here, so nothing parts them; the other is TRL where it is installed."""
  pairs = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.dialogues(12))
  tokenizer = tokenization.load_tokenizer(chat_model)
  records, _ = chat_pairs.read(pairs, tokenizer, tmp_path / "cache", longest_prompt=128, longest=128)
  settings = dict(
    beta=0.1,
    dtype="float32",
    source="jsonl",
    max_length=256,
    row_length=384,
    path=worlds.write_jsonl(tmp_path / "chat.jsonl", records),
    tokenizer=chat_model,
    batch_size=4,
    steps=2,
    rows_at_once=1,
    cache=str(tmp_path / "cache"),
    model=chat_model,
  )
  given = {}

  def run_side(side, settings, folder):
    given[folder.name, side] = settings
    return dpojax_side.run(settings)

  found = trajectory.run(settings, tmp_path, run_side)
  assert list(found) == ["all params", "adapter"] and len(given) == 4
  for form, sides in found.items():
    apart = trajectory.differences(sides["dpojax"]["trace"], sides["trl"]["trace"], 0.1)
    assert apart.shape == (2, 4) and not apart.any()
    shown = trajectory.values_of(sides["dpojax"]["trace"][1], 0.1)
    np.testing.assert_allclose(shown[1], 0.1 * (shown[2] - shown[3]), rtol=1e-4, atol=1e-6)
    assert f"| {form} | the last of 2 | 0.0e+00 |" in trajectory.table(found, 0.1)
  assert peft.is_adapter_folder(tmp_path / "adapter" / "adapter")
  ids, texts = (
    [json.loads(line) for line in pathlib.Path(given["adapter", "trl"][key]).read_text().splitlines()]
    for key in ("ids", "pairs")
  )
  assert len(ids) == len(texts) == 8
  for (prompt, *responses), text in zip(ids, texts):
    for side, response in zip(("chosen", "rejected"), responses):
      whole = tokenizer(text["prompt"] + text[side], add_special_tokens=False)["input_ids"]
      assert prompt + response[:-1] == whole and tokenizer.decode(response[-1:]) == "<|end|>"
