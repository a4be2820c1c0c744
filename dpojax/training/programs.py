"""The compiled programs of a run, and runs of one process that share them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dpojax.data import loader
from dpojax.models.config import ModelConfig
from dpojax.training import config as config_lib
from dpojax.training import objectives, resolve
from dpojax.training import step as step_lib
from dpojax.training.micro_batches import MicroBatches


class Programs(NamedTuple):
  """What a run lifts over its devices.

  Attributes:
    tx: the optimizer.
    train_step: (state, reference, rows) -> the next state and metrics; the state is donated.
    evaluate: see `make_evaluate`.
    evaluated: state -> the params that are evaluated.
    move_reference: (reference, state) -> the next reference; the reference is donated.
  """

  tx: Any
  train_step: Callable
  evaluate: Callable
  evaluated: Callable
  move_reference: Callable


_SHARED: dict[str, Programs] | None = None

_UNREAD = {
  "data.source",
  "data.path",
  "data.form",
  "data.config",
  "data.eval_path",
  "data.eval_size",
  "data.max_length",
  "data.max_prompt_length",
  "data.keep",
  "data.on_error",
  "data.score",
  "data.special_tokens",
  "data.template_date",
  "data.unique_prompts",
  "data.shuffle_labels",
  "data.cache_dir",
  "tokenizer",
  "model.checkpoint",
  "reference.checkpoint",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "checkpoint_keep",
  "checkpoint_best",
  "sample_every",
  "sample_prompts",
  "sample_limit",
  "sample_count",
  "sample_max_new_tokens",
  "sample_scorer",
  "profile_steps",
  "wandb_project",
  "check_memory",
}
"""Keys that no program is made of: what they lead to is in the model's config and the arguments' shapes."""


@contextlib.contextmanager
def shared() -> Iterator[None]:
  """Lets the runs of this process that begin inside take the programs of one before, where configs agree.

  What is traced is kept: a loss or a model whose code changes inside stays as it was.
  """
  global _SHARED
  before, _SHARED = _SHARED, {}
  try:
    yield
  finally:
    _SHARED = before


def make(
  config: ml_collections.ConfigDict, model: ModelConfig, objective: objectives.Objective, devices
) -> Programs:
  """Returns the programs of a run, those of an earlier one under `shared`. Nothing is compiled yet.

  Args:
    config: all keys.
    model: its model, of which the objective was made.
    objective: what is trained.
    devices: what the programs are lifted over.
  """
  if _SHARED is None:
    return _make(config, objective, devices)
  key = _key(config, model, devices)
  if key not in _SHARED:
    _SHARED[key] = _make(config, objective, devices)
  return _SHARED[key]


def _key(config: ml_collections.ConfigDict, model: ModelConfig, devices) -> str:
  read = {name: value for name, value in config_lib.flatten(config).items() if name not in _UNREAD}
  # Settings of jax decide programs as well: precision and the like.
  over = [type(devices).__name__, devices.row_multiple, jax.devices()]
  return json.dumps([read, model.as_dict(), over, jax.config.values], sort_keys=True, default=str)


def _make(config: ml_collections.ConfigDict, objective: objectives.Objective, devices) -> Programs:
  tx, train_step = resolve.make_train_step(config, objective, devices)
  return Programs(
    tx,
    train_step,
    make_evaluate(objective, devices, resolve.micro_batches_of(config, devices)),
    resolve.make_evaluated(config, devices),
    devices.lift(step_lib.make_reference_step(alpha=config.reference.sync_alpha), donate_state=True),
  )


def make_evaluate(
  objective: objectives.Objective, devices, micro_batches: MicroBatches = MicroBatches()
) -> Callable:
  """Returns `evaluate(params, reference, batches, step)`: an objective's metrics over their comparisons.

  `step` is placed, as that of a state; an objective that moves is evaluated as it is there.
  """
  eval_step = devices.lift(
    step_lib.make_eval_step(
      objective, micro_batches=micro_batches, axis_name=devices.axis_name, sum_rows=devices.sum_rows
    ),
    donate_state=False,
  )

  def evaluate(params, reference, batches: Iterator[loader.Batch], step) -> dict[str, float]:
    sums: dict[str, Any] = {}
    for batch in batches:
      part = eval_step(params, reference, devices.place_rows(batch.rows, batch.total_rows), step)
      for name, mean in jax.device_get(devices.collect(part)).items():
        # Totals and counts by themselves, so that a last batch with fewer comparisons weighs less.
        sums[name] = sums.get(name, 0.0) + np.asarray(mean, np.float64)
    return {name: float(total / count) if count else float("nan") for name, (total, count) in sums.items()}

  return evaluate
