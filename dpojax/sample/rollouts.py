"""Samples as packed rows: one prompt and its K samples are one row, the samples its branches.

Every array has the shape that prompts of W tokens and samples of T tokens can need, whatever was
drawn, so that what is compiled is compiled once. Scored token t of sample k stands at k * T + t.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.data.packing import Rows
from dpojax.log_probs import predicting_states, token_log_probs
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.training import objectives, parallel
from dpojax.training.micro_batches import MicroBatches

Reward = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], np.ndarray]
"""(prompts, responses), ids without padding -> a number of each response, [n]."""

_ROWS = 32


class Scored(NamedTuple):
  """Of each token [R, K T] of samples, float32: its log-prob under policy and reference, and value."""

  log_probs: jax.Array
  reference_log_probs: jax.Array
  values: jax.Array


def rows_of(prompts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> Rows:
  """Returns the rows of samples; P is 1.

  Args:
    prompts: [R, W] int32 ids, padded on the right.
    lengths: [R] tokens of each prompt, at least 1.
    tokens: [R, K, T] ids of samples.
    counts: [R, K] tokens of each.
  """
  size, width = prompts.shape
  _, samples, room = tokens.shape
  lengths = lengths[:, None]
  of_prompt = np.arange(width) < lengths
  of_sample = (np.arange(room) < counts[:, :, None]).reshape(size, -1)
  which = np.repeat(np.arange(samples), room)[None]
  # Every sample has its room, drawn or not: one shape is compiled, and token t of sample k is where it says.
  place = np.tile(np.arange(room), samples)[None]
  both = lambda prompt, sample: np.concatenate([prompt, sample], axis=1).astype(np.int32)
  return Rows(
    tokens=both(np.where(of_prompt, prompts, 0), np.where(of_sample, tokens.reshape(size, -1), 0)),
    positions=both(np.where(of_prompt, np.arange(width), 0), np.where(of_sample, lengths + place, 0)),
    comparison=both(of_prompt, of_sample),
    branch=both(np.zeros_like(of_prompt), np.where(of_sample, which + 1, 0)),
    # The first token of each sample is predicted by the end of the prompt, the others by their neighbour.
    source=np.where(place == 0, lengths - 1, width + which * room + place - 1).astype(np.int32),
    target=np.where(of_sample, tokens.reshape(size, -1), 0).astype(np.int32),
    # Padding goes to a slot of its own, which sums drop.
    slot=np.where(of_sample, which, samples).astype(np.int32),
    example=np.arange(size, dtype=np.int32)[:, None],
  )


def scored_log_probs(
  outputs: transformer.Outputs, rows: Rows, where: jax.Array, *, chunk_size: int | None = None
) -> jax.Array:
  """Returns the log-prob of each scored token, [R, S]; 0 where `where` [R, S] is false."""
  return token_log_probs(
    predicting_states(outputs.hidden, rows.source),
    outputs.head,
    rows.target,
    where=where,
    chunk_size=chunk_size,
  )


def scored_values(outputs: transformer.Outputs, rows: Rows) -> jax.Array:
  """Returns the scalar head on the state that predicts each scored token, [R, S] float32."""
  head = outputs.reward_head
  return predicting_states(outputs.hidden, rows.source).astype(head.dtype) @ head


def make_score(
  policy: objectives.Apply,
  critic: objectives.Apply,
  *,
  num_samples: int,
  chunk_size: int | None = None,
  micro_batches: MicroBatches = MicroBatches(),
) -> Callable:
  """Returns `score(params, critic_params, reference, rows) -> Scored`, to be lifted."""

  def score(params, critic_params, reference, rows):
    def of_part(part):
      where = part.slot < num_samples
      log_probs = lambda tree: scored_log_probs(policy(tree, part), part, where, chunk_size=chunk_size)
      return Scored(log_probs(params), log_probs(reference), scored_values(critic(critic_params, part), part))

    return micro_batches.map(of_part, rows)

  return score


def check_prompts(prompts: np.ndarray, lengths: np.ndarray) -> None:
  """Refuses prompts that are not [n, W] ids with [n] lengths of 1 to W.

  Raises:
    ValueError: saying what is wrong.
  """
  if np.ndim(prompts) != 2 or np.shape(lengths) != np.shape(prompts)[:1] or not len(prompts):
    raise ValueError(
      f"prompts are {np.shape(prompts)} and lengths {np.shape(lengths)}; give ids [n, W], padded "
      "on the right, and [n] lengths"
    )
  wrong = np.nonzero((lengths < 1) | (lengths > np.shape(prompts)[1]))[0]
  if len(wrong):
    raise ValueError(
      f"prompt {wrong[0]} has length {lengths[wrong[0]]}; it must be in 1..{np.shape(prompts)[1]}"
    )


def padded(sequences: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns ids [n, width] int32, padded on the right with 0, and their lengths [n]."""
  out = np.zeros((len(sequences), width), np.int32)
  for row, ids in zip(out, sequences):
    row[: len(ids)] = ids
  return out, np.array([len(ids) for ids in sequences], np.int32)


