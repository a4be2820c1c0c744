"""A few kills, rivals and lost processes; `python -m tests.chaos.harness` makes hundreds of them."""

import os
import re
import subprocess
import sys

import pytest

from tests import conftest

pytestmark = pytest.mark.chaos


def harness(*options):
  """What the harness prints; it ends with 1 and says LOST when anything was."""
  done = subprocess.run(
      [sys.executable, "-m", "tests.chaos.harness", *options], cwd=conftest.ROOT, capture_output=True,
      text=True, timeout=600, env=os.environ | {"XLA_FLAGS": conftest.QUICK_COMPILES})
  assert done.returncode == 0, done.stderr[-6000:]
  return done.stdout


def test_runs_that_are_killed_and_rivals_over_one_place_come_to_the_same_bits():
  said = harness("--kills=6", "--only=train,sample,ppo", "--rivals=1", "--seed=1")
  assert re.search(r"train: 4 kills, \d runs, the same bits", said)
  assert "| two of train at once | | 1 times |" in said and "| two of sample at once | | 1 times |" in said


def test_of_two_processes_the_other_says_who_is_lost_and_the_same_command_continues():
  said = harness("--kills=1", "--only=two", "--rivals=0", "--faults", "--lost_after=6")
  assert "two: 1 kills, 1 runs, the same bits" in said
  for what in ("another data file", "another config", "another jax"):
    assert f"- {what}, told by both before step 1" in said
  for what in ("kill -9 of process 0", "kill -9 of process 1", "SIGTERM of process 1", "SIGSTOP of process 0",
               "SIGSTOP of process 1"):
    assert f"- {what}: the other said so and ended after " in said
