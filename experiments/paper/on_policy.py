"""DPO on the policy's own samples beside offline DPO and PPO, at equal numbers of gold labels.

python -m experiments.paper.on_policy --workdir=runs/on_policy [--labels=256,1024,4096] [--seeds=0,1,2]
python -m experiments.paper.on_policy --workdir=runs/on_policy --lines=A/on_policy.jsonl,B/on_policy.jsonl

In the enumerable world, where every method aims at the same known optimum, pi_ref exp(r / beta) / Z. A gold
label is a comparison of two answers, drawn from Bradley-Terry; PPO-GT's is the reward of one answer. Offline:
all pairs are of the reference's samples. Iterative: four rounds, each of the present policy's. On-policy: a
round every 64 pairs. PPO: a reward model is learned from the pairs of offline DPO, an eighth of which choose
its step. A killed run continues with the first unfinished one. Writes on_policy.jsonl, a line a run with its
exact win rates by temperature, and on_policy.png. Runs of other labels or seeds in workdirs of their own are
put together by --lines.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from dpojax.data import loader
from dpojax.data.examples import DataError
from dpojax.online import config as online_config
from dpojax.online import loop as online
from dpojax.online.labels import Labeller
from dpojax.ppo import loop as ppo
from dpojax.training import resolve
from dpojax.training.metrics import read_lines, read_metrics
from experiments import figures, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure
from experiments.paper import enumerable, methods
from experiments.paper.enumerable import RESPONSES, Table
from experiments.paper.methods import Line, World

OFFLINE, ITERATIVE, ON_POLICY = "Offline DPO", "Iterative DPO, 4 rounds", "On-policy DPO"
PPO, PPO_GT = "PPO, learned reward", "PPO-GT"
BETAS, BETA = (0.25, 0.5, 1.0), 0.5
LABELS, MIDDLE = (256, 1024, 4096), 1024
"""Betas at `MIDDLE` labels, and labels at `BETA`."""

BATCH, PASSES, ROUND, ITERATIONS = 16, 4, 64, 4
"""Pairs of a step, passes over each pair, pairs of an on-policy round, rounds of iterative DPO."""

LEARNING_RATE = 2e-3
"""Of every method; reward models have half of it."""

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)

GT = ppo.Settings(
  prompts_per_step=16,
  num_samples=8,
  epochs=PASSES,
  minibatches=2,
  normalize_rewards=False,
  learning_rate=LEARNING_RATE,
  critic_learning_rate=1e-2,
  schedule="linear",
  value_clip=1.0,
)
"""PPO that is paid the true reward, 128 labels a rollout; as many rollouts as labels allow."""

LEARNED = dataclasses.replace(GT, steps=40, prompts_per_step=32, num_samples=16, epochs=2)
"""PPO that is paid a learned reward, of which it may ask as often as it likes."""


def run(world: World, table: Table, seeds: Sequence[int], counts: Sequence[int] = LABELS) -> list[Line]:
  """Trains every method at its betas on so many labels each; returns where each run ended."""
  lines, policies = [], enumerable.Policies(world.model.config, world.prompts)
  for labels in counts:
    betas = BETAS if labels == MIDDLE else (BETA,)
    ours = world._replace(data=lambda config, labels=labels: offline_pairs(config, table, world, labels))
    kind = f"offline_{labels}"
    runs = methods.trained(
      ours, OFFLINE, shared(labels), seeds=seeds, values=betas, kind=kind, at_once=len(seeds)
    )
    for line in methods.final(runs):
      lines.append(told(world, table, policies, kind, labels, line))
    for beta in betas:
      for seed in seeds:
        for method, rounds in ((ITERATIVE, ITERATIONS), (ON_POLICY, labels // ROUND)):
          ended = own_samples(ours, method, labels, rounds, beta, seed)
          lines.append(told(world, table, policies, *ended))
    lines += [told(world, table, policies, *ended) for ended in ppo_of(ours, labels, betas, seeds)]
  return lines


def shared(labels: int) -> dict:
  """Returns what the runs on so many labels change in the world's config."""
  steps = labels * PASSES // BATCH
  return {
    "batch_size": BATCH,
    "steps": steps,
    "log_every": steps,
    "eval_every": 0,
    "checkpoint_every": 0,
    "optimizer.learning_rate": LEARNING_RATE,
    "optimizer.warmup_steps": 10,
    "check_memory": False,
  }


