"""Trains by DPO on the policy's own samples, round after round. Read it from top to bottom.

python -m dpojax.online --config=configs/online.py --workdir=DIR \\
    --config.model.checkpoint=runs/sft --config.data.path=pairs.jsonl --config.online.judge=runs/reward

The first `online.offline_steps` are as in `dpojax.train`, on the data's pairs; where they are all of `steps`
it is that run, to the same numbers. Then come rounds: `num_samples` answers of the present policy to each of
`prompts_per_round` prompts, what `online.judge` says of them, the comparisons that come of it, beside them a
share of the data's, and `steps_per_round` steps on those. The reference stays, moves as TR-DPO's, or is the
policy that sampled. Optimizer, learning rate and steps go on over the rounds. A workdir is that of
`dpojax.train`, and holds besides

DIR/comparisons/round_N.jsonl   every comparison made, as data for `dpojax.train`
DIR/rounds/N/   samples, labels and counts of each round; see `rounds`
DIR/answers.jsonl   what a server has said; nothing is asked twice

and in metrics.jsonl a line a round, under `round`: pairs, ties, labels so far, scores, lengths, and the KL of
the samples to the reference as it stands. A run killed at any point continues to the same numbers. From
Python, `run` takes data in ids, whoever labels (`labels.Labeller`), and a callback between rounds.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from dpojax.data import loader, tokenization, tokenized
from dpojax.models.config import ModelConfig
from dpojax.online import config as online_config
from dpojax.online import pairs, rounds
from dpojax.online.labels import Labeller, make_labeller
from dpojax.plan import needs
from dpojax.runtime import paths
from dpojax.runtime.command import say
from dpojax.runtime.stopping import stop_signal
from dpojax.sample.current import Current
from dpojax.train import loop as train
from dpojax.train.loop import TrainingError
from dpojax.training import config as config_lib
from dpojax.training import resolve, weights
from dpojax.training import workdir as workdir_lib
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.log import Log
from dpojax.training.throughput import Profile, Throughput

_STAND_INS = 512


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  data: resolve.Data | None = None,
  labeller: Labeller | None = None,
  callback: Callable[[int, Any], None] | None = None,
) -> dict[str, float]:
  """Trains as the config says, from the last checkpoint in `workdir` if there is one.

  Args:
    config: all keys of `dpojax.online.config.defaults()`.
    workdir: the run's folder, made if missing.
    data: comparisons that are at hand in ids; None prepares those of the config.
    labeller: who says which answer is better; None is `online.judge`, which is then not read.
    callback: called with the step and the placed params to evaluate before the first round and after each,
      which are gone after it returns; not again of those that a run before this one has ended.

  Returns:
    The last evaluation's metrics, or the last logged step's where nothing is held out.

  Raises:
    ConfigError, DataError, PackingError: something given cannot be used; before any compile.
    CheckpointError: a checkpoint is missing, or belongs to another run.
    DamageError: what a round has left is not as it was written.
    DiskError: the disk is full or cannot be written.
    InUseError: another run owns the workdir.
    JudgeError: a server cannot be asked.
    TrainingError: an update is not finite, a round gives too few comparisons, or a signal asked to stop.
  """
  given = config.steps
  config = online_config.settled(weights.with_tokenizer(config), labeller and labeller.compares)
  if config.steps < given:
    say(
      f"{config.steps} of {given} steps: online.max_labels={config.online.max_labels} allows no more rounds"
    )
  with workdir_lib.open_workdir(workdir, config) as workdir:
    return _run(workdir_lib.with_template_date(config, workdir), workdir, data, labeller, callback)


def _run(config, workdir: paths.Path, data, labeller, callback) -> dict[str, float]:
  settings, training = config.online, online_config.of_training(config)
  resolve.use_compile_cache(training)
  devices = resolve.make_devices(training)
  data = data or resolve.load_data(training)
  batches = train.make_batches(training, workdir, data, devices)
  start = train.place(training, data, batches, devices)
  with contextlib.ExitStack() as held:
    own = _Own(config, workdir, data, start.model, labeller, devices, held)
    own.check_memory(start, batches)
    workdir_lib.check_space(workdir, start.state, training)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep, best=config.checkpoint_best, owner=True)
    first, start = train.continue_from(training, workdir, checkpoints, start, batches, data, devices)
    log, stop_asked = held.enter_context(Log(workdir, training, first)), held.enter_context(stop_signal())
    profile = held.enter_context(Profile(config_lib.profiled_steps(training), workdir))
    loop = train.Loop(training, workdir, data, start, batches, devices, checkpoints, log, first)
    flops = functools.partial(
      needs.flops_per_comparison, training, start._replace(state=None, reference=None)
    )
    del start  # the loop's copies are donated step by step; a second name would keep what they were
    offline = settings.offline_steps
    if settings.reference == "last_round":
      loop.reference_moves_after = lambda step: (
        step >= offline and (step - offline) % settings.steps_per_round == 0
      )
    if first == 0:
      loop.measure_start()
    loop.throughput.start()
    loop.take_steps(batches.train.training(first, max(first, offline)), profile, stop_asked)
    if callback is not None and first <= offline:
      callback(offline, loop.programs.evaluated(loop.state))
    for number in range(1, online_config.rounds_of(config) + 1):
      before = offline + (number - 1) * settings.steps_per_round
      done = max(0, first - before)
      if done >= settings.steps_per_round:
        continue
      of_round = own.batches(number, loop, before, done, stop_asked)
      # Rounds have other lengths, and sampling before them is no part of a step's time.
      loop.throughput = Throughput(flops(of_round.lengths))
      steps = of_round.training(done, settings.steps_per_round)
      loop.take_steps((batch._replace(step=before + batch.step) for batch in steps), profile, stop_asked)
      if callback is not None:
        callback(before + settings.steps_per_round, loop.programs.evaluated(loop.state))
    checkpoints.close()
  return log.last.get("eval", log.last.get("train", {}))


class _Own:
  """The comparisons that a run makes of its own samples, as rows; nothing where it has no rounds."""

  def __init__(
    self, config, workdir, data: resolve.Data, model: ModelConfig, labeller: Labeller | None, devices, held
  ):
    self._config, self._training = config, online_config.of_training(config)
    self._data, self._devices, self._rounds = data, devices, None
    if not online_config.rounds_of(config):
      return
    settings = config.online
    prompts = rounds.find_prompts(config, data, model)
    current = Current(
      self._training,
      model,
      tuple(data.stop_ids),
      online_config.draw_of(config),
      eos=tokenization.load_tokenizer(config.tokenizer).eos_token_id,
      batch_size=min(settings.prompts_per_round, settings.prompts_at_once),
      devices=devices,
    )
    labeller = labeller or make_labeller(config, workdir, current.mesh)
    held.callback(labeller.close)
    self._rounds = rounds.Rounds(config, workdir, prompts, labeller, current)

  def check_memory(self, start: train.Start, batches: train.Batches) -> None:
    """Refuses to start when a step on the data's comparisons, or the longest of a round, does not fit."""
    if self._config.online.offline_steps:
      train.check_memory(self._training, start, batches, self._devices)
    if self._rounds is None or not self._config.check_memory:
      return
    # Nothing is sampled yet: the longest answers that can come stand in for those that will.
    answer = np.zeros(self._config.online.max_new_tokens, np.int32)
    answers = [answer] * online_config.kept_responses(self._config)
    some = itertools.islice(
      itertools.cycle(self._rounds.prompts.ids), max(_STAND_INS, self._config.batch_size)
    )
    longest = tokenized.of_ids([(ids, answers) for ids in some], self._config.data.num_responses, {})
    batches = batches._replace(train=self._loader(loader.all_of(longest)))
    train.check_memory(self._training, start, batches, self._devices)

  def batches(
    self, number: int, loop: train.Loop, before: int, done: int, stop_asked: Callable[[int], bool]
  ) -> loader.Loader:
    """Returns a round's comparisons in rows; a round that is not begun is sampled and labelled first.

    Raises:
      TrainingError: a signal asked to stop, or the comparisons are fewer than a step takes.
    """
    if done:
      made = self._rounds.read(number)
    else:
      # A policy that is not finite would be sampled from for an hour first.
      loop.check_finite()
      try:
        made = self._rounds.make(
          number, loop.programs.evaluated(loop.state), loop.reference, lambda: stop_asked(before)
        )
      except rounds.Stopped:
        loop.stop(before)
      loop.log.write(before + 1, "round", made.metrics)
    subset, config = self._subset(number, made), self._config
    if len(subset) < config.batch_size:
      raise TrainingError(
        f"round {number} gives {len(subset)} comparisons, fewer than batch_size={config.batch_size}; left "
        f"out: {made.paired.counts}. Raise online.prompts_per_round or online.num_samples"
      )
    return self._loader(subset)

  def _subset(self, number: int, made: rounds.Made) -> loader.Subset:
    """A round's comparisons, and beside them a share of the data's."""
    config = self._config
    own = loader.all_of(self._rounds.in_ids(made, {"stop_ids": self._data.stop_ids}))
    if config.data.shuffle_labels:
      own = loader.shuffle_labels(own, config.seed * 2**16 + number)
    offline = loader.without_mismatched(self._data.train)
    # A stream of its own beside the other uses of the seed, and of the round alone.
    rng = np.random.default_rng([config.seed, 4, number])
    beside = pairs.offline_beside(len(own), len(offline), config.online.offline_share, rng).tolist()
    if not beside:
      return own
    all_of = lambda subset, which: [(*subset.comparison(i), subset.scored(i)) for i in which]
    return loader.all_of(
      tokenized.of_ids(
        all_of(own, range(len(own))) + all_of(offline, beside), config.data.num_responses, own.data.report
      )
    )

  def _loader(self, subset: loader.Subset) -> loader.Loader:
    subset = resolve.as_the_loss_reads(self._training, subset)
    return resolve.make_loader(self._training, subset, self._devices, coarse=True)
