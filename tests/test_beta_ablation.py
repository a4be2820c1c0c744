"""Real preferences against beta, in small."""

import numpy as np

from experiments.paper import beta_ablation
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
  beta_ablation.show(table)
  out = capsys.readouterr().out
  assert "| 0.1 | " in out and "| 5 | " in out
  first = [line for line in table if line["split"] == "measured" and line["step"] == 0]
  last = [line for line in table if line["split"] == "measured" and line["step"] == 6]
  assert len(last) == 4
  assert all(line["kl"] == 0 for line in first) and all(line["kl"] > 0 for line in last)
