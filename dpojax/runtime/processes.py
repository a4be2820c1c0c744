"""The processes of one run on several hosts: they join, compare what they were given, and end together.

Each shows every second, in the key-value store of jax's coordination service, that it lives. One that is
killed, stalls, or stops with an error ends the others with one line, which says who it was and which step
is saved; the same command continues. jax itself would notice after 100 s, and end by SIGABRT under a stack
trace. The store lives in process 0, without which jax ends the others at once: that too is made one line.
Process 0 writes what has stopped the others to its own log, stack traces of defects included: who runs a
hundred hosts reads one log.

The store's client is not public in jax; Orbax and others read it from the same place.
"""

import atexit
import contextlib
import ctypes
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed

from dpojax.runtime import ownership, paths, stderr_filter
from dpojax.runtime.errors import UserError

_BEAT = 1.0
_GRACE = 3.0  # for a process that is about to end by an error of its own
_FAREWELL = 12.0  # that process 0 waits for the others to read why it ends
_LAST = 60.0  # that a process at its end waits for the others to come to theirs; jax then waits on
_LONGEST_TRACE = 10_000  # characters of a stack trace that are told, its end
_FOREVER = 10**9  # ms; who waits in vain is ended by the watch


class DisagreementError(UserError, ValueError):
  """The processes of a run were given different things; the message names them."""


class Process(NamedTuple):
  """Where one of the processes runs; `kernel` is the same for those that see each other's pids."""

  host: str
  pid: int
  kernel: str


def join(coordinator: str, num_processes: int, process_id: int, *, timeout: float) -> None:
  """Joins the processes of a run and watches them; before any other use of jax.

  Args:
    coordinator: host:port of process 0, or auto on a cluster that jax knows.
    num_processes, process_id: how many there are, and which this is; for auto jax knows.
    timeout: seconds without a sign of life after which a process counts as lost; 0 leaves it to jax.
  """
  if timeout and os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0":  # jax sets 1
    _filter_stderr()
  arguments = (
    {}
    if coordinator == "auto"
    else dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
  )
  jax.distributed.initialize(**arguments)
  if timeout and distributed.global_state.num_processes > 1:
    global _watch
    _watch = _Watch(timeout)


def join_run(settings: Any) -> None:
  """Joins the processes that `config.parallel` names, if there are several; see `join`."""
  if settings.coordinator:
    join(settings.coordinator, settings.num_processes, settings.process_id, timeout=settings.lost_after)


def saves_in(workdir: paths.Path, steps: Callable[[], list[int]]) -> None:
  """Tells where the run's checkpoints are and how to find them, for the line about a lost process."""
  if _watch is not None:
    _watch.workdir, _watch.steps = workdir, steps


def agree(what: str, facts: dict[str, Any]) -> None:
  """Compares facts with those of the other processes; all of them have to call it.

  Args:
    what: names this comparison.
    facts: JSON values by the name a user knows them by.

  Raises:
    DisagreementError: in every process, naming the first fact that differs and who has which.
  """
  client, count = distributed.global_state.client, jax.process_count()
  if client is None or count == 1:
    return
  place = _place(what)
  client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(facts))
  of_all = [json.loads(client.blocking_key_value_get(f"{place}/{i}", _FOREVER)) for i in range(count)]
  for i, theirs in enumerate(of_all):
    for name in of_all[0] | theirs:
      first, other = of_all[0].get(name), theirs.get(name)
      if first != other:
        raise DisagreementError(
          f"process {i} has {name} {other!r}, process 0 {first!r}; give all processes the same"
        )


def from_first(what: str, make: Callable[[], Any]) -> Any:
  """Returns, in every process, a JSON value that process 0 makes; all of them have to call it.

  Args:
    what: names the value.
    make: called in process 0 alone.
  """
  client = distributed.global_state.client
  if client is None or jax.process_count() == 1:
    return make()
  place = _place(what)
  if jax.process_index() == 0:
    value = make()
    client.key_value_set(place, json.dumps(value))
    return value
  return json.loads(client.blocking_key_value_get(place, _FOREVER))


def versions() -> dict[str, str]:
  """Returns the versions that decide a run's numbers."""
  names = ("dpojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  return {name: importlib.metadata.version(name) for name in names} | {
    "python": ".".join(map(str, sys.version_info[:2]))
  }


