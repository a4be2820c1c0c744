"""Overoptimization in small: the law as fitted, what is said of it, and a run that goes on."""

import functools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from dpojax.runtime.errors import ConfigError
from experiments.measurements import measure
from experiments.paper import overoptimization, sentiment
from tests import worlds
from tests.test_sentiment import sentences

pytestmark = pytest.mark.usefixtures("compiled")

KLS = np.array([0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0])


@given(strategies.floats(-2, 2), strategies.floats(-1, 1))
@settings(deadline=None, max_examples=50)
def test_the_fit_recovers_a_and_b_and_the_hump_is_where_the_law_is_highest(a, b):
  distances = np.sqrt(KLS)
  gains = [d * (a - b * math.log(d)) for d in distances]
  fit = overoptimization.fit_law(distances, gains, [0, 1] * 4)
  np.testing.assert_allclose([fit.a, fit.b, fit.rmse], [a, b, 0], atol=1e-9)
  np.testing.assert_allclose([fit.a_error, fit.b_error], 0, atol=1e-9)
  if b < -1e-3:
    assert math.isnan(fit.hump)
  if b > 0.1 and abs(a / b) < 5:
    top = fit.hump
    here, *beside = overoptimization.law([top, 0.9 * top, 1.1 * top], a, b)
    assert here == pytest.approx(b * top) and here > max(beside)  # R = d b where d R' = 0


def test_errors_are_those_of_leaving_out_a_run():
  """Of R = a d + noise and b = 0 in three runs of one point each: by hand."""
  fit = overoptimization.fit_law([1.0, 1.0, 1.0, math.e], [1.0, 2.0, 3.0, 2 * math.e], ["x", "y", "z", "far"])
  assert (fit.a, fit.b) == pytest.approx((2.0, 0.0))
  # Without x, y, z: a is 2.5, 2, 1.5; without "far" it is 2.
  without = np.array([2.5, 2.0, 1.5, 2.0])
  assert fit.a_error == pytest.approx(math.sqrt(3 / 4 * np.sum((without - 2) ** 2)))
  assert math.isnan(overoptimization.fit_law([1.0, 2.0], [1.0, 1.0], [0, 0]).a_error)


def made_lines(a, b, *, kls=KLS, noise=0.0, beta=0.1):
  """A run of each of two seeds, as far apart as `noise` says, at a reference's reward of 0.5."""
  lines = []
  for seed in (0, 1):
    for step, kl in enumerate([0.0, *kls]):
      gain = float(overoptimization.law([math.sqrt(kl)], a, b)[0]) + (noise if seed and step else 0)
      about = {"size": "32x1", "loss": "dpo", "beta": beta, "seed": seed, "step": step, "steps": len(kls)}
      about |= {"pairs": 300, "seen": 256, "reference_loss": 4.0}
      lines.append(about | {"kl": kl, "reward": 0.5 + gain})
  return lines


@pytest.mark.parametrize(
  "a, b, said",
  [
    (0.2, 0.1, "7.39; 6 of 16 points past it"),
    (0.1, -0.1, "none"),
    (0.4, 0.1, "403, beyond the 30.0"),
    (1, 1.5e-3, "inf"),
  ],
)
def test_a_hump_is_told_with_whether_it_was_measured(a, b, said):
  """exp(2 (a / b - 1)) is e^2 = 7.39 and e^6 = 403; the last is no float."""
  (points,) = overoptimization.points_of(made_lines(a, b)).values()
  assert points.reference == 0.5 and len(points.lines) == 16
  assert overoptimization.hump_text(points).startswith(said)


def test_the_fall_is_from_the_step_that_another_seed_calls_best():
  lines = [line for line in made_lines(0.2, 0.1, noise=0.01) if line["step"]]
  lines[2]["reward"] += 5.0  # a lucky third point of the first seed
  of = overoptimization.beta_of(lines)
  assert of.best_at == pytest.approx(3 / 8) and of.best_kl == 1.0
  gain = lambda kl: float(overoptimization.law([math.sqrt(kl)], 0.2, 0.1)[0])
  theirs = [gain(8.0) - gain(30.0), gain(1.0) - gain(30.0)]  # of the first by the second's, and the other way
  assert of.fall == pytest.approx(np.mean(theirs))
  assert of.end == pytest.approx(0.5 + gain(30.0) + 0.005) and of.kl == 30.0


def test_gains_by_kl_are_means_of_points():
  points = overoptimization.points_of(made_lines(0.2, 0.1))
  edges = overoptimization.edges_of(points)
  assert edges == [0, 0.5, 1, 2, 4, 8, 16, 32]
  (of,) = points.values()
  texts = overoptimization.binned(of, edges)
  assert (
    texts[0].startswith("+0.10") and texts[-1].endswith("(4; +0.000)") or texts[-1].endswith("(4; -0.000)")
  )
  assert all("(2; " in text for text in texts[:-1])


@pytest.mark.parametrize("text", ["64", "x", "64x0", "0x1", "30x1", "64x2x1"])
def test_a_size_that_is_none_is_named(text):
  with pytest.raises(ConfigError, match="give WIDTHxLAYERS"):
    overoptimization.size_of(text)


def test_a_second_call_trains_nothing_again(tmp_path, monkeypatch, capsys):
  path = worlds.write_jsonl(tmp_path / "sentences.jsonl", sentences(np.random.default_rng(0), 500))
  folder, measured = tmp_path / "run", []
  measuring = measure.Bench.measure

  def counted(self, *given, **named):
    measured.append(measuring(self, *given, **named))
    return measured[-1]

  def call():
    given = ["--sizes=32x1", "--losses=ipo", "--small"]
    monkeypatch.setattr(
      sys, "argv", ["overoptimization", f"--workdir={folder}", f"--sentences={path}", *given]
    )
    overoptimization.main()
    out = capsys.readouterr().out
    return out[out.index("\n| size") :]

  monkeypatch.setattr(sentiment, "make", functools.cache(sentiment.make))  # how it is read is its own tests'
  monkeypatch.setattr(measure.Bench, "measure", counted)
  out = call()
  assert "| 32x1 | ipo | " in out and "of 1 stages" in out
  lines = overoptimization.finished(folder)
  assert len(lines) == len(measured) == 2 * 2 * 5
  assert {line["step"] for line in lines} == {k * lines[0]["steps"] // 4 for k in range(5)}
  # No pair twice, and no more left over than a look's.
  assert lines[0]["seen"] == lines[0]["steps"] * 16 <= lines[0]["pairs"] < lines[0]["seen"] + 4 * 16
  assert (folder / "overoptimization.png").stat().st_size > 5000
  (folder / "32x1" / "ipo" / "finished").unlink()  # as of one killed behind its training
  assert overoptimization.finished(folder) == []
  assert call() == out and len(measured) == 20
  (folder / "32x1" / "world").rename(tmp_path / "aside")  # of which a finished stage needs nothing
  assert call() == out and not (folder / "32x1" / "world").exists()
