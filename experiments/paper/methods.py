"""Every method of the paper in one world: DPO and what it is compared with, each by the same tools.

A world says what is given: a reference, comparisons, prompts, and a true reward that measures. Every
method here trains by the step, loader and checkpoints of dpojax, starts from the reference, and is
measured the same way along training. What a method was measured at is a list of lines, dicts with
`method`, `setting`, `seed`, `step`, `reward`, `kl` and their errors; a stage that is finished is read
from its folder, never made again.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dpojax import train
from dpojax.data import tokenized
from dpojax.models import hf
from dpojax.ppo import loop as ppo
from dpojax.runtime.command import say
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import ConfigError
from dpojax.sample import best_of_n, rollouts
from dpojax.training import parallel, resolve, weights
from dpojax.training.metrics import read_metrics
from experiments import sweep
from experiments.measurements import measure

Line = dict[str, Any]

BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128)
"""The N of which the best is told."""


class World(NamedTuple):
  """Where methods are compared.

  Attributes:
    folder: where everything about it is kept.
    model: the reference, which every method starts from.
    config: what every run has in common: weights, tokenizer, lengths, batch, optimizer.
    data: config -> its comparisons; the objective and the seed of the config count.
    prompts, prompt_lengths: [n, W] ids padded on the right, [n]; what PPO samples to.
    reward: the true one, of ids.
    measure: (params, seed) -> 'reward', 'kl' and their errors.
    stop_id, max_new_tokens: of samples.
  """

  folder: pathlib.Path
  model: weights.Loaded
  config: ml_collections.ConfigDict
  data: Callable[[ml_collections.ConfigDict], resolve.Data]
  prompts: np.ndarray
  prompt_lengths: np.ndarray
  reward: rollouts.Reward
  measure: Callable[[Any, int], dict[str, float]]
  stop_id: int
  max_new_tokens: int


class RewardModel(NamedTuple):
  """A learned reward, its accuracy on held-out comparisons, and the step it was best at."""

  model: weights.Loaded
  accuracy: float
  step: int


def in_ids(prompts: Sequence[np.ndarray], *responses: Sequence[np.ndarray]) -> tokenized.Tokenized:
  """Returns comparisons whose ids are at hand; `responses` are those of the first place, then the next."""
  places = [prompts, *responses]
  lengths = np.stack([[len(ids) for ids in each] for each in places], axis=1).astype(np.int32)
  ids = np.concatenate([each[i] for i in range(len(prompts)) for each in places]).astype(np.int32)
  offsets = np.concatenate([[0], lengths.sum(axis=1, dtype=np.int64).cumsum()])
  return tokenized.Tokenized(
    lengths,
    ids,
    offsets,
    np.arange(len(prompts), dtype=np.int32),
    {},
    hashlib.sha256(lengths.tobytes() + ids.tobytes()).hexdigest(),
  )


def stage(folder: pathlib.Path, settings: dict, make: Callable[[], list[Line]]) -> list[Line]:
  """Returns the lines of a stage: those in its folder, or else those that `make` gives.

  Raises:
    ConfigError: the folder holds them for other settings.
  """
  path = folder / "settings.json"
  settings = json.loads(json.dumps(settings))
  if path.exists() and json.loads(path.read_text()) != settings:
    raise ConfigError(
      f"{folder} was made with other settings, those of {path}; take another workdir, "
      "or remove the folder to make it again"
    )
  if (folder / "finished").exists():
    return sweep.read_table(folder)
  with disk_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))
  say(f"-- {folder}")
  lines = make()
  sweep.write_table(folder, lines)
  (folder / "finished").touch()
  return lines


def config_of(world: World, changes: dict[str, Any]) -> ml_collections.ConfigDict:
  """Returns the world's config with changes by dotted key."""
  config = world.config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  return config


def trained(
  world: World,
  method: str,
  changes: dict[str, Any],
  *,
  seeds: Sequence[int],
  axis: str = "beta",
  values: Sequence[float] = (),
  measure_every: int = 0,
  at_once: int = 0,
  kind: str = "",
) -> list[Line]:
  """Trains a method that learns from comparisons, at all values and seeds side by side.

  Args:
    world: where.
    method: its name in figures; also that of its folder.
    changes: to the world's config, by dotted key.
    seeds, axis, values, at_once: see `sweep.run`; no axis where the method has none.
    measure_every: steps between measurements, of which one is at the start and one at the end.
    kind: folder for several settings of one method; empty is the method's own.

  Returns:
    Its measurements, and for each the last held-out metrics beside them, under `eval/`.
  """
  folder = world.folder / (kind or method).lower().replace(" ", "_")
  config = config_of(world, changes)
  settings = {
    "changes": changes,
    "seeds": list(seeds),
    "axis": axis,
    "values": list(values),
    "measure_every": measure_every,
  }

  def of_seed(seed):
    return world.data(config_of(world, changes | {"seed": seed}))

  def make():
    def look(member, step, params):
      if step == config.steps:
        save_policy(world, folder, member.value if axis else 0.0, member.seed, params)
      return world.measure(params, member.seed)

    table = sweep.run(
      config,
      folder / "sweep",
      seeds=seeds,
      axis=axis,
      values=values,
      at_once=at_once,
      data=of_seed,
      measure_every=measure_every,
      measure=look,
    )
    held_out = {(line["member"], line["step"]): line for line in table if line["split"] == "eval"}
    lines = []
    for line in table:
      if line["split"] == "measured":
        beside = held_out.get((line["member"], line["step"]), {})
        lines.append(
          {"method": method, "setting": line.get(axis, 0.0)}
          | _without(line, axis)
          | {f"eval/{name}": value for name, value in _without(beside, axis).items() if name not in line}
        )
    return lines

  return stage(folder, settings, make)


