"""The benchmark does what it says: the same pairs for all sides, a table of medians."""

import json
import pathlib

import numpy as np

from dpojax import plan
from experiments.benchmark import dpojax_side, inputs, report
from tests import worlds


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
  flops = 8 * plan.necessary_flops(model, np.array(result["lengths"]), 4)
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
