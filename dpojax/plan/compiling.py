"""A run's step compiled for chips that are not there, and what it costs there; kept by digest."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from dpojax.kernels.platform import built_for
from dpojax.plan import needs as needs_lib
from dpojax.plan import program
from dpojax.plan.needs import Needs
from dpojax.plan.topology import Topology
from dpojax.runtime import digests, paths
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import ConfigError
from dpojax.training import resolve
from dpojax.training.chips import CHIPS

VERSION = 1
"""Of what is kept: raised when `program` reads more, or otherwise."""


class Compiled(NamedTuple):
  """A step as the chips' compiler makes it.

  Attributes:
    step: the step and the shapes of its arguments.
    needs: memory and arithmetic, see `needs.Needs`.
    costs: what it costs a device, see `program.Costs`.
    seconds: how long it took to compile.
    kept: whether it was compiled before.
  """

  step: needs_lib.Step
  needs: Needs
  costs: program.Costs
  seconds: float
  kept: bool


def compile_for(
  config: ml_collections.ConfigDict,
  topology: Topology,
  lengths: np.ndarray | None = None,
  *,
  say: Callable[[str], None] = lambda text: None,
) -> Compiled:
  """Returns the config's step as compiled for a topology, from the cache folder where it is there.

  Args:
    config: all keys.
    topology: from `topology.described`.
    lengths: [N, 1 + K] tokens of prompts and responses; None reads the run's data.
    say: takes a line of progress.

  Raises:
    ConfigError: the step does not fit the chips' memory, as their compiler says, or its lift cannot be had
      for devices that are not there.
    DataError, CheckpointError, PackingError: something given cannot be used.
  """
  if config.parallel.strategy != "mesh":
    raise ConfigError(
      "config.parallel.strategy is 'pmap', whose programs are compiled where the devices are; for a "
      "topology set parallel.strategy='mesh', which with parallel.fsdp=1 does the same"
    )
  with built_for(topology.platform):
    step = needs_lib.step_of(config, lengths, topology.devices)
    say(f"tracing the step for {topology.name}, {len(topology.devices)} devices")
    lowered = step.train_step.lower(step.state, step.reference, step.rows)
    # By the program itself: whatever of config or code changes it, the key does too.
    digest = digests.of_bytes(f"{VERSION} {topology.name} {topology.compiler}\n{lowered.as_text()}".encode())
    path = resolve.cache_dir(config) / "topologies" / f"{digest}.json"
    found = _read(path)
    kept = found is not None
    if not kept:
      start = time.perf_counter()
      with _progress(say, topology.name), _explained(topology):
        compiled = lowered.compile()
      found = {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "peak": needs_lib.peak_bytes(compiled),
        "counted_flops": (compiled.cost_analysis() or {}).get("flops", float("nan")),
        "costs": program.to_json(program.costs(compiled.as_text())),
        "seconds": time.perf_counter() - start,
      }
      _write(path, found)
  needs = needs_lib.needs_of(step, found["temporaries"], found["peak"], found["counted_flops"])
  check_fits(needs.peak, topology)
  return Compiled(step, needs, program.from_json(found["costs"]), found["seconds"], kept)


def check_fits(peak: float, topology: Topology) -> None:
  """Refuses a step of which a device would hold more than it has: libtpu compiles some of them.

  Raises:
    ConfigError: saying what it takes, what there is, and what would make it smaller.
  """
  memory = CHIPS[topology.chip].memory
  if peak > memory:
    raise _does_not_fit(topology, f"{peak / 2**30:.2f}G of {memory / 2**30:.2f}G, arguments and temporaries")


def _does_not_fit(topology: Topology, taken: str) -> ConfigError:
  return ConfigError(
    f"a step does not fit a device of {topology.name}: it takes {taken}; {needs_lib.SMALLER}"
  )


@contextlib.contextmanager
def _progress(say: Callable[[str], None], name: str, every: float = 20.0) -> Iterator[None]:
  """Says now and then for how long the work inside has gone on; a step of 8B takes minutes."""
  done, start = threading.Event(), time.perf_counter()

  def tell():
    # By a thread, as the compiler says nothing until it is done.
    while not done.wait(every):
      say(f"compiling for {name}: {time.perf_counter() - start:.0f} s")

  teller = threading.Thread(target=tell, daemon=True)
  say(f"compiling for {name}; a small model takes a minute, one of 8B several")
  teller.start()
  try:
    yield
  finally:
    done.set()
    teller.join()


@contextlib.contextmanager
def _explained(topology: Topology) -> Iterator[None]:
  """Turns a compiler's refusal for want of memory into a user's error."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "memory" not in text.lower():
      raise
    # Told after the program is laid out, or before, where its temporaries alone are more than there is.
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", text)
    before = re.search(r"HLO temporaries \(([\d.]+\w)\) exceeds available (\w+) \(([\d.]+\w)\)", text)
    if used:
      why = f"{used[1]} of {used[2]} of {used[3]}"
    elif before:
      why = f"{before[1]} of {before[3]} of {before[2].lower()} for temporaries alone"
    else:
      why = text.splitlines()[0]
    raise _does_not_fit(topology, why) from error


def _read(path: paths.Path) -> dict | None:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):  # none, or one whose writer was killed: it is made again
    return None


def _write(path: paths.Path, found: dict) -> None:
  with disk_errors(path.parent):
    paths.make_folder(path.parent)
    paths.write_whole(path, json.dumps(found))
