"""Trains a model on comparisons: SFT, DPO or a reward model. Read it from top to bottom.

The command is `dpojax.train.__main__`, `python -m dpojax.train`.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dpojax.data import loader, packing, tokenization
from dpojax.data import report as report_lib
from dpojax.evaluate import watching
from dpojax.models.config import ModelConfig
from dpojax.plan import needs
from dpojax.runtime import memory, paths, processes
from dpojax.runtime.command import say
from dpojax.runtime.errors import ConfigError, UserError
from dpojax.runtime.stopping import stop_signal
from dpojax.training import checkpoint, objectives, resolve, weights
from dpojax.training import config as config_lib
from dpojax.training import programs as programs_lib
from dpojax.training import step as step_lib
from dpojax.training import workdir as workdir_lib
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.log import Log
from dpojax.training.throughput import Profile, Throughput


class TrainingError(UserError, RuntimeError):
  """Training cannot go on; the message says at which step, why, and what is saved."""


def run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike, *, data: resolve.Data | None = None
) -> dict[str, float]:
  """Trains as the config says, from the last checkpoint in `workdir` if there is one.

  Args:
    config: all keys of `dpojax.training.config.defaults()`.
    workdir: the run's folder, made if missing.
    data: comparisons that are at hand in ids; None prepares those of the config.

  Returns:
    The last evaluation's metrics, or the last logged step's where nothing is held out.

  Raises:
    ConfigError, DataError, PackingError: something given cannot be used; before any compile.
    CheckpointError: a checkpoint is missing, or belongs to another run.
    DiskError: the disk is full or cannot be written.
    InUseError: another run owns the workdir.
    TrainingError: policy and reference disagree before step 1 (said after it, where nothing is evaluated),
      or the loss is not finite.
  """
  # What the config alone shows cannot run is refused before the workdir exists.
  config = weights.with_tokenizer(config)
  config_lib.validate(config)
  with workdir_lib.open_workdir(workdir, config) as workdir:
    return _run(workdir_lib.with_template_date(config, workdir), workdir, data)


def _run(
  config: ml_collections.ConfigDict, workdir: paths.Path, data: resolve.Data | None
) -> dict[str, float]:
  resolve.use_compile_cache(config)
  devices = resolve.make_devices(config)
  data = data or resolve.load_data(config)
  batches = make_batches(config, workdir, data, devices)
  start = place(config, data, batches, devices)
  check_memory(config, start, batches, devices)
  workdir_lib.check_space(workdir, start.state, config)
  checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep, best=config.checkpoint_best, owner=True)
  first, start = continue_from(config, workdir, checkpoints, start, batches, data, devices)
  with (
    Log(workdir, config, first) as log,
    stop_signal() as stop_asked,
    Profile(config_lib.profiled_steps(config), workdir) as profile,
  ):
    loop = Loop(config, workdir, data, start, batches, devices, checkpoints, log, first)
    del start  # the loop's copies are donated step by step; a second name would keep what they were
    if first == 0:
      loop.measure_start()
    loop.throughput.start()
    loop.take_steps(batches.train.training(first, config.steps), profile, stop_asked)
    checkpoints.close()
  return log.last.get("eval", log.last.get("train", {}))


class Batches(NamedTuple):
  """Comparisons in rows. `told` is what data_report.json said before this start, or nothing."""

  train: loader.Loader
  held_out: loader.Loader | None
  told: dict


class Start(NamedTuple):
  """All that a step takes and is. `about` is what its checkpoints belong to."""

  model: ModelConfig
  objective: objectives.Objective
  programs: programs_lib.Programs
  state: step_lib.TrainState
  reference: Any
  about: dict[str, Any]
  flops: float


def make_batches(
  config: ml_collections.ConfigDict, workdir: paths.Path, data: resolve.Data, devices
) -> Batches:
  told = workdir_lib.open_report(workdir, data)
  train = resolve.make_loader(config, data.train, devices)
  held_out = data.held_out and resolve.make_loader(config, data.held_out, devices)
  _report_plan(train, config)
  processes.agree("data", data.fingerprints())
  return Batches(train, held_out, told)


def place(config: ml_collections.ConfigDict, data: resolve.Data, batches: Batches, devices) -> Start:
  """Reads the weights and puts them on the devices; no other copy of them is left when it returns."""
  # Of a Hugging Face model each device reads its own part: no host holds it whole.
  setup = resolve.make_setup(config, axis_name=devices.axis_name, place=devices.place_shard)
  resolve.check_ids(setup.model, config, data)
  if config.checkpoint_best:
    _check_best(setup, batches.train, config, devices.axis_name)
  programs = programs_lib.make(config, setup.model, setup.objective, devices)
  about = {
    "model": setup.model.as_dict(),
    "data": data.fingerprint,
    "stop_ids": data.stop_ids,
    "reference": None if setup.reference is None else checkpoint.fingerprint(setup.reference),
  }
  reference = (
    None
    if setup.reference is None
    else devices.place(setup.reference, donated=bool(config.reference.sync_every))
  )
  if setup.objective.needs_reference and config.reference.mode == "stored":
    resolve.use_stored_reference(
      config, setup, reference, about["reference"], [batches.train, batches.held_out], devices
    )
    # Freed before the first step: its log-probs are all that is needed of it.
    reference = reference if config.lora.rank else None  # an adapter's is its base as well
  state = devices.place(step_lib.init_state(setup.params, programs.tx))
  # Now that it is placed, what it was read into can be given back.
  memory.fit_memory_to(state)
  return Start(
    setup.model,
    setup.objective,
    programs,
    state,
    reference,
    about,
    needs.flops_per_comparison(config, setup, batches.train.lengths),
  )


def check_memory(config: ml_collections.ConfigDict, start: Start, batches: Batches, devices) -> None:
  """Refuses to start when the compiled step needs more memory than a device has."""
  if not config.check_memory:
    return
  if not devices.compiles_ahead:
    say("the check of memory is left out: pmap over several processes compiles with its first step only")
    return
  stored = config.reference.mode == "stored" and start.objective.needs_reference
  rows = needs.largest_rows(batches.train, start.objective.num_responses, devices, stored=stored)
  needs.check_fits(start.programs.train_step.compile(start.state, start.reference, rows))


def continue_from(
  config, workdir, checkpoints: Checkpoints, start: Start, batches: Batches, data: resolve.Data, devices
) -> tuple[int, Start]:
  """Returns the step that is done, 0 in a new run, and the start as its checkpoint has it."""
  # Every process looks, and then they compare: one that sees another step would train another run.
  first = checkpoints.last_sound() or 0
  processes.agree(
    "start",
    {
      "the last checkpoint at step": first,
      "the model": processes.digest(start.about["model"]),
      "a reference with digest": start.about["reference"],
    },
  )
  if not first:
    return first, start
  saved, was = checkpoints.restore(first, devices.restore_target(start.state))
  workdir_lib.check_same(was, start.about, workdir, report_lib.differences(batches.told, data.report or {}))
  # `finite` is of the step that failed in the run before, if one did; the state is the last good one.
  state, reference = devices.place(saved._replace(finite=np.ones((), bool))), start.reference
  if config.reference.sync_every:
    reference = devices.place(checkpoints.restore_reference(first, devices.restore_target(reference)))
  say(f"continuing from step {first} of {workdir}")
  return first, start._replace(state=state, reference=reference)


class Loop:
  """A run between two steps: its state, its reference, and what is told and kept of them."""

  def __init__(
    self,
    config,
    workdir,
    data: resolve.Data,
    start: Start,
    batches: Batches,
    devices,
    checkpoints: Checkpoints,
    log: Log,
    first: int,
  ):
    self.config, self.workdir, self.devices, self.batches = config, workdir, devices, batches
    self.checkpoints, self.log, self.about = checkpoints, log, start.about
    self.objective, self.programs = start.objective, start.programs
    self.state, self.reference, self.metrics = start.state, start.reference, {}
    self.throughput = Throughput(start.flops)
    every = config.reference.sync_every
    self.reference_moves_after = lambda step: every and step % every == 0
    self.watch = watching.make_watcher(
      config, start.model, data.held_out or data.train, workdir, devices, after_step=first or -1
    )

  def measure_start(self) -> None:
    """Evaluates and samples before step 1, as far as the run does so later."""
    if self.config.eval_every:
      metrics = self.programs.evaluate(
        self.state.params, self.reference, self.batches.held_out.evaluation(), self.state.step
      )
      if self.objective.needs_reference:
        check_agreement(metrics, self.config)
      self.log.write(0, "eval", metrics)
    if self.watch is not None:
      self.log.write(0, "samples", self.watch(0, self.programs.evaluated(self.state), self.reference))

  def take_steps(
    self, batches: Iterator[loader.Batch], profile: Profile, stop_asked: Callable[[int], bool]
  ) -> None:
    """Takes the steps of these batches, telling and keeping what is due after each."""
    for batch, rows, waited in placed_ahead(batches, self.devices):
      profile.before(batch.step + 1, self.state)
      self.step(batch, rows, waited)
      self.tell_and_keep(batch.step + 1, stopping=stop_asked(batch.step + 1))

  def step(self, batch: loader.Batch, rows: Any, waited: float) -> None:
    """Takes a step; `waited` are the seconds its rows have kept the loop."""
    with self.throughput.on_device():
      self.state, self.metrics = self.programs.train_step(self.state, self.reference, rows)
    self.checkpoints.check()  # a save that failed since the last step ends the run now, not at the next save
    if self.reference_moves_after(batch.step + 1):
      self.reference, _ = self.programs.move_reference(self.reference, self.state)
    self.log.advance()
    self.throughput.advance(batch, waited)

  def tell_and_keep(self, step: int, *, stopping: bool) -> None:
    """Logs, evaluates, samples and saves what is due after a step, and ends the run if it was asked to."""
    config, log = self.config, self.log
    due = lambda every: every and (step % every == 0 or step == config.steps)
    logging_now, saving = step == 1 or due(config.log_every), due(config.checkpoint_every)
    if logging_now or saving or stopping:  # only here: to ask is to wait for the devices
      self.check_finite()
    if logging_now:
      metrics = {name: float(value) for name, value in self.devices.collect(self.metrics).items()}
      # A step tells what held before it. A run that evaluates has asked already; another need not compile and
      # wait for an evaluation of its own.
      if step == 1 and self.objective.needs_reference and not config.eval_every:
        check_agreement(metrics, config)
      log.write(step, "train", metrics | self.throughput.rates())
    if due(config.eval_every):
      log.write(
        step,
        "eval",
        self.programs.evaluate(
          self.programs.evaluated(self.state),
          self.reference,
          self.batches.held_out.evaluation(),
          self.state.step,
        ),
      )
      self.throughput.start()
    if self.watch is not None and due(config.sample_every):
      log.write(step, "samples", self.watch(step, self.programs.evaluated(self.state), self.reference))
      self.throughput.start()
    if saving:
      self._save(step)
    if stopping:
      self.stop(step)

  def check_finite(self) -> None:
    """Waits for the last step; if it or one before was not finite, saves the last good state and raises."""
    with self.throughput.on_device():
      finite = self.devices.collect(self.state.finite)
    if not finite:
      self._stop_at_a_bad_step()

  def stop(self, step: int) -> None:
    """Saves a step that is not saved yet, and raises: a signal has asked to stop."""
    # It may have been due just now.
    if self.config.checkpoint_every and step and step not in self.checkpoints.steps():
      self._save(step)
    self.checkpoints.wait()
    # None ends before all have written their part: the first to go takes the others with it.
    processes.meet("stop")
    raise TrainingError(
      f"stopped by a signal after step {step}; "
      + (
        f"it is saved in {self.workdir}: the same command continues"
        if self.config.checkpoint_every
        else "nothing is saved: checkpoint_every is 0"
      )
    )

  def _save(self, step: int) -> None:
    moving = self.devices.collect(self.reference) if self.config.reference.sync_every else None
    self.checkpoints.save(
      step, self.devices.collect(self.state), self.about, self.log.evaluations.get(step), reference=moving
    )

  def _stop_at_a_bad_step(self) -> None:
    """Saves the last good state, which the step has kept, and raises."""
    good, config = int(self.devices.collect(self.state.step)), self.config
    saved = "nothing is saved: checkpoint_every is 0"
    if config.checkpoint_every:
      if good and good not in self.checkpoints.steps():
        self._save(good)
      self.checkpoints.wait()
      processes.meet("bad step")
      saved = f"the state before it is saved in {self.workdir}"
    raise TrainingError(
      f"the loss or its gradient is not finite at step {good + 1}; {saved}. Usual causes: a "
      f"learning rate too high (optimizer.learning_rate={config.optimizer.learning_rate}), no "
      f"clipping (optimizer.max_grad_norm={config.optimizer.max_grad_norm}), or weights that are "
      "not finite"
    )


def dry_run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike = "", count: int = 3
) -> resolve.Data:
  """Reads a run's data, reports on them and shows some comparisons as they will be scored.

  Args:
    config: as `run` takes it.
    workdir: of a run that is there, if there is one: its chat template's day is told.
    count: how many comparisons are shown.

  Raises:
    ConfigError, DataError: something given cannot be used.
  """
  config = weights.with_tokenizer(config)
  config_lib.validate(config)
  if workdir:
    config = workdir_lib.with_template_date(config, paths.of(workdir))
  data = resolve.load_data(config)
  tokenizer, coloured = tokenization.load_tokenizer(config.tokenizer), sys.stdout.isatty()
  if coloured:
    say(report_lib.legend())
  subset = loader.without_mismatched(data.train)
  for i in range(min(count, len(subset))):
    say(f"comparison {subset.example(i)}")
    say(report_lib.shown(tokenizer, subset.comparison(i), subset.scored(i), coloured=coloured))
  return data


def join_processes(config: ml_collections.ConfigDict) -> None:
  """Joins the processes of a run on several hosts, if there are; before any other use of jax."""
  processes.join_run(config.parallel)


def check_agreement(metrics: dict[str, float], config: ml_collections.ConfigDict) -> None:
  """Refuses to go on when policy and reference give different log-probs before step 1.

  Where they agree every log-ratio is 0 and the DPO loss is log 2.

  Raises:
    TrainingError: saying by how much and what usually causes it.
  """
  # In bfloat16 two programs round a response's sum by some tenths of a nat.
  tolerance = 1e-3 if config.model.dtype == "float32" else 0.5
  apart = metrics["log_ratios/abs"]
  if not np.isfinite(apart):
    raise TrainingError(
      f"before step 1 the log-ratio of policy and reference is {apart}: the weights of "
      f"{config.model.checkpoint or 'the random start'} give no finite log-probs"
    )
  if apart > tolerance and not config.reference.may_differ:
    raise TrainingError(
      f"before step 1 policy and reference differ by {apart:.3g} nats a response on average "
      f"(loss {metrics['loss']:.6f}; for DPO it is log 2 = 0.693147 where they agree). Usual "
      "causes: another checkpoint as reference, another dtype, an adapter already applied. Set "
      "reference.may_differ=True if that is the purpose"
    )


def _check_best(setup: resolve.Setup, train_loader: loader.Loader, config, axis_name: str | None) -> None:
  """Refuses to rank checkpoints by a metric that the objective does not have; it is traced for it."""
  rows = next(train_loader.training(0, 1)).rows
  if config.reference.mode == "stored":
    shape = (*rows.example.shape, setup.objective.num_responses)
    rows = rows._replace(reference=np.zeros(shape, np.float32))
  evaluate = jax.vmap(setup.objective.evaluate, in_axes=(None, None, 0), axis_name=axis_name)
  _, metrics = jax.eval_shape(evaluate, setup.params, setup.reference, jax.tree.map(lambda x: x[None], rows))
  if config.checkpoint_best not in metrics:
    raise ConfigError(
      f"config.checkpoint_best is {config.checkpoint_best!r}; it must be one of {', '.join(metrics)}"
    )


def _report_plan(train_loader: loader.Loader, config: ml_collections.ConfigDict) -> None:
  plan = train_loader.plan()
  shapes = sorted(set(plan.rows.tolist()))
  say(
    f"{len(plan.rows)} steps an epoch of {config.batch_size} comparisons; rows of "
    f"{plan.shape.length} tokens, {plan.shape.scored} scored; {len(shapes)} shapes to compile: "
    f"{shapes} rows; row fill "
    f"{packing.row_fill(plan, train_loader.lengths, part=train_loader.part):.1%}"
  )


def placed_ahead(
  batches: Iterator[loader.Batch], devices, ahead: int = 2
) -> Iterator[tuple[loader.Batch, Any, float]]:
  """Keeps `ahead` batches on the devices before they are asked for; says how long each kept the loop."""
  # jax places in the background: rows for the next steps travel while a step is computed.
  queue, asked, there_are_more = [], time.perf_counter(), True
  while queue or there_are_more:
    while there_are_more and len(queue) <= ahead:
      batch = next(batches, None)
      there_are_more = batch is not None
      if there_are_more:
        queue.append((batch, devices.place_rows(batch.rows, batch.total_rows)))
    if queue:
      yield *queue.pop(0), time.perf_counter() - asked
      asked = time.perf_counter()
