"""Memory of a DPO step against the length of its rows: the compiled step's temporaries, nothing run.

python -m experiments.measurements.row_length_memory [--longest=16384]

A row is computed at once and holds one comparison: half of it prompt, a quarter each response. Beside
it stand what a dense step would hold: scores of one layer's heads [heads, length, length], and
logits [length, vocabulary], in float32.
"""

import argparse

import jax
import numpy as np

from dpojax.plan import needs
from dpojax.training import config as config_lib

HEADS, VOCABULARY = 4, 50257


def config_of(length: int):
  """Returns the config of a step on rows of that many tokens."""
  config = config_lib.defaults()
  config.update_from_flattened_dict(
    {
      "tokenizer": "none is read",
      "data.path": "none is read",
      "data.max_length": length,
      "data.max_prompt_length": length // 2,
      "row_length": length,
      "rows_at_once": 1,
      "batch_size": 1,
      "model.width": 256,
      "model.layers": 4,
      "model.heads": HEADS,
      "model.vocab_size": VOCABULARY,
      "eval_every": 0,
      "optimizer.name": "adamw",
    }
  )
  return config


def step_needs(length: int) -> needs.Needs:
  """Returns what a step on rows of that many tokens needs."""
  comparison = np.array([[length // 2, length // 4, length // 4]])
  return needs.plan(config_of(length), comparison)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--longest", type=int, default=16384)
  options = parser.parse_args()
  print(f"16M parameters, AdamW, compiled for {jax.default_backend()}, jax {jax.__version__}\n")
  print(
    "| row length | temporaries, MiB | more a token, KiB | dense scores of a layer, MiB | all logits, MiB |"
  )
  print("|---|---|---|---|---|")
  length, before = 512, None
  while length <= options.longest:
    found = step_needs(length).temporaries
    slope = "" if before is None else f"{(found - before) / (length / 2) / 2**10:.1f}"
    print(
      f"| {length:,} | {found / 2**20:,.0f} | {slope} | {HEADS * length**2 * 4 / 2**20:,.0f} | "
      f"{length * VOCABULARY * 4 / 2**20:,.0f} |",
      flush=True,
    )
    length, before = 2 * length, found


if __name__ == "__main__":
  main()