def unpadded(
  prompts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, counts: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Returns each sample's prompt and its ids, R K of both; arguments as of `rows_of`."""
  starts = [prompt[:n] for prompt, n in zip(prompts, lengths) for _ in range(tokens.shape[1])]
  samples = [ids[:n] for of, ns in zip(tokens, counts) for ids, n in zip(of, ns)]
  return starts, samples


def checked_scores(reward: Reward, prompts, responses) -> np.ndarray:
  """Returns the reward of each response, [n] float32.

  Raises:
    ValueError: it gives another number of values, or one that is not finite.
  """
  scores = np.asarray(reward(prompts, responses), np.float32)
  if scores.shape != (len(responses),):
    raise ValueError(
      f"the reward returned {scores.shape} for {len(responses)} responses; return one number each"
    )
  if not np.isfinite(scores).all():
    first = int(np.argmin(np.isfinite(scores)))
    raise ValueError(
      f"the reward of response {first} is {scores[first]} (ids {responses[first].tolist()}); "
      "return finite numbers"
    )
  return scores


def prompts_in_turn(count: int, number: int, *, size: int, seed: int) -> np.ndarray:
  """Returns which of `count` prompts the `number`-th draw of `size` is about.

  Each comes once an epoch, in an order that the epoch has of its own.
  """
  # Of seed and epoch alone: any draw is made without those before it, as a resume does.
  places = np.arange(number * size, (number + 1) * size)
  orders = {
    epoch: np.random.default_rng([seed, 1, epoch]).permutation(count)
    for epoch in np.unique(places // count).tolist()
  }
  return np.array([orders[place // count][place % count] for place in places.tolist()])


class LearnedReward:
  """The `Reward` of a reward model that reads the policy's ids: its head on each last token."""

  def __init__(
    self,
    config: ModelConfig,
    params: Any,
    devices: parallel.Mesh,
    *,
    num_samples: int,
    prompt_width: int,
    max_new_tokens: int,
  ):
    """Places the params.

    Args:
      config, params: a run's with objective=reward, see `weights.load`.
      devices: where it stands.
      num_samples: consecutive responses that are to one prompt.
      prompt_width, max_new_tokens: tokens of prompts and responses at most.

    Raises:
      ValueError: the model is no reward model.
    """
    if not config.reward_head:
      raise ValueError("the reward model has no reward head; train one with objective='reward'")
    self._devices, self._samples = devices, num_samples
    self._width, self._room = prompt_width, max_new_tokens
    self._params = devices.place(params)
    apply = transformer.make_apply(config)
    rewards = lambda params, rows: objectives.response_rewards(
      apply(params, rows), rows, num_responses=num_samples
    )[:, 0]
    self._score = devices.lift(devices.map_rows(rewards), donate_state=False)

  def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> np.ndarray:
    starts, lengths = padded(prompts[:: self._samples], self._width)
    tokens, counts = padded(responses, self._room)
    tokens = tokens.reshape(len(starts), self._samples, self._room)
    rows = rows_of(starts, lengths, tokens, counts.reshape(len(starts), self._samples))
    size = -(-_ROWS // self._devices.row_multiple) * self._devices.row_multiple
    values = []
    for first in range(0, len(starts), size):
      # The last batch is filled up with its last row, whose values are cut off: one shape for all.
      index = np.minimum(np.arange(first, first + size), len(starts) - 1)
      part = self._devices.place_rows(take_rows(rows, index), size)
      values.append(self._devices.collect_rows(self._score(self._params, part)))
    return np.concatenate(values)[: len(starts)].reshape(-1)


def take_rows(tree: Any, index: np.ndarray) -> Any:
  """Returns rows of NumPy arrays [R, ...] by their index."""
  return jax.tree.map(lambda x: x[index], tree)
