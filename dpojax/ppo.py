"""PPO against a reward minus beta KL (Schulman et al. 2017; Ziegler et al. 2019): the one online loop.

From Python, with params and prompts at hand:

    from dpojax import parallel, ppo

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
import math
from functools import partial
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import losses, parallel, ppo_losses, rollouts, sampling
from dpojax import step as step_lib
from dpojax.data.packing import Rows
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.objectives import Apply, Objective, mean_where
from dpojax.parts import Parts
from dpojax.rollouts import Reward
from dpojax.step import TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
  """How PPO runs.

  Attributes:
    steps: rollouts.
    prompts_per_step, num_samples: prompts of a rollout and samples of each, together 1024.
    max_new_tokens: of a sample.
    epochs, minibatches: passes over a rollout, and the updates of each.
    beta: what a nat of log pi - log pi_ref costs, in units of the (normalised) score; with
      `target_kl` where it starts.
    target_kl: nats of a whole response that beta is steered towards; 0 leaves beta alone.
    kl_gain: how fast, see `ppo_losses.adapted_beta`.
    normalize_rewards: scores less their mean over their deviation, both of all seen so far.
    whiten_advantages: mean 0 and deviation 1 over the tokens of a rollout.
    gamma, lam: discount, and the decay of generalised advantages.
    clip, value_clip: how far ratios and values count, see `ppo_losses`.
    optimizer: a name in `step.OPTIMIZERS`.
    learning_rate, critic_learning_rate: of the two networks.
    warmup_steps: updates over which they rise.
    schedule: a name in `step.SCHEDULES`.
    max_grad_norm: gradients are clipped to it; 0 is none.
    rows_at_once: prompts, with their samples, a device computes at once; 0 is all.
    prompts_at_once: prompts that are sampled to at once; 0 is all of a rollout.
    chunk_size: see `log_probs.token_log_probs`; 0 goes by memory.
    seed: of samples, the order of prompts, and minibatches.
  """

  steps: int = 100
  prompts_per_step: int = 128
  num_samples: int = 8
  max_new_tokens: int = 64
  epochs: int = 4
  minibatches: int = 4
  beta: float = 0.1
  target_kl: float = 0.0
  kl_gain: float = 0.1
  normalize_rewards: bool = True
  whiten_advantages: bool = True
  gamma: float = 1.0
  lam: float = 0.95
  clip: float = 0.2
  value_clip: float = 0.2
  optimizer: str = "adamw"
  learning_rate: float = 1e-5
  critic_learning_rate: float = 1e-5
  warmup_steps: int = 0
  schedule: str = "constant"
  max_grad_norm: float = 1.0
  rows_at_once: int = 0
  prompts_at_once: int = 0
  chunk_size: int = 0
  seed: int = 0

  def check(self) -> None:
    """Refuses values that cannot run.

    Raises:
      ValueError: naming the setting, its value and the fix.
    """
    for name in ("steps", "prompts_per_step", "num_samples", "max_new_tokens", "epochs", "minibatches"):
      _refuse(name, getattr(self, name), getattr(self, name) >= 1, "it must be at least 1")
    for name in ("beta", "target_kl", "kl_gain", "warmup_steps", "max_grad_norm", "rows_at_once",
                 "prompts_at_once", "chunk_size", "seed"):
      _refuse(name, getattr(self, name), 0 <= getattr(self, name) < math.inf,
              "it must be at least 0")
    for name in ("clip", "value_clip", "learning_rate", "critic_learning_rate"):
      _refuse(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "it must be positive")
    for name in ("gamma", "lam"):
      _refuse(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "it must be in [0, 1]")
    for name, allowed in (("optimizer", step_lib.OPTIMIZERS), ("schedule", step_lib.SCHEDULES)):
      _refuse(name, getattr(self, name), getattr(self, name) in allowed, f"it must be one of {allowed}")
    if self.target_kl and not self.beta:
      raise ValueError("beta is 0 and target_kl set, but beta is steered by factors; give it a start")
    for name in ("minibatches", "prompts_at_once"):
      parts = getattr(self, name)
      if parts and self.prompts_per_step % parts:
        raise ValueError(
            f"{name} is {parts} and prompts_per_step {self.prompts_per_step}; the one must divide "
            "the other")


def _refuse(name: str, value: Any, sound: bool, rule: str) -> None:
  if not sound:
    raise ValueError(f"{name} is {value!r}; {rule}")


class Control(NamedTuple):
  """What a rollout changes besides the networks: the price of a nat, and the scores' moments."""

  beta: jax.Array
  moments: ppo_losses.Moments


