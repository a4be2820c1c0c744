"""Knobs that comparisons bring, and losses of every token, under any lift and from the loader."""

import jax
import numpy as np
import optax
import pytest

from dpojax.data import loader, packing
from dpojax.models import transformer
from dpojax.training import parallel, preference, step
from dpojax.training.micro_batches import MicroBatches
from tests import sgd_step, test_loader, worlds

CASES = {
  "tdpo1": {},
  "tdpo2": {},
  "epsilon_dpo": {},
  "dpo": {"dr_dpo": 0.5},
  "ipo": {"sampo": True},
  "mappo": {"knobs": ("gap", "beta")},
  "kto": {"knobs": ("beta",)},
  "beta_dpo": {"knobs": ("beta",)},
}


def pieces(name):
  """An objective of the case by mapped axis, and its rows."""
  knobs = {name: np.linspace(0.05, 0.9, 21, dtype=np.float32) for name in CASES[name].get("knobs", ())}
  options = {key: value for key, value in CASES[name].items() if key != "knobs"}
  examples, *_ = sgd_step.pieces(3 if name == "kto" else 2)
  plan = packing.plan_in_order(worlds.lengths_of(examples), len(examples), 64)

  def rows(first=0, count=sgd_step.ROWS):
    return packing.fill(
      examples,
      plan.row[0],
      count,
      plan.shape,
      num_responses=len(examples[0][1]),
      example=range(len(examples)),
      first_row=first,
      knobs=knobs,
    )

  def objective(axis_name=None):
    given = {"gap": 0.5} if name == "mappo" else {"epsilon": 0.1} if name == "epsilon_dpo" else {}
    return preference.preference_objective(
      transformer.make_apply(sgd_step.CONFIG),
      preference.make_terms([name], (), given),
      beta=0.3,
      axis_name=axis_name,
      **options,
    )

  return objective, rows


@pytest.mark.parametrize("lift", [("pmap", 0, 1, 1), ("mesh", 2, 2, 2)])
@pytest.mark.parametrize("name", CASES)
def test_a_lift_gives_the_step_of_one_device(name, lift):
  strategy, data, fsdp, tensor = lift
  objective, rows = pieces(name)
  _, params, reference = sgd_step.pieces()
  tx = step.with_memory(optax.sgd(1.0), objective())
  want, want_metrics = jax.device_get(
    jax.jit(step.make_train_step(objective(), tx))(step.init_state(params, tx), reference, rows())
  )
  devices = parallel.make_parallel(strategy, data=data, fsdp=fsdp, tensor=tensor)
  train_step = devices.lift(
    step.make_train_step(
      objective(devices.axis_name),
      tx,
      axis_name=devices.axis_name,
      over_rows=devices.over_rows,
      micro_batches=MicroBatches(0, devices.global_shards),
    ),
    donate_state=True,
  )
  state, metrics = train_step(
    devices.place(step.init_state(params, tx)),
    devices.place(reference),
    devices.place_rows(rows(*devices.span(sgd_step.ROWS)), sgd_step.ROWS),
  )
  got, metrics = jax.device_get(devices.collect((state.params, metrics)))
  for metric in want_metrics:
    np.testing.assert_allclose(metrics[metric], want_metrics[metric], rtol=1e-4, atol=1e-6, err_msg=metric)
  largest = max(np.abs(b - w).max() for b, w in zip(*map(jax.tree.leaves, (params, want.params))))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5 * largest, rtol=1e-5), got, want.params
  )
  assert ("beta" in metrics) == ("beta" in CASES[name].get("knobs", ()))


@pytest.mark.parametrize("name", ["mappo", "tdpo2", "ipo"])
def test_rows_in_parts_give_the_same_step(name):
  objective, rows = pieces(name)
  _, params, reference = sgd_step.pieces()
  tx = optax.sgd(1.0)
  (want, _), (got, _) = (
    jax.jit(step.make_train_step(objective(), tx, micro_batches=MicroBatches(at_once)))(
      step.init_state(params, tx), reference, rows()
    )
    for at_once in (0, 2)
  )
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got.params, want.params)


def test_the_loader_puts_a_comparisons_knobs_where_the_comparison_is(rng):
  data = test_loader.tokenized(rng)
  batches = test_loader.make(loader.all_of(data))
  batches.knobs = {"beta": rng.random(60).astype(np.float32)}
  seen = 0
  for batch in [*batches.training(0, 7), *batches.evaluation()]:
    there = batch.rows.example >= 0
    np.testing.assert_array_equal(
      batch.rows.knobs["beta"][there], batches.knobs["beta"][batch.rows.example[there]]
    )
    assert np.all(batch.rows.knobs["beta"] > 0)
    seen += there.sum()
  assert seen == 56 + 60


def test_rows_without_knobs_have_none(rng):
  batch = next(test_loader.make(loader.all_of(test_loader.tokenized(rng))).training(0, 1))
  assert batch.rows.knobs is None
