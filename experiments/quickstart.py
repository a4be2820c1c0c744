"""Controlled sentiment in miniature: the paper's first experiment, with a true reward, in minutes.

python -m experiments.quickstart [--workdir=runs/quickstart] [--small]

A grammar writes film reviews; a small Transformer learns them (SFT); four completions of each prefix
are sampled and all six pairs labelled by the true reward; DPO is trained on the pairs at several
betas; and on held-out prefixes the true reward is measured against the KL to the reference, along
training. Writes summary.json, frontier.png and every run's metrics.jsonl. No download.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
import matplotlib
import numpy as np
import tokenizers
import tqdm
import transformers

from configs import dpo, sft
from dpojax import checkpoint, objectives, sampling, train
from dpojax.data import packing, tokenization
from dpojax.disk import DiskError, disk_errors
from dpojax.models import transformer
from experiments import quickstart_world as world

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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
    reviews=1500, prefixes=256, held_out=128, width=32, layers=1, sft_steps=150, dpo_steps=80,
    measure_every=40, betas=(0.5,))
"""A smoke test."""


class Measurement(NamedTuple):
  """Means over samples on held-out prefixes, with their standard errors."""

  step: int
  reward: float
  reward_error: float
  kl: float
  kl_error: float


def save_tokenizer(folder: pathlib.Path) -> None:
  """Saves a tokenizer of the grammar's words as a Hugging Face folder."""
  ids = {word: i for i, word in enumerate(["<eos>", *world.vocabulary()])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<eos>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


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


class Bench:
  """Samples from params, and scores the samples under them and under others; compiled once."""

  def __init__(self, config, tokenizer, sizes: Sizes):
    self.tokenizer, self.sizes = tokenizer, sizes
    self._sample = jax.jit(sampling.make_sampler(
        config, max_new_tokens=sizes.max_new_tokens, num_samples=sizes.samples,
        stop_id=tokenizer.eos_token_id))
    score = functools.partial(objectives.response_log_probs, num_responses=sizes.samples)
    apply = transformer.make_apply(config)
    self._score = jax.jit(lambda params, rows: score(apply(params, rows), rows).sums[:, 0])

  def sample(self, params: Any, prefixes: list[str], key: jax.Array) -> list[list[np.ndarray]]:
    """Returns the ids of `sizes.samples` completions of each prefix, with the EOS that ends them."""
    prompts = [self.tokenizer(text)["input_ids"] for text in prefixes]
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    padded = np.array([ids + [0] * (8 - len(ids)) for ids in prompts], np.int32)
    drawn = jax.device_get(self._sample(params, padded, lengths, key))
    return [[ids[:n] for ids, n in zip(*each)] for each in zip(drawn.tokens, drawn.lengths)]

  def text(self, ids: np.ndarray) -> str:
    return self.tokenizer.decode(ids, skip_special_tokens=True)

  def rewards(self, prefixes: list[str], samples: list[list[np.ndarray]]) -> np.ndarray:
    """Returns the true reward of each completed review, [prefixes, samples]."""
    return np.array([[world.true_reward(f"{start} {self.text(ids)}") for ids in each]
                     for start, each in zip(prefixes, samples)])

  def log_probs(self, params: Any, prefixes, samples) -> np.ndarray:
    """Returns the log-prob of each completion, [prefixes, samples], by the training primitive.

    A row holds one prefix; its completions are the branches.
    """
    most = self.sizes.samples * self.sizes.max_new_tokens
    rows = packing.fill(
        [(np.array(self.tokenizer(text)["input_ids"]), each)
         for text, each in zip(prefixes, samples)],
        np.arange(len(prefixes)), len(prefixes), packing.RowShape(8 + most, most, 1),
        num_responses=self.sizes.samples, example=range(len(prefixes)))
    return np.asarray(self._score(params, rows), np.float64)

  def measure(self, step: int, params, reference, prefixes, key) -> Measurement:
    """Measures true reward and sampled KL(pi || pi_ref), the mean of log pi - log pi_ref."""
    samples = self.sample(params, prefixes, key)
    rewards = self.rewards(prefixes, samples).mean(axis=1)
    ratios = self.log_probs(params, prefixes, samples) - self.log_probs(reference, prefixes, samples)
    error = lambda values: float(values.std(ddof=1) / len(values) ** 0.5)
    ratios = ratios.mean(axis=1)
    return Measurement(step, float(rewards.mean()), error(rewards), float(ratios.mean()), error(ratios))


def preferences(prefixes, texts, rewards) -> list[dict]:
  """Returns every pair of completions of a prefix, the better one chosen; ties are left out."""
  records = []
  for start, completions, values in zip(prefixes, texts, rewards):
    for i, j in itertools.combinations(range(len(completions)), 2):
      if values[i] != values[j] and completions[i].strip() and completions[j].strip():
        best, worst = (i, j) if values[i] > values[j] else (j, i)
        records.append({"prompt": start, "chosen": f" {completions[best]}",
                        "rejected": f" {completions[worst]}"})
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
    learned = [{"prompt": start, "responses": [text[len(start):]]}
               for start, text in zip(starts[:sizes.reviews], reviews)]
    write_jsonl(workdir / "reviews.jsonl", learned)
  prefixes = starts[sizes.reviews:][:sizes.prefixes]
  held_out = starts[sizes.reviews + sizes.prefixes:]
  bar.update()

  stage("supervised fine-tuning")
  train.run(sft_config(sizes, workdir), workdir / "sft")
  reference = checkpoint.load_policy(workdir / "sft")
  bench = Bench(reference.config, tokenization.load_tokenizer(str(workdir / "tokenizer")), sizes)
  bar.update()

  stage("sampling and labelling preferences")
  samples = []
  for i in range(0, len(prefixes), len(held_out)):
    part = (prefixes[i:] + prefixes)[:len(held_out)]  # every call has one shape
    samples += bench.sample(reference.params, part, jax.random.key(i + 1))
  samples = samples[:len(prefixes)]
  records = preferences(prefixes, [[bench.text(ids) for ids in each] for each in samples],
                        bench.rewards(prefixes, samples))
  with disk_errors(workdir):
    write_jsonl(workdir / "preferences.jsonl", records)
  key = jax.random.key(0)
  start = bench.measure(0, reference.params, reference.params, held_out, key)
  bar.update()

  curves = {}
  for beta in sizes.betas:
    stage(f"DPO, beta {beta}")
    folder = workdir / f"dpo_beta_{beta}"
    train.run(dpo_config(beta, sizes, workdir), folder)
    bar.update()
    steps = range(sizes.measure_every, sizes.dpo_steps + 1, sizes.measure_every)
    policies = [checkpoint.load_policy(folder, step) for step in steps]
    curves[beta] = [start] + [
        bench.measure(policy.step, policy.params, reference.params, held_out, key)
        for policy in policies]
    if beta == sizes.betas[0]:
      after = policies[-1].params
    bar.update()
  bar.close()

  before, then = (bench.sample(params, held_out, key) for params in (reference.params, after))
  summary = {
      "pairs": len(records), "reference": start._asdict(),
      "betas": {str(beta): [point._asdict() for point in curve] for beta, curve in curves.items()},
      "samples": [{"prefix": held_out[i], "reference": bench.text(before[i][0]),
                   f"dpo_beta_{sizes.betas[0]}": bench.text(then[i][0])} for i in range(3)]}
  with disk_errors(workdir):
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(curves, workdir / "frontier.png")
  return summary


def plot(curves: dict[float, list[Measurement]], path: pathlib.Path) -> None:
  """Draws true reward against KL, one curve a beta, the reference marked."""
  figure, axes = plt.subplots(figsize=(5.2, 3.6), dpi=150)
  for (beta, curve), marker, shade in zip(
      curves.items(), "osD^v", ("#0b3c5d", "#d9822b", "#3a8f5c", "#8e3b6f", "#555555")):
    _, reward, reward_error, kl, kl_error = np.array(curve).T
    axes.errorbar(kl, reward, yerr=reward_error, xerr=kl_error, marker=marker, color=shade,
                  markersize=4, capsize=2, linewidth=1.3, label=rf"DPO, $\beta$ = {beta:g}")
  origin = next(iter(curves.values()))[0]
  axes.plot(origin.kl, origin.reward, marker="*", markersize=13, color="black", linestyle="none",
            label="reference (SFT)", zorder=5)
  axes.set_xlabel(r"KL($\pi\,\|\,\pi_{\mathrm{ref}}$) of a completion, nats")
  axes.set_ylabel("true reward, p(positive)")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False, loc="lower right")
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


def show(summary: dict) -> None:
  """Prints the table and the samples."""
  print("\n| policy | step | true reward | KL to the reference, nats |")
  print("|---|---|---|---|")
  row = lambda name, p: print(
      f"| {name} | {p['step']} | {p['reward']:.3f} +- {p['reward_error']:.3f} "
      f"| {p['kl']:.2f} +- {p['kl_error']:.2f} |")
  row("reference (SFT)", summary["reference"])
  for beta, curve in summary["betas"].items():
    row(f"DPO, beta {beta}", curve[-1])
  for sample in summary["samples"]:
    (_, start), (_, before), (name, after) = sample.items()
    print(f"\n{start} ...\n  reference: {before}\n  {name}: {after}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/quickstart"))
  parser.add_argument("--small", action="store_true", help="a smoke test, one beta")
  arguments = parser.parse_args()
  workdir = arguments.workdir.absolute()
  try:
    summary = run(workdir, SMALL if arguments.small else Sizes())
  except (*train.USER_ERRORS, DiskError, train.TrainingError) as error:
    sys.exit(f"error: {error}")
  show(summary)
  print(f"\nwritten: {workdir}/summary.json, frontier.png and the runs' metrics.jsonl")


if __name__ == "__main__":
  main()