class PPOState(NamedTuple):
  """All that PPO changes. The critic has the policy's architecture and a scalar head."""

  policy: TrainState
  critic: TrainState
  control: Control


class Targets(NamedTuple):
  """What an update aims at, each [R, K T] float32."""

  log_probs: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array


class Experience(NamedTuple):
  """A rollout, or some rows of it."""

  rows: Rows
  targets: Targets

  @property
  def example(self) -> jax.Array:
    return self.rows.example


def make_targets(settings: Settings) -> Callable:
  """Returns `targets(control, scored, scores, counts) -> (control after it, Targets, metrics)`.

  Args of it: `rollouts.Scored`, the score of each sample [R, K] and its tokens [R, K].
  """
  def targets(control, scored, scores, counts):
    log_probs, reference, values = (x.reshape(*counts.shape, -1) for x in scored)
    moments, shown = control.moments, scores
    if settings.normalize_rewards:
      moments = ppo_losses.add_moments(moments, scores)
      shown = (scores - moments.mean) / moments.deviation()
    rewards = _each(partial(ppo_losses.token_rewards, beta=control.beta))(
        shown, log_probs, reference, counts)
    advantages = _each(partial(ppo_losses.gae, gamma=settings.gamma, lam=settings.lam))(
        rewards, values, counts)
    there = jax.lax.broadcasted_iota(jnp.int32, values.shape, 2) < counts[:, :, None]
    returns = jnp.where(there, advantages + values, 0.0)
    metrics = _rollout_metrics(log_probs, reference, scores, shown, counts, control.beta)
    metrics["val/explained_variance"] = 1 - jnp.var(advantages, where=there) / jnp.maximum(
        jnp.var(returns, where=there), 1e-8)
    if settings.whiten_advantages:
      advantages = ppo_losses.whiten(advantages, there)
    beta = control.beta
    if settings.target_kl:
      beta = ppo_losses.adapted_beta(
          beta, metrics["objective/kl"], target=settings.target_kl, gain=settings.kl_gain)
    flat = lambda x: x.reshape(x.shape[0], -1)
    aims = Targets(*map(flat, (log_probs, values, advantages, returns)))
    return Control(beta, moments), aims, metrics

  return targets


def _each(function: Callable) -> Callable:
  return jax.vmap(jax.vmap(function))


def _rollout_metrics(log_probs, reference, scores, shown, counts, beta) -> dict[str, jax.Array]:
  """Means over samples, under the names the field plots; `shown` are the scores that count."""
  kl = jnp.mean(jnp.sum(losses.kl_k1(log_probs, reference), axis=-1))
  return {
      "objective/kl": kl,
      "objective/scores": jnp.mean(scores),
      "objective/scores_std": jnp.std(scores),
      "objective/non_score_reward": -beta * kl,
      "objective/rlhf_reward": jnp.mean(shown) - beta * kl,
      "objective/entropy": -jnp.mean(jnp.sum(log_probs, axis=-1)),
      "objective/beta": beta,
      "objective/length": jnp.mean(counts.astype(jnp.float32)),
  }


def policy_objective(apply: Apply, settings: Settings) -> Objective:
  """The clipped surrogate, averaged over tokens of `Experience`."""
  def evaluate(params, reference, experience):
    rows, targets = experience
    where = rows.slot < settings.num_samples
    log_probs = rollouts.scored_log_probs(
        apply(params, rows), rows, where, chunk_size=settings.chunk_size or None)
    loss = ppo_losses.ppo_policy_loss(
        log_probs, targets.log_probs, targets.advantages, clip=settings.clip)
    moved = log_probs - targets.log_probs
    clipped = loss > -jnp.exp(moved) * targets.advantages
    mean = lambda values: mean_where(values.astype(jnp.float32), where)
    return mean(loss), {
        "loss": mean(loss), "policy/clipfrac": mean(clipped), "policy/ratio": mean(jnp.exp(moved)),
        "policy/approxkl": mean(losses.kl_k2(targets.log_probs, log_probs)),
        "policy/moved": mean(jnp.abs(moved))}

  return Objective(evaluate, settings.num_samples, needs_reference=False)


def critic_objective(apply: Apply, settings: Settings) -> Objective:
  """The clipped error of values, averaged over tokens of `Experience`."""
  def evaluate(params, reference, experience):
    rows, targets = experience
    where = rows.slot < settings.num_samples
    values = rollouts.scored_values(apply(params, rows), rows)
    loss = ppo_losses.ppo_value_loss(
        values, targets.values, targets.returns, clip=settings.value_clip)
    far = jnp.abs(values - targets.values) > settings.value_clip
    return mean_where(loss, where), {
        "loss": mean_where(loss, where), "val/clipfrac": mean_where(far.astype(jnp.float32), where)}

  return Objective(evaluate, settings.num_samples, needs_reference=False)


