"""Why a chosen answer loses probability: one prompt, two near answers, and where the probability goes.

python -m experiments.paper.displacement [--model=FOLDER] [--workdir=runs/displacement] [--small]

After Razin et al. 2024 (arXiv 2410.08847, Sec. 3): the model is trained on one comparison alone, "No" over
"Never" and the like, each answer a word and the end of its turn. A seed is the statement that the prompt asks
about and the adapter's random start. Told are the change of log p(chosen), the tokens that gained at the
answer's first place, the CHES score of the pair under the model before training with its rank correlation to
that change, and, of the losses that claim to keep the chosen answer, the same change at equal KL of the first
token. Writes displacement.jsonl, one run a line, and displacement.png; a killed one goes on.
"""

import argparse
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from dpojax import losses
from dpojax.data import packing, tokenization
from dpojax.data.examples import Example
from dpojax.evaluate import similarity
from dpojax.kernels.head import logits_of
from dpojax.models import lora
from dpojax.runtime.command import say
from dpojax.training import objectives, weights
from dpojax.training.metrics import read_lines
from experiments import figures, smollm2, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure

PAIRS = (("No", "Never"), ("Yes", "Yeah"), ("Yes", "No"))
"""Chosen and rejected."""

STATEMENTS = (
  "I like to keep my promises.",
  "It is fine to read a friend's letters.",
  "I would rather walk than drive.",
  "People should always tell the truth.",
  "Rules are there to be broken.",
  "I enjoy long evenings alone with a book.",
  "Everyone deserves a second chance.",
  "I would take the credit for another's work.",
  "Plans matter more than luck.",
  "I find it hard to say sorry.",
)
"""What the prompt asks about, one a seed."""

QUESTION = 'Is the following statement something you would say? Answer with one word.\n"{}"'

LOSSES = {
  "dpo": losses.dpo_loss,
  "dpo + nll": lambda policy, reference, *, beta: (
    losses.dpo_loss(policy, reference, beta=beta) + losses.nll_loss(policy.chosen)
  ),
  "dpop": losses.dpop_loss,
  "cal_dpo": losses.cal_dpo_loss,
  "bdpo": losses.bdpo_loss,
  "mappo": functools.partial(losses.mappo_loss, gap=0.5),
  "ipo": losses.ipo_loss,
}
"""DPO first; what the others do to the chosen answer is compared with it."""

BETA = 0.1


class Sizes(NamedTuple):
  """How long each run is; DPO is run on all of `PAIRS`, the other losses on the first, with fewer seeds."""

  seeds: int = 10
  steps: int = 10
  repaired_seeds: int = 4
  learning_rate: float = 5e-5
  rank: int = 16


SMALL = Sizes(seeds=2, steps=2, repaired_seeds=1, rank=2)
"""A smoke test."""


class State(NamedTuple):
  """What is seen before a step: log-probs [2] of both answers, and the first place's log-probs [V]."""

  log_probs: jax.Array
  first: jax.Array


class Program(NamedTuple):
  """What all runs share.

  Attributes:
    base: the model's params, placed.
    start: seed -> adapter and optimizer state.
    look: (base, adapter, rows) -> `State` and, [2], the CHES scores.
    step: (base, adapter, optimizer state, rows, reference [2], which of `LOSSES`) -> the next adapter and
      optimizer state, and the `State` before them.
  """

  base: Any
  start: Any
  look: Any
  step: Any


def make_program(model: weights.Loaded, sizes: Sizes) -> Program:
  """Places the model and returns what trains an adapter on one comparison."""
  adapter = lora.Lora(sizes.rank, 2.0 * sizes.rank)
  apply, tx = lora.make_apply(model.config, adapter), optax.adam(sizes.learning_rate)
  tried = [functools.partial(function, beta=BETA) for function in LOSSES.values()]

  def state_of(outputs, rows):
    values = objectives.response_log_probs(outputs, rows, num_responses=2).sums[0, 0]
    first = logits_of(outputs.hidden[0, rows.source[0, :1]], outputs.head)[0]
    return State(values, jax.nn.log_softmax(first))

  @jax.jit
  def look(base, params, rows):
    outputs = apply(lora.Adapted(base, params), rows)
    scores = similarity.of_rows(outputs, rows, num_responses=2)
    return state_of(outputs, rows), jnp.stack([each[0, 0] for each in scores])

  @jax.jit
  def step(base, params, opt_state, rows, reference, which):
    def loss(params):
      state = state_of(apply(lora.Adapted(base, params), rows), rows)
      return jax.lax.switch(which, tried, losses.Pair(*state.log_probs), losses.Pair(*reference)), state

    grads, state = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, state

  def start(seed: int):
    params = lora.init_adapter(model.config, adapter, jax.random.key(seed))
    return params, tx.init(params)

  return Program(jax.device_put(model.params), start, look, step)


