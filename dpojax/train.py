"""Trains a model on comparisons: SFT, DPO or a reward model. Read it from top to bottom.

python -m dpojax.train --config=FILE[:arg] --workdir=DIR [--config.key=value ...] [--dry_run]

DIR/config.json  DIR/data_report.json  DIR/metrics.jsonl  DIR/checkpoints/  DIR/tensorboard/
DIR/samples.jsonl

With --dry_run the data are read, reported and three comparisons shown as they will be scored; nothing is
compiled, and nothing written but to the cache.
"""

import contextlib
import datetime
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from typing import Any, Callable, Iterator

import jax
import ml_collections
import numpy as np
import tqdm
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from dpojax import plan
from dpojax.data import loader, packing, tokenization
from dpojax.data import report as report_lib
from dpojax.evaluate import watching
from dpojax.runtime import memory, processes
from dpojax.runtime.command import command, is_main, say
from dpojax.runtime.disk import DiskError, disk_errors
from dpojax.runtime.errors import UserError
from dpojax.runtime.ownership import owned
from dpojax.training import checkpoint, objectives, resolve, weights
from dpojax.training import config as config_lib
from dpojax.training import step as step_lib
from dpojax.training.checkpoint import CheckpointError, Checkpoints
from dpojax.training.config import ConfigError
from dpojax.training.metrics import MetricsWriter
from dpojax.training.parts import Parts
from dpojax.training.throughput import Profile, Throughput


class TrainingError(UserError, RuntimeError):
  """Training cannot go on; the message says at which step, why, and what is saved."""


