"""Displacement in small: one comparison, every loss, and what is read off its runs."""

import numpy as np
import pytest

from dpojax.data import tokenization
from experiments.paper import displacement

pytestmark = pytest.mark.usefixtures("compiled")


def test_the_change_at_a_kl_is_read_off_the_line_between_two_steps():
  line = {"kl": [0.0, 0.1, 0.3], "chosen": [-1.0, -1.5, -2.5]}
  np.testing.assert_allclose(displacement.change_at(line, 0.2), -1.0)
  np.testing.assert_allclose(displacement.change_at(line, 0.05), -0.25)
  assert np.isnan(displacement.change_at(line, 0.4))


def test_a_row_holds_the_answers_and_the_ends_of_their_turns(chat_model):
  tokenizer = tokenization.load_tokenizer(chat_model)
  comparison = displacement.encoded(tokenizer, 3, ("No", "Never"))
  shape = displacement.shape_of([comparison])
  assert shape.length % 32 == 0 and shape.length - len(comparison[0]) - shape.scored < 32
  rows = displacement.rows_of(comparison, shape)
  texts = [tokenizer.decode(rows.target[0][rows.slot[0] == k]) for k in (0, 1)]
  assert texts == ["No<|end|>", "Never<|end|>"]
  prompt = tokenizer.decode(rows.tokens[0][(rows.branch[0] == 0) & (rows.comparison[0] > 0)])
  assert displacement.STATEMENTS[3] in prompt and prompt.endswith("<|start|>assistant\n\n")


def test_the_experiment_in_small_tells_where_probability_goes_and_goes_on(chat_model, tmp_path, capsys):
  sizes = displacement.SMALL._replace(learning_rate=1e-2)
  lines = displacement.run(tmp_path, chat_model, sizes)
  assert len(lines) == 3 * 2 + 6  # DPO of every pair and seed, and the other losses on the first
  for line in lines:
    assert len(line["kl"]) == 3 and abs(line["kl"][0]) < 1e-5 < line["kl"][-1]
    assert len(line["gained"]) == 3 and line["gained"][0][1] > 0
    if line["loss"] == "dpo":  # which widens the gap, whatever becomes of the chosen answer
      gap = np.subtract(line["chosen"], line["rejected"])
      assert gap[-1] > gap[0]
  displacement.plot(lines, tmp_path / "displacement.png")
  displacement.show(lines)
  out = capsys.readouterr().out
  assert all(f"| {loss} | " in out for loss in displacement.LOSSES) and "| all | " in out
  assert (tmp_path / "displacement.png").stat().st_size > 5000
  (tmp_path / "displacement.jsonl").write_text(
    "".join((tmp_path / "displacement.jsonl").read_text().splitlines(keepends=True)[:-1])
  )
  again = displacement.run(tmp_path, chat_model, sizes)
  assert again[:-1] == lines[:-1]
  np.testing.assert_allclose(again[-1]["chosen"], lines[-1]["chosen"], rtol=1e-6)
