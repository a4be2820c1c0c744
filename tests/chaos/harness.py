"""Kills runs at random moments, starts them again, and compares the end with that of runs left alone.

python -m tests.chaos.harness --kills=200 --rivals=10 --faults [--only=train,ppo] [--seed=0] [--out=TABLE.md]

A process that has imported everything forks one for each start, so that a kill falls in what a run does and
not in its imports. Half of the kills fall at a moment drawn from the time a run takes, the other half just
after a phase drawn from those it has. Prints a table; ends with 1 when anything was lost.
"""

import argparse
import collections
import contextlib
import ctypes
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback

os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "HF_HUB_OFFLINE": "1",
  "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1",
}

from tests import stores
from tests.chaos import scenarios

LONGEST = 120.0
_PR_SET_PDEATHSIG = 1
SHARES = {"train": 0.4, "ppo": 0.15, "sample": 0.1, "online": 0.15, "two": 0.2}
"""Of the kills, by scenario."""
WITHIN = 30.0  # s, in which the processes of a run end when one of them is lost


class Lost(Exception):
  """A run did not come to the end it comes to when it is left alone."""


class Run:
  """Starts of one scenario, each forked from this process."""

  def __init__(self, name, world, folder, slow=0.0):
    self.name, self.world, self.folder, self.slow = name, world, folder, slow
    folder.mkdir(parents=True, exist_ok=True)

  def start(self, number=0, **changes):
    """Returns the pid of a new process that runs the scenario."""
    pid = os.fork()
    if pid:
      return pid
    code = 1
    try:
      ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))  # it does not outlive the harness
      log = os.open(self.log(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      os.dup2(log, 1)
      os.dup2(log, 2)
      sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
      scenarios.jax.config.update("jax_compilation_cache_dir", str(self.world / "compiled"))
      scenarios.jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
      scenarios.watch_phases(self.phase_file(number), self.slow)
      scenarios.RUNS[self.name](self.world, self.folder, **changes)
      code = 0
    except SystemExit as exit:
      print(exit, file=sys.stderr)
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stderr.flush()
      os._exit(code)

  def start_two(self, of_one=None, **changes):
    """Returns the pids of two processes of one run; `of_one` are changes to the second's config alone."""
    port = stores.free_port()
    return [
      self.start(
        i,
        **{"parallel.coordinator": f"127.0.0.1:{port}", "parallel.num_processes": 2, "parallel.process_id": i}
        | changes
        | ((of_one or {}) if i else {}),
      )
      for i in range(2)
    ]

  def log(self, number=0):
    return self.folder / f"log{number}"

  def phase_file(self, number=0):
    return self.folder / f"phase{number}"

  def phase(self, number=0):
    with contextlib.suppress(FileNotFoundError):
      return self.phase_file(number).read_text().strip()
    return ""

  def outcome(self):
    path = self.folder / ("run" if self.name in ("train", "two") else "") / "outcome.json"
    return json.loads(path.read_text()) if path.exists() else None


def wait(pid, seconds):
  """Returns the exit code of a process, negative for a signal, or None if it goes on for longer."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.005)
  return None


def finished(run, pids):
  """Waits for processes that have to end well."""
  for number, pid in enumerate(pids):
    code = wait(pid, LONGEST)
    if code != 0:
      raise Lost(f"{run.name} ended with {code}:\n{run.log(number).read_text()[-3000:]}")


def moment(run, pid, number, rng, length, aimed):
  """Waits for the moment of a kill; returns the exit code of a process that ended before it, or None."""
  if not aimed:
    return wait(pid, rng.uniform(0, length))
  target, until = rng.choice(scenarios.PHASES[run.name]), time.monotonic() + length
  while run.phase(number) != target and time.monotonic() < until:
    if (code := wait(pid, 0.003)) is not None:
      return code
  return wait(pid, rng.uniform(0, 0.05))


def kill(run, pid, number):
  """Kills a process; returns what it was doing."""
  os.kill(pid, signal.SIGKILL)
  wait(pid, LONGEST)
  half_written = list(run.folder.glob("run/checkpoints/*orbax-checkpoint-tmp*"))
  return "saving" if half_written else run.phase(number)


def check_the_other(run, other, number):
  """A process whose fellow was killed ends in time, with one line and exit code 1."""
  started = time.monotonic()
  code = wait(other, WITHIN)
  took = time.monotonic() - started
  if code is None:
    os.kill(other, signal.SIGKILL)
    wait(other, LONGEST)
  errors = [line for line in run.log(number).read_text().splitlines() if not expected(line)]
  if code != 1 or len(errors) != 1 or not errors[0].startswith(f"error: process {1 - number} "):
    raise Lost(f"the other process ended with {code} after {took:.1f} s, saying\n" + "\n".join(errors))
  return took


def expected(line):
  """Whether a line is one of a run that goes well."""
  of_every_run = (
    "step ",
    "training ",
    "  ",
    "[Gloo]",
    "[transformers]",
    "continuing from",
    "removed from",
    "waiting for",
  )
  return line.startswith(of_every_run) or "comparisons" in line or "held out by" in line


def killed_until(run, kills, rng, whole, length, seen, times):
  """Kills and starts again until the run comes to its end or there were enough kills; returns how many."""
  two, count = run.name == "two", 0
  while True:
    pids = run.start_two() if two else [run.start()]
    if count == kills:
      break
    victim = rng.randrange(len(pids))
    code = moment(run, pids[victim], victim, rng, length, rng.random() < 0.5)
    if code is not None:
      if code != 0:
        raise Lost(f"{run.name} ended by itself with {code}:\n{run.log(victim).read_text()[-3000:]}")
      pids.pop(victim)
      break
    phase = kill(run, pids[victim], victim)
    seen[run.name, phase] += 1
    count += 1
    if two:
      if run.phase(1 - victim) in ("", "starting"):  # it has not joined its fellow yet, and waits for it
        os.kill(pids[1 - victim], signal.SIGKILL)
        wait(pids[1 - victim], LONGEST)
      else:
        times.append(check_the_other(run, pids[1 - victim], 1 - victim))
  finished(run, pids)
  if run.outcome() != whole:
    raise Lost(f"{run.name} after {count} kills gave {run.outcome()}, not {whole}; see {run.folder}")
  return count


def left_alone(run):
  """Returns the outcome of a run that is not killed, and the seconds it took."""
  started = time.monotonic()
  finished(run, run.start_two() if run.name == "two" else [run.start()])
  return run.outcome(), time.monotonic() - started


def chaos(name, kills, world, folder, rng, seen, times, options):
  """Kills runs of a scenario so many times; returns what comes out of it, and how many came to their end."""
  slow, until = options.slow, time.monotonic() + options.seconds
  if not options.quick:  # else the time a run takes is that of one which compiles
    left_alone(Run(name, world, folder / f"{name}_first", slow))
  whole, length = left_alone(Run(name, world, folder / f"{name}_whole", slow))
  runs = 0
  while kills > 0 and time.monotonic() < until:
    place = folder / f"{name}_{runs}"
    kills -= killed_until(Run(name, world, place, slow), min(kills, 12), rng, whole, length, seen, times)
    shutil.rmtree(place)
    runs += 1
  return whole, runs


def rivals(name, world, folder, rng, whole):
  """Starts two runs at once over one cache, and over one workdir or file; both have to be right."""
  if name == "train":  # a workdir each, one cache
    run = Run(name, world, folder / "shared")
    pids = [run.start(i, workdir=str(run.folder / f"run{i}")) for i in range(2)]
    finished(run, pids)
    for i in range(2):
      got = json.loads((run.folder / f"run{i}" / "outcome.json").read_text())
      if got != whole:
        raise Lost(f"of two runs over one cache one gave {got}, not {whole}")
    shutil.rmtree(run.folder)
  run = Run(name, world, folder / "one")
  first = run.start(0)
  time.sleep(rng.uniform(0.0, 0.3))
  second = run.start(1)
  codes = wait(first, LONGEST), wait(second, LONGEST)
  said = [run.log(i).read_text().strip() for i in range(2)]
  refused = codes.index(1) if 1 in codes else 0
  if sorted(codes) != [0, 1] or "is in use by another process (pid " not in said[refused].splitlines()[-1]:
    raise Lost(f"two runs of {name} over one place ended with {codes}:\n{said}")
  if run.outcome() != whole:
    raise Lost(f"beside a refused run {name} gave {run.outcome()}, not {whole}")
  shutil.rmtree(run.folder)


def differing(world, folder, chosen):
  """Starts two processes that were given different things; both have to say so before step 1."""
  for what, changes, line in (
    ("another data file", {"path": str(world / "others.jsonl")}, "process 1 has training data with digest"),
    ("another config", {"beta": 0.5}, "process 1 has config.beta 0.5, process 0 0.1"),
    ("another jax", {"versions": {"jax": "0.9.9"}}, "process 1 has jax '0.9.9', process 0 '"),
  ):
    if not chosen(what):
      continue
    run = Run("two", world, folder / what.replace(" ", "_"))
    codes = [wait(pid, LONGEST) for pid in run.start_two(changes)]
    for i, code in enumerate(codes):
      errors = [each for each in run.log(i).read_text().splitlines() if not expected(each)]
      if code != 1 or len(errors) != 1 or not errors[0].startswith(f"error: {line}"):
        raise Lost(f"{what}: process {i} ended with {code}, saying\n" + "\n".join(errors))
    if (run.folder / "run" / "metrics.jsonl").exists():
      raise Lost(f"{what}: it was told after the first step")
    yield f"{what}, told by both before step 1"


def stopped(world, folder, whole, lost_after, chosen):
  """Kills, stops and stalls one process of two while they train; the same command has to continue."""
  lost = lambda victim, how: f"error: process {victim} (pid {{pid}} on {{host}}) {how} "
  for what, victim, number, said in (
    ("kill -9 of process 0", 0, signal.SIGKILL, lost(0, "is gone; step")),
    ("kill -9 of process 1", 1, signal.SIGKILL, lost(1, "is gone; step")),
    ("SIGTERM of process 1", 1, signal.SIGTERM, "error: stopped by a signal after step "),
    ("SIGSTOP of process 0", 0, signal.SIGSTOP, lost(0, "has been silent for")),
    ("SIGSTOP of process 1", 1, signal.SIGSTOP, lost(1, "has been silent for")),
  ):
    if not chosen(what):
      continue
    run = Run("two", world, folder / what.replace(" ", "_"), slow=0.25)
    pids = run.start_two(**{"parallel.lost_after": lost_after})
    metrics, until = run.folder / "run" / "metrics.jsonl", time.monotonic() + LONGEST
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("train") > 3):
      time.sleep(0.01)
    os.kill(pids[victim], number)
    started = time.monotonic()
    code = wait(pids[1 - victim], lost_after + 5)
    took = time.monotonic() - started
    if number != signal.SIGTERM:
      os.kill(pids[victim], signal.SIGKILL)
    wait(pids[victim], LONGEST)
    errors = [each for each in run.log(1 - victim).read_text().splitlines() if not expected(each)]
    said = said.format(pid=pids[victim], host=socket.gethostname())
    line = errors[0] if len(errors) == 1 else ""
    if code != 1 or not (line.startswith(said) and line.endswith("the same command continues")):
      raise Lost(f"{what}: the other ended with {code} after {took:.1f} s, saying\n" + "\n".join(errors))
    finished(run, run.start_two())
    if run.outcome() != whole:
      raise Lost(f"{what}: the same command came to {run.outcome()}, not {whole}")
    yield f"{what}: the other said so and ended after {took:.1f} s, the same command came to the same bits"


def table(seen, ended, rivals_tried, times):
  """Returns the lines of the table: what was killed, doing what, how often, and what came of it."""
  lines = ["| run | killed while | kills | runs to the end, bit for bit |", "|---|---|---|---|"]
  for (name, phase), count in sorted(seen.items()):
    lines.append(f"| {name} | {phase} | {count} | |")
  for name, runs in ended.items():
    total = sum(count for (of, _), count in seen.items() if of == name)
    lines.append(f"| {name} | all | {total} | {runs} of {runs} |")
  for name, count in rivals_tried.items():
    lines.append(f"| two of {name} at once | | {count} times | {count} of {count} |")
  if times:
    mean = sum(times) / len(times)
    lines.append(f"\nOf two processes the other ended within {max(times):.1f} s, {mean:.1f} s on average.")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=200, help="of all scenarios together")
  parser.add_argument("--only", default=",".join(SHARES), help="of these scenarios")
  parser.add_argument("--seconds", type=float, default=1e9, help="a scenario gets no new run after these")
  parser.add_argument("--rivals", type=int, default=10, help="times that two runs are started at once")
  parser.add_argument("--faults", nargs="?", const="all", default="", help="also these, of one of two")
  parser.add_argument("--quick", action="store_true", help="no run of a scenario first that only compiles")
  parser.add_argument("--lost_after", type=float, default=20.0, help="seconds, for a process that stalls")
  parser.add_argument("--slow", type=float, default=0.02, help="seconds a step takes longer")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", default="")
  options = parser.parse_args()
  rng, seen, ended, times, tried, told = (random.Random(options.seed), collections.Counter(), {}, [], {}, [])
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    world = folder / "world"
    world.mkdir()
    maker = os.fork()
    if not maker:
      try:
        scenarios.make_world(world, with_reward="ppo" in options.only or "online" in options.only)
        os._exit(0)
      finally:
        os._exit(1)
    if wait(maker, LONGEST) != 0:
      raise Lost("the world was not made")
    chosen = {name: SHARES[name] for name in options.only.split(",")}
    for each, share in chosen.items():
      count = math.ceil(options.kills * share / sum(chosen.values()))
      if count:
        whole, ended[each] = chaos(each, count, world, folder, rng, seen, times, options)
        done = sum(number for (of, _), number in seen.items() if of == each)
        phases = ", ".join(f"{phase} {number}" for (of, phase), number in sorted(seen.items()) if of == each)
        print(f"{each}: {done} kills, {ended[each]} runs, the same bits; {phases}", flush=True)
        if each == "two" and options.faults:
          wanted = lambda what: options.faults == "all" or what in options.faults.split(",")
          for line in itertools.chain(
            differing(world, folder, wanted), stopped(world, folder, whole, options.lost_after, wanted)
          ):
            print(line, flush=True)
            told.append(line)
        if each in ("train", "sample") and options.rivals:
          for _ in range(options.rivals):
            rivals(each, world, folder, rng, whole)
          tried[each] = options.rivals
  text = "\n".join([table(seen, ended, tried, times), "", *(f"- {line}" for line in told)])
  print(text)
  if options.out:
    pathlib.Path(options.out).write_text(text + "\n")


if __name__ == "__main__":
  try:
    main()
  except Lost as lost:
    sys.exit(f"LOST: {lost}")