class Trainer:
  """PPO one step at a time; `state` is all that changes, and may be set to one that was saved.

  The critic is a network of its own, so that its larger, early gradients leave the policy's trunk
  alone (Stiennon et al. 2020, Sec. 3.4). It starts from the policy with a head of zeros, or from
  `critic_params`, such as a reward model's.
  """

  def __init__(
      self, config: ModelConfig, params: Any, reward: Reward, settings: Settings, *,
      stop_id: int | Sequence[int], devices: parallel.Mesh | None = None, reference: Any = None,
      critic_params: Any = None):
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
    if critic_params is None:
      critic_params = params | {"reward_head": np.zeros(config.width, np.float32)}
    apply = transformer.make_apply(config)
    critic = transformer.make_apply(dataclasses.replace(config, reward_head=True))
    place = lambda tree: devices.place(jax.tree.map(np.asarray, tree))
    self.reference = place(params if reference is None else reference)

    parts = Parts(settings.rows_at_once, devices.global_shards)
    learners = [(params, settings.learning_rate, policy_objective(apply, settings)),
                (critic_params, settings.critic_learning_rate, critic_objective(critic, settings))]
    states, self._steps = [], []
    for first, learning_rate, objective in learners:
      schedule, tx = _optimizer(settings, learning_rate)
      states.append(devices.place(step_lib.init_state(jax.tree.map(np.asarray, first), tx)))
      self._steps.append(devices.lift(step_lib.make_train_step(
          objective, tx, schedule=schedule, parts=parts), donate_state=True))
    self.state = PPOState(*states, devices.place(
        Control(jnp.float32(settings.beta), ppo_losses.no_moments())))
    self._sample = devices.lift(sampling.make_sampler(
        config, max_new_tokens=settings.max_new_tokens, num_samples=settings.num_samples,
        stop_id=stop_id), donate_state=False)
    self._score = devices.lift(rollouts.make_score(
        apply, critic, num_samples=settings.num_samples, chunk_size=settings.chunk_size or None,
        parts=parts), donate_state=False)
    self._targets = devices.lift(make_targets(settings), donate_state=False)

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
          prompts[index % len(prompts)], lengths[index % len(prompts)], (first, number + 1),
          count=min(size, len(prompts) - first))
      for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + value * min(size, len(prompts) - first)
    return {name: value / len(prompts) for name, value in sums.items()
            if name.startswith("objective/")}

  def finite(self) -> bool:
    """Returns whether every update so far was finite; one that is not is not applied."""
    return bool(self.state.policy.finite) and bool(self.state.critic.finite)

  def _rollout(self, prompts, lengths, numbers, count: int | None = None):
    """Samples, scores them under all networks, and sets the targets; of the first `count` prompts."""
    devices, state = self.devices, self.state
    tokens, counts, summed = self._draw(prompts, lengths, numbers)
    scores = rollouts.checked_scores(
        self.reward, *rollouts.unpadded(prompts, lengths, tokens, counts)).reshape(counts.shape)
    rows = rollouts.rows_of(prompts, lengths, tokens, counts)
    scored = devices.collect_rows(self._score(
        state.policy.params, state.critic.params, self.reference,
        devices.place_rows(rows, len(prompts))))
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
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(prompts)))
    size, drawn = self.settings.prompts_at_once or len(prompts), []
    for first in range(0, len(prompts), size):
      part = slice(first, first + size)
      placed = self.devices.place_rows((prompts[part], lengths[part]), size)
      drawn.append(self.devices.collect_rows(
          self._sample(self.state.policy.params, *placed, keys[part])))
    return (np.concatenate(each) for each in zip(*drawn))

  def _update(self, number: int, experience: Experience) -> dict[str, float]:
    """Runs the epochs of minibatches; returns means over them, and how the first one began."""
    settings, seen = self.settings, []
    for epoch in range(settings.epochs):
      rng = np.random.default_rng([settings.seed, number, epoch])
      for part in np.split(rng.permutation(settings.prompts_per_step), settings.minibatches):
        rows = self.devices.place_rows(rollouts.take_rows(experience, part), len(part))
        policy, ours = self._steps[0](self.state.policy, (), rows)
        critic, theirs = self._steps[1](self.state.critic, (), rows)
        self.state = self.state._replace(policy=policy, critic=critic)
        seen.append(_named(ours, "policy") | _named(theirs, "value"))
    seen = jax.device_get(seen)
    mismatch = float(seen[0].pop("policy/moved"))
    return {name: float(np.mean([each[name] for each in seen])) for name in seen[0]} | {
        "policy/mismatch": mismatch}


