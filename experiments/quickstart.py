"""Controlled sentiment in miniature: the paper's first experiment, with a true reward, in minutes.

python -m experiments.quickstart [--workdir=runs/quickstart] [--small]

A grammar writes film reviews; a small Transformer learns them (SFT); four completions of each prefix
are sampled and all six pairs labelled by the true reward; DPO is trained on the pairs at several
betas; and on held-out prefixes the true reward is measured against the KL to the reference, along
training. Writes summary.json, frontier.png and every run's metrics.jsonl. No download.
"""

import argparse
import itertools
import json
import os
import pathlib
import sys
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np
import tokenizers
import tqdm
import transformers

from configs import dpo, sft
from dpojax import train
from dpojax.data import tokenization
from dpojax.runtime.command import command
from dpojax.runtime.disk import disk_errors
from dpojax.training import checkpoint
from experiments import figures
from experiments import quickstart_world as world
from experiments.command import folder_argument
from experiments.measurements import measure

LONGEST_PREFIX = 8


class Sizes(NamedTuple):
  """How large the experiment is; the defaults take under three minutes on two CPU cores."""

  reviews: int = 6000
  prefixes: int = 1200
  held_out: int = 256
  samples: int = 4
  max_new_tokens: int = 24
  width: int = 64
  layers: int = 2
  sft_steps: int = 250
  dpo_steps: int = 120
  measure_every: int = 20
  betas: tuple[float, ...] = (0.1, 0.5, 2.0)


SMALL = Sizes(
  reviews=1500,
  prefixes=256,
  held_out=128,
  width=32,
  layers=1,
  sft_steps=150,
  dpo_steps=80,
  measure_every=40,
  betas=(0.5,),
)
"""A smoke test."""