def digest(value: Any) -> str:
  """Returns a short digest of JSON values, to be compared and shown."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def meet(where: str) -> None:
  """Returns when all processes have called it."""
  if distributed.global_state.client is not None and jax.process_count() > 1:
    distributed.global_state.client.wait_at_barrier(_place(where), _FOREVER)


def _place(name: str) -> str:
  """Returns a name that is new each time, and the same in all processes, as they come by in one order."""
  return f"dpojax/{next(_places)}/{name}"


def leave() -> None:
  """Ends the watch in good order, when all processes have come to their end."""
  if _watch is not None:
    _watch.leave()


def end(error: BaseException) -> None:
  """Ends this process by what has stopped it, and lets the others know; returns if there are no others.

  What jax raises because another process is lost is told as that.
  """
  if _watch is not None:
    _watch.end(error)


class _Watch:
  """Shows the others that this process lives, and ends it when one of them does not."""

  def __init__(self, timeout: float):
    state = distributed.global_state
    self._client, self._coordinator = state.client, state.coordinator_address
    self._me, self._count, self._timeout = state.process_id, state.num_processes, timeout
    self.workdir, self.steps = None, list
    self._ending, self._left = threading.Lock(), threading.Event()
    here = Process(socket.gethostname(), os.getpid(), ownership.kernel())
    self._client.key_value_set(f"dpojax/process/{self._me}", json.dumps(here))
    self._processes = [
      Process(*json.loads(self._client.blocking_key_value_get(f"dpojax/process/{i}", _FOREVER)))
      for i in range(self._count)
    ]
    self._seen = {i: (None, time.monotonic()) for i in range(self._count) if i != self._me}
    self._ended, self._told = {}, None
    self._silent = set()  # those given up: nobody waits for them to hear of it
    self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), self._on_abort)
    for loop in (self._exchange, self._look):
      threading.Thread(target=loop, daemon=True).start()
    sys.excepthook = lambda kind, error, trace: self.end(error)  # for a run that is no command's
    atexit.register(self.leave)

  def _exchange(self) -> None:
    """Writes this process's sign of life and reads the others'; it may hang, `_look` never does."""
    beat = 0
    while not self._left.is_set():
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # not answered: no sign of life
        beat += 1
        self._client.key_value_set(f"dpojax/beat/{self._me}", str(beat), allow_overwrite=True)
        self._read()
      time.sleep(_BEAT)

  def _read(self) -> None:
    """Process 0 looks for all; to the others it shows that it lives by answering."""
    numbered = lambda name: {
      int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"dpojax/{name}/")
    }
    self._ended |= {i: text for i, text in numbered("end").items() if i != self._me}
    now = time.monotonic()
    if self._me:
      self._told = numbered("lost").get(0)
      self._seen[0] = (None, now)
      return
    for i, beat in numbered("beat").items():
      if i in self._seen and self._seen[i][0] != beat:
        self._seen[i] = (beat, now)

  def _look(self) -> None:
    before, asked = time.monotonic(), {}
    while not self._left.is_set():
      time.sleep(_BEAT / 2)
      now = time.monotonic()
      if now - before > self._timeout / 2:  # it was this process that was stopped
        self._seen = {i: (beat, now) for i, (beat, _) in self._seen.items()}
      before = now
      for i, text in list(self._ended.items()):
        if text and now - asked.setdefault(i, now) > _GRACE:
          self._stop("; ".join(f"process {j} has stopped: {why}" for j, why in self._reasons()))
      if self._told:
        self._stop(self._told)
      for i in self._seen if self._me == 0 else (0,):
        if i not in self._ended and (lost := self._lost(i, now)):
          self._silent.add(i)
          self._stop(lost)

  def _lost(self, i: int, now: float) -> str:
    """Returns in words that a process is lost, or nothing."""
    process, silent = self._processes[i], now - self._seen[i][1]
    name = f"process {i} (pid {process.pid} on {process.host})"
    if process.kernel == self._processes[self._me].kernel and not ownership.lives(process.pid):
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        if self._me == 0:
          self._read()  # it may have said why
      return "" if i in self._ended else f"{name} is gone"
    return f"{name} has been silent for {silent:.0f} s" if silent > self._timeout else ""

  def _stop(self, why: str) -> NoReturn:
    """Ends this process by one line."""
    self._ending.acquire()  # for good
    if self._me == 0:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._client.key_value_set("dpojax/lost/0", why, allow_overwrite=True)
      self._show_traces()
    self._exit(f"error: {why}; {self._saved()}", tell=why)

  def _reasons(self) -> list[tuple[int, str]]:
    """Returns who has stopped and why; of those with the same reason the first, for all may lack one file."""
    reasons = {}
    for i, text in sorted(self._ended.items()):
      if text:
        reasons.setdefault(text, i)
    return [(i, text) for text, i in reasons.items()]

  def _show_traces(self) -> None:
    """Writes the stack traces of the others' defects to the log of process 0, the same one once."""
    with contextlib.suppress(jax.errors.JaxRuntimeError, OSError):
      traces = {}
      for key, text in self._client.key_value_dir_get("dpojax/trace/"):
        traces.setdefault(text, []).append(key.rpartition("/")[2])
      for text, processes in traces.items():
        print(f"process {', '.join(sorted(processes, key=int))}:\n{text}", file=sys.stderr, flush=True)

  def _saved(self) -> str:
    if self.workdir is None:
      return "nothing is saved yet: start all processes again"
    found = []
    looking = threading.Thread(target=lambda: found.append(self.steps()), daemon=True)
    looking.start()
    looking.join(_GRACE)  # a store may not answer
    if not found:
      return f"what is saved is in {self.workdir}: the same command continues"
    (steps,) = found
    if not steps:
      return f"no step is saved in {self.workdir} yet: the same command starts again"
    return f"step {max(steps)} is saved in {self.workdir}: the same command continues"

  def _exit(self, text: str, *, tell: str, trace: str = "", code: int = 1) -> NoReturn:
    """Says it, here and to the others, and ends the process without jax's wait for those it has lost."""
    with contextlib.suppress(OSError):  # a terminal may be gone
      print(text, file=sys.stderr, flush=True)
      sys.stdout.flush()
    telling = threading.Thread(target=self._tell, args=(tell, trace), daemon=True)
    telling.start()
    telling.join(_FAREWELL if self._me == 0 else _GRACE)  # a process 0 that stalls does not answer
    os._exit(code)

  def _tell(self, why: str, trace: str) -> None:
    """Lets the others know; the store goes with process 0, which waits until they do."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      if trace:
        self._client.key_value_set(f"dpojax/trace/{self._me}", trace[-_LONGEST_TRACE:], allow_overwrite=True)
      self._client.key_value_set(f"dpojax/end/{self._me}", why or "no reason given", allow_overwrite=True)
      while self._me == 0 and not self._all_ended():
        time.sleep(_BEAT / 4)

  def _all_ended(self) -> bool:
    self._read()
    here = self._processes[self._me].kernel
    dead = lambda process: process.kernel == here and not ownership.lives(process.pid)
    return all(i in self._ended or i in self._silent or dead(self._processes[i]) for i in self._seen)

  def end(self, error: BaseException) -> None:
    # If it is for the loss of a process, the watch ends this one meanwhile.
    time.sleep(self._timeout + 2 * _BEAT if _between_processes(error) else 2 * _BEAT)
    self._ending.acquire()
    if isinstance(error, UserError):
      self._exit(f"error: {error}", tell=str(error).partition("\n")[0])
    text = "".join(traceback.format_exception(error)).rstrip()
    code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    self._exit(text, tell=text.splitlines()[-1], trace=text, code=code)

  def leave(self) -> None:
    if self._left.is_set():
      return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f"dpojax/end/{self._me}", "")
      until = time.monotonic() + _LAST
      while not self._ended.keys() >= self._seen.keys() and time.monotonic() < until:
        # The watch goes on: one may be lost even now.
        time.sleep(_BEAT / 4)
        self._ended |= {
          int(key.rpartition("/")[2]): text for key, text in self._client.key_value_dir_get("dpojax/end/")
        }
    self._left.set()
    jax.distributed.shutdown()  # waits once more for all, so that none sees process 0 go before it has left
    ctypes.CDLL(None).signal(int(signal.SIGABRT), None)  # the default

  def _aborted(self, _) -> None:
    """Runs in the thread that aborts, for jax aborts when process 0 is lost; other aborts go on."""
    if self._me and not self._coordinator_answers():
      if self._ending.acquire(blocking=False):
        text = self._ended.get(0)
        name = f"process 0 (pid {self._processes[0].pid} on {self._processes[0].host})"
        why = f"process 0 has stopped: {text}" if text else self._told or f"{name} is gone"
        print(f"error: {why}; {self._saved()}", file=sys.stderr, flush=True)
      else:
        time.sleep(_FAREWELL)  # another thread is about to end the process
      sys.stdout.flush()
      os._exit(1)

  def _coordinator_answers(self) -> bool:
    host, _, port = self._coordinator.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
      return False
    return True


def _between_processes(error: BaseException | None) -> bool:
  """Returns whether it, or what it was raised from, is about what processes do together."""
  return error is not None and (
    re.search("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Bb]arrier|ABORTED", str(error)) is not None
    or _between_processes(error.__cause__)
  )


_places = itertools.count()
_watch: _Watch | None = None
_filter: subprocess.Popen | None = None


def _filter_stderr() -> None:
  """Lets `stderr_filter` read what libraries write to stderr; Python's own lines go past it."""
  global _filter
  sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
  _filter = subprocess.Popen(
    [sys.executable, "-I", "-S", stderr_filter.__file__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
  )
  os.dup2(_filter.stdin.fileno(), 2)
  _filter.stdin.close()
