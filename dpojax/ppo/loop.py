"""PPO against a reward minus beta KL (Schulman et al. 2017; Ziegler et al. 2019): the one online loop.

From Python, with params and prompts at hand:

    from dpojax.ppo import loop as ppo
    from dpojax.training import parallel

    settings = ppo.Settings(steps=100, prompts_per_step=128, num_samples=8, max_new_tokens=32,
                            beta=0.1, target_kl=6.0)          # target_kl=0: beta stays as it is
    params, history = ppo.train(
        config, params,                # ModelConfig and the params of the policy; also the reference
        prompts, lengths,              # [n, W] int32 ids padded on the right, [n] tokens of each
        reward,                        # (prompts, responses), lists of ids -> [m] float
        settings, stop_id=tokenizer.eos_token_id,
        callback=lambda step, params, metrics: ...,   # at step 0 with {}, then after each step
        devices=parallel.Mesh())       # by default all there are

`params` that come back are NumPy arrays, those of the callback are placed on the devices and are gone
after it returns; `history` holds the metrics of each step, plain floats. The reward gets every
response with the stop id that ends it, or without one where it ran out of tokens. That of a reward
model is `rollouts.LearnedReward`. `Trainer` is the same, one step at a time.

From the command line, on the prompts of any data set:

    python -m dpojax.ppo --config=configs/ppo.py --workdir=DIR \\
        --config.model.checkpoint=runs/sft --config.ppo.reward=runs/reward [--config.key=value ...]

`ppo.reward` is the workdir of a run with objective=reward and the same tokenizer, or module:function
of a prompt and a response in text. The workdir is as that of `dpojax.train`: metrics.jsonl, checkpoints
that `dpojax.sample`, `evaluate` and `export` read, and a killed run continues to the same numbers.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpojax.data import loader, report, tokenization
from dpojax.evaluate import scorers
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.ppo import config as ppo_config
from dpojax.ppo import losses as ppo_losses
from dpojax.ppo import step as ppo_step
from dpojax.ppo.config import Settings
from dpojax.ppo.step import Control, Experience, PPOState
from dpojax.runtime import paths
from dpojax.runtime.command import say
from dpojax.runtime.errors import ConfigError
from dpojax.runtime.stopping import stop_signal
from dpojax.sample import decoding, rollouts
from dpojax.sample.rollouts import Reward
from dpojax.train.loop import TrainingError
from dpojax.training import checkpoint, parallel, resolve, weights
from dpojax.training import config as config_lib
from dpojax.training import step as step_lib
from dpojax.training import workdir as workdir_lib
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.log import Log
from dpojax.training.micro_batches import MicroBatches
from dpojax.training.throughput import Throughput


class Trainer:
  """PPO one step at a time; `state` is all that changes, and may be set to one that was saved.

  The critic is a network of its own, so that its larger, early gradients leave the policy's trunk
  alone (Stiennon et al. 2020, Sec. 3.4). It starts from the policy with a head of zeros, or from
  `critic_params`, such as a reward model's.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Any,
    reward: Reward,
    settings: Settings,
    *,
    stop_id: int | Sequence[int],
    devices: parallel.Mesh | None = None,
    reference: Any = None,
    critic_params: Any = None,
  ):
    """Places the networks.

    Args:
      config, params: the policy's, without a reward head.
      reward: (prompts, responses) -> [n] float.
      settings: how to run.
      stop_id: the id, or ids, that end a response.
      devices: where to run; None is the mesh over all devices.
      reference: params the KL is measured to; None is `params`.
      critic_params: where the critic starts.

    Raises:
      ValueError: a setting cannot run, or rows do not spread evenly over the devices.
    """
    settings.check()
    self.settings, self.reward = settings, reward
    self.devices = devices = parallel.Mesh() if devices is None else devices
    _check_rows(settings, devices)
    config = dataclasses.replace(config, reward_head=False, published="")
    params = {name: part for name, part in params.items() if name != "reward_head"}
    # The critic starts as the policy with a head of 0: values are 0, the first advantages of rewards alone.
    if critic_params is None:
      critic_params = params | {"reward_head": np.zeros(config.width, np.float32)}
    apply = transformer.make_apply(config)
    critic = transformer.make_apply(dataclasses.replace(config, reward_head=True))
    place = lambda tree: devices.place(jax.tree.map(np.asarray, tree))
    self.reference = place(params if reference is None else reference)

    micro_batches = MicroBatches(settings.rows_at_once, devices.global_shards)
    learners = [
      (params, settings.learning_rate, ppo_step.policy_objective(apply, settings)),
      (critic_params, settings.critic_learning_rate, ppo_step.critic_objective(critic, settings)),
    ]
    states, self._steps = [], []
    for first, learning_rate, objective in learners:
      schedule, tx = ppo_step.make_optimizer(settings, learning_rate)
      states.append(devices.place(step_lib.init_state(jax.tree.map(np.asarray, first), tx)))
      self._steps.append(
        devices.lift(
          step_lib.make_train_step(
            objective, tx, schedule=schedule, micro_batches=micro_batches, over_rows=devices.over_rows
          ),
          donate_state=True,
        )
      )
    self.state = PPOState(
      *states, devices.place(Control(jnp.float32(settings.beta), ppo_losses.no_moments()))
    )
    self._sample = decoding.make_sampler(
      devices,
      config,
      max_new_tokens=settings.max_new_tokens,
      num_samples=settings.num_samples,
      stop_id=stop_id,
    )
    score = rollouts.make_score(
      apply,
      critic,
      num_samples=settings.num_samples,
      chunk_size=settings.chunk_size or None,
      micro_batches=micro_batches,
    )
    self._score = devices.lift(devices.map_rows(score, trees=3), donate_state=False)
    self._targets = devices.lift(ppo_step.make_targets(settings), donate_state=False)

  def step(self, number: int, prompts: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Makes a rollout and updates on it; returns its metrics.

    Args:
      number: of the step; with the seed it decides all that is random.
      prompts: [prompts_per_step, W] int32 ids, padded on the right; W the same in every step.
      lengths: [prompts_per_step] tokens of each.

    Raises:
      ValueError: the reward gives no finite number for each response.
    """
    rows, targets, control, metrics = self._rollout(prompts, lengths, (number, 0))
    metrics |= self._update(number, Experience(rows, targets))
    self.state = self.state._replace(control=control)
    return metrics

  def measure(self, prompts: np.ndarray, lengths: np.ndarray, number: int = 0) -> dict[str, float]:
    """Returns the `objective/` metrics of samples to prompts [n, W], and changes nothing."""
    size, sums = self.settings.prompts_per_step, {}
    for first in range(0, len(prompts), size):
      index = np.arange(first, first + size)
      *_, metrics = self._rollout(
        # The last part is filled up from the start, to the one compiled shape; `count` leaves that out.
        prompts[index % len(prompts)],
        lengths[index % len(prompts)],
        # Other numbers than a step's, whose second is 0: an evaluation never draws what training drew.
        (first, number + 1),
        count=min(size, len(prompts) - first),
      )
      for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + value * min(size, len(prompts) - first)
    return {name: value / len(prompts) for name, value in sums.items() if name.startswith("objective/")}

  def finite(self) -> bool:
    """Returns whether every update so far was finite; one that is not is not applied."""
    return bool(self.state.policy.finite) and bool(self.state.critic.finite)

  def _rollout(self, prompts, lengths, numbers, count: int | None = None):
    """Samples, scores them under all networks, and sets the targets; of the first `count` prompts."""
    devices, state = self.devices, self.state
    tokens, counts, summed = self._draw(prompts, lengths, numbers)
    scores = rollouts.checked_scores(
      self.reward, *rollouts.unpadded(prompts, lengths, tokens, counts)
    ).reshape(counts.shape)
    rows = rollouts.rows_of(prompts, lengths, tokens, counts)
    scored = devices.collect_rows(
      self._score(
        state.policy.params, state.critic.params, self.reference, devices.place_rows(rows, len(prompts))
      )
    )
    # The sampler and the training pass are two programs: what they disagree by is told, for a large gap would
    # be a wrong ratio in every update.
    apart = np.abs(np.sum(scored.log_probs.reshape(tokens.shape), axis=-1) - summed).mean()
    kept = jax.tree.map(lambda x: x[:count], (scored, scores, counts))
    control, targets, metrics = self._targets(state.control, *kept)
    metrics = {name: float(value) for name, value in metrics.items()}
    return rows, devices.collect_rows(targets), control, metrics | {"policy/sampler_error": float(apart)}

  def _draw(self, prompts, lengths, numbers):
    """Returns samples [R, K, T], their lengths and their log-probs, [R, K]."""
    key = jax.random.key(self.settings.seed)
    for number in numbers:
      key = jax.random.fold_in(key, number)
    # A key a prompt: prompts_at_once changes no sample.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(prompts)))
    size, drawn = self.settings.prompts_at_once or len(prompts), []
    for first in range(0, len(prompts), size):
      part = slice(first, first + size)
      placed = self.devices.place_rows((prompts[part], lengths[part]), size)
      drawn.append(self.devices.collect_rows(self._sample(self.state.policy.params, *placed, keys[part])))
    return (np.concatenate(each) for each in zip(*drawn))

  def _update(self, number: int, experience: Experience) -> dict[str, float]:
    """Runs the epochs of minibatches; returns means over them, and how the first one began."""
    settings, seen = self.settings, []
    for epoch in range(settings.epochs):
      # Of seed, step and epoch alone, so that a run that continues shuffles as it would have.
      rng = np.random.default_rng([settings.seed, number, epoch])
      for part in np.split(rng.permutation(settings.prompts_per_step), settings.minibatches):
        rows = self.devices.place_rows(rollouts.take_rows(experience, part), len(part))
        policy, ours = self._steps[0](self.state.policy, (), rows)
        critic, theirs = self._steps[1](self.state.critic, (), rows)
        self.state = self.state._replace(policy=policy, critic=critic)
        seen.append(_named(ours, "policy") | _named(theirs, "value"))
    # Once, at the end: asked in the loop every update would wait for the host.
    seen = jax.device_get(seen)
    # Before the first update the policy is the one that has sampled: how far ratios are from 1 then is error.
    mismatch = float(seen[0].pop("policy/moved"))
    return {name: float(np.mean([each[name] for each in seen])) for name in seen[0]} | {
      "policy/mismatch": mismatch
    }


def _named(metrics: dict[str, jax.Array], which: str) -> dict[str, jax.Array]:
  """Metrics of a train step under the names the field plots."""
  own = {
    "loss": f"loss/{which}",
    "grad_norm": f"grad_norm/{which}",
    "learning_rate": f"learning_rate/{which}",
  }
  return {own.get(name, name): value for name, value in metrics.items()}


def _check_rows(settings: Settings, devices: parallel.Mesh) -> None:
  """Refuses rollouts whose parts do not spread evenly over the devices."""
  for name, rows in (
    ("prompts_per_step / minibatches", settings.prompts_per_step // settings.minibatches),
    ("prompts_at_once", settings.prompts_at_once),
  ):
    multiple = devices.row_multiple * (max(1, settings.rows_at_once) if "step" in name else 1)
    if rows % multiple:
      raise ValueError(
        f"{name} is {rows} but rows stand on {devices.row_multiple} devices, rows_at_once="
        f"{settings.rows_at_once} at once; make it a multiple of {multiple}"
      )


def prompts_of_step(count: int, number: int, settings: Settings) -> np.ndarray:
  """Returns which of `count` prompts a step is about: each once an epoch, in an order of its own."""
  return rollouts.prompts_in_turn(count, number, size=settings.prompts_per_step, seed=settings.seed)


def train(
  config: ModelConfig,
  params: Any,
  prompts: np.ndarray,
  lengths: np.ndarray,
  reward: Reward,
  settings: Settings,
  *,
  stop_id: int | Sequence[int],
  callback: Callable[[int, Any, dict[str, float]], None] | None = None,
  devices: parallel.Mesh | None = None,
  reference: Any = None,
  critic_params: Any = None,
) -> tuple[Any, list[dict[str, float]]]:
  """Runs PPO from params; see the module's text and `Trainer`.

  Returns:
    The policy's params, NumPy arrays, and the metrics of each step.

  Raises:
    ValueError: prompts, settings or scores cannot be used.
    TrainingError: an update was not finite.
  """
  rollouts.check_prompts(prompts, lengths)
  trainer = Trainer(
    config,
    params,
    reward,
    settings,
    stop_id=stop_id,
    devices=devices,
    reference=reference,
    critic_params=critic_params,
  )
  history = []
  if callback is not None:
    callback(0, trainer.state.policy.params, {})
  for number in range(settings.steps):
    index = prompts_of_step(len(prompts), number, settings)
    history.append(trainer.step(number, prompts[index], lengths[index]))
    if not trainer.finite():
      raise TrainingError(
        f"an update of step {number + 1} is not finite; lower learning_rate="
        f"{settings.learning_rate} or critic_learning_rate={settings.critic_learning_rate}"
      )
    if callback is not None:
      callback(number + 1, trainer.state.policy.params, history[-1])
  return jax.tree.map(np.asarray, trainer.state.policy.params), history


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
  """Runs PPO as the config says, from the last checkpoint in `workdir` if there is one.

  Args:
    config: all keys of `dpojax.ppo.config.defaults()`.
    workdir: the run's folder, made if missing.

  Returns:
    The last evaluation's metrics, or the last step's where nothing is held out.

  Raises:
    ConfigError, DataError: something given cannot be used; before any compile.
    CheckpointError: a checkpoint is missing, or belongs to another run.
    DiskError: the disk is full or cannot be written.
    InUseError: another run owns the workdir.
    TrainingError: an update is not finite, or a signal asked to stop.
  """
  config = weights.with_tokenizer(config)
  settings = ppo_config.validate(config)
  with workdir_lib.open_workdir(workdir, config) as workdir:
    return _run(workdir_lib.with_template_date(config, workdir), settings, workdir)


def _run(config: ml_collections.ConfigDict, settings: Settings, workdir: paths.Path) -> dict[str, float]:
  resolve.use_compile_cache(config)
  trainer, train_prompts, held_out, about, data = _set_up(config, settings)
  was_report = workdir_lib.open_report(workdir, data)
  workdir_lib.check_space(workdir, _saved(trainer.state), config)
  checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep, owner=True)
  first = checkpoints.last_sound() or 0
  if first:
    saved, was = checkpoints.restore(first, trainer.devices.restore_target(_saved(trainer.state)))
    workdir_lib.check_same(was, about, workdir, report.differences(was_report, data.report or {}))
    trainer.state = trainer.devices.place(_restored(saved))
    say(f"continuing from step {first} of {workdir}")

  with Log(workdir, config, first) as log, stop_signal() as stop_asked:
    if first == 0 and config.eval_every:
      log.write(0, "eval", trainer.measure(*held_out))
    throughput = Throughput()
    for step in range(first + 1, config.steps + 1):
      index = prompts_of_step(len(train_prompts[0]), step - 1, settings)
      metrics = trainer.step(step - 1, *(x[index] for x in train_prompts))
      samples = settings.prompts_per_step * settings.num_samples
      log.advance()
      throughput.advance(_Progress(samples, round(samples * metrics["objective/length"])), waited=0.0)
      checkpoints.check()
      if not trainer.finite():
        raise TrainingError(_not_finite(step, settings))
      due = lambda every: every and (step % every == 0 or step == config.steps)
      stopping = stop_asked(step)
      if step == 1 or due(config.log_every):
        rates = throughput.rates()
        log.write(
          step,
          "train",
          metrics
          | {
            "samples_per_second": rates["pairs_per_second"],
            "tokens_per_second": rates["tokens_per_second"],
          },
        )
      if due(config.eval_every):
        log.write(step, "eval", trainer.measure(*held_out))
        throughput.start()
      if due(config.checkpoint_every) or (stopping and config.checkpoint_every):
        checkpoints.save(step, _saved(trainer.state), about)
      if stopping:
        checkpoints.wait()
        raise TrainingError(
          f"stopped by a signal after step {step}; "
          + (
            f"it is saved in {workdir}: the same command continues"
            if config.checkpoint_every
            else "nothing is saved: checkpoint_every is 0"
          )
        )
    checkpoints.close()
  return log.last.get("eval", log.last.get("train", {}))


class _Progress(NamedTuple):
  """What a step has done, in the words of `Throughput`."""

  comparisons: int
  tokens: int


def _saved(state: PPOState) -> dict[str, Any]:
  """A checkpoint's state: the policy's as in every other run, the rest beside it."""
  # So that every command that reads a run's policy reads this one's.
  return state.policy._asdict() | {"critic": state.critic, "control": state.control}


def _restored(saved: dict[str, Any]) -> PPOState:
  policy = {name: saved[name] for name in step_lib.TrainState._fields}
  return PPOState(step_lib.TrainState(**policy), saved["critic"], saved["control"])


def _set_up(config: ml_collections.ConfigDict, settings: Settings):
  """Returns the trainer, prompts to train on and held-out ones, what checkpoints belong to, and the data."""
  model = weights.load(config.model.checkpoint, dtype=config.model.dtype)
  policy = dataclasses.replace(model.config, remat=config.model.remat, attention=config.model.attention)
  width, room = config.data.max_prompt_length, config.ppo.max_new_tokens
  if policy.longest is not None and width + room > policy.longest:
    raise ConfigError(
      f"config.data.max_prompt_length is {width} and ppo.max_new_tokens {room}, together more than "
      f"the {policy.longest} positions of {model.name}; lower one of them"
    )
  tokenizer = tokenization.load_tokenizer(config.tokenizer)
  devices = resolve.make_devices(config)
  reward = _reward(config, tokenizer, devices)
  critic = _reward_model(config, "ppo.critic", tokenizer) if config.ppo.critic else None
  if critic is not None and dataclasses.replace(critic.config, **_SAME) != dataclasses.replace(
    policy, **_SAME
  ):
    raise ConfigError(
      f"config.ppo.critic is {config.ppo.critic!r}, a model of other dimensions than "
      f"{config.model.checkpoint!r}; leave it empty"
    )
  data = resolve.load_data(ppo_config.data_config(config))
  resolve.check_ids(policy, config, data)
  train_prompts = _prompts(data.train, width, "training")
  held_out = _prompts(data.held_out, width, "held-out") if config.eval_every else None
  stop_ids = tuple(dict.fromkeys((tokenizer.eos_token_id, *model.stop_ids)))
  trainer = ppo_config.in_keys(
    lambda: Trainer(
      policy,
      model.params,
      reward,
      settings,
      devices=devices,
      stop_id=stop_ids,
      critic_params=critic and critic.params,
    )
  )
  about = {
    "model": model.config.as_dict(),
    "data": data.fingerprint,
    "stop_ids": list(stop_ids),
    "reference": checkpoint.fingerprint(model.params),
  }
  return trainer, train_prompts, held_out, about, data


_SAME = dict(dtype="float32", remat="none", attention="auto", published="", reward_head=True, max_positions=1)
"""What may differ between a policy and its critic."""


def _prompts(subset: loader.Subset, width: int, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the prompts [n, width] of a data set, each once, and their lengths."""
  # Prompts are what is wanted, and each stands there once a comparison.
  subset = loader.last_of_each_prompt(subset)
  ids = [subset.comparison(i)[0] for i in range(len(subset))]
  kept = [each for each in ids if 1 <= len(each) <= width]
  say(
    f"{len(kept)} {name} prompts; left out: {len(ids) - len(kept)} that are empty or longer "
    f"than {width} tokens"
  )
  if not kept:
    raise ConfigError(f"config.data.max_prompt_length is {width} and every {name} prompt is longer; raise it")
  return rollouts.padded(kept, width)


def _reward(config: ml_collections.ConfigDict, tokenizer: Any, devices: parallel.Mesh) -> Reward:
  """Returns the reward that `ppo.reward` names, of ids."""
  name = config.ppo.reward
  if not scorers.is_function(name):
    model = _reward_model(config, "ppo.reward", tokenizer)
    return rollouts.LearnedReward(
      model.config,
      model.params,
      devices,
      num_samples=config.ppo.num_samples,
      prompt_width=config.data.max_prompt_length,
      max_new_tokens=config.ppo.max_new_tokens,
    )
  function = scorers.load_function(name, ("prompt", "response"))
  text = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
  return lambda prompts, responses: np.array(
    [
      float(function(text(p), tokenization.decode_response(tokenizer, p, r)))
      for p, r in zip(prompts, responses)
    ],
    np.float32,
  )


def _reward_model(config: ml_collections.ConfigDict, key: str, tokenizer: Any) -> weights.Loaded:
  """Returns the reward model of a key.

  Raises:
    ConfigError: it is none, or reads other ids than the policy writes.
  """
  name = config_lib.flatten(config)[key]
  model = weights.load(name)
  if not model.config.reward_head:
    raise ConfigError(
      f"config.{key} is {name!r}, no reward model; give the workdir of a run with objective=reward"
    )
  if tokenization.load_tokenizer(model.tokenizer).get_vocab() != tokenizer.get_vocab():
    raise ConfigError(
      f"config.{key} is {name!r}, whose tokenizer {model.tokenizer} has other ids than the policy's "
      f"{config.tokenizer}; train a reward model with that one"
    )
  return model


def _not_finite(step: int, settings: Settings) -> str:
  return (
    f"an update of step {step} is not finite; lower optimizer.learning_rate="
    f"{settings.learning_rate} or ppo.critic_learning_rate={settings.critic_learning_rate}"
  )
