"""Means, shares and ratios with the interval they may lie in. NumPy only."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.959963984540054


class Estimate(NamedTuple):
  """A value with its 95 % interval, and the number of independent observations it is from."""

  value: float
  low: float
  high: float
  count: int


def mean(values: np.ndarray) -> Estimate:
  """Returns the mean of independent values [N], plus and minus 1.96 standard errors."""
  values = np.asarray(values, np.float64)
  value = float(values.mean())
  # One observation has no spread to tell of: its interval is everything.
  error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
  return Estimate(value, value - NORMAL_95 * error, value + NORMAL_95 * error, len(values))


def standard_error(estimate: Estimate) -> float:
  """Returns the standard error of a `mean`."""
  return (estimate.high - estimate.low) / (2 * NORMAL_95)


def share(successes: float, count: int) -> Estimate:
  """Returns the share of successes with Wilson's score interval (Wilson 1927).

  It stays in [0, 1] and holds for shares near its ends, where the mean's does not.

  Args:
    successes: how many of `count`; a tie may be half of one, which makes the interval too wide
      rather than too narrow.
    count: independent trials; with none the interval is all of [0, 1].
  """
  if not count:
    return Estimate(math.nan, 0.0, 1.0, 0)
  z, p = NORMAL_95, successes / count
  middle = (p + z * z / (2 * count)) / (1 + z * z / count)
  half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
  return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)), count)


def bootstrap(
  statistic: Callable[..., np.ndarray], *arrays: np.ndarray, seed: int = 0, resamples: int = 2000
) -> Estimate:
  """Returns a statistic with its percentile bootstrap interval (Efron 1979).

  Args:
    statistic: arrays [..., N] -> [...], such as a ratio of sums over the last axis.
    *arrays: [N] each; observations are drawn again by their index, together in all arrays.
    seed: of the draws.
    resamples: how often.
  """
  arrays = [np.asarray(array, np.float64) for array in arrays]
  count, rng = len(arrays[0]), np.random.default_rng(seed)
  drawn = []
  for _ in range(0, resamples, 100):  # a hundred at a time, for memory
    index = rng.integers(count, size=(100, count))
    drawn.append(statistic(*(array[index] for array in arrays)))
  # Percentiles and no normal approximation: ratios of sums are skewed.
  low, high = np.percentile(np.concatenate(drawn)[:resamples], [2.5, 97.5])
  return Estimate(float(statistic(*arrays)), float(low), float(high), count)
