"""Intervals: they hold the true value as often as they say, and no more than they must."""

import numpy as np
import pytest

from dpojax.evaluate import confidence


@pytest.mark.parametrize("truth, count", [(0.5, 40), (0.1, 60), (0.03, 100), (0.97, 30)])
def test_wilsons_interval_holds_the_share_95_times_in_100(truth, count, rng):
  drawn = rng.binomial(count, truth, size=2000)
  found = [confidence.share(successes, count) for successes in drawn]
  assert 0.93 < np.mean([each.low <= truth <= each.high for each in found]) < 0.98
  assert all(0 <= each.low <= each.value <= each.high <= 1 for each in found)


def test_wilsons_interval_is_the_solution_of_its_equation():
  """(p - x)^2 = z^2 x (1 - x) / n at both ends."""
  found = confidence.share(13, 40)
  for x in (found.low, found.high):
    np.testing.assert_allclose((13 / 40 - x) ** 2, confidence.NORMAL_95**2 * x * (1 - x) / 40, rtol=1e-9)


def test_nothing_judged_leaves_every_share_possible():
  assert confidence.share(0, 0)[1:] == (0.0, 1.0, 0)


def test_a_means_interval_holds_it_and_gives_its_standard_error(rng):
  values = rng.normal(2.0, 3.0, size=(2000, 50))
  found = [confidence.mean(each) for each in values]
  assert 0.93 < np.mean([each.low <= 2.0 <= each.high for each in found]) < 0.97
  np.testing.assert_allclose(
    confidence.standard_error(found[0]), values[0].std(ddof=1) / np.sqrt(50), rtol=1e-12
  )


def test_the_bootstrap_of_a_ratio_holds_it(rng):
  """Log-probs a token, of responses of unequal lengths."""
  ratio = lambda sums, counts: sums.sum(axis=-1) / counts.sum(axis=-1)
  held = 0
  for seed in range(200):
    counts = rng.integers(1, 20, size=80)
    sums = counts * 1.5 + rng.normal(scale=np.sqrt(counts))
    found = confidence.bootstrap(ratio, sums, counts, seed=seed, resamples=400)
    held += found.low <= 1.5 <= found.high
  assert 0.89 < held / 200 < 0.99
  assert found == confidence.bootstrap(ratio, sums, counts, seed=199, resamples=400)
