"""Controlled sentiment with GPT-2 large on IMDb: the paper's Section 6.1 and Figure 2 (left).

python -m experiments.paper.imdb --workdir=runs/paper/imdb [--dry_run]

SFT on reviews; 25,000 beginnings of reviews, 2 to 8 tokens each; 4 samples of each; all 6 pairs labelled
by the true reward; then DPO, unlikelihood, Preferred-FT, a reward model, PPO and PPO-GT, each measured
along training on beginnings of test reviews: true reward of samples and their KL to the reference.
Writes frontier.jsonl and frontier.png, and prints where every method ended.

The true reward is `experiments.paper.siebert`, which needs PyTorch; --reward=module:function of a prompt
and a response is another. --reviews and --test_reviews are files of IMDb, {"text"} a line or Parquet;
without them they are downloaded. Kinds of runs whose configs can be changed: sft; dpo, which is all that
start from it; of these unlikelihood, preferred_ft, reward by themselves; and ppo, by `ppo.Settings`.

What the paper leaves open and is chosen here: reviews are taken in a shuffled order, each once before any
twice, and cut where the tokenizer finds the same tokens again; samples are drawn at temperature 1, at most 60
tokens; pairs of equal reward are left out; 256 test prefixes, four samples each; one epoch of pairs for
every method; reward model: AdamW at 1e-5; PPO: 120 rollouts of 1024 samples, 128 prefixes with 8 each,
measured every 6 of them, which are 96 updates.
"""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.data import builders, tokenization
from dpojax.data.examples import DataError
from dpojax.evaluate import scorers
from dpojax.ppo import loop as ppo
from dpojax.sample.draws import Draw
from dpojax.sample.generator import make_mesh
from dpojax.sample.prompts import read_prompts
from dpojax.training import resolve, weights
from experiments import sweep
from experiments.measurements import measure
from experiments.paper import frontier, methods, stages
from experiments.paper.methods import Line
from experiments.paper.stages import Given

SHORTEST, LONGEST = 2, 8
KINDS = ("sft", "dpo", "unlikelihood", "preferred_ft", "reward", "ppo")
FILES = {"reviews": "training reviews", "test_reviews": "test reviews"}


class Plan(NamedTuple):
  """The experiment's numbers; `measure_every` steps, or `ppo_measure_every` rollouts."""

  prefixes: int = 25_000
  samples: int = 4
  test_prefixes: int = 256
  max_new_tokens: int = 60
  betas: tuple[float, ...] = (0.05, 0.1, 1.0, 5.0)
  alphas: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)
  target_kls: tuple[float, ...] = (3.0, 6.0, 9.0, 12.0)
  preferred_ft_seeds: tuple[int, ...] = (0, 1)
  reward_epochs: int = 3
  measure_every: int = 100
  ppo_measure_every: int = 6
  prompts_at_once: int = 64
  reward: str = "experiments.paper.siebert:p_positive"

  @property
  def pairs(self) -> int:
    """How many pairs there are, before those of equal reward are left out."""
    return self.prefixes * self.samples * (self.samples - 1) // 2


def methods_of(plan: Plan, given: Given) -> frontier.Plan:
  """Returns the runs of each method."""
  of = lambda kind: given.changes.get(kind, {})
  base = stages.config_of("imdb:dpo", {"data.path": "pairs.jsonl"} | given.of("dpo"))
  reward = {
    "steps": plan.reward_epochs * plan.pairs // base.batch_size,
    "eval_every": 500,
    "checkpoint_every": 500,
    "data.eval_size": 1500,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-5,
    "optimizer.max_grad_norm": 1.0,
  }
  settings = ppo.Settings(
    steps=120,
    prompts_per_step=128,
    num_samples=8,
    epochs=4,
    minibatches=4,
    learning_rate=1e-5,
    critic_learning_rate=1e-5,
    rows_at_once=8,
  )
  return frontier.Plan(
    seeds=(0,),
    betas=plan.betas,
    alphas=plan.alphas,
    ppo_axis="target_kl",
    ppo_values=plan.target_kls,
    ppo_seeds=(0,),
    ppo=dataclasses.replace(settings, **of("ppo")),
    reward_model=reward | of("reward"),
    dpo={},
    unlikelihood=of("unlikelihood"),
    preferred_ft=of("preferred_ft"),
    measure_every=plan.measure_every,
    ppo_measure_every=plan.ppo_measure_every,
    at_once=1,
    preferred_ft_seeds=plan.preferred_ft_seeds,
  )


def draw_prefixes(tokenizer: Any, texts: Sequence[str], count: int) -> list[str]:
  """Returns beginnings of texts, of 2 to 8 tokens that the tokenizer finds in them again.

  Raises:
    DataError: no text has such a beginning.
  """
  rng, prefixes = np.random.default_rng(0), []
  ids_of = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
  while len(prefixes) < count:
    before = len(prefixes)
    for i in rng.permutation(len(texts))[: count - before]:
      ids = ids_of(texts[i][:500])  # far more than 8 tokens
      cut = {
        n: tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        for n in range(SHORTEST, min(LONGEST, len(ids)) + 1)
      }
      places = [n for n, text in cut.items() if ids_of(text) == ids[:n]]
      if places:
        prefixes.append(cut[int(rng.choice(places))])
    if len(prefixes) == before:
      raise DataError(
        f"none of {len(texts)} reviews has a beginning of {SHORTEST} to {LONGEST} tokens; check --reviews"
      )
  return prefixes


