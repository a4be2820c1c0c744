"""One config at several betas and seeds, trained side by side: beta as an axis.

python -m experiments.sweep --config=configs/dpo.py --workdir=runs/sweep --betas=0.05,0.1,1,5 --seeds=0,1,2 \\
    [--at_once=4] [--axis=loss_options.alpha --betas=...] [--config.key=value ...]

The data are prepared once, the reference's log-probs computed once, and the step compiled once for all
members, whose value on the axis is an argument of it. A reference that moves is each member's own.
`at_once` members are trained under one `vmap`, spread over the devices there are; 0 is all of them. A
killed sweep continues where it was. Writes table.jsonl, one object a line (`member`, `seed`, the axis,
`step`, `split`, then metrics as in a run's metrics.jsonl), and sweep.png.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax
import tqdm
from absl import flags

from dpojax.data import loader, packing
from dpojax.runtime import command_line
from dpojax.runtime.command import command, say
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import ConfigError
from dpojax.training import checkpoint, objectives, parallel, resolve, weights
from dpojax.training import config as config_lib
from dpojax.training import step as step_lib
from dpojax.training import workdir as workdir_lib
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.metrics import read_lines
from dpojax.training.micro_batches import MicroBatches
from experiments import figures
from experiments.command import local_folder

AXES = ("beta", "optimizer.learning_rate", "loss_options.")
"""Beginnings of the keys a sweep may be over: numbers that the step computes with."""


class Member(NamedTuple):
  """One run of a sweep: its place, its seed, and its value on the axis."""

  number: int
  seed: int
  axis: str
  value: float

  def labels(self) -> dict[str, float]:
    """Returns what stands in each of its lines of the table."""
    return {"member": self.number, "seed": self.seed} | ({self.axis: self.value} if self.axis else {})


Measure = Callable[[Member, int, Any], dict[str, float]]
"""(member, step, params as NumPy arrays) -> numbers for the table, under the split 'measured'."""


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  seeds: Sequence[int] = (0,),
  axis: str = "beta",
  values: Sequence[float] = (),
  at_once: int = 0,
  data: Callable[[int], resolve.Data] | None = None,
  measure: Measure | None = None,
  measure_every: int = 0,
) -> list[dict]:
  """Trains every seed at every value, or continues to; see the module's text.

  Args:
    config: of every member but for its seed and its value on the axis. `eval_every`, `log_every` and
      `checkpoint_every` are as in a run.
    workdir: the sweep's folder, made if missing.
    seeds: of the order of the data, and of random weights and shuffled labels where a config has them.
    axis: a dotted key in `AXES`; empty, and no values, for an objective that has none.
    values: on the axis; empty is the config's own.
    at_once: members under one `vmap`; 0 is all.
    data: seed -> its comparisons; None reads those of the config.
    measure: called for each member at step 0, every `measure_every` steps, and at the end.
    measure_every: steps; 0 is the end alone.

  Returns:
    The table, a dict a line.

  Raises:
    ConfigError: a value cannot be run, or the workdir is in a bucket or holds another sweep; and what
      `train.run` raises.
  """
  workdir = local_folder(workdir)
  config = weights.with_tokenizer(config).copy_and_resolve_references()
  members = members_of(config, seeds, axis, values)
  _check_can_sweep(config)
  with workdir_lib.open_workdir(workdir, config) as workdir:
    return _run(
      workdir_lib.with_template_date(config, workdir), workdir, members, at_once, data, measure, measure_every
    )


def _run(config, workdir, members, at_once, data, measure, measure_every) -> list[dict]:
  _check_same_sweep(workdir, members, at_once)
  at_once = min(at_once or len(members), len(members))
  sweep = _Sweep(config, members, at_once, data)
  bar = tqdm.tqdm(
    total=len(members) * config.steps, unit="step", file=sys.stderr, disable=not sys.stderr.isatty()
  )
  for first in range(0, len(members), at_once):
    group = members[first : first + at_once]
    folder = workdir / f"members_{first}"
    if not (folder / "done").exists():
      sweep.train(group, at_once, folder, measure, measure_every, bar)
      (folder / "done").touch()
  bar.close()
  table = [
    line for first in range(0, len(members), at_once) for line in read_table(workdir / f"members_{first}")
  ]
  write_table(workdir, table)
  return table


def members_of(
  config: ml_collections.ConfigDict, seeds: Sequence[int], axis: str, values: Sequence[float]
) -> list[Member]:
  """Returns every seed at every value, seeds first.

  Raises:
    ConfigError: the axis is none, or a config of a member cannot be run.
  """
  flat = config_lib.flatten(config)
  if not axis:
    values = (math.nan,)
  elif axis not in flat or not axis.startswith(AXES):
    raise ConfigError(
      f"a sweep cannot be over {axis!r}; it may be over beta, optimizer.learning_rate "
      "or a number in loss_options"
    )
  knob = axis.removeprefix("loss_options.")
  if knob in config_lib.columns_of(config):
    raise ConfigError(
      f"a sweep over {axis} would change nothing: data.columns.{knob} is {config.data.columns[knob]!r}, so "
      "each pair brings its own; leave one of them"
    )
  values = list(values) or [flat[axis]]
  members = [
    Member(i, seed, axis, value)
    for i, (value, seed) in enumerate((value, seed) for value in values for seed in seeds)
  ]
  for name, given in (("seeds", seeds), ("values", values)):
    if len(set(given)) < len(given) or not given:
      raise ConfigError(f"{name} are {list(given)}; give each once, and at least one")
  for member in members:
    config_lib.validate(config_of(config, member))
  return members


def config_of(config: ml_collections.ConfigDict, member: Member) -> ml_collections.ConfigDict:
  """Returns the config of one member, whose value may be traced."""
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    config.seed = member.seed
    if member.axis:
      config.update_from_flattened_dict({member.axis: member.value})
  return config


class _Sweep:
  """What members share: data, reference, and the compiled step."""

  def __init__(self, config: ml_collections.ConfigDict, members: Sequence[Member], at_once: int, data):
    self.config, self.axis = config, members[0].axis
    self.devices = parallel.EnsembleMesh(at_once)
    seeds = list(dict.fromkeys(member.seed for member in members))
    of_seed = lambda seed: config_of(config, Member(0, seed, "", math.nan))
    data = data or (lambda seed: resolve.load_data(of_seed(seed)))
    datasets = {seed: data(seed) for seed in seeds}
    self.loaders = {seed: _loader(of_seed(seed), each.train) for seed, each in datasets.items()}
    held_out = datasets[seeds[0]].held_out if config.eval_every else None
    self.held_out = held_out and _loader(config, held_out)

    random_start = not config.model.checkpoint or config.lora.rank
    setups = {seed: resolve.make_setup(of_seed(seed)) for seed in (seeds if random_start else seeds[:1])}
    self.setup = setup = setups[seeds[0]]
    for each in datasets.values():
      resolve.check_ids(setup.model, config, each)
    self.starts = {seed: setups.get(seed, setup).params for seed in seeds}
    self.about = {
      "model": setup.model.as_dict(),
      "data": [each.fingerprint for each in datasets.values()],
      "stop_ids": list(dict.fromkeys(i for each in datasets.values() for i in each.stop_ids)),
      "reference": None if setup.reference is None else checkpoint.fingerprint(setup.reference),
    }
    stored = setup.objective.needs_reference and config.reference.mode == "stored"
    if stored:
      plain = parallel.Mesh()
      resolve.use_stored_reference(
        config,
        setup,
        plain.place(setup.reference, donated=False),
        self.about["reference"],
        [*self.loaders.values(), self.held_out],
        plain,
      )
    unread = setup.reference is None or (stored and not config.lora.rank)
    self.frozen = None if unread else setup.reference
    theirs = 0 if config.reference.sync_every else None  # a reference that moves is each member's own
    self._train = self.devices.lift(jax.vmap(self._step, in_axes=(0, theirs, 0, 0)), donate_state=True)
    self._eval = self.devices.lift(
      jax.vmap(self._evaluate, in_axes=(0, theirs, 0, 0, None)), donate_state=False
    )
    self._average = self.devices.lift(jax.vmap(step_lib.average_of), donate_state=False)
    self._move_reference = self.devices.lift(
      jax.vmap(step_lib.make_reference_step(alpha=config.reference.sync_alpha)), donate_state=True
    )

  def _at(self, value) -> tuple[objectives.Objective, Callable, optax.GradientTransformation]:
    """Returns objective, schedule and optimizer at a value on the axis, which may be traced."""
    config = config_of(self.config, Member(0, self.config.seed, self.axis, value))
    schedule, tx = resolve.make_optimizer(config)
    objective = resolve.setup_of(self.setup.model, self.setup.params, config).objective
    return objective, schedule, step_lib.with_memory(tx, objective)

  def _step(self, state, reference, value, rows):
    objective, schedule, tx = self._at(value)
    return step_lib.make_train_step(
      objective, tx, schedule=schedule, micro_batches=MicroBatches(self.config.rows_at_once)
    )(state, reference, rows)

  def _evaluate(self, params, reference, value, step, rows):
    evaluate = step_lib.make_eval_step(
      self._at(value)[0], micro_batches=MicroBatches(self.config.rows_at_once)
    )
    return evaluate(params, reference, rows, step)

  def train(
    self,
    group: Sequence[Member],
    size: int,
    folder: pathlib.Path,
    measure: Measure | None,
    measure_every: int,
    bar: tqdm.tqdm,
  ) -> None:
    """Trains a group of members to the end, from its last checkpoint if there is one."""
    config, devices = self.config, self.devices
    size = -(-size // devices.row_multiple) * devices.row_multiple
    every = (list(group) * size)[:size]  # a group is filled up, so that all compile to one program
    value = devices.place_rows(np.array([each.value for each in every], np.float32), size)
    state, reference, moves = self._first_state(every), self._first_reference(size), self._moves
    checkpoints = Checkpoints(folder, keep=1, owner=True)
    first = checkpoints.last_sound() or 0
    if first:
      state, was = checkpoints.restore(first, devices.restore_target(state))
      workdir_lib.check_same(was, self.about, folder)
      state = devices.place(state)
      if moves:
        reference = devices.place(checkpoints.restore_reference(first, devices.restore_target(reference)))
    with contextlib.closing(_Table(folder, first or -1)) as table:
      bar.update(len(group) * first)

      def write(step, split, metrics):
        """Writes numbers [M] of all members."""
        for place, member in enumerate(group):
          table.write(
            member,
            step,
            split,
            {name: float(each[place]) for name, each in metrics.items() if not np.isnan(each[place])},
          )

      def look(step):
        """Evaluates and measures, as far as either is due."""
        if config.eval_every and due(step, config.eval_every):
          write(step, "eval", self._evaluation(state, reference, value))
        if measure is not None and due(step, measure_every):
          evaluated = self._evaluated(state)
          for place, member in enumerate(group):
            params = jax.tree.map(lambda x: np.asarray(x[place]), evaluated)
            table.write(member, step, "measured", measure(member, step, params))

      due = lambda step, often: (often and step % often == 0) or step == config.steps
      if first == 0:
        look(0)
      for step, rows in self._rows(every, first):
        state, metrics = self._train(state, reference, value, devices.place_rows(rows, size))
        if moves and step % moves == 0:
          reference, _ = self._move_reference(reference, state)
        bar.update(len(group))
        checkpoints.check()
        if step == 1 or due(step, config.log_every):
          metrics = jax.device_get(metrics) | {"finite": np.asarray(state.finite)}
          write(step, "train", metrics)
          bar.set_postfix(loss=float(np.mean(metrics["loss"])))
        look(step)
        if config.checkpoint_every and due(step, config.checkpoint_every):
          table.flush()
          checkpoints.save(step, state, self.about, reference=reference if moves else None)
      checkpoints.close()
    for member, fine in zip(group, np.asarray(state.finite)):
      if not fine:
        say(f"{member.labels()}: an update was not finite; it stands where it was before that")

  def _first_state(self, members: Sequence[Member]) -> step_lib.TrainState:
    """Returns the states before step 1, stacked."""
    _, _, tx = self._at(members[0].value)
    states = {seed: jax.device_get(step_lib.init_state(params, tx)) for seed, params in self.starts.items()}
    return self.devices.place(
      jax.tree.map(lambda *each: np.stack(each), *(states[member.seed] for member in members))
    )

  @property
  def _moves(self) -> int:
    """Steps between updates of the references; 0 where there is one that stands still."""
    return self.config.reference.sync_every

  def _first_reference(self, size: int) -> Any:
    """Returns the reference of all, or where it moves one for each of the members."""
    if not self._moves:
      return None if self.frozen is None else self.devices.share(self.frozen)
    return self.devices.place(jax.tree.map(lambda x: np.stack([np.asarray(x)] * size), self.frozen))

  def _evaluated(self, state: step_lib.TrainState) -> Any:
    """Returns the params to evaluate: those that the optimizer averages, where it does."""
    return self._average(state.params, state.opt_state) if config_lib.averages(self.config) else state.params

  def _evaluation(self, state: step_lib.TrainState, reference, value: jax.Array) -> dict[str, np.ndarray]:
    """Returns metrics [M] over the held-out comparisons."""
    sums, params = {}, self._evaluated(state)
    for batch in self.held_out.evaluation():
      part = jax.device_get(self._eval(params, reference, value, state.step, batch.rows))
      for name, mean in part.items():
        sums[name] = sums.get(name, 0.0) + np.asarray(mean, np.float64)
    return {
      name: np.where(count > 0, total / np.maximum(count, 1), np.nan) for name, (total, count) in sums.items()
    }

  def _rows(self, members: Sequence[Member], first: int) -> Iterator[tuple[int, packing.Rows]]:
    """Yields (step, rows [M, R, ...]): each member's, with as many rows as the one that has most."""
    batches = [each.training(first, self.config.steps) for each in self.loaders.values()]
    seeds = list(self.loaders)
    place = [seeds.index(member.seed) for member in members]
    for of_seeds in zip(*batches):
      most = max(len(batch.rows.tokens) for batch in of_seeds)
      rows = [_filled_up(batch.rows, most, self.setup.objective.num_responses) for batch in of_seeds]
      yield of_seeds[0].step + 1, jax.tree.map(lambda *each: np.stack([each[i] for i in place]), *rows)