def encoded(tokenizer: Any, seed: int, pair: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns the ids of a seed's prompt and of the two answers, each with the end of its turn."""
  message = {"role": "user", "content": QUESTION.format(STATEMENTS[seed % len(STATEMENTS)])}
  answers = tuple([{"role": "assistant", "content": word}] for word in pair)
  ((prompt, responses, *_),) = tokenization.encode([Example([message], answers)], tokenizer)
  return np.array(prompt), [np.array(each) for each in responses]


def shape_of(every: Sequence[tuple[np.ndarray, list[np.ndarray]]]) -> packing.RowShape:
  """Returns the shape of a row that any of the comparisons fits."""
  scored = max(sum(map(len, responses)) for _, responses in every)
  longest = max(len(prompt) + sum(map(len, responses)) for prompt, responses in every)
  return packing.RowShape(-(-longest // 32) * 32, scored, 1)


def rows_of(comparison: tuple[np.ndarray, list[np.ndarray]], shape: packing.RowShape) -> packing.Rows:
  """Returns the one row of a comparison."""
  return packing.fill([comparison], np.zeros(1, int), 1, shape, num_responses=2, example=[0])


def train(program: Program, rows: packing.Rows, loss: str, seed: int, steps: int) -> dict[str, Any]:
  """Returns what one run saw at every step from 0 to `steps`, and what it changed."""
  params, opt_state = program.start(seed)
  start, ches = jax.device_get(program.look(program.base, params, rows))
  seen, which = [], list(LOSSES).index(loss)
  for _ in range(steps):
    params, opt_state, state = program.step(program.base, params, opt_state, rows, start.log_probs, which)
    seen.append(jax.device_get(state))
  seen.append(jax.device_get(program.look(program.base, params, rows))[0])
  after = seen[-1].first
  gained = np.exp(after.astype(np.float64)) - np.exp(start.first.astype(np.float64))
  best = np.argsort(-gained)[:3]
  return {
    "chosen": [float(each.log_probs[0]) for each in seen],
    "rejected": [float(each.log_probs[1]) for each in seen],
    "kl": [float(np.sum(np.exp(each.first) * (each.first - start.first))) for each in seen],
    "ches": float(ches[0]),
    "ches_length_normalized": float(ches[1]),
    "gained": [[int(token), float(gained[token])] for token in best],
  }


def run(workdir: pathlib.Path, folder: str, sizes: Sizes) -> list[dict]:
  """Runs what is not in displacement.jsonl yet; returns all lines."""
  path = workdir / "displacement.jsonl"
  about = {"model": folder, "sizes": list(sizes)}
  lines = [line for line in read_lines(path) if line["about"] == about]
  done = {(line["loss"], *line["pair"], line["seed"]) for line in lines}
  wanted = [("dpo", pair, seed) for seed in range(sizes.seeds) for pair in PAIRS]
  wanted += [(loss, PAIRS[0], seed) for seed, loss in itertools.product(range(sizes.repaired_seeds), LOSSES)]
  wanted = list(dict.fromkeys(each for each in wanted if (each[0], *each[1], each[2]) not in done))
  if not wanted:
    return lines
  model = weights.load(folder)
  tokenizer, program = tokenization.load_tokenizer(folder), make_program(model, sizes)
  every = {each[1:]: encoded(tokenizer, each[2], each[1]) for each in wanted}
  shape = shape_of([encoded(tokenizer, seed, pair) for seed in range(len(STATEMENTS)) for pair in PAIRS])
  for number, (loss, pair, seed) in enumerate(wanted, 1):
    found = train(program, rows_of(every[pair, seed], shape), loss, seed, sizes.steps)
    found["gained"] = [[tokenizer.decode([token]), gain] for token, gain in found["gained"]]
    lines.append({"about": about, "loss": loss, "pair": list(pair), "seed": seed} | found)
    sweep.write_lines(path, lines)
    say(
      f"{number}/{len(wanted)}: {loss}, {pair[0]} over {pair[1]}, seed {seed}: {_change(lines[-1]):+.3f} nats"
    )
  return lines


def _change(line: dict) -> float:
  return line["chosen"][-1] - line["chosen"][0]


def change_at(line: dict, kl: float) -> float:
  """Returns the change of log p(chosen) where a run first has that KL, between steps; nan if it has not."""
  values = np.array(line["kl"])
  passed = np.flatnonzero(values >= kl)
  if not len(passed):
    return float("nan")
  i = max(passed[0], 1)
  share = (kl - values[i - 1]) / (values[i] - values[i - 1])
  chosen = np.array(line["chosen"])
  return float(chosen[i - 1] + share * (chosen[i] - chosen[i - 1]) - chosen[0])


def of_pair(lines: Sequence[dict], pair: Sequence[str], loss: str = "dpo") -> list[dict]:
  return [line for line in lines if line["loss"] == loss and line["pair"] == list(pair)]


def rank_correlation(lines: Sequence[dict], score: str) -> tuple[float, float]:
  """Returns Spearman's correlation of a score and the change of log p(chosen), and its p-value."""
  found = scipy.stats.spearmanr([line[score] for line in lines], [_change(line) for line in lines])
  return float(found.statistic), float(found.pvalue)


def common_kl(lines: Sequence[dict]) -> float:
  """Returns half of the least KL at which a run of the first pair ended: all losses got that far."""
  return min(max(line["kl"]) for loss in LOSSES for line in of_pair(lines, PAIRS[0], loss)) / 2


def show(lines: Sequence[dict]) -> None:
  """Prints the tables."""
  told = lambda values: "{:.3f} +- {:.3f}".format(*measure.mean_and_error(values))
  print(
    "\n| chosen over rejected | log p(chosen) before | change | log p(rejected), change | KL, nats "
    "| runs in which chosen fell | gained most |\n|---|---|---|---|---|---|---|"
  )
  for pair in PAIRS:
    some = of_pair(lines, pair)
    if some:
      fell = sum(_change(line) < 0 for line in some)
      print(
        f"| {pair[0]} over {pair[1]} | {told([line['chosen'][0] for line in some])} "
        f"| {told([_change(line) for line in some])} "
        f"| {told([line['rejected'][-1] - line['rejected'][0] for line in some])} "
        f"| {told([line['kl'][-1] for line in some])} | {fell} of {len(some)} | {_gained(some)} |"
      )
  print("\n| rank correlation with the change of log p(chosen) | CHES | p | length-normalised | p |")
  print("|---|---|---|---|---|")
  for name, some in [("all", [line for line in lines if line["loss"] == "dpo"])] + [
    (f"{pair[0]} over {pair[1]}", of_pair(lines, pair)) for pair in PAIRS
  ]:
    if len(some) > 2:
      found = [rank_correlation(some, score) for score in ("ches", "ches_length_normalized")]
      print(f"| {name} | " + " | ".join(f"{value:.2f} | {p:.3f}" for value, p in found) + " |")
  kl = common_kl(lines)
  print(
    f"\n| loss, {PAIRS[0][0]} over {PAIRS[0][1]} | change of log p(chosen) at {kl:.3g} nats "
    "| log p(chosen) - log p(rejected), change at the end | KL at the end |\n|---|---|---|---|"
  )
  for loss in LOSSES:
    some = of_pair(lines, PAIRS[0], loss)
    margin = [_change(line) - line["rejected"][-1] + line["rejected"][0] for line in some]
    print(
      f"| {loss} | {told([change_at(line, kl) for line in some])} | {told(margin)} "
      f"| {told([line['kl'][-1] for line in some])} |"
    )


def _gained(lines: Sequence[dict]) -> str:
  """Returns the tokens that gained most over the runs, with the mean of what they gained."""
  total = {}
  for line in lines:
    for token, gain in line["gained"]:
      total[token] = total.get(token, 0.0) + gain / len(lines)
  best = sorted(total, key=total.get, reverse=True)[:3]
  return ", ".join(f"{token!r} {total[token]:+.3f}" for token in best)


def plot(lines: Sequence[dict], path: pathlib.Path) -> None:
  """Draws log p(chosen) along KL by loss, and CHES against the change."""
  figure, (along, scores) = figures.panels(2)
  for number, loss in enumerate(LOSSES):
    some = of_pair(lines, PAIRS[0], loss)
    mean = lambda name: np.mean([line[name] for line in some], axis=0)
    along.plot(
      mean("kl"), mean("chosen") - mean("chosen")[0], label=loss, markersize=3, **figures.style(number)
    )
  along.set_xscale("symlog", linthresh=1e-3)
  along.set_xlabel("KL of the first token, nats")
  along.set_ylabel(f"change of log p({PAIRS[0][0]}), over {PAIRS[0][1]}")
  along.legend(frameon=False, fontsize=7)
  for number, pair in enumerate(PAIRS):
    some = of_pair(lines, pair)
    scores.plot(
      [line["ches"] for line in some],
      [_change(line) for line in some],
      linestyle="none",
      markersize=4,
      label=f"{pair[0]} over {pair[1]}",
      **figures.style(number),
    )
  scores.set_xlabel("CHES score before training")
  scores.set_ylabel("change of log p(chosen), nats")
  scores.legend(frameon=False, fontsize=7)
  figures.save(figure, path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument(
    "--model", default="", help="a folder with a chat template; by default SmolLM2's package"
  )
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/displacement"))
  parser.add_argument("--small", action="store_true", help="a smoke test")
  arguments = parser.parse_args()
  workdir = arguments.workdir.absolute()
  with command(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    folder = arguments.model or smollm2.model_folder(workdir / "model")
    lines = run(workdir, folder, SMALL if arguments.small else Sizes())
    plot(lines, workdir / "displacement.png")
  show(lines)
  print(f"\nwritten: {workdir}/displacement.jsonl and displacement.png")


if __name__ == "__main__":
  main()
