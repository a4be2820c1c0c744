"""The step: optimizers as the paper's code has them, schedules, parts, updates not finite."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax.training import objectives, step
from dpojax.training.micro_batches import MicroBatches
from dpojax.training.objectives import Mean, Objective


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
  got, metrics = step.make_train_step(quadratic(), tx, micro_batches=MicroBatches(rows_at_once))(
    state, None, batch
  )
  np.testing.assert_allclose(got.params["x"], want.params["x"], rtol=1e-6)
  for name in want_metrics:
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-6)


def test_parts_that_hold_nothing_are_not_computed(rng):
  """Their values are nan: one of them computed would show."""
  batch = rows(rng, empty=4)
  batch = batch._replace(target=jnp.where(batch.example >= 0, batch.target, jnp.nan))
  whole = quadratic().evaluate({"x": jnp.ones(3)}, None, rows(rng, 4))
  sums = lambda part: jnp.sum(part.target)
  assert jnp.isfinite(MicroBatches(2).sum(sums, batch)) and jnp.isnan(MicroBatches(8).sum(sums, batch))
  assert jnp.isfinite(whole[0].total)


def test_parts_come_back_in_the_order_of_the_rows(rng):
  batch = rows(rng, 24)
  for shards in (1, 2, 4):
    micro_batches = MicroBatches(3, shards)
    np.testing.assert_array_equal(micro_batches.map(lambda part: 2 * part.target, batch), 2 * batch.target)
    assert micro_batches.split(batch).target.shape == (8 // shards, 3 * shards, 3)


def test_rows_that_cannot_be_taken_in_parts_are_named(rng):
  tx = optax.sgd(0.1)
  state = step.init_state({"x": jnp.zeros(3)}, tx)
  with pytest.raises(ValueError, match="8 rows on 1 shards cannot be taken 3 at once"):
    step.make_train_step(quadratic(), tx, micro_batches=MicroBatches(3))(state, None, rows(rng))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_not_applied_nor_any_after_it(bad, rng):
  tx = optax.adam(0.1)
  train_step = step.make_train_step(quadratic(), tx)
  good, _ = train_step(step.init_state({"x": jnp.zeros(3)}, tx), None, rows(rng))
  held, _ = train_step(good, None, rows(rng)._replace(target=jnp.full((8, 3), bad)))
  after, _ = train_step(held, None, rows(rng))
  assert not held.finite and not after.finite and int(after.step) == 1
  for state in (held, after):
    jax.tree.map(
      np.testing.assert_array_equal, (state.params, state.opt_state), (good.params, good.opt_state)
    )


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


# Optimizers by name, and averages of params.


def layers(rng):
  """Params of every kind: an embedding, stacked kernels of all projections, a norm, an adapter's pair."""
  shapes = {
    "embed": {"embedding": (8, 6)},
    "norm": {"scale": (6,)},
    "layers": {
      "query": {"kernel": (2, 6, 3, 4)},
      "attention_out": {"kernel": (2, 3, 4, 6)},
      "up": {"kernel": (2, 6, 10), "bias": (2, 10)},
      "down": {"a": (2, 10, 2), "b": (2, 2, 6)},
    },
  }
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def minimised(name, params, steps=60, learning_rate=0.03, **options):
  """Params and optimizer state after some steps down (params - 1)^2, by the train step."""

  def evaluate(params, reference, rows):
    value = sum(jnp.sum(jnp.square(leaf - 1)) for leaf in jax.tree.leaves(params))
    return Mean(value, jnp.ones(())), {"loss": Mean(value, jnp.ones(()))}

  tx = step.make_optimizer(name, constant(learning_rate), max_grad_norm=0.0, **options)
  train_step = jax.jit(step.make_train_step(Objective(evaluate, 1, False), tx))
  state = step.init_state(params, tx)
  for _ in range(steps):
    state, metrics = train_step(state, None, ())
  return state, metrics


@pytest.mark.parametrize("name", step.OPTIMIZERS)
def test_every_optimizer_goes_down_and_keeps_shapes_and_dtypes(name, rng):
  params = layers(rng)
  distance = lambda tree: sum(float(jnp.sum(jnp.square(x - 1))) for x in jax.tree.leaves(tree))
  state, _ = minimised(name, params, learning_rate=0.3 if name == "muon" else 0.03)
  assert distance(step.average_of(state.params, state.opt_state)) < 0.5 * distance(params)
  for kept in (state.params, step.average_of(state.params, state.opt_state)):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == jax.tree.map(
      lambda x: (x.shape, x.dtype), params
    )


STATES = {"rmsprop": 1, "adamw": 2, "adamw_bfloat16": 1.5, "sgd": 0, "lion": 1, "schedule_free": 2}
"""Of each optimizer, bytes of its state by bytes of params."""


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_an_optimizer_keeps(name, ema):
  params = {"up": {"kernel": jnp.zeros((64, 512))}}
  tx = step.make_optimizer(name, constant(), max_grad_norm=1.0, ema=ema)
  kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)))
  assert kept / params["up"]["kernel"].nbytes == pytest.approx(STATES[name] + (ema > 0), abs=1e-3)


