"""Best-of-N: of N samples the one that scores most (Stiennon et al. 2020; the paper's Sec. 6).

One draw of N samples tells of every n up to N: the expected best of n of them, over all subsets of that
size, is a weighted mean of the sorted scores, and unbiased for the best of n new samples.

    drawn = best_of_n.draw(
        config, params, prompts, lengths, reward, num_samples=128, max_new_tokens=64, stop_id=eos)
    for point in best_of_n.curve(drawn.scores, (1, 4, 16, 64, 128)):
      print(point.n, point.mean, point.error, point.kl_bound)
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.models.config import ModelConfig
from dpojax.sample import decoding, rollouts
from dpojax.training import parallel


class Drawn(NamedTuple):
  """Samples of each prompt: ids [n, N, T], tokens of each [n, N], and scores [n, N] float32."""

  tokens: np.ndarray
  lengths: np.ndarray
  scores: np.ndarray


class Point(NamedTuple):
  """What the best of n samples is worth: mean over prompts, its standard error, and the KL bound."""

  n: int
  mean: float
  error: float
  kl_bound: float


def kl_bound(n: int) -> float:
  """Returns log n - (n - 1) / n, nats (Stiennon et al. 2020, App. G.3).

  That is the KL of the best of n to one sample where no two samples score the same, and bounds it
  elsewhere (Beirami et al. 2024).

  Raises:
    ValueError: n is less than 1.
  """
  if n < 1:
    raise ValueError(f"n is {n}; it must be at least 1")
  return math.log(n) - (n - 1) / n


def expected_best(scores: np.ndarray, n: int, values: np.ndarray | None = None) -> np.ndarray:
  """Returns the mean over all subsets of n samples of the best one's value, [...] float64.

  Of N samples sorted upwards the i-th is the best of C(i - 1, n - 1) of C(N, n) subsets. Samples
  that score the same are as likely to be chosen.

  Args:
    scores: [..., N], what the best is chosen by.
    n: samples of a subset.
    values: [..., N], what it is worth, such as a true reward; None is its score.

  Raises:
    ValueError: n is not in 1..N, or the shapes differ.
  """
  scores = np.asarray(scores, np.float64)
  values = scores if values is None else np.asarray(values, np.float64)
  if values.shape != scores.shape:
    raise ValueError(f"values are {values.shape} and scores {scores.shape}; give one of each sample")
  chances = _chances(scores.shape[-1], n)
  above = np.cumsum(np.append(0.0, chances))
  ordered = np.sort(scores, axis=-1)
  # Equal scores share the chances of all their places, so that no order of theirs is made up.
  below, until = (_count(ordered, scores, side) for side in ("left", "right"))
  return np.sum(values * (above[until] - above[below]) / (until - below), axis=-1)


def _chances(count: int, n: int) -> np.ndarray:
  """Returns the chance of each of `count` sorted samples to be the best of n, [N]."""
  if not 1 <= n <= count:
    raise ValueError(f"n is {n} and there are {count} samples; n must be in 1..{count}")
  # By ratios of neighbours: the binomials themselves overflow at a few hundred samples.
  place = np.arange(count, n, -1)  # C(i-2, n-1) / C(i-1, n-1) = (i-n) / (i-1)
  falling = np.cumprod(np.append(n / count, (place - n) / (place - 1)))
  return np.append(np.zeros(n - 1), falling[::-1])


def _count(ordered: np.ndarray, scores: np.ndarray, side: str) -> np.ndarray:
  """Returns how many of each row are below a score ('left'), or not above it ('right'), [..., N]."""
  count = scores.shape[-1]
  each = [np.searchsorted(a, b, side) for a, b in zip(ordered.reshape(-1, count), scores.reshape(-1, count))]
  return np.reshape(each, scores.shape).astype(int)


def curve(scores: np.ndarray, sizes: Sequence[int], values: np.ndarray | None = None) -> list[Point]:
  """Returns what the best of each size is worth, from one draw.

  Args:
    scores: [prompts, N], what the best is chosen by.
    sizes: the n to tell of.
    values: [prompts, N], what it is worth; None is its score.

  Raises:
    ValueError: a size is not in 1..N, or the shapes differ.
  """
  points = []
  for n in sizes:
    best = expected_best(scores, n, values)
    error = float(np.std(best, ddof=1) / math.sqrt(len(best))) if len(best) > 1 else float("nan")
    points.append(Point(n, float(np.mean(best)), error, kl_bound(n)))
  return points


def draw(
  config: ModelConfig,
  params: Any,
  prompts: np.ndarray,
  lengths: np.ndarray,
  reward: rollouts.Reward,
  *,
  num_samples: int,
  max_new_tokens: int,
  stop_id: int | Sequence[int],
  temperature: float = 1.0,
  prompts_at_once: int = 64,
  seed: int = 0,
  devices: parallel.Mesh | None = None,
) -> Drawn:
  """Draws samples, each prompt read once, and scores them.

  Args:
    config, params: the model's.
    prompts, lengths: [n, W] int32 ids, padded on the right, and [n] tokens of each.
    reward: (prompts, responses), lists of ids -> [m] float; the samples of a prompt stand together.
    num_samples: N.
    max_new_tokens: of a sample.
    stop_id: the id, or ids, that end one.
    temperature: of the draw.
    prompts_at_once: that are sampled to and scored at once, rounded up to what devices share evenly.
    seed: of the draw; with it, a prompt's place decides its samples, whatever is at once.
    devices: where to run; None is the mesh over all.

  Raises:
    ValueError: prompts or scores cannot be used.
  """
  rollouts.check_prompts(prompts, lengths)
  devices = parallel.Mesh() if devices is None else devices
  size = -(-min(prompts_at_once, len(prompts)) // devices.row_multiple) * devices.row_multiple
  sample = decoding.make_sampler(
    devices, config, max_new_tokens=max_new_tokens, num_samples=num_samples, stop_id=stop_id
  )
  params, key, parts = devices.place(params, donated=False), jax.random.key(seed), []
  for first in range(0, len(prompts), size):
    # The last part is filled up from the start, to the one compiled shape, and cut off below.
    index = np.arange(first, first + size) % len(prompts)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    drawn = devices.collect_rows(
      sample(params, *devices.place_rows((prompts[index], lengths[index]), size), keys, temperature)
    )
    kept = slice(0, len(prompts) - first)
    tokens, counts = drawn.tokens[kept], drawn.lengths[kept]
    scores = rollouts.checked_scores(
      reward, *rollouts.unpadded(prompts[index][kept], lengths[index][kept], tokens, counts)
    )
    parts.append(Drawn(tokens, counts, scores.reshape(counts.shape)))
  return Drawn(*map(np.concatenate, zip(*parts)))
