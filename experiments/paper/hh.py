"""Dialogue with Pythia-2.8B on Anthropic HH: the paper's Section 6.2, Figures 3 and 4.

python -m experiments.paper.hh --workdir=runs/paper/hh --judge_model=MODEL
    [--train=FILES] [--test=FILES] [--judge=URL] [--dry_run]

Preferred-FT on the chosen responses, then DPO and a reward model from it. 256 test dialogues of one turn
are answered at three temperatures by DPO, Preferred-FT, Pythia with two examples in front, and the best
of 1 to 128 samples of Preferred-FT; a judge says how often an answer is more helpful than the
chosen one. Writes win_rate.jsonl and .png (Figure 3, left), training.jsonl and .png (Figure 3, right:
DPO every 300 steps), best_of_n.jsonl and .png (Figure 4), and prints the tables.

FILES are HH's own, several with commas; without them all of HH is downloaded. Kinds of runs whose configs can
be changed: sft, dpo, reward.

What the paper leaves open and is chosen here: answers have at most 256 tokens; DPO runs 3,300 steps of which
the 2,400th, the nearest to one epoch, is judged in the left figure; the two examples are dialogues of one
turn drawn from the training data, the same for all prompts, and an answer to them ends where the next
turn begins; the best of N is of the first N of one draw.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data import builders
from dpojax.data.examples import ASSISTANT, HUMAN, DataError, Example
from dpojax.sample.draws import Draw
from dpojax.sample.prompts import read_prompts
from dpojax.training import resolve
from experiments import sweep
from experiments.paper import methods, stages
from experiments.paper.methods import Line
from experiments.paper.stages import Given, Policy

KINDS = ("sft", "dpo", "reward")
FILES = {"train": "training dialogues", "test": "test dialogues"}


class Plan(NamedTuple):
  """The experiment's numbers; `base` is a model."""

  beta: float = 0.1
  dpo_steps: int = 3300
  judged_step: int = 2400
  every: int = 300
  prompts: int = 256
  temperatures: tuple[float, ...] = (0.25, 0.7, 1.0)
  training_temperatures: tuple[float, ...] = (0.7, 1.0)
  best_of: tuple[int, ...] = (1, 4, 16, 64, 128)
  shots: int = 2
  max_new_tokens: int = 256
  prompts_at_once: int = 64
  base: str = "EleutherAI/pythia-2.8b"


def of_one_turn(given: Given, path: str, split: str) -> Iterator[Example]:
  """Yields the dialogues of a split with exactly one turn of the human and one of the assistant."""
  cache = resolve.cache_dir(stages.config_of("hh_pythia:dpo", given.of("dpo")))
  for example in builders.prepare("hh", path=path, split=split, data_dir=cache / "prepared"):
    if example.prompt.startswith(HUMAN) and example.prompt.count(ASSISTANT) == 1:
      yield example


def with_shots(given: Given, plan: Plan, path: str, prompts: str) -> str:
  """Writes the prompts with whole training dialogues in front; returns their file."""
  out = given.workdir / "shots" / "prompts.jsonl"

  def make():
    every = list(of_one_turn(given, path, "train"))
    if len(every) < plan.shots:
      raise DataError(f"the training data have {len(every)} dialogues of one turn, not --shots={plan.shots}")
    chosen = np.random.default_rng(0).permutation(len(every))[: plan.shots]
    shots = "".join(every[i].prompt + every[i].responses[0] for i in chosen)
    sweep.write_lines(out, [{"prompt": shots + each.prompt} for each in read_prompts(prompts).values()])
    return [{"shots": shots}]

  stages.stage(
    given,
    "shots",
    f"{plan.shots} training dialogues before each prompt",
    {"shots": plan.shots, "path": path},
    make,
  )
  return str(out)


def first_turn(given: Given, name: str, samples: str, prompts: str) -> str:
  """Writes samples under the prompts without shots, each up to the next turn; returns their file."""
  out = given.workdir / name / "samples.jsonl"

  def make():
    plain = read_prompts(prompts)
    records = stages.read_samples(samples)
    sweep.write_lines(
      out,
      [
        record
        | {
          "prompt": plain[record["index"]].prompt,
          "response": record["response"].partition(HUMAN.rstrip())[0],
        }
        for record in records
      ],
    )
    return [{"samples": len(records)}]

  stages.stage(given, name, f"the samples of {samples} up to the next turn", {"samples": samples}, make)
  return str(out)


