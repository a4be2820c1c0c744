"""Real preferences against beta, in small."""

import numpy as np

from experiments import figures
from experiments.paper import beta_ablation, beta_real
from tests import worlds


def test_the_beta_ablation_in_small_tells_of_every_beta(tmp_path, capsys):
  rng = np.random.default_rng(1)
  records = []
  for i, each in enumerate(worlds.pairs(rng, 60)):
    start = f"\n\nHuman: {i} {each['prompt']}?\n\nAssistant:"
    records.append({"chosen": start + each["chosen"], "rejected": start + each["rejected"]})
  path = worlds.write_jsonl(tmp_path / "pairs.jsonl", records)
  table = beta_ablation.run(
    path,
    tmp_path / "run",
    beta_ablation.Sizes(
      vocabulary=300,
      width=32,
      layers=1,
      sft_steps=3,
      dpo_steps=6,
      batch_size=16,
      held_out=12,
      sampled=6,
      prompt_tokens=18,
      max_length=64,
      max_new_tokens=6,
    ),
    betas=(0.1, 5.0),
    seeds=(0, 1),
  )
  figures.show_against(table, "beta", beta_ablation.SHOWN)
  out = capsys.readouterr().out
  assert "| 0.1 | " in out and "| 5 | " in out
  first = [line for line in table if line["split"] == "measured" and line["step"] == 0]
  last = [line for line in table if line["split"] == "measured" and line["step"] == 6]
  assert len(last) == 4
  assert all(line["kl"] == 0 for line in first) and all(line["kl"] > 0 for line in last)


def test_beta_on_a_chat_model_in_small_tells_of_every_beta_and_goes_on(chat_model, tmp_path, capsys):
  pairs = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.dialogues(30))
  run = lambda: beta_real.run(
    pairs, chat_model, tmp_path / "run", beta_real.SMALL, betas=(0.1, 0.5), seeds=(0,)
  )
  table = run()
  figures.show_against(table, "beta", beta_real.SHOWN)
  out = capsys.readouterr().out
  assert "| 0.1 | " in out and "| 0.5 | " in out
  first, last = (
    [line for line in table if line["split"] == "measured" and line["step"] == step] for step in (0, 2)
  )
  assert [line["beta"] for line in last] == [0.1, 0.5]
  assert all(abs(line["kl"]) < 1e-6 for line in first) and all(line["kl"] > 0 for line in last)
  assert all(line["perplexity"] > 1 for line in last)
  assert run() == table
