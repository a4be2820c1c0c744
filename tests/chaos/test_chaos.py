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
    [sys.executable, "-m", "tests.chaos.harness", *options],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    env=os.environ | {"XLA_FLAGS": conftest.QUICK_COMPILES},
  )
  assert done.returncode == 0, done.stderr[-6000:]
  return done.stdout


def test_runs_that_are_killed_and_rivals_over_one_place_come_to_the_same_bits():
  said = harness(
    "--quick", "--kills=4", "--only=train,sample,two", "--rivals=1", "--seed=1", "--faults=another data file"
  )
  for name in ("train", "sample", "two"):
    assert re.search(rf"^{name}: [1-9] kills, [1-9] runs, the same bits", said, re.MULTILINE), said
  assert "| two of train at once | | 1 times |" in said and "| two of sample at once | | 1 times |" in said
  assert "- another data file, told by both before step 1" in said
