"""What a user waits for is measured from the start of a process to the line that says it is there."""

import sys

import pytest

from experiments.measurements import time_to_first
from tests import worlds


def test_the_wait_ends_with_the_line_and_not_with_the_process(tmp_path):
  code = "import time; time.sleep(0.3); print('first of all', flush=True); time.sleep(0.4)"
  first, whole = time_to_first.waited([sys.executable, "-c", code], "first", tmp_path / "log", {})
  assert 0.3 <= first < whole - 0.35
  assert (tmp_path / "log").read_text() == "first of all\n"


def test_a_process_that_fails_or_says_nothing_is_told(tmp_path):
  for code in ("raise SystemExit(3)", "print('second')"):
    with pytest.raises(RuntimeError, match="has not said 'first'; see .*log"):
      time_to_first.waited([sys.executable, "-c", code], "first", tmp_path / "log", {})


def test_a_command_is_timed_by_stage_and_starts_sooner_with_what_was_compiled(
  chat_model, tmp_path, monkeypatch
):
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  pairs = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.dialogues(12))
  data = time_to_first.write_inputs(chat_model, pairs, tmp_path)
  cold, warm = (
    time_to_first.ours("sample", chat_model, data, tmp_path, 4, warm) | {"what": "sample", "side": side}
    for side, warm in (("cold", False), ("warm", True))
  )
  compiling = "/jax/core/compile/backend_compile_duration"
  for found in (cold, warm):
    assert 0 < found["import"] < found["first"] <= found["whole"] and found[compiling] > 0
  assert warm[compiling] < cold[compiling]
  shown = time_to_first.table([cold, warm, {"what": "train", "side": "TRL", "first": 9.0, "whole": 9.5}])
  assert "| the first step | TRL | 9.0 | 9.5 |  |" in shown and "| three answers | cold |" in shown
