"""What a run tells of its speed: rates, where the time of a step goes, and the share of the chips' peak."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax

from dpojax.data.loader import Batch
from dpojax.runtime import paths
from dpojax.training.chips import CHIPS

_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}
"""What jax calls TPUs (`device_kind`); a GPU's name holds that of its chip."""

METRICS = (
  "pairs_per_second",
  "tokens_per_second",
  "tokens_per_second_per_device",
  "input_wait",
  "mfu",
  "step_seconds",
  "step_seconds/input",
  "step_seconds/device",
  "step_seconds/host",
  "peak_memory_gib",
)
"""Names of all that depends on the clock and the machine, and so differs between two equal runs."""


def chip_of(device_kind: str) -> str:
  """Returns the name in `CHIPS` of a device, or '' where it is none of them, such as a CPU."""
  if device_kind in _KINDS:
    return _KINDS[device_kind]
  # H100 NVL and PCIe have other rates than the SXM module that the table is of.
  name = device_kind.lower()
  known = [chip for chip in ("a100", "h100", "h200") if f" {chip}" in f" {name}"]
  return known[0] if known and "nvl" not in name and "pcie" not in name else ""


class Throughput:
  """Counts what passes through the train loop, and where its time goes.

  The host's time has three parts: `input`, waiting for rows; `device`, in the call of a step and waiting
  for its results; `host`, everything else (logging, evaluating, the start of a save). Programs with loops
  run on GPUs while they are called, so that a call cannot be told from a wait. A run that its devices bound
  spends nearly all of it in `device`; so does a step that is compiled.
  """

  def __init__(self, flops_per_comparison: float = 0.0):
    """Starts the clock.

    Args:
      flops_per_comparison: what one cannot do without, see `plan.needs.necessary_flops`; 0 leaves `mfu` out.
    """
    self._flops = flops_per_comparison
    chip = chip_of(jax.devices()[0].device_kind)
    self._peak = CHIPS[chip].flops * jax.device_count() if chip else 0.0
    self.start()

  def start(self) -> None:
    """Forgets what was counted."""
    self._started, self._input, self._device = time.perf_counter(), 0.0, 0.0
    self._steps = self._comparisons = self._tokens = 0

  def advance(self, batch: Batch, waited: float) -> None:
    """Counts a step of a batch whose rows were waited for so many seconds."""
    self._input += waited
    self._steps += 1
    self._comparisons += batch.comparisons
    self._tokens += batch.tokens

  @contextlib.contextmanager
  def on_device(self) -> Iterator[None]:
    """Counts the time inside as waiting for the devices."""
    start = time.perf_counter()
    yield
    self._device += time.perf_counter() - start

  def rates(self) -> dict[str, float]:
    """Returns what was counted since the start, by the names in `METRICS`, and starts again."""
    seconds, steps = time.perf_counter() - self._started, max(1, self._steps)
    of_input, of_device = self._input / steps, self._device / steps
    rates = {
      "pairs_per_second": self._comparisons / seconds,
      "tokens_per_second": self._tokens / seconds,
      "tokens_per_second_per_device": self._tokens / seconds / jax.device_count(),
      "input_wait": self._input / seconds,
      "step_seconds": seconds / steps,
      "step_seconds/input": of_input,
      "step_seconds/device": of_device,
      # Clocks are read at different moments: the rest may come out a hair below 0.
      "step_seconds/host": max(0.0, seconds / steps - of_input - of_device),
    }
    if self._flops and self._peak:
      rates["mfu"] = self._flops * self._comparisons / seconds / self._peak
    # CPUs tell nothing of their memory.
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
      rates["peak_memory_gib"] = stats["peak_bytes_in_use"] / 2**30
    self.start()
    return rates


class Profile:
  """An xprof trace of some steps, in the run's TensorBoard folder, where its profile plugin finds it."""

  def __init__(self, steps: range, workdir: str | os.PathLike):
    """Traces these steps, none where there are none; on several hosts each writes its own."""
    self._steps, self._running = steps, False
    self._folder = paths.of(workdir) / "tensorboard"
    self._here = paths.scratch() / "trace" if paths.is_remote(workdir) and steps else self._folder

  def before(self, step: int, state: Any) -> None:
    """Starts or ends the trace where this step is the first, or the first one after it.

    Args:
      step: the step that comes next, from 1.
      state: arrays of the step before it, which are waited for: a trace holds whole steps.
    """
    if self._running and step not in self._steps:
      jax.block_until_ready(state)
      self._stop()
    elif step in self._steps and not self._running:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._here))
      self._running = True

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    if self._here is not self._folder:
      paths.upload(self._here, self._folder)
    self._running = False

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._running:
      self._stop()