def label(records: Iterable[dict], rewards: np.ndarray) -> list[dict]:
  """Returns every pair of a prompt's samples whose rewards differ, the better one chosen."""
  pairs = []
  for _, group in itertools.groupby(zip(records, rewards), key=lambda each: each[0]["index"]):
    for one, other in itertools.combinations(group, 2):
      (worse, low), (better, high) = sorted((one, other), key=lambda each: each[1])
      if low < high:
        pairs.append(
          {
            "prompt": better["prompt"],
            "chosen": better["response"],
            "rejected": worse["response"],
            "rewards": [float(high), float(low)],
          }
        )
  return pairs


def prefixes_file(given: Given, name: str, split: str, path: str, count: int) -> pathlib.Path:
  """Draws prefixes of the reviews of a split; returns their file."""
  out = given.workdir / name / "prefixes.jsonl"

  def make():
    settings = stages.config_of("imdb:sft", given.of("sft"))
    reviews = builders.prepare(
      "imdb", path=path, split=split, data_dir=resolve.cache_dir(settings) / "prepared"
    )
    tokenizer = tokenization.load_tokenizer(settings.tokenizer)
    texts = [review.prompt + review.responses[0] for review in reviews]
    sweep.write_lines(out, [{"prompt": each} for each in draw_prefixes(tokenizer, texts, count)])
    return [{"prefixes": count, "reviews": len(texts)}]

  what = f"{count} prefixes of {SHORTEST} to {LONGEST} tokens of {split} reviews"
  stages.stage(given, name, what, {"count": count, "path": path}, make)
  return out


def labelled(given: Given, plan: Plan, samples: str) -> pathlib.Path:
  """Labels the pairs of samples by the true reward; returns their file."""
  out = given.workdir / "pairs" / "pairs.jsonl"

  def make():
    records = stages.read_samples(samples)
    score = scorers.make_scorer(plan.reward, make_mesh(1, 1))
    rewards = score([each["prompt"] for each in records], [each["response"] for each in records])
    pairs = label(records, rewards)
    sweep.write_lines(out, pairs)
    return [{"pairs": len(pairs), "reward": float(np.mean(rewards))}]

  what = (
    f"at most {plan.pairs} pairs, {plan.pairs // plan.prefixes} of the {plan.samples} samples of each "
    f"of {plan.prefixes} prefixes, labelled by {plan.reward}"
  )
  stages.stage(given, "pairs", what, {"samples": samples, "reward": plan.reward}, make)
  return out


def world_of(plan: Plan, given: Given, sft: str, pairs: str, prefixes: str, test: str) -> methods.World:
  """Returns where the methods are compared: the reference, the pairs, and what measures."""
  config = stages.config_of(
    "imdb:dpo",
    {"model.checkpoint": sft, "data.path": pairs, "reference.mode": "stored", "checkpoint_keep": 1}
    | given.of("dpo"),
  )
  model = weights.load(sft)
  tokenizer = tokenization.load_tokenizer(config.tokenizer)
  score = scorers.make_scorer(plan.reward, make_mesh(1, 1))
  text = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

  def reward(prompts, responses):
    return score(
      [text(prompt) for prompt in prompts],
      [tokenization.decode_response(tokenizer, *both) for both in zip(prompts, responses)],
    )

  bench = measure.Bench(
    model.config,
    reward,
    stop_id=tokenizer.eos_token_id,
    num_samples=plan.samples,
    max_new_tokens=plan.max_new_tokens,
    prompts_at_once=min(plan.prompts_at_once, plan.test_prefixes),
  )
  starts, held_out = (
    measure.prompt_ids(tokenizer, list(read_prompts(path).values()), LONGEST) for path in (prefixes, test)
  )
  reference = jax.device_put(model.params)
  return methods.World(
    folder=given.workdir,
    model=model,
    config=config,
    data=resolve.load_data,
    prompts=starts[0],
    prompt_lengths=starts[1],
    reward=reward,
    stop_id=tokenizer.eos_token_id,
    max_new_tokens=plan.max_new_tokens,
    measure=lambda params, seed: bench.measure(params, reference, *held_out, seed=seed),
  )


def run(plan: Plan, given: Given, files: argparse.Namespace) -> list[Line]:
  """Runs the experiment, or what is left of it; returns all measurements."""
  reviews = {"data.path": files.reviews} if files.reviews else {}
  sft = stages.trained(given, "sft", "imdb:sft", reviews | given.of("sft"))
  prefixes = prefixes_file(given, "prefixes", "train", files.reviews, plan.prefixes)
  test = prefixes_file(given, "test_prefixes", "test", files.test_reviews, plan.test_prefixes)
  samples = stages.sampled(
    given,
    "samples",
    stages.Policy("SFT", sft),
    str(prefixes),
    Draw(num_samples=plan.samples, max_new_tokens=plan.max_new_tokens),
    batch_size=plan.prompts_at_once,
    fsdp=1,
  )
  pairs = labelled(given, plan, samples)
  runs = methods_of(plan, given)
  if given.dry_run:
    config = stages.config_of("imdb:dpo", {"data.path": str(pairs)} | given.of("dpo"))
    print(
      "methods:",
      f"    of pairs, if not said otherwise: {stages.described(config)}",
      *(f"    {name} {value}" for name, value in runs._asdict().items()),
      sep="\n",
    )
    return []
  lines = frontier.run(world_of(plan, given, sft, str(pairs), str(prefixes), str(test)), runs)
  sweep.write_lines(given.workdir / "frontier.jsonl", lines)
  frontier.plot(lines, given.workdir / "frontier.png")
  frontier.report(lines)
  print(f"\nwritten: {given.workdir}/frontier.jsonl and frontier.png")
  return lines


def main(argv: Sequence[str] | None = None):
  stages.main(run, __doc__, Plan(), KINDS, FILES, argv=argv)


if __name__ == "__main__":
  main()
