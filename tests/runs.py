"""Runs in processes of their own, of `tests.run_training`."""

import json
import os
import subprocess
import sys

from tests import conftest, stores


def start_run(tmp_path, name, settings, *, settings_name="", devices=1):
  path = tmp_path / f"{settings_name or name}.json"
  path.write_text(json.dumps(settings))
  count = f" --xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-m", "tests.run_training", str(path), str(tmp_path / name)],
    cwd=conftest.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {"XLA_FLAGS": conftest.QUICK_COMPILES + count},
  )


def finish(process):
  output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output[-3000:]
  return output


def in_two_processes(tmp_path, settings):
  """Runs a run of two processes, with four devices each, to its end, in "two"; returns what each says."""
  place = {"parallel.coordinator": f"127.0.0.1:{stores.free_port()}", "parallel.num_processes": 2}
  processes = [
    start_run(
      tmp_path,
      "two",
      {"kind": "dpo", **settings, **place, "parallel.process_id": i},
      settings_name=f"two{i}",
      devices=4,
    )
    for i in range(2)
  ]
  return [finish(process) for process in processes]
