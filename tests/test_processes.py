"""What is kept of what libraries write, and that one process needs no others. Lost ones: `tests.chaos`."""

import subprocess
import sys

import jax
import pytest

from dpojax.runtime import processes, stderr_filter
from dpojax.runtime.command import command
from dpojax.runtime.errors import UserError


def passed_on(text):
  done = subprocess.run(
    [sys.executable, "-I", "-S", stderr_filter.__file__],
    input=text,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert not done.stdout
  return done.stderr


LOST = """\
E1127 13:56:59.553030    9335 coordination_service_agent.cc:289] Polled an error from coordination service.
F1127 13:56:59.553077    9335 client.h:80] Terminating process because the JAX distributed service detected
Additional GRPC error information from remote target coordination_service while calling /xla.PollForError:
:UNKNOWN:Error received from peer  {grpc_message:"Socket closed", grpc_status:14}
*** Check failure stack trace: ***
    @     0x7fc82f240634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def test_reports_of_a_lost_process_are_held_back_and_nothing_else_is():
  others = """\
[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1
W1127 13:56:59.100000    9335 cpu_client.cc:12] a warning
  that goes on
"""
  fatal = """\
F1127 13:57:01.000000    9335 literal.cc:80] Check failed: shapes are equal
*** Check failure stack trace: ***
    @     0x7fc82f240634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
  python = "Traceback (most recent call last):\n  File \"a.py\", line 1\nKeyError: 'coordination_service'\n"
  assert passed_on(others + LOST + fatal + LOST + python + others) == others + fatal + python + others
  assert passed_on("no end of line") == "no end of line"


def test_one_process_agrees_with_itself_and_waits_for_no_one():
  assert jax.process_count() == 1
  processes.agree("config", {"jax": jax.__version__})
  processes.meet("anywhere")
  processes.leave()


def test_versions_are_those_that_are_installed():
  assert processes.versions()["jax"] == jax.__version__
  assert processes.versions()["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize(
  "error, raised, text",
  [
    (UserError("mend it"), SystemExit, "error: mend it"),
    (KeyError("a defect"), KeyError, "'a defect'"),
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
  ],
)
def test_a_command_of_one_process_ends_by_a_line_or_by_the_error_itself(error, raised, text):
  with pytest.raises(raised) as caught:
    with command():
      raise error
  assert str(caught.value) == text