def save_tokenizer(folder: pathlib.Path) -> None:
  """Saves a tokenizer of the grammar's words as a Hugging Face folder."""
  ids = {word: i for i, word in enumerate(["<eos>", *world.vocabulary()])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<eos>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def write_jsonl(path: pathlib.Path, records: list[dict]) -> None:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def settings(base, sizes: Sizes, workdir: pathlib.Path, data: pathlib.Path):
  """Fills in what the runs of the quickstart share."""
  base.tokenizer = str(workdir / "tokenizer")
  base.data.path = str(data)
  base.data.cache_dir = str(workdir / "cache")
  base.data.max_length = 48
  base.data.max_prompt_length = 16
  base.data.unique_prompts = False
  base.row_length = 256
  base.rows_at_once = 1  # one program for steps of any number of rows
  base.model.width = sizes.width
  base.model.layers = sizes.layers
  base.optimizer.name = "adamw"
  base.optimizer.warmup_steps = 10
  base.optimizer.max_grad_norm = 1.0
  base.eval_every = 0
  return base


def sft_config(sizes: Sizes, workdir: pathlib.Path):
  config = settings(sft.get_config(), sizes, workdir, workdir / "reviews.jsonl")
  config.loss = "token_mean"
  config.steps = sizes.sft_steps
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "cosine"
  config.log_every = 50
  config.checkpoint_every = sizes.sft_steps
  return config


def dpo_config(beta: float, sizes: Sizes, workdir: pathlib.Path):
  config = settings(dpo.get_config(), sizes, workdir, workdir / "preferences.jsonl")
  config.beta = beta
  config.model.checkpoint = str(workdir / "sft")
  config.steps = sizes.dpo_steps
  config.optimizer.learning_rate = 5e-4
  config.log_every = 20
  config.checkpoint_every = sizes.measure_every
  config.checkpoint_keep = 0
  return config


def texts_of(tokenizer, answers: measure.Answers) -> list[list[str]]:
  """Returns the samples to each prompt as text."""
  return [
    [tokenizer.decode(ids[:count], skip_special_tokens=True) for ids, count in zip(*each)]
    for each in zip(answers.tokens, answers.lengths)
  ]


def preferences(prefixes, texts, rewards) -> list[dict]:
  """Returns every pair of completions of a prefix, the better one chosen; ties are left out."""
  records = []
  for start, completions, values in zip(prefixes, texts, rewards):
    for i, j in itertools.combinations(range(len(completions)), 2):
      if values[i] != values[j] and completions[i].strip() and completions[j].strip():
        best, worst = (i, j) if values[i] > values[j] else (j, i)
        records.append(
          {"prompt": start, "chosen": f" {completions[best]}", "rejected": f" {completions[worst]}"}
        )
  return records


def run(workdir: pathlib.Path, sizes: Sizes) -> dict:
  """Runs the experiment and returns the summary it writes."""
  rng = np.random.default_rng(0)
  stages = 3 + 2 * len(sizes.betas)
  bar = tqdm.tqdm(total=stages, unit="stage", file=sys.stderr, disable=not sys.stderr.isatty())

  def stage(title):
    bar.set_description(title)
    with tqdm.tqdm.external_write_mode(file=sys.stdout):
      print(f"\n-- {title}", flush=True)

  stage("writing reviews")
  with disk_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(workdir / "tokenizer")
    reviews = [world.review(rng) for _ in range(sizes.reviews + sizes.prefixes + sizes.held_out)]
    starts = [world.prefix(text, rng) for text in reviews]
    learned = [
      {"prompt": start, "responses": [text[len(start) :]]}
      for start, text in zip(starts[: sizes.reviews], reviews)
    ]
    write_jsonl(workdir / "reviews.jsonl", learned)
  prefixes = starts[sizes.reviews :][: sizes.prefixes]
  held_out = starts[sizes.reviews + sizes.prefixes :]
  bar.update()

  stage("supervised fine-tuning")
  train.run(sft_config(sizes, workdir), workdir / "sft")
  reference = checkpoint.load_policy(workdir / "sft")
  tokenizer = tokenization.load_tokenizer(str(workdir / "tokenizer"))
  bench = measure.Bench(
    reference.config,
    measure.reward_of_text(tokenizer, lambda texts: list(map(world.true_reward, texts))),
    stop_id=tokenizer.eos_token_id,
    num_samples=sizes.samples,
    max_new_tokens=sizes.max_new_tokens,
    prompts_at_once=len(held_out),
  )
  bar.update()

  stage("sampling and labelling preferences")
  asked = measure.prompt_ids(tokenizer, prefixes, LONGEST_PREFIX)
  answers = bench.answers(reference.params, *asked, seed=1)
  records = preferences(prefixes, texts_of(tokenizer, answers), answers.rewards)
  with disk_errors(workdir):
    write_jsonl(workdir / "preferences.jsonl", records)
  asked = measure.prompt_ids(tokenizer, held_out, LONGEST_PREFIX)
  measured = lambda step, params: {"step": step} | bench.measure(params, reference.params, *asked, seed=0)
  start = measured(0, reference.params)
  bar.update()

  curves = {}
  for beta in sizes.betas:
    stage(f"DPO, beta {beta}")
    folder = workdir / f"dpo_beta_{beta}"
    train.run(dpo_config(beta, sizes, workdir), folder)
    bar.update()
    steps = range(sizes.measure_every, sizes.dpo_steps + 1, sizes.measure_every)
    policies = [checkpoint.load_policy(folder, step) for step in steps]
    curves[beta] = [start] + [measured(policy.step, policy.params) for policy in policies]
    if beta == sizes.betas[0]:
      after = policies[-1].params
    bar.update()
  bar.close()

  before, then = (
    texts_of(tokenizer, bench.answers(params, *asked, seed=0)) for params in (reference.params, after)
  )
  summary = {
    "pairs": len(records),
    "reference": start,
    "betas": {str(beta): curve for beta, curve in curves.items()},
    "samples": [
      {"prefix": held_out[i], "reference": before[i][0], f"dpo_beta_{sizes.betas[0]}": then[i][0]}
      for i in range(3)
    ],
  }
  with disk_errors(workdir):
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(curves, workdir / "frontier.png")
  return summary


def plot(curves: dict[float, list[dict]], path: pathlib.Path) -> None:
  """Draws true reward against KL, one curve a beta, the reference marked."""
  figure, (panel,) = figures.panels(1, size=(5.2, 3.6))
  for number, (beta, curve) in enumerate(curves.items()):
    of = lambda name: [point[name] for point in curve]
    panel.errorbar(
      of("kl"),
      of("reward"),
      yerr=of("reward_error"),
      xerr=of("kl_error"),
      markersize=4,
      capsize=2,
      linewidth=1.3,
      label=rf"DPO, $\beta$ = {beta:g}",
      **figures.style(number),
    )
  origin = next(iter(curves.values()))[0]
  panel.plot(
    origin["kl"],
    origin["reward"],
    marker="*",
    markersize=13,
    color="black",
    linestyle="none",
    label="reference (SFT)",
    zorder=5,
  )
  panel.set_xlabel(r"KL($\pi\,\|\,\pi_{\mathrm{ref}}$) of a completion, nats")
  panel.set_ylabel("true reward, p(positive)")
  panel.legend(frameon=False, loc="lower right")
  figures.save(figure, path)


def show(summary: dict) -> None:
  """Prints the table and the samples."""
  print("\n| policy | step | true reward | KL to the reference, nats |")
  print("|---|---|---|---|")
  row = lambda name, p: print(
    f"| {name} | {p['step']} | {p['reward']:.3f} +- {p['reward_error']:.3f} "
    f"| {p['kl']:.2f} +- {p['kl_error']:.2f} |"
  )
  row("reference (SFT)", summary["reference"])
  for beta, curve in summary["betas"].items():
    row(f"DPO, beta {beta}", curve[-1])
  for sample in summary["samples"]:
    (_, start), (_, before), (name, after) = sample.items()
    print(f"\n{start} ...\n  reference: {before}\n  {name}: {after}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/quickstart"))
  parser.add_argument("--small", action="store_true", help="a smoke test, one beta")
  arguments = parser.parse_args()
  workdir = arguments.workdir.absolute()
  with command():
    summary = run(workdir, SMALL if arguments.small else Sizes())
  show(summary)
  print(f"\nwritten: {workdir}/summary.json, frontier.png and the runs' metrics.jsonl")


if __name__ == "__main__":
  main()