def _loader(config: ml_collections.ConfigDict, subset: loader.Subset) -> loader.Loader:
  """Returns the loader of one member's rows."""
  return loader.Loader(
    subset,
    seed=config.seed,
    batch_size=config.batch_size,
    row_length=config.row_length,
    rows_at_once=config.rows_at_once,
  )


def _filled_up(rows: packing.Rows, count: int, num_responses: int) -> packing.Rows:
  """Returns the rows with empty ones behind them, `count` in all."""
  missing = count - len(rows.tokens)
  if not missing:
    return rows
  shape = packing.RowShape(rows.tokens.shape[1], rows.source.shape[1], rows.example.shape[1])
  empty = packing.empty(
    missing,
    shape,
    num_responses=num_responses,
    with_reference=rows.reference is not None,
    knobs=list(rows.knobs or ()),
  )
  return jax.tree.map(lambda *each: np.concatenate(each), rows, empty)


class _Table:
  """Lines of a group of members; those of steps after a checkpoint are dropped and written again."""

  def __init__(self, folder: pathlib.Path, after_step: int):
    with disk_errors(folder):
      write_table(folder, [line for line in read_table(folder) if line["step"] <= after_step])
      self._file = open(folder / "table.jsonl", "a")
    self._folder = folder

  def write(self, member: Member, step: int, split: str, metrics: dict[str, float]) -> None:
    with disk_errors(self._folder):
      self._file.write(json.dumps(member.labels() | {"step": step, "split": split} | metrics) + "\n")

  def flush(self) -> None:
    with disk_errors(self._folder):
      self._file.flush()

  def close(self) -> None:
    with disk_errors(self._folder):
      self._file.close()


