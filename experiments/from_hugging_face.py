"""DPO from a Hugging Face folder on real pairs: all params, and an adapter; both end as folders.

python -m experiments.from_hugging_face PAIRS TOKENIZER [--out=runs/from_hugging_face]

PAIRS is a file of Anthropic HH, TOKENIZER a folder with the GPT-2 tokenizer. There being nothing to
download, the folder to start from is made first: a small Llama, trained on the chosen responses and
exported. In OUT come to lie `start`, `all_params` and `adapter` (runs), `base` (what both start
from), and the folders that `transformers` and PEFT read: `all_params_hf`, `adapter_hf` (merged) and
`adapter_peft` (the adapter alone).
"""

import argparse
import pathlib

from dpojax import train
from dpojax.export import writer
from dpojax.training import config as config_lib
from dpojax.training.metrics import read_metrics


def settings(pairs: str, **changes):
  """Returns the config that the three runs share, changed by dotted key."""
  config = config_lib.defaults()
  config.update_from_flattened_dict(
    {
      "data.source": "hh",
      "data.path": pairs,
      "data.max_length": 256,
      "data.max_prompt_length": 128,
      "row_length": 512,
      "batch_size": 16,
      "log_every": 1,
      "eval_every": 0,
      "optimizer.name": "adamw",
      "optimizer.warmup_steps": 5,
      "optimizer.max_grad_norm": 1.0,
    }
    | changes
  )
  return config


STEPS = {"sft": 60, "dpo": 120}


def run(pairs: str, tokenizer: str, out: pathlib.Path) -> dict[str, list[dict]]:
  """Trains and exports; returns the metrics of each run."""
  start, base = out / "start", out / "base"
  if not base.exists():
    train.run(
      settings(
        pairs,
        **{
          "objective": "sft",
          "loss": "token_mean",
          "steps": STEPS["sft"],
          "tokenizer": tokenizer,
          "data.unique_prompts": True,
          "model.width": 128,
          "model.layers": 2,
          "model.heads": 4,
          "optimizer.learning_rate": 2e-3,
          "checkpoint_every": STEPS["sft"],
        },
      ),
      start,
    )
    writer.export(start, base)
  forms = {
    "all_params": {"optimizer.learning_rate": 5e-5},
    "adapter": {"optimizer.learning_rate": 5e-4, "lora.rank": 8, "lora.alpha": 16.0},
  }
  for name, changes in forms.items():
    train.run(
      settings(
        pairs,
        **{
          "model.checkpoint": str(base),
          "steps": STEPS["dpo"],
          "eval_every": 40,
          "checkpoint_every": STEPS["dpo"],
        }
        | changes,
      ),
      out / name,
    )
    writer.export(out / name, out / f"{name}_hf")
  writer.export_adapter(out / "adapter", out / "adapter_peft")
  return {name: read_metrics(out / name) for name in forms}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("pairs")
  parser.add_argument("tokenizer")
  parser.add_argument("--out", default="runs/from_hugging_face", type=pathlib.Path)
  options = parser.parse_args()
  runs = run(options.pairs, options.tokenizer, options.out)
  print(
    "\n| trained | first loss | training accuracy, steps 2-31 | last 30 steps | held-out accuracy "
    "| held-out loss | checkpoint, MiB |"
  )
  print("|---|---|---|---|---|---|---|")
  for name, lines in runs.items():
    logged = [line for line in lines if line["split"] == "train"]
    last = [line for line in lines if line["split"] == "eval"][-1]
    accuracy = lambda some: sum(line["rewards/accuracies"] for line in some) / len(some)
    files = (options.out / name / "checkpoints").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    print(
      f"| {name.replace('_', ' ')} | {logged[0]['loss']:.7f} | {accuracy(logged[1:31]):.1%} "
      f"| {accuracy(logged[-30:]):.1%} | {last['rewards/accuracies']:.1%} | {last['loss']:.4f} "
      f"| {size / 2**20:.1f} |"
    )


if __name__ == "__main__":
  main()