def run(plan: Plan, given: Given, files: argparse.Namespace) -> tuple[list[Line], list[Line], list[Line]]:
  """Runs the experiment, or what is left of it; returns the lines of its three figures."""
  data = {"data.path": files.train} if files.train else {}
  fsdp = stages.config_of("hh_pythia:dpo", data | given.of("dpo")).parallel.fsdp
  prompts = stages.references(
    given,
    "dialogues",
    f"test dialogues of one turn of {files.test or 'HH'}",
    lambda: of_one_turn(given, files.test, "test"),
    plan.prompts,
  )
  sft = stages.trained(given, "preferred_ft", "hh_pythia:sft", data | given.of("sft"))
  start = data | {"model.checkpoint": sft}
  dpo = stages.trained(
    given,
    "dpo",
    "hh_pythia:dpo",
    start
    | given.of("dpo")
    | {"beta": plan.beta, "steps": plan.dpo_steps, "checkpoint_every": plan.every, "checkpoint_keep": 0},
  )
  reward_model = stages.trained(given, "reward_model", "hh_pythia:reward", start | given.of("reward"))

  def samples_of(policy: Policy, temperature: float, prompts: str = prompts, count: int = 1) -> str:
    draw = Draw(num_samples=count, max_new_tokens=plan.max_new_tokens, temperature=temperature)
    return stages.sampled(
      given,
      f"samples/{stages.place_of('dialogues', policy, temperature)}",
      policy,
      prompts,
      draw,
      batch_size=max(1, plan.prompts_at_once // count),
      fsdp=fsdp,
    )

  def judged(policy: Policy, temperature: float, ours: str, **about: float) -> list[Line]:
    return stages.judged(
      given,
      stages.place_of("dialogues", policy, temperature),
      {"method": policy.name, "temperature": temperature} | about,
      ours,
      prompts,
      "dialogue",
    )

  shots = with_shots(given, plan, files.train, prompts)
  left, right, best_of_n = [], [], []
  for temperature in plan.temperatures:
    for policy in (Policy("DPO", dpo, plan.judged_step), Policy("Preferred-FT", sft)):
      left += judged(policy, temperature, samples_of(policy, temperature))
    base = Policy(f"Pythia, {plan.shots} shots", plan.base)
    ours = samples_of(base, temperature, shots)
    place = stages.place_of("dialogues", base, temperature)
    left += judged(base, temperature, first_turn(given, f"cut/{place}", ours, prompts))

    draws = Policy("Best of N", sft)
    many = samples_of(draws, temperature, count=max(plan.best_of))
    place = stages.place_of("dialogues", draws, temperature)
    for n, path in stages.best_of(
      given, f"best/{place}", many, reward_model, plan.best_of, fsdp=fsdp
    ).items():
      best_of_n += judged(Policy(f"Best of {n}", sft), temperature, path, N=n)
  left += [line for line in best_of_n if line["N"] == max(plan.best_of)]

  for temperature in plan.training_temperatures:
    for step in range(plan.every, plan.dpo_steps + 1, plan.every):
      policy = Policy("DPO", dpo, step)
      right += judged(policy, temperature, samples_of(policy, temperature), step=step)

  against = dict(against="the chosen response")
  by_temperature = lambda lines: [line | {"method": f"T = {line['temperature']:g}"} for line in lines]
  right, best_of_n = by_temperature(right), by_temperature(best_of_n)
  stages.report(given, "win_rate", left, **against)
  methods.show_configurations(left)
  stages.report(given, "training", right, axis="step", label="step of DPO", **against)
  stages.report(given, "best_of_n", best_of_n, axis="N", label="N", scale="log", **against)
  return left, right, best_of_n


def main(argv: Sequence[str] | None = None):
  stages.main(run, __doc__, Plan(), KINDS, FILES, judge=True, argv=argv)


if __name__ == "__main__":
  main()