def offline_pairs(config, table: Table, world: World, labels: int) -> resolve.Data:
  """Draws so many comparisons of the reference's samples; for a reward model an eighth is held out."""
  rng = np.random.default_rng([5, config.seed])
  which, chosen, rejected = enumerable.draw_comparisons(rng, table, labels, uniform=0.0)
  cut = labels - labels // 8 if config.eval_every else labels
  part = lambda of: loader.all_of(
    methods.in_ids(
      world.prompts[which[of]], *([RESPONSES[i] for i in each[of]] for each in (chosen, rejected))
    )
  )
  train = part(slice(0, cut))
  held_out = part(slice(cut, None)) if config.eval_every else None
  return resolve.Data(train, held_out, train.data.fingerprint)


def drawn_label(world: World) -> Labeller:
  """Returns who says, by a draw from Bradley-Terry, which of two answers is better."""

  def ask(pairs, seed):
    prompts = [np.array(first.prompt_ids) for first, _ in pairs]
    first, second = (world.reward(prompts, [each[k].ids for each in pairs]) for k in (0, 1))
    wins = np.random.default_rng(seed).random(len(pairs)) < 1 / (1 + np.exp(second - first))
    return ["win" if win else "loss" for win in wins]

  return Labeller(ask, compares=True, at_once=2**30)


