"""Best-of-N: its estimate against all subsets, its KL against the exact one, its draw against the truth."""

import itertools
import math

import numpy as np
import pytest

from dpojax.sample import best_of_n
from tests import test_ppo as world


def test_the_estimate_is_the_mean_over_all_subsets(rng):
  scores = rng.normal(size=(3, 7))
  for n in range(1, 8):
    subsets = [scores[:, list(each)].max(1) for each in itertools.combinations(range(7), n)]
    np.testing.assert_allclose(best_of_n.expected_best(scores, n), np.mean(subsets, axis=0), rtol=1e-9)


def test_what_is_chosen_by_one_score_is_worth_another_and_ties_are_shared(rng):
  scores, values = rng.integers(3, size=(4, 6)), rng.normal(size=(4, 6))
  for n in (1, 2, 4, 6):
    want = np.mean(
      [
        [
          np.mean(value[list(each)][score[list(each)] == score[list(each)].max()])
          for score, value in zip(scores, values)
        ]
        for each in itertools.combinations(range(6), n)
      ],
      axis=0,
    )
    np.testing.assert_allclose(best_of_n.expected_best(scores, n, values), want, rtol=1e-9)


def test_a_large_n_stays_finite(rng):
  scores = rng.random((2, 2048))
  np.testing.assert_allclose(best_of_n.expected_best(scores, 1), scores.mean(1), rtol=1e-9)
  np.testing.assert_allclose(best_of_n.expected_best(scores, 2048), scores.max(1), rtol=1e-9)
  assert np.all(np.abs(best_of_n.expected_best(scores, 1024) - 1024 / 1025) < 2e-3)


def exact_best(chances, scores, n):
  """The distribution of the best of n samples of chances [M], ties by chance."""
  below = np.array([chances[scores < score].sum() for score in scores])
  same = np.array([chances[scores == score].sum() for score in scores])
  return chances / same * ((below + same) ** n - below**n)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_kl_is_at_most_its_bound_and_meets_it_where_no_two_samples_tie(n, rng):
  kl = lambda best, chances: np.sum(best * np.log(best / chances))
  chances = rng.dirichlet(np.ones(12))
  best = exact_best(chances, rng.integers(8, size=12), n)
  assert best.sum() == pytest.approx(1)
  assert kl(best, chances) <= best_of_n.kl_bound(n) + 1e-12
  many = np.full(20000, 1 / 20000)
  assert kl(exact_best_of_distinct(many, n), many) == pytest.approx(best_of_n.kl_bound(n), rel=1e-3, abs=1e-9)


def exact_best_of_distinct(chances, n):
  """As `exact_best` of scores that rise."""
  until = np.cumsum(chances)
  return np.diff(np.append(0.0, until) ** n)


def test_the_best_of_a_models_samples_is_worth_what_the_whole_distribution_says():
  config, params = world.tiny()
  chances, scores = np.exp(world.exact_log_probs(config, params)), world.every_reward()
  prompts, lengths = (np.tile(x, (16, *[1] * (x.ndim - 1))) for x in (world.PROMPTS, world.LENGTHS))
  drawn = best_of_n.draw(
    config,
    params,
    prompts,
    lengths,
    world.table_reward,
    num_samples=64,
    max_new_tokens=world.ROOM,
    stop_id=world.STOP,
    prompts_at_once=24,
  )
  assert drawn.scores.shape == (64, 64) and drawn.tokens.shape == (64, 64, world.ROOM)
  for point in best_of_n.curve(drawn.scores, (1, 4, 16)):
    want = np.mean([exact_best(c, s, point.n) @ s for c, s in zip(chances, scores)])
    best = best_of_n.expected_best(drawn.scores, point.n).reshape(16, 4)  # by prompt: its own spread
    error = math.sqrt((best.var(0, ddof=1) / 16).mean() / 4)
    assert abs(point.mean - want) < 4 * error
    assert point.kl_bound == pytest.approx(math.log(point.n) - 1 + 1 / point.n)


def test_sizes_that_are_not_there_are_refused():
  for n in (0, 4):
    with pytest.raises(ValueError, match=f"n is {n} and there are 3 samples"):
      best_of_n.curve(np.zeros((2, 3)), [n])
  with pytest.raises(ValueError, match="values are"):
    best_of_n.expected_best(np.zeros(3), 1, np.zeros(2))
  with pytest.raises(ValueError, match="n is 0"):
    best_of_n.kl_bound(0)
