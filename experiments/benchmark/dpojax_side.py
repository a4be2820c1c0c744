"""dpojax's own train step on the benchmark's pairs.

python -m experiments.benchmark.dpojax_side SETTINGS OUT
"""

import json
import pathlib
import sys
import time

import flax
import jax
import jaxlib
import numpy as np

from dpojax.models import peft
from dpojax.runtime import memory
from dpojax.runtime.command import settle
from dpojax.training import checkpoint, resolve, step
from dpojax.training import config as config_lib
from experiments.benchmark import inputs, measure


def run(settings: dict) -> dict:
  config = inputs.run_config(settings)
  devices = resolve.make_devices(config)
  batches = resolve.make_loader(config, resolve.load_data(config).train, devices)
  setup = resolve.make_setup(config, axis_name=devices.axis_name)
  tx, train_step = resolve.make_train_step(config, setup.objective, devices)
  if settings.get("adapter") and not pathlib.Path(settings["adapter"]).exists():
    params = jax.tree.map(np.asarray, setup.params)
    peft.save(settings["adapter"], setup.model, params, config_lib.lora_of(config), base=settings["model"])
  start = time.perf_counter()
  reference = devices.place(setup.reference)
  if settings.get("stored"):
    resolve.use_stored_reference(
      config, setup, reference, checkpoint.fingerprint(setup.reference), [batches], devices
    )
    reference = None
  stored = time.perf_counter() - start
  state = devices.place(step.init_state(setup.params, tx))
  setup = setup._replace(params=None, reference=None)
  memory.fit_memory_to(state)

  seconds, waits, losses, trace, compiled = [], [], [], [], {}
  source = iter(batches.training(0, config.steps))
  for _ in range(config.steps):
    start = time.perf_counter()
    batch = next(source)
    rows = devices.place_rows(batch.rows, batch.total_rows)
    waits.append(time.perf_counter() - start)
    state, metrics = train_step(state, reference, rows)
    losses.append(float(devices.collect(metrics["loss"])))
    trace.append({name: float(value) for name, value in devices.collect(metrics).items()})
    seconds.append(time.perf_counter() - start)
    if batch.total_rows not in compiled:  # this step was compiled: its time is told apart
      compiled[batch.total_rows] = seconds.pop()
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
    "seconds": seconds,
    "losses": losses,
    "trace": trace,
    "compile": sum(compiled.values()) - len(compiled) * min(seconds, default=0.0),
    "compiles": len(compiled),
    "input_wait": waits,
    "reference_pass": stored,
    "peak_bytes": stats.get("peak_bytes_in_use") or measure.peak_bytes(),
    "row_fill": inputs.row_fill(batches, config.steps),
    "lengths": batches.lengths[batches.plan(0).index[: config.steps].ravel()].tolist(),
    "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__},
  }


if __name__ == "__main__":
  settle()  # as every command of dpojax does
  with open(sys.argv[1]) as given:
    result = run(json.load(given))
  with open(sys.argv[2], "w") as out:
    json.dump(result, out)