def save_policy(world: World, folder: pathlib.Path, setting: float, seed: int, params: Any) -> None:
  """Saves a trained policy as a Hugging Face folder; see `load_policy`."""
  path = _in_stage(folder, setting, seed)
  shutil.rmtree(path, ignore_errors=True)  # of a run that was killed behind it
  hf.save(path, world.model.config, params, eos_token_id=world.stop_id)


def load_policy(world: World, method: str, setting: float, seed: int) -> Any:
  """Returns the params that a method ended with, at a setting and a seed.

  Raises:
    HuggingFaceError: it was not trained in this world.
  """
  folder = policy_folder(world, method, setting, seed)
  return hf.load(str(folder), scan_layers=world.model.config.scan_layers).params


def policy_folder(world: World, method: str, setting: float, seed: int) -> pathlib.Path:
  """Returns where the policy is that a method, or one of its kinds, ended with."""
  return _in_stage(world.folder / method.lower().replace(" ", "_"), setting, seed)


def _in_stage(folder: pathlib.Path, setting: float, seed: int) -> pathlib.Path:
  return folder / "policies" / f"{setting:g}_seed_{seed}"


def _without(line: Line, axis: str) -> Line:
  """A line of a sweep less what only places it there."""
  return {name: value for name, value in line.items() if name not in ("member", "split", axis)}


def reward_model(world: World, changes: dict[str, Any], *, seed: int = 0, kind: str = "") -> RewardModel:
  """Trains the Bradley-Terry reward model and keeps the step with the best held-out accuracy.

  `kind` tells apart the folders of several settings with one seed.
  """
  folder = world.folder / "_".join(filter(None, ("reward_model", str(seed), kind)))
  config = config_of(
    world,
    {"objective": "reward", "loss": "bradley_terry", "seed": seed, "checkpoint_best": "rewards/accuracies"}
    | changes,
  )

  def make():
    train.run(config, folder / "run", data=world.data(config))
    return read_metrics(folder / "run")

  best = best_evaluation(stage(folder, changes, make))
  model = weights.load(str(folder / "run"), best["step"])
  return RewardModel(model, best["rewards/accuracies"], best["step"])


def best_evaluation(metrics: Sequence[Line]) -> Line:
  """Returns the line of a reward model's checkpoint with the best held-out accuracy.

  Of several it is the last, as that is the one that `checkpoint_best` keeps.
  """
  evaluations = [line for line in metrics if line["split"] == "eval" and line["step"]]
  return max(evaluations, key=lambda line: (line["rewards/accuracies"], line["step"]))


def learned(world: World, model: RewardModel, *, num_samples: int) -> rollouts.Reward:
  """Returns the reward of a reward model, of `num_samples` responses to each prompt."""
  return rollouts.LearnedReward(
    model.model.config,
    model.model.params,
    parallel.Mesh(),
    num_samples=num_samples,
    prompt_width=world.prompts.shape[1],
    max_new_tokens=world.max_new_tokens,
  )


def ppo_runs(
  world: World,
  method: str,
  reward_of_seed: Callable[[int], rollouts.Reward],
  settings: ppo.Settings,
  *,
  seeds: Sequence[int],
  axis: str,
  values: Sequence[float],
  measure_every: int,
  kind: str = "",
) -> list[Line]:
  """Runs PPO at every value of a setting and every seed, one after another.

  Args:
    world: where.
    method: its name in figures.
    reward_of_seed: what it is paid for, by seed.
    settings: all but `axis` and the seed.
    seeds: of samples, order and minibatches.
    axis: a field of the settings, 'target_kl' or 'beta'.
    values: of that field.
    measure_every: rollouts between measurements.
    kind: folder for several settings of one method; empty is the method's own.
  """
  name = (kind or method).lower().replace(" ", "_")
  lines = []
  for value in values:
    for seed in seeds:
      ours = dataclasses.replace(settings, **{axis: value}, seed=seed, max_new_tokens=world.max_new_tokens)
      lines += stage(
        world.folder / name / f"{axis}_{value:g}_seed_{seed}",
        dataclasses.asdict(ours),
        lambda: _ppo_run(
          world, method, world.folder / name, reward_of_seed(seed), ours, value, measure_every
        ),
      )
  return lines