def test_adafactor_keeps_rows_and_columns_and_muon_one_moment_of_a_matrix():
  params = {"up": {"kernel": jnp.zeros((256, 512))}}
  for name, values in (("adafactor", 256 + 512), ("muon", 256 * 512)):
    tx = step.make_optimizer(name, constant(), max_grad_norm=0.0)
    kept = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)))
    assert values <= kept < values + 16


def test_muon_steps_along_the_polar_factor_of_each_layers_matrix_and_adam_steps_the_rest(rng):
  """Of what goes in to what comes out: heads belong to the outputs of query, to the inputs of
  attention_out. Newton-Schulz in five steps brings singular values to between 0.7 and 1.2."""
  params, grads = layers(rng), layers(rng)
  tx = step.make_optimizer("muon", constant(0.1), max_grad_norm=0.0)
  updates, _ = tx.update(grads, tx.init(params), params)
  flat = {
    "query": lambda x: x.reshape(2, 6, 12),
    "attention_out": lambda x: x.reshape(2, 12, 6),
    "up": lambda x: x,
  }
  for name, matrix in flat.items():
    gradient = matrix(np.asarray(grads["layers"][name]["kernel"], np.float64))
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    for step_of, polar in zip(matrix(np.asarray(updates["layers"][name]["kernel"])), u @ vt):
      scale = 0.1 * 0.2 * max(polar.shape) ** 0.5
      assert np.abs(np.linalg.svd(-step_of / scale)[1] - 0.95).max() < 0.3
      assert np.sum(-step_of * polar) / np.linalg.norm(step_of) / np.linalg.norm(polar) > 0.95
  adam = optax.adamw(0.1, weight_decay=0.0, nesterov=True)
  wanted, _ = adam.update(grads, adam.init(params), params)
  for path in (("embed", "embedding"), ("norm", "scale"), ("layers", "up", "bias")):
    of = lambda tree, path=path: functools.reduce(lambda node, key: node[key], path, tree)
    np.testing.assert_allclose(of(updates), of(wanted), rtol=1e-4)


@pytest.mark.parametrize("name", step.DECAYS)
def test_optimizers_with_weight_decay_shrink_kernels_by_learning_rate_times_decay_and_no_norm(name):
  params = {"norm": {"scale": jnp.ones(2)}, "up": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
  tx = step.make_optimizer(name, constant(0.1), max_grad_norm=0.0, weight_decay=0.5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = tx.update(zeros, tx.init(params), params)
  updated = step.average_of(optax.apply_updates(params, updates), state)
  np.testing.assert_allclose(updated["norm"]["scale"], 1, rtol=1e-6)
  np.testing.assert_allclose(updated["up"]["bias"], 1, rtol=1e-6)
  np.testing.assert_allclose(updated["up"]["kernel"], 0.95, rtol=1e-5)


def test_the_mean_of_params_is_what_its_decay_says(rng):
  tx = step.with_average(optax.sgd(0.1), 0.5)
  params, mean = {"x": jnp.asarray([3.0, -1.0])}, np.array([3.0, -1.0])
  state = tx.init(params)
  for t in range(8):
    updates, state = tx.update({"x": jnp.asarray(rng.normal(size=2), jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
    kept = min(0.5, (1 + t) / (10 + t))
    mean = kept * mean + (1 - kept) * np.asarray(params["x"])
    np.testing.assert_allclose(step.average_of(params, state)["x"], mean, rtol=1e-5)


def test_schedule_free_evaluates_the_mean_of_where_its_steps_went(rng):
  """Its x: at a constant learning rate the mean of all z (Defazio et al. 2024)."""
  params = {"up": {"kernel": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)}}
  tx = step.make_optimizer("schedule_free", constant(0.1), max_grad_norm=0.0)
  state, places = tx.init(params), []
  for _ in range(5):
    updates, state = tx.update(jax.tree.map(lambda x: x - 1, params), state, params)
    params = optax.apply_updates(params, updates)
    places.append(np.asarray(state.z["up"]["kernel"]))
  np.testing.assert_allclose(
    step.average_of(params, state)["up"]["kernel"], np.mean(places, axis=0), rtol=1e-4
  )


def test_without_an_average_params_are_themselves(rng):
  params = layers(rng)
  tx = step.make_optimizer("adamw", constant(), max_grad_norm=1.0)
  assert step.average_of(params, tx.init(params)) is params


# Beta by step.


@pytest.mark.parametrize(
  "between, want", [("linear", [4, 4, 2.5, 1, 1]), ("geometric", [4, 4, 2, 1, 1]), ("hold", [4, 4, 4, 1, 1])]
)
def test_the_factor_of_beta_is_as_its_points_say(between, want):
  factor = step.make_beta_factor((10, 20), (4.0, 1.0), between)
  got = jax.vmap(factor)(jnp.asarray([0, 10, 15, 20, 99]))
  np.testing.assert_allclose(got, want, rtol=1e-6)