def _named(metrics: dict[str, jax.Array], which: str) -> dict[str, jax.Array]:
  """Metrics of a train step under the names the field plots."""
  own = {"loss": f"loss/{which}", "grad_norm": f"grad_norm/{which}",
         "learning_rate": f"learning_rate/{which}"}
  return {own.get(name, name): value for name, value in metrics.items()}


def _optimizer(settings: Settings, learning_rate: float):
  """Returns the schedule and the optimizer of one network."""
  schedule = step_lib.make_schedule(
      settings.schedule, learning_rate=learning_rate, warmup_steps=settings.warmup_steps,
      steps=settings.steps * settings.epochs * settings.minibatches)
  return schedule, step_lib.make_optimizer(
      settings.optimizer, schedule, max_grad_norm=settings.max_grad_norm)


def _check_rows(settings: Settings, devices: parallel.Mesh) -> None:
  """Refuses rollouts whose parts do not spread evenly over the devices."""
  for name, rows in (
      ("prompts_per_step / minibatches", settings.prompts_per_step // settings.minibatches),
      ("prompts_at_once", settings.prompts_at_once)):
    multiple = devices.row_multiple * (max(1, settings.rows_at_once) if "step" in name else 1)
    if rows % multiple:
      raise ValueError(
          f"{name} is {rows} but rows stand on {devices.row_multiple} devices, rows_at_once="
          f"{settings.rows_at_once} at once; make it a multiple of {multiple}")


def prompts_of_step(count: int, number: int, settings: Settings) -> np.ndarray:
  """Returns which of `count` prompts a step is about: each once an epoch, in an order of its own."""
  places = np.arange(number * settings.prompts_per_step, (number + 1) * settings.prompts_per_step)
  orders = {epoch: np.random.default_rng([settings.seed, 1, epoch]).permutation(count)
            for epoch in np.unique(places // count).tolist()}
  return np.array([orders[place // count][place % count] for place in places.tolist()])


def train(
    config: ModelConfig, params: Any, prompts: np.ndarray, lengths: np.ndarray, reward: Reward,
    settings: Settings, *, stop_id: int | Sequence[int],
    callback: Callable[[int, Any, dict[str, float]], None] | None = None,
    devices: parallel.Mesh | None = None, reference: Any = None, critic_params: Any = None,
) -> tuple[Any, list[dict[str, float]]]:
  """Runs PPO from params; see the module's text and `Trainer`.

  Returns:
    The policy's params, NumPy arrays, and the metrics of each step.

  Raises:
    ValueError: prompts, settings or scores cannot be used.
    FloatingPointError: an update was not finite.
  """
  check_prompts(prompts, lengths)
  trainer = Trainer(config, params, reward, settings, stop_id=stop_id, devices=devices,
                    reference=reference, critic_params=critic_params)
  history = []
  if callback is not None:
    callback(0, trainer.state.policy.params, {})
  for number in range(settings.steps):
    index = prompts_of_step(len(prompts), number, settings)
    history.append(trainer.step(number, prompts[index], lengths[index]))
    if not trainer.finite():
      raise FloatingPointError(
          f"an update of step {number + 1} is not finite; lower learning_rate="
          f"{settings.learning_rate} or critic_learning_rate={settings.critic_learning_rate}")
    if callback is not None:
      callback(number + 1, trainer.state.policy.params, history[-1])
  return jax.tree.map(np.asarray, trainer.state.policy.params), history


def check_prompts(prompts: np.ndarray, lengths: np.ndarray) -> None:
  """Refuses prompts that are not [n, W] ids with [n] lengths of 1 to W.

  Raises:
    ValueError: saying what is wrong.
  """
  if np.ndim(prompts) != 2 or np.shape(lengths) != np.shape(prompts)[:1] or not len(prompts):
    raise ValueError(
        f"prompts are {np.shape(prompts)} and lengths {np.shape(lengths)}; give ids [n, W], padded "
        "on the right, and [n] lengths")
  wrong = np.nonzero((lengths < 1) | (lengths > np.shape(prompts)[1]))[0]
  if len(wrong):
    raise ValueError(
        f"prompt {wrong[0]} has length {lengths[wrong[0]]}; it must be in 1..{np.shape(prompts)[1]}")