def _ppo_run(world, method, folder, reward, settings, value, measure_every) -> list[Line]:
  lines = []

  def look(step, params, metrics):
    if step % measure_every == 0 or step == settings.steps:
      lines.append(
        {"method": method, "setting": value, "seed": settings.seed, "step": step}
        | world.measure(jax.device_get(params), settings.seed)
        | {f"train/{name}": number for name, number in metrics.items()}
      )

  params, _ = ppo.train(
    world.model.config,
    world.model.params,
    world.prompts,
    world.prompt_lengths,
    reward,
    settings,
    stop_id=world.stop_id,
    callback=look,
  )
  save_policy(world, folder, value, settings.seed, params)
  return lines


def draw(
  world: World,
  prompts: np.ndarray,
  lengths: np.ndarray,
  *,
  num_samples: int,
  temperature: float = 1.0,
  seed: int = 0,
) -> best_of_n.Drawn:
  """Returns samples of the reference to prompts [n, W] of [n] tokens, scored by the true reward."""
  return best_of_n.draw(
    world.model.config,
    world.model.params,
    prompts,
    lengths,
    world.reward,
    num_samples=num_samples,
    max_new_tokens=world.max_new_tokens,
    stop_id=world.stop_id,
    temperature=temperature,
    seed=seed,
    prompts_at_once=32,
  )


def scores_of(
  world: World, model: RewardModel, prompts: np.ndarray, lengths: np.ndarray, drawn: best_of_n.Drawn
) -> np.ndarray:
  """Returns what a reward model says of the samples, [n, N]."""
  reward = learned(world, model, num_samples=drawn.scores.shape[1])
  return reward(*rollouts.unpadded(prompts, lengths, drawn.tokens, drawn.lengths)).reshape(drawn.scores.shape)


def best_of_n_lines(
  world: World,
  prompts: np.ndarray,
  lengths: np.ndarray,
  model: RewardModel | None,
  *,
  sizes: Sequence[int],
  temperature: float = 1.0,
  seed: int = 0,
) -> list[Line]:
  """Draws as many samples as the largest size from the reference, and tells what the best are worth.

  Args:
    world: where.
    prompts, lengths: [n, W] ids padded on the right, [n].
    model: what the best is chosen by; None is the true reward.
    sizes: the N to tell of.
    temperature: of the draw.
    seed: of the draw.
  """
  method = "Best of N" if model else "Best of N, true reward"
  name = f"best_of_n{'' if model else '_true'}_temperature_{temperature:g}_seed_{seed}"

  def make():
    drawn = draw(world, prompts, lengths, num_samples=max(sizes), temperature=temperature, seed=seed)
    by = scores_of(world, model, prompts, lengths, drawn) if model else drawn.scores
    return [
      {
        "method": method,
        "setting": point.n,
        "seed": seed,
        "step": 0,
        "reward": point.mean,
        "reward_error": point.error,
        "kl": point.kl_bound,
        "kl_error": 0.0,
        "temperature": temperature,
        "score": float(np.mean(best_of_n.expected_best(by, point.n))),
      }
      for point in best_of_n.curve(by, sizes, drawn.scores)
    ]

  return stage(world.folder / name, {"sizes": list(sizes), "prompts": len(prompts)}, make)


def final(lines: Sequence[Line]) -> list[Line]:
  """Returns the last line of every run: of each method, setting and seed."""
  last = {(line["method"], line["setting"], line["seed"]): line for line in lines}
  return list(last.values())


def dominated(points: Sequence[Line], others: Sequence[Line]) -> int:
  """Returns how many points some other point beats on both axes: more reward at less KL."""
  return sum(
    any(other["reward"] > point["reward"] and other["kl"] < point["kl"] for other in others)
    for point in points
  )


def over_seeds(lines: Sequence[Line], name: str) -> dict[tuple[str, float], tuple[float, float]]:
  """Returns mean and standard error over seeds of a number, by method and setting."""
  groups = {}
  for line in lines:
    groups.setdefault((line["method"], line["setting"]), []).append(line[name])
  return {group: measure.mean_and_error(values) for group, values in groups.items()}


def show_configurations(lines: Sequence[Line]) -> None:
  """Prints how many settings each method was given; seeds, steps and temperatures are none."""
  settings = {}
  for line in lines:
    settings.setdefault(line["method"], set()).add(line["setting"])
  print("configurations tried: " + ", ".join(f"{method} {len(of)}" for method, of in settings.items()))
