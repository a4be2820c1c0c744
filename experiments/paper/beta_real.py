"""Beta on a published model and real pairs: what is learnt, what it costs, and what becomes of the text.

python -m experiments.paper.beta_real [--pairs=FILE] [--model=FOLDER] [--workdir=runs/beta_real]
    [--betas=0.01,0.05,0.1,0.2,0.5] [--seeds=0,1] [--small] [--steps=N and other fields of `Sizes`]

LoRA DPO at every beta and seed, side by side, with one stored reference. A seed is the order of the pairs and
the adapter's random start. KL and length are of samples to held-out prompts; perplexity is that of held-out
chosen answers, from their mean log-prob a token. Writes sweep/table.jsonl and beta.png; a killed one goes on.
"""

import argparse
import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from configs import smollm2 as config_of_model
from dpojax.data import loader, tokenization
from dpojax.models import lora
from dpojax.sample import rollouts
from dpojax.training import config as config_lib
from dpojax.training import resolve, weights
from experiments import chat_pairs, figures, smollm2, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure

SHOWN = (
  ("eval", "loss", "held-out loss"),
  ("eval", "rewards/accuracies", "accuracy"),
  ("eval", "rewards/margins", "margin"),
  ("eval", "log_ratios/chosen", "log-ratio chosen"),
  ("eval", "log_ratios/rejected", "log-ratio rejected"),
  ("measured", "perplexity", "perplexity of chosen"),
  ("measured", "kl", "KL, nats"),
  ("measured", "length", "tokens of an answer"),
)


class Sizes(NamedTuple):
  """How much is trained and measured."""

  steps: int = 32
  batch_size: int = 16
  held_out: int = 96
  sampled: int = 16
  samples: int = 2
  max_new_tokens: int = 48
  longest_prompt: int = 96
  longest: int = 160
  row_length: int = 512
  dtype: str = "float32"


SMALL = Sizes(steps=2, batch_size=4, held_out=8, sampled=3, samples=1, max_new_tokens=4, row_length=256)
"""A smoke test."""


def run(pairs: str, model: str, workdir: pathlib.Path, sizes: Sizes, *, betas, seeds) -> list[dict]:
  """Returns the table of the sweep."""
  config = config_of(pairs, model, workdir, sizes)
  reference = weights.load(model)
  tokenizer = tokenization.load_tokenizer(model)
  data = resolve.load_data(config)
  held_out = loader.last_of_each_prompt(data.held_out)
  prompts = [held_out.comparison(i)[0] for i in range(len(held_out))][: sizes.sampled]
  ids, lengths = rollouts.padded(prompts, sizes.longest_prompt)
  bench = measure.Bench(
    reference.config,
    lambda asked, answers: np.zeros(len(answers)),
    num_samples=sizes.samples,
    stop_id=tokenizer.eos_token_id,
    max_new_tokens=sizes.max_new_tokens,
    prompts_at_once=len(ids),
  )
  tokens = float(np.mean(loader.without_mismatched(data.held_out).scored_lengths[:, 0]))
  base, adapter = jax.device_put(reference.params), config_lib.lora_of(config)

  def look(member, step, params):
    merged = lora.merge(reference.params, params, adapter)
    numbers = bench.measure(merged, base, ids, lengths, seed=member.seed)
    return {name: numbers[name] for name in ("kl", "kl_error", "length")}

  table = sweep.run(
    config, workdir / "sweep", seeds=seeds, values=betas, at_once=1, measure=look, data=lambda seed: data
  )
  log_prob = {
    (line["member"], line["step"]): line["logps/chosen"] for line in table if line["split"] == "eval"
  }
  for line in table:
    if line["split"] == "measured":
      line["perplexity"] = math.exp(-log_prob[line["member"], line["step"]] / tokens)
  return table


def config_of(pairs: str, model: str, workdir: pathlib.Path, sizes: Sizes):
  """Returns the config that all members share; writes the pairs at the first call."""
  workdir.mkdir(parents=True, exist_ok=True)
  paths = {name: workdir / f"{name}.jsonl" for name in ("held_out", "train")}
  if not all(path.exists() for path in paths.values()):
    records, _ = chat_pairs.read(
      pairs,
      tokenization.load_tokenizer(model),
      workdir / "prepared",
      longest_prompt=sizes.longest_prompt,
      longest=sizes.longest,
    )
    for name, part in chat_pairs.split(records, {"held_out": sizes.held_out, "train": 0}).items():
      sweep.write_lines(paths[name], part)
  config = config_of_model.get_config(model)
  config.tokenizer = model
  config.data.path, config.data.eval_path = str(paths["train"]), str(paths["held_out"])
  config.data.cache_dir = str(workdir / "prepared")
  config.data.max_length, config.data.max_prompt_length = sizes.longest, sizes.longest_prompt
  config.row_length, config.batch_size = sizes.row_length, sizes.batch_size
  config.reference.mode = "stored"
  config.model.dtype = sizes.dtype
  config.steps = config.eval_every = config.checkpoint_every = sizes.steps
  return config


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--pairs", default="", help="by default Anthropic HH in the folder DPOJAX_DATA")
  parser.add_argument("--model", default="", help="a folder with a chat template; by default the package's")
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/beta_real"))
  parser.add_argument("--betas", default="0.01,0.05,0.1,0.2,0.5")
  parser.add_argument("--seeds", default="0,1")
  parser.add_argument("--small", action="store_true", help="a smoke test")
  for name, default in Sizes()._asdict().items():
    parser.add_argument(f"--{name}", type=type(default), help=f"by default {default}")
  arguments = parser.parse_args()
  given = {
    name: value for name, value in vars(arguments).items() if name in Sizes._fields and value is not None
  }
  workdir = arguments.workdir.absolute()
  with command(workdir):
    table = run(
      chat_pairs.find(arguments.pairs),
      arguments.model or smollm2.model_folder(workdir / "model"),
      workdir,
      (SMALL if arguments.small else Sizes())._replace(**given),
      betas=[float(beta) for beta in arguments.betas.split(",")],
      seeds=[int(seed) for seed in arguments.seeds.split(",")],
    )
    figures.against_axis(table, "beta", workdir / "beta.png")
  figures.show_against(table, "beta", SHOWN)
  print(f"\nwritten: {workdir}/sweep/table.jsonl and {workdir}/beta.png")


if __name__ == "__main__":
  main()