def run(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike, *,
    data: resolve.Data | None = None) -> dict[str, float]:
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
    TrainingError: policy and reference disagree before step 1, or the loss is not finite.
  """
  config = weights.with_tokenizer(config)
  config_lib.validate(config)
  with open_workdir(workdir, config) as workdir:
    return _run(with_template_date(config, workdir), workdir, data)


def _run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, data: resolve.Data | None
) -> dict[str, float]:
  resolve.use_compile_cache(config)
  devices = resolve.make_devices(config)
  data = data or resolve.load_data(config)
  was_report = open_report(workdir, data)
  train_loader = resolve.make_loader(config, data.train, devices)
  held_out_loader = data.held_out and resolve.make_loader(config, data.held_out, devices)
  _report_plan(train_loader, config)
  processes.agree("data", data.fingerprints())

  setup = resolve.make_setup(config, axis_name=devices.axis_name, place=devices.place_part)
  resolve.check_ids(setup.model, config, data)
  _check_metrics(setup, train_loader, config, devices.axis_name)
  tx, train_step = resolve.make_train_step(config, setup.objective, devices)
  about = {
      "model": setup.model.as_dict(), "data": data.fingerprint, "stop_ids": data.stop_ids,
      "reference": None if setup.reference is None else checkpoint.fingerprint(setup.reference)}
  reference = None if setup.reference is None else devices.place(
      setup.reference, donated=bool(config.reference.sync_every))
  if setup.objective.needs_reference and config.reference.mode == "stored":
    resolve.use_stored_reference(
        config, setup, reference, about["reference"], [train_loader, held_out_loader], devices)
    reference = reference if config.lora.rank else None  # an adapter's is its base as well
  state = devices.place(step_lib.init_state(setup.params, tx))
  throughput = Throughput(plan.flops_per_comparison(config, setup, train_loader.lengths))
  setup = setup._replace(params=None, reference=None)  # the placed copies are the only ones now
  memory.fit_memory_to(state)

  if config.check_memory and not devices.compiles_ahead:
    say("the check of memory is left out: pmap over several processes compiles with its first step only")
  elif config.check_memory:
    stored = config.reference.mode == "stored" and setup.objective.needs_reference
    rows = plan.largest_rows(train_loader, setup.objective.num_responses, devices, stored=stored)
    plan.check_fits(train_step.compile(state, reference, rows))
  check_space(workdir, state, config)
  checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep, best=config.checkpoint_best, owner=True)
  first = checkpoints.last_sound() or 0
  processes.agree("start", {
      "the last checkpoint at step": first, "the model": processes.digest(about["model"]),
      "a reference with digest": about["reference"]})
  if first:
    saved, was = checkpoints.restore(first, devices.restore_target(state))
    check_same(was, about, workdir, report_lib.differences(was_report, data.report or {}))
    state = devices.place(saved._replace(finite=np.ones((), bool)))
    if config.reference.sync_every:
      reference = devices.place(
          checkpoints.restore_reference(first, devices.restore_target(reference)))
    say(f"continuing from step {first} of {workdir}")

  evaluate = make_evaluate(setup.objective, devices, resolve.parts_of(config, devices))
  evaluated = resolve.make_evaluated(config, devices)
  move_reference = devices.lift(
      step_lib.make_reference_step(alpha=config.reference.sync_alpha), donate_state=True)
  watch = watching.make_watcher(
      config, setup.model, data.held_out or data.train, workdir, devices, after_step=first or -1)
  moving = lambda: devices.collect(reference) if config.reference.sync_every else None

  profile = Profile(config_lib.profiled_steps(config), workdir)
  with Log(workdir, config, first) as log, stop_signal() as stop_asked, profile:
    if first == 0:
      batches = held_out_loader.evaluation() if config.eval_every else train_loader.training(0, 1)
      metrics = evaluate(state.params, reference, batches, state.step)
      if setup.objective.needs_reference:
        check_agreement(metrics, config)
      if config.eval_every:
        log.write(0, "eval", metrics)
      if watch is not None:
        log.write(0, "samples", watch(0, evaluated(state), reference))

    throughput.start()
    for batch, rows, waited in _placed_ahead(train_loader.training(first, config.steps), devices):
      step = batch.step + 1
      profile.before(step, state)
      with throughput.on_device():
        state, metrics = train_step(state, reference, rows)
      checkpoints.check()
      if config.reference.sync_every and step % config.reference.sync_every == 0:
        reference, _ = move_reference(reference, state)
      log.advance()
      throughput.advance(batch, waited)
      due = lambda every: every and (step % every == 0 or step == config.steps)
      stopping = stop_asked(step)
      logging_now, saving = step == 1 or due(config.log_every), due(config.checkpoint_every)
      finite = True
      if logging_now or saving or stopping:
        with throughput.on_device():
          finite = devices.collect(state.finite)
      if not finite:
        _stop_at_a_bad_step(state, moving(), devices, checkpoints, about, workdir, config)
      if logging_now:
        metrics = {name: float(value) for name, value in devices.collect(metrics).items()}
        log.write(step, "train", metrics | throughput.rates())
      if due(config.eval_every):
        log.write(step, "eval", evaluate(
            evaluated(state), reference, held_out_loader.evaluation(), state.step))
        throughput.start()
      if watch is not None and due(config.sample_every):
        log.write(step, "samples", watch(step, evaluated(state), reference))
        throughput.start()
      if saving or (stopping and config.checkpoint_every):
        checkpoints.save(
            step, devices.collect(state), about, log.evaluations.get(step), reference=moving())
      if stopping:
        checkpoints.wait()
        processes.meet("stop")
        raise TrainingError(
            f"stopped by a signal after step {step}; "
            + (f"it is saved in {workdir}: the same command continues"
               if config.checkpoint_every else "nothing is saved: checkpoint_every is 0"))
    checkpoints.close()
  return log.last.get("eval", log.last.get("train", {}))


def dry_run(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike = "", count: int = 3) -> resolve.Data:
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
    config = with_template_date(config, pathlib.Path(workdir))
  data = resolve.load_data(config)
  tokenizer, coloured = tokenization.load_tokenizer(config.tokenizer), sys.stdout.isatty()
  if coloured:
    say(report_lib.legend())
  subset = loader.without_borrowed(data.train)
  for i in range(min(count, len(subset))):
    say(f"comparison {subset.example(i)}")
    say(report_lib.shown(tokenizer, subset.comparison(i), subset.scored(i), coloured=coloured))
  return data


def join_processes(config: ml_collections.ConfigDict) -> None:
  """Joins the processes of a run on several hosts, if there are; before any other use of jax."""
  settings = config.parallel
  if settings.coordinator:
    processes.join(settings.coordinator, settings.num_processes, settings.process_id,
                   timeout=settings.lost_after)


def check_agreement(metrics: dict[str, float], config: ml_collections.ConfigDict) -> None:
  """Refuses to start when policy and reference give different log-probs before step 1.

  Where they agree every log-ratio is 0 and the DPO loss is log 2.

  Raises:
    TrainingError: saying by how much and what usually causes it.
  """
  tolerance = 1e-3 if config.model.dtype == "float32" else 0.5
  apart = metrics["log_ratios/abs"]
  if not np.isfinite(apart):
    raise TrainingError(
        f"before step 1 the log-ratio of policy and reference is {apart}: the weights of "
        f"{config.model.checkpoint or 'the random start'} give no finite log-probs")
  if apart > tolerance and not config.reference.may_differ:
    raise TrainingError(
        f"before step 1 policy and reference differ by {apart:.3g} nats a response on average "
        f"(loss {metrics['loss']:.6f}; for DPO it is log 2 = 0.693147 where they agree). Usual "
        "causes: another checkpoint as reference, another dtype, an adapter already applied. Set "
        "reference.may_differ=True if that is the purpose")


def make_evaluate(
    objective: objectives.Objective, devices, parts: Parts = Parts()) -> Callable:
  """Returns `evaluate(params, reference, batches, step)`: an objective's metrics over their comparisons.

  `step` is placed, as that of a state; an objective that moves is evaluated as it is there.
  """
  eval_step = devices.lift(
      step_lib.make_eval_step(objective, parts=parts, axis_name=devices.axis_name),
      donate_state=False)

  def evaluate(params, reference, batches: Iterator[loader.Batch], step) -> dict[str, float]:
    sums = {}
    for batch in batches:
      part = eval_step(params, reference, devices.place_rows(batch.rows, batch.total_rows), step)
      for name, mean in jax.device_get(devices.collect(part)).items():
        sums[name] = sums.get(name, 0.0) + np.asarray(mean, np.float64)
    return {name: float(total / count) if count else float("nan")
            for name, (total, count) in sums.items()}

  return evaluate


class Log:
  """What a run tells: files, a bar with the time left on a terminal, and plain lines.

  `last` holds the last metrics of each split, `evaluations` those of each evaluation by step.
  """

  def __init__(self, workdir: pathlib.Path, config: ml_collections.ConfigDict, first: int):
    self.last, self.evaluations, self._steps = {}, {}, config.steps
    self._writer = MetricsWriter(
        workdir, after_step=first or -1, wandb_project=config.wandb_project,
        settings=config.to_dict()) if is_main() else None
    self._bar = tqdm.tqdm(
        total=config.steps, initial=first, unit="step",
        disable=not (is_main() and sys.stderr.isatty()))

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._bar.close()
    if self._writer is not None:
      self._writer.close()

  def advance(self) -> None:
    """Moves the bar by a step."""
    self._bar.update(1)

  def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step, but those of nothing (such as margins of no pairs)."""
    metrics = {name: value for name, value in metrics.items() if not np.isnan(value)}
    self.last[split] = metrics
    if split == "eval":
      self.evaluations[step] = metrics
    if self._writer is not None:
      self._writer.write(step, split, metrics)
    names = ("loss", "rewards/accuracies", "rewards/margins", "objective/scores", "objective/kl",
             "kl", "score", "tokens", "grad_norm", "pairs_per_second")
    text = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    with tqdm.tqdm.external_write_mode(file=sys.stdout):
      say(f"step {step}/{self._steps}  {split}  {text}")


