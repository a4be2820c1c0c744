"""The step: optimizers as the paper's code has them, schedules, parts, updates not finite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import objectives, step
from dpojax.objectives import Mean, Objective
from dpojax.parts import Parts


def quadratic(scale=1.0):
  """An objective whose loss is the mean of scale * (params - target)^2 over comparisons."""
  def evaluate(params, reference, rows):
    values = scale * jnp.sum(jnp.square(rows.target - params["x"][None]), axis=-1)
    there = rows.example[:, 0] >= 0
    loss = Mean(jnp.sum(values, where=there), jnp.sum(there, dtype=jnp.float32))
    return loss, {"loss": loss}
  return Objective(evaluate, num_responses=1, needs_reference=False)


class Rows(NamedTuple):
  target: jax.Array
  example: jax.Array


def rows(rng, count=8, empty=0):
  target = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
  return Rows(target, jnp.where(jnp.arange(count)[:, None] < count - empty, 1, -1))


def constant(learning_rate=0.1):
  return step.make_schedule("constant", learning_rate=learning_rate, warmup_steps=0, steps=1)


def test_rmsprop_is_pytorchs():
  """torch.optim.RMSprop: v = 0.99 v + 0.01 g^2; x -= lr g / (sqrt(v) + 1e-8)."""
  tx = step.make_optimizer("rmsprop", constant(), max_grad_norm=0.0)
  params = jnp.float32(3.0)
  state = tx.init(params)
  x, v = 3.0, 0.0
  for g in (0.5, -2.0, 1e-6):
    updates, state = tx.update(jnp.float32(g), state, params)
    params = optax.apply_updates(params, updates)
    v = 0.99 * v + 0.01 * g**2
    x -= 0.1 * g / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(params, x, rtol=1e-5)


def test_warm_up_is_the_reference_implementations():
  schedule = step.make_schedule("constant", learning_rate=1e-6, warmup_steps=150, steps=1000)
  for t in (0, 1, 75, 149, 150, 999):
    np.testing.assert_allclose(schedule(t), 1e-6 * min(1, (t + 1) / 151), rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_ends_at_zero(name):
  schedule = step.make_schedule(name, learning_rate=1.0, warmup_steps=10, steps=100)
  np.testing.assert_allclose(schedule(10), 1.0, rtol=1e-6)
  np.testing.assert_allclose(schedule(55), 0.5, rtol=1e-6)
  np.testing.assert_allclose(schedule(100), 0.0, atol=1e-6)


def test_gradients_are_clipped_to_their_global_norm(rng):
  objective, batch = quadratic(100.0), rows(rng)
  tx = step.make_optimizer("sgd", constant(1.0), max_grad_norm=0.5)
  state = step.init_state({"x": jnp.ones(3)}, tx)
  new, metrics = step.make_train_step(objective, tx)(state, None, batch)
  assert metrics["grad_norm"] > 0.5
  np.testing.assert_allclose(np.linalg.norm(new.params["x"] - 1.0), 0.5, rtol=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 2, 4, 8])
@pytest.mark.parametrize("empty", [0, 3])
def test_parts_change_nothing(rows_at_once, empty, rng):
  batch, tx = rows(rng, empty=empty), optax.sgd(0.1)
  state = step.init_state({"x": jnp.zeros(3)}, tx)
  want, want_metrics = step.make_train_step(quadratic(), tx)(state, None, batch)
  got, metrics = step.make_train_step(quadratic(), tx, parts=Parts(rows_at_once))(
      state, None, batch)
  np.testing.assert_allclose(got.params["x"], want.params["x"], rtol=1e-6)
  for name in want_metrics:
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-6)


def test_parts_that_hold_nothing_are_not_computed(rng):
  """Their values are nan: one of them computed would show."""
  batch = rows(rng, empty=4)
  batch = batch._replace(target=jnp.where(batch.example >= 0, batch.target, jnp.nan))
  whole = quadratic().evaluate({"x": jnp.ones(3)}, None, rows(rng, 4))
  sums = lambda part: jnp.sum(part.target)
  assert jnp.isfinite(Parts(2).sum(sums, batch)) and jnp.isnan(Parts(8).sum(sums, batch))
  assert jnp.isfinite(whole[0].total)


def test_parts_come_back_in_the_order_of_the_rows(rng):
  batch = rows(rng, 24)
  for shards in (1, 2, 4):
    parts = Parts(3, shards)
    np.testing.assert_array_equal(parts.map(lambda part: 2 * part.target, batch), 2 * batch.target)
    assert parts.split(batch).target.shape == (8 // shards, 3 * shards, 3)


def test_rows_that_cannot_be_taken_in_parts_are_named(rng):
  tx = optax.sgd(0.1)
  state = step.init_state({"x": jnp.zeros(3)}, tx)
  with pytest.raises(ValueError, match="8 rows on 1 shards cannot be taken 3 at once"):
    step.make_train_step(quadratic(), tx, parts=Parts(3))(state, None, rows(rng))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_not_applied_nor_any_after_it(bad, rng):
  tx = optax.adam(0.1)
  train_step = step.make_train_step(quadratic(), tx)
  good, _ = train_step(step.init_state({"x": jnp.zeros(3)}, tx), None, rows(rng))
  held, _ = train_step(good, None, rows(rng)._replace(target=jnp.full((8, 3), bad)))
  after, _ = train_step(held, None, rows(rng))
  assert not held.finite and not after.finite and int(after.step) == 1
  for state in (held, after):
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state),
                 (good.params, good.opt_state))


def test_weight_decay_leaves_norms_and_biases_alone():
  tx = step.make_optimizer("adamw", constant(), max_grad_norm=0.0, weight_decay=0.5)
  params = {"norm": {"scale": jnp.ones(2)}, "up": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert not np.any(updates["norm"]["scale"]) and not np.any(updates["up"]["bias"])
  np.testing.assert_allclose(updates["up"]["kernel"], -0.05, rtol=1e-6)


def test_a_mean_adds_over_parts():
  parts = [Mean(jnp.float32(6), jnp.float32(2)), Mean(jnp.float32(1), jnp.float32(5))]
  whole = jax.tree.map(lambda *x: sum(x), *parts)
  assert whole.value() == 1.0
  assert jnp.isnan(objectives.Mean(jnp.float32(0), jnp.float32(0)).value())