def own_samples(
  world: World, method: str, labels: int, rounds: int, beta: float, seed: int
) -> tuple[str, int, Line]:
  """Trains DPO in rounds of the policy's own samples; returns its folder, its labels and where it ended."""
  kind = f"{'iterative' if method == ITERATIVE else 'on_policy'}_{labels}"
  folder = world.folder / kind
  config = methods.config_of(world, shared(labels) | {"beta": beta, "seed": seed})
  with config.unlocked():
    config.parallel.strategy = "mesh"
    config.online = online_config.defaults().online
    config.online.steps_per_round = config.steps // rounds
    config.online.prompts_per_round = labels // rounds
    config.online.prompts_at_once = min(256, labels // rounds)
    config.online.max_new_tokens = world.max_new_tokens
    config.online.pairing = "choice"

  def make():
    ended = {}

    def look(step, params):
      if step == config.steps:
        ended.update(world.measure(params, seed))
        methods.save_policy(world, folder, beta, seed, jax.device_get(params))

    workdir = folder / f"run_{beta:g}_seed_{seed}"
    online.run(config, workdir, data=world.data(config), labeller=drawn_label(world), callback=look)
    last = [line for line in read_metrics(workdir) if line["split"] == "round"][-1]
    return [
      {"method": method, "setting": beta, "seed": seed, "step": config.steps, "asked": last["labels"]} | ended
    ]

  name = f"{beta:g}_seed_{seed}"
  (line,) = methods.stage(folder / name, config.to_dict() | {"rounds": rounds}, make)
  return kind, labels, line


def ppo_of(
  world: World, labels: int, betas: Sequence[float], seeds: Sequence[int]
) -> list[tuple[str, int, Line]]:
  """Runs PPO paid by a model of the pairs, and PPO paid so many rewards; returns like `own_samples`."""
  steps = max(200, labels // 8)
  every = {"eval_every": steps // 10, "checkpoint_every": steps // 10}
  changes = shared(labels) | every | {"steps": steps, "optimizer.learning_rate": LEARNING_RATE / 2}
  models = {seed: methods.reward_model(world, changes, seed=seed, kind=f"{labels}_labels") for seed in seeds}
  learned = lambda seed: methods.learned(world, models[seed], num_samples=LEARNED.num_samples)
  rollouts = labels // (GT.prompts_per_step * GT.num_samples)
  ended = []
  for method, kind, reward, settings in (
    (PPO, f"ppo_{labels}", learned, LEARNED),
    (PPO_GT, f"ppo_gt_{labels}", lambda seed: world.reward, dataclasses.replace(GT, steps=rollouts)),
  ):
    runs = methods.ppo_runs(
      world,
      method,
      reward,
      settings,
      seeds=seeds,
      axis="beta",
      values=betas,
      measure_every=settings.steps,
      kind=kind,
    )
    ended += [(kind, labels, line) for line in methods.final(runs)]
  return ended


def told(
  world: World, table: Table, policies: enumerable.Policies, kind: str, labels: int, line: Line
) -> Line:
  """Returns what is written of a run that has ended: exact numbers of its policy."""
  beta, seed = line["setting"], line["seed"]
  log_probs = policies.log_probs(methods.load_policy(world, kind, beta, seed))
  kept = {name: line[name] for name in ("method", "setting", "seed", "step", "reward", "kl")}
  return kept | {
    "labels": labels,
    "asked": line.get("asked", labels),
    "share": value_of(line, beta) / best_value(table, beta),
    "win_rates": [win_rate(table, log_probs, temperature) for temperature in TEMPERATURES],
  }


def value_of(line: Line, beta: float) -> float:
  """Returns reward less beta KL, what every method maximises."""
  return line["reward"] - beta * line["kl"]


def best_value(table: Table, beta: float) -> float:
  """Returns the largest reward less beta KL: that of the optimum."""
  reward, kl = enumerable.reward_and_kl(table, enumerable.optimum(table, beta))
  return reward - beta * kl


def win_rate(table: Table, log_probs: np.ndarray, temperature: float) -> float:
  """Returns the exact chance that a policy's answer has more reward than the reference's, ties half.

  The policy's are drawn at a temperature, the reference's at 1.
  """
  chances, against = at_temperature(log_probs, temperature), np.exp(table.log_probs)
  more = table.rewards[:, :, None] > table.rewards[:, None, :]
  same = table.rewards[:, :, None] == table.rewards[:, None, :]
  return float(np.einsum("pi,pij,pj->p", chances, more + 0.5 * same, against).mean())


def at_temperature(log_probs: np.ndarray, temperature: float) -> np.ndarray:
  """Returns the chance of each response, [prompts, responses], when each token is drawn at a temperature.

  That of a token is had from those of all responses that begin alike; 0 takes the likeliest token.
  """
  chances = np.exp(log_probs)
  result = np.ones_like(chances)
  beginnings = {(): np.ones(len(RESPONSES), bool)}
  for response in RESPONSES:
    for length in range(1, len(response) + 1):
      start = tuple(response[:length].tolist())
      if start not in beginnings:
        beginnings[start] = np.array([tuple(each[:length].tolist()) == start for each in RESPONSES])
  mass = {start: chances[:, of].sum(axis=1) for start, of in beginnings.items()}
  for start in beginnings:
    following = [other for other in beginnings if len(other) == len(start) + 1 and other[:-1] == start]
    if not following:
      continue
    tokens = np.stack([mass[other] for other in following], axis=1)
    if temperature:
      powers = (tokens / tokens.max(axis=1, keepdims=True)) ** (1 / temperature)
      drawn = powers / powers.sum(axis=1, keepdims=True)
    else:
      drawn = np.eye(len(following))[tokens.argmax(axis=1)]
    for other, chance in zip(following, drawn.T):
      result[:, beginnings[other]] *= chance[:, None]
  return result


def show(lines: Sequence[Line]) -> None:
  """Prints means over seeds and their standard errors."""
  print(
    "| method | gold labels | beta | true reward | KL, nats | share of the best reward - beta KL | "
    + " | ".join(f"win rate, T = {temperature:g}" for temperature in TEMPERATURES)
    + " |"
  )
  print("|---|---|---|---|---|---|" + "---|" * len(TEMPERATURES))
  text = lambda values: "{:.3f} +- {:.3f}".format(*measure.mean_and_error(values))
  for (method, labels, beta), of in groups(lines).items():
    cells = [text([line[name] for line in of]) for name in ("reward", "kl", "share")]
    cells += [text(values) for values in zip(*(line["win_rates"] for line in of))]
    print(f"| {method} | {labels} | {beta:g} | " + " | ".join(cells) + " |")


def groups(lines: Sequence[Line]) -> dict[tuple[str, int, float], list[Line]]:
  """Returns the lines of all seeds by method, labels and beta."""
  found = {}
  for line in lines:
    found.setdefault((line["method"], line["labels"], line["setting"]), []).append(line)
  return dict(sorted(found.items(), key=lambda item: (item[0][1], -item[0][2], METHODS.index(item[0][0]))))


METHODS = (OFFLINE, ITERATIVE, ON_POLICY, PPO, PPO_GT)


def plot(lines: Sequence[Line], table: Table, path: pathlib.Path) -> None:
  """Draws the frontier, win rates by temperature, and what labels buy; bars are errors over seeds."""
  figure, (frontier, wins, labels) = figures.panels(3, size=(4.4, 3.6))
  reward, kl = np.transpose(
    [enumerable.reward_and_kl(table, enumerable.optimum(table, beta)) for beta in np.geomspace(0.2, 100, 100)]
  )
  frontier.plot(kl, reward, color="black", linewidth=1, label="optimum")
  found = groups(lines)
  of = lambda lines, name: measure.mean_and_error([line[name] for line in lines])
  for number, method in enumerate(METHODS):
    style = dict(markersize=4, linewidth=0.9, capsize=2, label=method, **figures.style(number))
    at_middle = [each for (name, count, _), each in found.items() if (name, count) == (method, MIDDLE)]
    x, y = (np.transpose([of(each, name) for each in at_middle]) for name in ("kl", "reward"))
    frontier.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], **style)
    values = [line["win_rates"] for line in found[method, MIDDLE, BETA]]
    mean, error = np.transpose([measure.mean_and_error(each) for each in zip(*values)])
    wins.errorbar(TEMPERATURES, mean, yerr=error, **style)
    mean, error = np.transpose([of(found[method, count, BETA], "share") for count in LABELS])
    labels.errorbar(LABELS, mean, yerr=error, **style)
  frontier.set(xlabel="KL to the reference, nats", ylabel=f"true reward, {MIDDLE} labels")
  wins.set(xlabel="temperature", ylabel=f"win rate against the reference, beta {BETA:g}")
  labels.set(xlabel="gold labels", ylabel=f"share of the best reward - {BETA:g} KL", xscale="log")
  labels.set_xticks(LABELS, LABELS)
  labels.minorticks_off()
  frontier.legend(frameon=False, fontsize=7)
  figures.save(figure, path)


def lines_of(paths: Sequence[str]) -> list[Line]:
  """Returns the lines of runs that have ended.

  Raises:
    DataError: a file is not there, or has none.
  """
  lines = []
  for path in paths:
    found = read_lines(pathlib.Path(path))
    if not found:
      raise DataError(
        f"--lines names {path}, which has no lines; give the on_policy.jsonl of runs that have ended"
      )
    lines += found
  return lines


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/on_policy"))
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--labels", default=",".join(map(str, LABELS)))
  parser.add_argument("--lines", default="", help="files of runs that have ended; nothing else is run")
  arguments = parser.parse_args()
  folder = arguments.workdir.absolute()
  seeds, counts = ([int(each) for each in of.split(",")] for of in (arguments.seeds, arguments.labels))
  with command(folder):
    world, table = enumerable.make(folder)
    if arguments.lines:
      lines = lines_of(arguments.lines.split(","))
    else:
      lines = run(world, table, seeds, counts)
    sweep.write_lines(folder / "on_policy.jsonl", lines)
    drawn = set(LABELS) <= {line["labels"] for line in lines}
    if drawn:
      plot(lines, table, folder / "on_policy.png")
  show(lines)
  print(f"\nwritten: {folder}/on_policy.jsonl" + (" and on_policy.png" if drawn else ""))


if __name__ == "__main__":
  main()
