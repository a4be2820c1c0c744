"""One SGD step of DPO on comparisons spread unevenly, under any lift; a script for two processes.

python -m tests.sgd_step STRATEGY DATA FSDP TENSOR OUT [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

import dataclasses
import sys

import jax
import numpy as np
import optax

from dpojax.data import packing
from dpojax.models import transformer
from dpojax.training import parallel, preference, step
from dpojax.training.micro_batches import MicroBatches
from tests import worlds

CONFIG = worlds.llama(vocab_size=64, width=32, mlp_width=64)
ROWS = 16


def pieces(num_responses=2):
  """The comparisons, the params and a reference that differs from them."""
  examples = worlds.comparisons(np.random.default_rng(0), 21, num_responses)
  return examples, worlds.params_of(CONFIG, 0), worlds.params_of(CONFIG, 7)


def rows_of(examples, first=0, count=ROWS, row_length=64):
  """16 rows of comparisons: the first ones full, the last ones empty."""
  lengths = worlds.lengths_of(examples)
  plan = packing.plan_in_order(lengths, len(examples), row_length)
  assert plan.rows[0] < ROWS - 2
  return packing.fill(
    examples,
    plan.row[0],
    count,
    plan.shape,
    num_responses=len(examples[0][1]),
    example=range(len(examples)),
    first_row=first,
  )


def objective(loss="dpo", axis_name=None, dtype="float32"):
  config = dataclasses.replace(CONFIG, dtype=dtype)
  return preference.preference_objective(
    transformer.make_apply(config), preference.make_terms([loss]), beta=0.3, axis_name=axis_name
  )


def lifted(devices, *, rows_at_once=0, loss="dpo", row_length=64, dtype="float32"):
  """Returns the placed state after one step, and the metrics."""
  examples, params, reference = pieces(3 if loss == "kto" else 2)
  tx = optax.sgd(1.0)
  train_step = devices.lift(
    step.make_train_step(
      objective(loss, devices.axis_name, dtype),
      tx,
      axis_name=devices.axis_name,
      over_rows=devices.over_rows,
      micro_batches=MicroBatches(rows_at_once, devices.global_shards),
    ),
    donate_state=True,
  )
  state = devices.place(step.init_state(params, tx))
  rows = devices.place_rows(rows_of(examples, *devices.span(ROWS), row_length), ROWS)
  return train_step(state, devices.place(reference), rows)


def main(strategy, data, fsdp, tensor, out, coordinator, num_processes, process_id):
  jax.distributed.initialize(coordinator, int(num_processes), int(process_id))
  assert jax.device_count() == 8 and jax.local_device_count() == 4
  devices = parallel.make_parallel(strategy, data=int(data), fsdp=int(fsdp), tensor=int(tensor))
  state, metrics = lifted(devices)
  if strategy == "mesh":
    everywhere = jax.sharding.NamedSharding(devices.mesh, jax.sharding.PartitionSpec())
    state = jax.jit(lambda x: x, out_shardings=everywhere)(state)
    read = lambda x: np.asarray(x.addressable_data(0))
  else:
    read = lambda x: devices.collect(x)
  params = {
    jax.tree_util.keystr(path): read(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }
  np.savez(out, loss=read(metrics["loss"]), **params)


if __name__ == "__main__":
  main(*sys.argv[1:])
