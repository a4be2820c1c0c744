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
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import parallel, ppo_losses, ppo_step, rollouts, sampling
from dpojax import step as step_lib
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.parts import Parts
from dpojax.ppo_step import Control, Experience, PPOState, Settings
from dpojax.rollouts import Reward


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
    learners = [(params, settings.learning_rate, ppo_step.policy_objective(apply, settings)),
                (critic_params, settings.critic_learning_rate, ppo_step.critic_objective(critic, settings))]
    states, self._steps = [], []
    for first, learning_rate, objective in learners:
      schedule, tx = ppo_step.make_optimizer(settings, learning_rate)
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
