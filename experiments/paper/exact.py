"""Training in the enumerable world with every log-prob at hand: many runs at once, measured exactly.

All 156 responses to a prompt are told by the chances of the next id behind 31 beginnings, so one pass over
four short rows gives the log-prob of every response: a step over thousands of comparisons costs as much as
one over ten. The model, the optimizer and the step are dpojax's, and so are the losses; rows of comparisons
are numbers of responses.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import losses
from dpojax.kernels.head import logits_of
from dpojax.losses import Pair
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.sample import rollouts
from dpojax.training import step as step_lib
from dpojax.training.objectives import Mean, Objective
from experiments.paper import enumerable
from experiments.paper.enumerable import IDS, RESPONSES, ROOM, STOP, WIDTH

BEGINNINGS = [
  ids for length in range(ROOM) for ids in itertools.product(range(IDS), repeat=length) if STOP not in ids
]
"""What a response may begin with before its last id."""


class Members(NamedTuple):
  """Runs side by side, [M] each: the seed's place among the data, learning rate, beta, other knobs."""

  seed: np.ndarray
  learning_rate: np.ndarray
  beta: np.ndarray
  knobs: dict[str, np.ndarray]


class View(NamedTuple):
  """What a loss may read of the comparisons of a step.

  Attributes:
    policy, reference: log-probs [B] of chosen and rejected.
    next_ids, reference_next_ids: log-probs [prompts, beginnings, ids] of the next id.
    of: [prompts, beginnings, ids] of the next id -> `Pair` of their sums over the comparisons' responses.
    step: the step's number.
    noise: [B] uniform draws of the step.
  """

  policy: Pair
  reference: Pair
  next_ids: jax.Array
  reference_next_ids: jax.Array
  of: Callable[[jax.Array], Pair]
  step: jax.Array
  noise: jax.Array

  def mixed(self, share: jax.Array) -> Pair:
    """Returns the log-probs of the policy whose logits are moved by a share to the reference's."""
    logits = (1 - share) * self.next_ids + share * self.reference_next_ids
    return self.of(jax.nn.log_softmax(logits, axis=-1))


Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""(view, memory, *, beta, **knobs) -> losses [B], and numbers of the step that may be remembered."""


class Method(NamedTuple):
  """A loss, and how beta or the reference moves beside it.

  Attributes:
    loss: what is minimised.
    memory: what is remembered before the first step, numbers by name; the loss's numbers come after it.
    sync_every: steps between updates of the reference; 0: it stands still. The knob `sync_alpha` is then the
      policy's share in one.
  """

  loss: Loss
  memory: dict[str, float] = {}
  sync_every: int = 0


class Chances:
  """Log-probs of the next id behind every beginning, and of every response, under any params."""

  def __init__(self, config: ModelConfig, prompts: np.ndarray):
    longest = [ids for ids in BEGINNINGS if len(ids) == ROOM - 1]
    tokens, counts = rollouts.padded([np.array(ids, np.int32) for ids in longest], ROOM - 1)
    every = lambda x: np.broadcast_to(x, (len(prompts), *x.shape))
    self._rows = rollouts.rows_of(prompts, np.full(len(prompts), WIDTH), every(tokens), every(counts))
    self._apply = transformer.make_apply(config)

    def place(beginning: Sequence[int]) -> int:
      """Where in a row the state stands that predicts what follows a beginning."""
      branch = next(k for k, ids in enumerate(longest) if ids[: len(beginning)] == tuple(beginning))
      return WIDTH + branch * (ROOM - 1) + len(beginning) - 1 if beginning else WIDTH - 1

    self._places = np.array([place(beginning) for beginning in BEGINNINGS])
    number = {ids: i for i, ids in enumerate(BEGINNINGS)}
    self._before, self._ids = np.zeros((2, len(RESPONSES), ROOM), int)
    for i, response in enumerate(RESPONSES):
      for place_of_id, chosen in enumerate(response):
        self._before[i, place_of_id] = number[tuple(response[:place_of_id].tolist())]
        self._ids[i, place_of_id] = chosen
    self._there = np.arange(ROOM) < np.array([len(response) for response in RESPONSES])[:, None]

  def next_ids(self, params: Any) -> jax.Array:
    """Returns log-probs of the next id, [prompts, beginnings, ids]."""
    outputs = self._apply(params, self._rows)
    return jax.nn.log_softmax(logits_of(outputs.hidden[:, self._places], outputs.head), axis=-1)

  def responses(self, next_ids: jax.Array) -> jax.Array:
    """Returns values of the next id summed over every response, [prompts, responses]."""
    return jnp.sum(next_ids[:, self._before, self._ids], axis=-1, where=self._there)


def draw(
  table: enumerable.Table, seeds: Sequence[int], *, steps: int, batch_size: int, size: int
) -> np.ndarray:
  """Returns prompt, chosen and rejected of every comparison, [seeds, steps, batch, 3].

  Each seed has `size` comparisons of its own, labelled by Bradley-Terry draws, which come again in a new
  order in every epoch.
  """
  drawn = []
  for seed in seeds:
    rng = np.random.default_rng([seed, 4])
    comparisons = np.stack(enumerable.draw_comparisons(rng, table, size), axis=1).astype(np.int16)
    epochs = -(-steps * batch_size // size)
    order = np.concatenate([rng.permutation(size) for _ in range(epochs)])[: steps * batch_size]
    drawn.append(comparisons[order].reshape(steps, batch_size, 3))
  return np.stack(drawn)


def make_train(chances: Chances, method: Method, *, warmup_steps: int = 20) -> Callable:
  """Returns `train(params, members, data) -> params [M, ...]`, compiled once for members of one number.

  Data are those of `draw`; AdamW, clipped at 1, with a learning rate that falls linearly.
  """

  def one(params, data, member):
    steps, batch_size = data.shape[1:3]
    comparisons = data[member.seed].astype(jnp.int32)
    knobs = dict(member.knobs)
    sync_alpha = knobs.pop("sync_alpha", 1.0)
    schedule = step_lib.make_schedule(
      "linear", learning_rate=member.learning_rate, warmup_steps=warmup_steps, steps=steps
    )
    key = jax.random.fold_in(jax.random.key(0), member.seed)

    def evaluate(params, theirs, rows, step, memory=None):
      pair = lambda table: Pair(table[rows[:, 0], rows[:, 1]], table[rows[:, 0], rows[:, 2]])
      of = lambda next_ids: pair(chances.responses(next_ids))
      ours = chances.next_ids(params)
      noise = jax.random.uniform(jax.random.fold_in(key, step), (batch_size,))
      view = View(of(ours), of(theirs), ours, theirs, of, step, noise)
      values, numbers = method.loss(view, memory, beta=member.beta, **knobs)
      loss = Mean(jnp.sum(values), jnp.float32(batch_size))
      return loss, {"loss": loss} | {name: Mean(value, jnp.float32(1)) for name, value in numbers.items()}

    objective = Objective(
      evaluate,
      num_responses=2,
      needs_reference=True,
      moves=True,
      memory={name: jnp.float32(value) for name, value in method.memory.items()} or None,
      remember=lambda memory, metrics: {name: metrics[name].value() for name in memory},
    )
    tx = step_lib.make_optimizer("adamw", schedule, max_grad_norm=1.0)
    tx = step_lib.with_memory(tx, objective)
    train_step = step_lib.make_train_step(objective, tx)
    state = step_lib.init_state(params, tx)
    if not method.sync_every:
      theirs = chances.next_ids(params)
      state, _ = jax.lax.scan(
        lambda state, rows: (train_step(state, theirs, rows)[0], ()), state, comparisons
      )
      return state.params

    def period(carry, rows):
      state, reference = carry
      theirs = chances.next_ids(reference)
      state, _ = jax.lax.scan(lambda state, rows: (train_step(state, theirs, rows)[0], ()), state, rows)
      return (state, losses.mix_reference(state.params, reference, alpha=sync_alpha)), ()

    periods = comparisons.reshape(-1, method.sync_every, *comparisons.shape[1:])
    (state, _), _ = jax.lax.scan(period, (state, params), periods)
    return state.params

  return jax.jit(jax.vmap(one, in_axes=(None, None, 0)))


def measure(chances: Chances, table: enumerable.Table, params: Any) -> list[tuple[float, float]]:
  """Returns exact reward and KL of each of the params [M, ...]."""
  every = jax.jit(jax.vmap(lambda one: chances.responses(chances.next_ids(one))))(params)
  every = np.asarray(every, np.float64)
  every -= np.logaddexp.reduce(every, axis=-1, keepdims=True)
  return [enumerable.reward_and_kl(table, log_probs) for log_probs in every]
