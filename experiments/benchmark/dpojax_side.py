"""dpojax's own train step on the benchmark's pairs.

python -m experiments.benchmark.dpojax_side SETTINGS OUT
"""

import json
import sys
import time

import flax
import jax
import jaxlib

from dpojax import resolve, step
from dpojax.parallel import make_parallel
from dpojax.parts import Parts
from experiments.benchmark import inputs, measure


def run(settings: dict) -> dict:
  config = inputs.run_config(settings)
  devices = make_parallel(config.parallel.strategy)
  batches = inputs.make_loader(config, shards=devices.row_multiple,
      rows_at_once=config.rows_at_once, span=devices.span)
  setup = resolve.make_setup(config, axis_name=devices.axis_name)
  schedule = step.make_schedule("constant", learning_rate=config.optimizer.learning_rate,
                                warmup_steps=0, steps=config.steps)
  tx = step.make_optimizer("adamw", schedule, max_grad_norm=10.0)
  state = devices.place(step.init_state(setup.params, tx))
  reference = None if setup.reference is None else devices.place(setup.reference)
  setup = setup._replace(params=None, reference=None)
  train_step = devices.lift(
      step.make_train_step(
          setup.objective, tx, axis_name=devices.axis_name,
          parts=Parts(config.rows_at_once, devices.global_shards)), donate_state=True)

  seconds, waits, losses, compiled = [], [], [], {}
  source = iter(batches.training(0, config.steps))
  for _ in range(config.steps):
    start = time.perf_counter()
    batch = next(source)
    rows = devices.place_rows(batch.rows, batch.total_rows)
    waits.append(time.perf_counter() - start)
    state, metrics = train_step(state, reference, rows)
    losses.append(float(devices.collect(metrics["loss"])))
    seconds.append(time.perf_counter() - start)
    if batch.total_rows not in compiled:  # this step was compiled: its time is told apart
      compiled[batch.total_rows] = seconds.pop()
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
      "seconds": seconds, "losses": losses, "compile": sum(compiled.values()) - len(compiled) * min(
          seconds, default=0.0), "compiles": len(compiled), "input_wait": waits,
      "peak_bytes": stats.get("peak_bytes_in_use") or measure.peak_bytes(),
      "row_fill": inputs.row_fill(batches, config.steps), "lengths": batches.lengths[
          batches.plan(0).index[:config.steps].ravel()].tolist(),
      "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}}


if __name__ == "__main__":
  with open(sys.argv[1]) as given:
    result = run(json.load(given))
  with open(sys.argv[2], "w") as out:
    json.dump(result, out)