@contextlib.contextmanager
def open_workdir(
    workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> Iterator[pathlib.Path]:
  """Makes the workdir, owns it, and writes config.json or checks that the run there is the same.

  Of several processes the first does it for all, after they have compared configs and versions.

  Raises:
    DisagreementError: the processes have different ones.
    InUseError: another run owns it.
    ConfigError: it holds a run of another config.
    DiskError: the disk is full or cannot be written.
  """
  workdir = pathlib.Path(workdir).absolute()
  path = workdir / "config.json"
  with contextlib.ExitStack() as held:
    def open_it():
      with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
      held.enter_context(owned(workdir / "run", f"the workdir {workdir}"))
      with disk_errors(workdir):
        dated = with_template_date(config, workdir)
        if path.exists():
          config_lib.check_continues(checkpoint.load_settings(workdir), dated)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(config_lib.to_json(dated))
        os.replace(temporary, path)

    processes.agree("config", config_lib.shared(config) | processes.versions())
    if is_main():
      open_it()
    processes.meet("workdir")
    processes.saves_in(workdir)
    yield workdir


def with_template_date(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Returns the config with a day for chat templates: its own, that of the run in the workdir, or today."""
  if config.data.template_date:
    return config
  path = workdir / "config.json"
  kept = config_lib.from_json(path.read_text()).data.get("template_date", "") if path.exists() else ""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.template_date = kept or datetime.date.today().isoformat()
  return config


def open_report(workdir: pathlib.Path, data: resolve.Data) -> dict:
  """Returns what data_report.json in the workdir says, or nothing, and writes it there if it is not."""
  path = workdir / "data_report.json"
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    pass
  if data.report is not None and is_main():
    with disk_errors(workdir):
      path.write_text(json.dumps(data.report, indent=2, ensure_ascii=False) + "\n")
  return {}


def _check_metrics(
    setup: resolve.Setup, train_loader: loader.Loader, config, axis_name: str | None) -> None:
  """Traces the objective once, and refuses to rank checkpoints by a metric it does not have."""
  rows = next(train_loader.training(0, 1)).rows
  if config.reference.mode == "stored":
    shape = (*rows.example.shape, setup.objective.num_responses)
    rows = rows._replace(reference=np.zeros(shape, np.float32))
  evaluate = jax.vmap(setup.objective.evaluate, in_axes=(None, None, 0), axis_name=axis_name)
  _, metrics = jax.eval_shape(
      evaluate, setup.params, setup.reference, jax.tree.map(lambda x: x[None], rows))
  if config.checkpoint_best and config.checkpoint_best not in metrics:
    raise ConfigError(
        f"config.checkpoint_best is {config.checkpoint_best!r}; it must be one of "
        f"{', '.join(metrics)}")


def check_space(workdir: pathlib.Path, state: Any, config: ml_collections.ConfigDict) -> None:
  """Refuses to start when not even one checkpoint fits the disk."""
  if not config.checkpoint_every:
    return
  saved = (state, state.params) if config.reference.sync_every else state
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
  free = shutil.disk_usage(workdir).free
  if free < needed:
    raise DiskError(
        f"a checkpoint takes up to {needed / 2**20:.0f} MiB but the disk of {workdir} has "
        f"{free / 2**20:.0f} MiB free; free some space, or set checkpoint_every=0")


def check_same(was: dict, now: dict, workdir: pathlib.Path, of_data: str = "") -> None:
  """Refuses to continue a run of another model, of other ids, or beside another reference.

  Args:
    was: what the checkpoint belongs to.
    now: what this run is of.
    workdir: the run's.
    of_data: in what the data differ, in words.
  """
  what = {"model": "another model", "data": "other ids of its data", "reference": "another reference weights"}
  for key, name in what.items():
    if was[key] != now[key]:
      why = f"; what differs is {of_data}" if key == "data" and of_data else ""
      raise CheckpointError(
          f"the run in {workdir} was started with {name} ({was[key]}, now {now[key]}){why}; "
          "bring it back, or start in another workdir")


def _report_plan(train_loader: loader.Loader, config: ml_collections.ConfigDict) -> None:
  plan = train_loader.plan()
  shapes = sorted(set(plan.rows.tolist()))
  say(f"{len(plan.rows)} steps an epoch of {config.batch_size} comparisons; rows of "
      f"{plan.shape.length} tokens, {plan.shape.scored} scored; {len(shapes)} shapes to compile: "
      f"{shapes} rows; row fill "
      f"{packing.row_fill(plan, train_loader.lengths, part=train_loader.part):.1%}")


def _placed_ahead(
    batches: Iterator[loader.Batch], devices, ahead: int = 2
) -> Iterator[tuple[loader.Batch, Any, float]]:
  """Keeps `ahead` batches on the devices before they are asked for; says how long each kept the loop."""
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


def _stop_at_a_bad_step(state, moving, devices, checkpoints, about, workdir, config) -> None:
  """Saves the last good state, which the step has kept, and raises."""
  good = int(devices.collect(state.step))
  saved = "nothing is saved: checkpoint_every is 0"
  if config.checkpoint_every:
    if good and good not in checkpoints.steps():
      checkpoints.save(good, devices.collect(state), about, reference=moving)
    checkpoints.wait()
    processes.meet("bad step")
    saved = f"the state before it is saved in {workdir}"
  raise TrainingError(
      f"the loss or its gradient is not finite at step {good + 1}; {saved}. Usual causes: a "
      f"learning rate too high (optimizer.learning_rate={config.optimizer.learning_rate}), no "
      f"clipping (optimizer.max_grad_norm={config.optimizer.max_grad_norm}), or weights that are "
      "not finite")


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
  """Yields `asked(step)`: whether SIGTERM has come, as a machine about to be taken away sends it.

  With several processes jax agrees on the step at which all of them stop.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():  # no handler can be set here
    yield lambda step: False
    return
  flag = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: flag.set())
  try:
    yield lambda step: flag.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)


CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :arg if it takes one.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]}")
  logging.set_verbosity(logging.WARNING)
  with command():
    join_processes(CONFIG.value)
    if flags.FLAGS.dry_run:
      dry_run(CONFIG.value, WORKDIR.value or "")
    else:
      run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
  flags.DEFINE_bool("dry_run", False, "Report on the data, show three comparisons, and stop.")
  flags.mark_flag_as_required("config")
  flags.register_multi_flags_validator(
      ["workdir", "dry_run"], lambda given: given["workdir"] or given["dry_run"], "--workdir is missing")
  app.run(main)
