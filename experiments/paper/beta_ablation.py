"""What beta does on real preferences: accuracy, margins, log-ratios and KL against it.

python -m experiments.paper.beta_ablation --pairs=FILE --workdir=runs/beta_ablation \\
    [--betas=0.05,...] [--seeds=0,1,2]

FILE holds Anthropic HH pairs. A byte-pair tokenizer and a small language model are trained on the
chosen responses, DPO at every beta and seed side by side; KL is measured on samples to held-out
prompts. Writes table.jsonl and beta.png and prints the table: means and standard errors over seeds.
"""

import argparse
import gzip
import json
import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np

from configs import dpo, sft
from dpojax import train
from dpojax.data import loader, tokenization
from dpojax.data.examples import DataError
from dpojax.sample import rollouts
from dpojax.training import resolve, weights
from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure
from experiments.paper import sentiment

SHOWN = (
  ("eval", "rewards/accuracies", "held-out accuracy"),
  ("eval", "rewards/margins", "margin"),
  ("eval", "log_ratios/chosen", "log-ratio chosen"),
  ("eval", "log_ratios/rejected", "log-ratio rejected"),
  ("measured", "kl", "KL, nats"),
)


class Sizes(NamedTuple):
  """How large the model is, and how long it is trained."""

  vocabulary: int = 4000
  width: int = 128
  layers: int = 2
  sft_steps: int = 200
  dpo_steps: int = 60
  batch_size: int = 32
  held_out: int = 256
  sampled: int = 64
  prompt_tokens: int = 96
  max_length: int = 192
  max_new_tokens: int = 48


def start(pairs: str, workdir: pathlib.Path, sizes: Sizes) -> ml_collections.ConfigDict:
  """Trains the tokenizer and the language model; returns the config of DPO runs that start from it."""
  workdir.mkdir(parents=True, exist_ok=True)
  tokenizer_folder = workdir / "tokenizer"
  if not (tokenizer_folder / "tokenizer.json").exists():
    sentiment.save_tokenizer(tokenizer_folder, chosen_texts(pairs), sizes.vocabulary)
  sft_config = _settings(sft.get_config("hh"), pairs, workdir, sizes)
  sft_config.loss = "token_mean"
  sft_config.model.width, sft_config.model.layers, sft_config.model.heads = sizes.width, sizes.layers, 4
  sft_config.model.scan_layers = False
  sft_config.steps = sft_config.checkpoint_every = sizes.sft_steps
  sft_config.optimizer.learning_rate = 3e-3
  sft_config.optimizer.warmup_steps = 20
  train.run(sft_config, workdir / "sft")

  config = _settings(dpo.get_config("hh"), pairs, workdir, sizes)
  config.model.checkpoint = str(workdir / "sft")
  config.reference.mode = "stored"
  config.steps = config.checkpoint_every = sizes.dpo_steps
  config.eval_every = max(1, sizes.dpo_steps // 3)
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup_steps = 10
  return config


def run(pairs: str, workdir: pathlib.Path, sizes: Sizes, *, betas, seeds) -> list[dict]:
  """Returns the table of the sweep."""
  config = start(pairs, workdir, sizes)
  reference = weights.load(str(workdir / "sft"))
  tokenizer = tokenization.load_tokenizer(config.tokenizer)
  held_out = loader.last_of_each_prompt(resolve.load_data(config).held_out)
  prompts = [held_out.comparison(i)[0] for i in range(len(held_out))]
  short = [prompt for prompt in prompts if len(prompt) <= sizes.prompt_tokens][: sizes.sampled]
  ids, lengths = rollouts.padded(short, sizes.prompt_tokens)
  bench = measure.Bench(
    reference.config,
    lambda asked, answers: np.zeros(len(answers)),
    num_samples=4,
    stop_id=tokenizer.eos_token_id,
    max_new_tokens=sizes.max_new_tokens,
    prompts_at_once=len(ids),
  )

  def kl(member, step, params):
    numbers = bench.measure(params, reference.params, ids, lengths, seed=member.seed)
    return {name: numbers[name] for name in ("kl", "kl_error", "length")}

  return sweep.run(config, workdir / "sweep", seeds=seeds, values=betas, at_once=len(seeds), measure=kl)


def _settings(config, pairs: str, workdir: pathlib.Path, sizes: Sizes):
  """What both runs have in common."""
  config.tokenizer = str(workdir / "tokenizer")
  config.data.path = pairs
  config.data.max_length = sizes.max_length
  config.data.max_prompt_length = sizes.prompt_tokens
  config.data.eval_size = sizes.held_out
  config.data.cache_dir = str(workdir / "prepared")
  config.row_length = 512
  config.batch_size = sizes.batch_size
  config.optimizer.name = "adamw"
  config.optimizer.max_grad_norm = 1.0
  config.eval_every = config.log_every = 20
  return config


def chosen_texts(pairs: str) -> list[str]:
  """Returns the chosen dialogues of a file of HH pairs.

  Raises:
    DataError: it cannot be read.
  """
  try:
    with (gzip.open if pairs.endswith(".gz") else open)(pairs, "rt") as file:
      return [json.loads(line)["chosen"] for line in file]
  except (OSError, ValueError, KeyError) as error:
    raise DataError(f"--pairs {pairs} cannot be read ({error!r}); give a file of Anthropic HH") from error


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--pairs", required=True)
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/beta_ablation"))
  parser.add_argument("--betas", default="0.05,0.1,0.5,1,5")
  parser.add_argument("--seeds", default="0,1,2")
  arguments = parser.parse_args()
  workdir = arguments.workdir.absolute()
  with command(workdir):
    table = run(
      arguments.pairs,
      workdir,
      Sizes(),
      betas=[float(b) for b in arguments.betas.split(",")],
      seeds=[int(s) for s in arguments.seeds.split(",")],
    )
    figures.against_axis(table, "beta", workdir / "beta.png")
  figures.show_against(table, "beta", SHOWN)
  print(f"\nwritten: {workdir}/sweep/table.jsonl and {workdir}/beta.png")


if __name__ == "__main__":
  main()
