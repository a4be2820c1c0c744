"""A function called on many inputs in processes of its own, one a core.

The processes are told what to do through pipes. Unlike those of `multiprocessing` they import nothing but
what the function needs: not the program that started them, and no jax.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

from dpojax.data.examples import DataError

_COMMAND = "from dpojax.data import pool; pool.serve()"


def cores() -> int:
  """Returns how many cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(function: Callable, inputs: Iterable[tuple], workers: int) -> Iterator[Any]:
  """Yields function(*input) of each input, in their order, computed by processes.

  Args:
    function: can be pickled, and what it returns.
    inputs: read as they are needed, a few ahead.
    workers: how many processes.

  Raises:
    DataError: a process raised one, or died.
  """
  with contextlib.ExitStack() as stack:
    idle: queue.SimpleQueue = queue.SimpleQueue()
    pickled = pickle.dumps(function)
    for _ in range(workers):
      idle.put(stack.enter_context(_Worker(pickled)))
    threads = stack.enter_context(futures.ThreadPoolExecutor(workers))

    def call(given: tuple) -> Any:
      worker = idle.get()
      try:
        return worker(given)
      finally:
        idle.put(worker)

    waiting: list[futures.Future] = []
    try:
      for given in inputs:
        waiting.append(threads.submit(call, given))
        # A few ahead: all workers have work while results wait their turn, and memory is bounded.
        if len(waiting) > 2 * workers:
          yield waiting.pop(0).result()
      while waiting:
        yield waiting.pop(0).result()
    finally:
      for future in waiting:
        future.cancel()


class _Worker:
  """A process that has the function."""

  def __init__(self, function: bytes):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, *filter(None, sys.path)])
    self._process = subprocess.Popen(
      [sys.executable, "-c", _COMMAND],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      # One core a process is the plan: the tokenizer's own threads would fight over them.
      env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )
    self._send(function)

  def __enter__(self) -> "_Worker":
    return self

  def __exit__(self, *error) -> None:
    with contextlib.suppress(OSError):  # it may be gone
      self._process.stdin.close()
    self._process.stdout.close()
    # In the middle of a text it would not see that its input has ended.
    if error[0] is not None:
      self._process.kill()
    self._process.wait()

  def __call__(self, given: tuple) -> Any:
    try:
      self._send(pickle.dumps(given))
      size = int.from_bytes(self._read(8), "little")
      failed, result = pickle.loads(self._read(size))
    except (OSError, EOFError) as error:
      raise DataError(
        f"a process that tokenizes has died (exit status {self._process.wait(10)}); it may have run out of "
        "memory: shorten the longest records"
      ) from error
    if failed:
      raise DataError(result)
    return result

  def _send(self, data: bytes) -> None:
    self._process.stdin.write(len(data).to_bytes(8, "little") + data)
    self._process.stdin.flush()

  def _read(self, size: int) -> bytes:
    data = self._process.stdout.read(size)
    if len(data) < size:
      raise EOFError
    return data


def serve() -> None:
  """Calls the function it is given first on each input that follows, until there are no more."""
  source, out = sys.stdin.buffer, sys.stdout.buffer
  sys.stdout = sys.stderr  # what is printed is no answer
  function = None
  while size := source.read(8):
    given = pickle.loads(source.read(int.from_bytes(size, "little")))
    if function is None:
      function = given
      continue
    try:
      answer = False, function(*given)
    except DataError as error:
      answer = True, str(error)
    # With its length in front: a pipe has no messages.
    data = pickle.dumps(answer, protocol=5)
    out.write(len(data).to_bytes(8, "little") + data)
    out.flush()