def read_table(folder: str | os.PathLike) -> list[dict]:
  """Returns the lines of a folder's table.jsonl; a last line cut off by a kill is left out."""
  return read_lines(pathlib.Path(folder) / "table.jsonl")


def write_table(folder: str | os.PathLike, table: Sequence[dict]) -> None:
  """Writes table.jsonl; see `write_lines`."""
  write_lines(pathlib.Path(folder) / "table.jsonl", table)


def write_lines(path: pathlib.Path, lines: Sequence[dict]) -> None:
  """Writes a JSONL file, whole or not at all.

  Raises:
    DiskError: the disk is full or cannot be written.
  """
  with disk_errors(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)


def _check_same_sweep(workdir: pathlib.Path, members: Sequence[Member], at_once: int) -> None:
  """Refuses to continue a sweep with other members."""
  path = workdir / "sweep.json"
  now = {"members": [list(member.labels().items()) for member in members], "at_once": at_once}
  with disk_errors(workdir):
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(now)):
      raise ConfigError(
        f"{workdir} holds a sweep over other members; take another workdir, or go back to those of {path}"
      )
    path.write_text(json.dumps(now))


def _check_can_sweep(config: ml_collections.ConfigDict) -> None:
  """Refuses what only a single run can do."""
  for key, value, why in (
    ("checkpoint_best", "", "the members share their checkpoints"),
    ("parallel.coordinator", "", "a sweep is one process"),
    ("parallel.fsdp", 1, "each member is whole on one device"),
    ("parallel.tensor", 1, "each member is whole on one device"),
  ):
    given = config_lib.flatten(config)[key]
    if given != value:
      raise ConfigError(f"config.{key} is {given!r} and {why}; set {value!r}, or train members one by one")


def main():
  given = flags.FLAGS
  with command():
    workdir = local_folder(given.workdir)
    table = run(
      given.config,
      workdir,
      seeds=[int(seed) for seed in given.seeds],
      axis=given.axis,
      values=[float(value) for value in given.betas],
      at_once=given.at_once,
    )
    with disk_errors(workdir):
      figures.against_axis(table, given.axis, workdir / "sweep.png")
  print(f"written: {workdir}/table.jsonl and sweep.png")


if __name__ == "__main__":
  command_line.define_config()
  command_line.define_workdir()
  flags.mark_flag_as_required("workdir")
  flags.DEFINE_list("betas", [], "Values on the axis, separated by commas.")
  flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas.")
  flags.DEFINE_string("axis", "beta", "The key that the values are of.")
  flags.DEFINE_integer("at_once", 0, "Members trained side by side; 0: all.")
  command_line.start(main, __doc__)
