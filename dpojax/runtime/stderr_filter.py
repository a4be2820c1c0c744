"""Passes on what the libraries of a process write to stderr, but for jax's reports of a lost process.

Of a process that is lost, jax's coordination service writes tens of lines and a stack trace before it ends
the process by SIGABRT; `dpojax.runtime.processes` says it in one. Run as a script of its own, because it has
to outlive the process whose lines it reads. A record starts with its letter and time, as
`E1127 13:56:59.553030`, and goes on to the next.
"""

import re
import signal
import sys

_STARTS = re.compile(rb"[IWEF]\d{4} \d\d:|Traceback |[A-Z]+:")
_LOST = re.compile(rb"coordination_service|preemption_sync_manager|JAX distributed service")


def main() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process, which ends this one
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  passing = True
  for line in iter(sys.stdin.buffer.readline, b""):
    if _STARTS.match(line):
      passing = not _LOST.search(line)
    if passing:
      sys.stderr.buffer.write(line)
      sys.stderr.buffer.flush()


if __name__ == "__main__":
  main()
