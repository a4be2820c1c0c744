"""Launchers: the Slurm script under a stand-in `srun` on this machine, the others' syntax, the container.

And what several processes tell the log of the first of them when one of them fails.
"""

import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from dpojax.runtime import command_line
from tests import conftest, worlds

SCRIPTS = conftest.ROOT / "scripts"

SRUN = """#!/usr/bin/env python3
\"\"\"Starts a command SLURM_NTASKS times on this machine, as `srun` on a cluster; passes SIGTERM on.\"\"\"
import os, signal, subprocess, sys

assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = [
  subprocess.Popen(
    sys.argv[2:],
    env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NODELIST": "localhost"},
  )
  for i in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$REQUEUED"
"""


def tool(name):
  """A command that pip put beside this Python, whether or not its environment is active."""
  return shutil.which(
    name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
  )


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
  """The environment of a batch job of two tasks on this machine."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  return os.environ | {
    "PATH": f"{folder}:{os.environ['PATH']}",
    "PYTHONPATH": str(conftest.ROOT),
    "PYTHON": sys.executable,
    "XLA_FLAGS": conftest.QUICK_COMPILES,
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "2",
    "JAX_COORDINATOR_PORT": str(free_port()),
    "REQUEUED": str(tmp_path / "requeued"),
  }


def test_the_slurm_script_trains_over_its_tasks_saves_at_sigterm_and_asks_to_be_started_again(
  cluster, words, compiled, tmp_path
):
  pairs = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 40))
  workdir, log = tmp_path / "run", tmp_path / "log"
  settings = {
    "tokenizer": words,
    "data.path": pairs,
    "data.cache_dir": str(tmp_path / "cache"),
    "data.max_length": 32,
    "data.max_prompt_length": 16,
    "row_length": 64,
    "rows_at_once": 1,
    "batch_size": 8,
    "steps": 100_000,
    "log_every": 1,
    "eval_every": 0,
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
  }
  line = [SCRIPTS / "slurm.sh", "--config=sft", f"--workdir={workdir}"]
  line += [f"--config.{key}={value}" for key, value in settings.items()]
  with log.open("w") as output:
    job = subprocess.Popen(line, cwd=tmp_path, env=cluster, stdout=output, stderr=subprocess.STDOUT)
    try:
      until = time.monotonic() + 200
      while not (workdir / "metrics.jsonl").exists() and time.monotonic() < until and job.poll() is None:
        time.sleep(0.2)
      job.send_signal(signal.SIGTERM)
      job.wait(60)
    finally:
      job.kill()
  text = log.read_text()
  assert job.returncode == 1 and (workdir / "metrics.jsonl").exists(), text
  assert text.count("error: stopped by a signal after step") == 2, text
  assert any((workdir / "checkpoints").glob("[0-9]*/digests.json")), text
  assert (tmp_path / "requeued").read_text() == "requeue 1\n"


FAILS = """
import os, time

from dpojax.runtime import processes
from dpojax.runtime.command import command
from dpojax.runtime.errors import UserError

with command():
  processes.join("auto", 0, 0, timeout=20.0)
  if os.environ["SLURM_PROCID"] == "1":
    raise UserError("the disk is full")
  if os.environ["SLURM_PROCID"] == "2":
    raise KeyError("a defect")
  time.sleep(60)
"""


def test_what_stops_any_host_reaches_the_log_of_the_first_with_the_stack_traces_of_defects(cluster, tmp_path):
  script = tmp_path / "fails.py"
  script.write_text(FAILS)
  tasks = []
  try:
    for i in range(3):
      of_task = {"SLURM_NTASKS": "3", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
      with (tmp_path / f"log{i}").open("w") as log:
        environment = cluster | of_task | {"SLURM_STEP_NODELIST": "localhost"}
        tasks.append(subprocess.Popen([sys.executable, script], env=environment, stderr=log))
    assert [task.wait(60) for task in tasks] == [1, 1, 1]
  finally:
    for task in tasks:
      task.kill()
  first = (tmp_path / "log0").read_text()
  assert first.startswith("process 2:\nTraceback") and 'raise KeyError("a defect")' in first, first
  reasons = "process 1 has stopped: the disk is full; process 2 has stopped: KeyError: 'a defect'"
  assert first.splitlines()[-1].startswith(f"error: {reasons}; nothing is saved"), first


@pytest.mark.parametrize(
  "script", [*sorted(SCRIPTS.glob("*.sh")), conftest.ROOT / ".ci" / "run"], ids=lambda path: path.name
)
def test_a_script_is_sound_bash_and_clean(script):
  assert subprocess.run(["bash", "-n", script]).returncode == 0
  done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_the_tasks_of_skypilot_are_sound_bash_and_give_each_node_its_number():
  task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
  assert {"setup", "run", "resources", "num_nodes"} <= task.keys()
  for part in ("setup", "run"):
    assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
  environment = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
  }
  said = subprocess.run(
    ["bash", "-c", task["run"].replace("~/dpojax-env/bin/dpojax-train", "echo")],
    env=os.environ | environment | {"ARGUMENTS": "--config=dpo --workdir=runs/dpo"},
    capture_output=True,
    text=True,
  ).stdout
  assert said.split() == [
    "--config=dpo",
    "--workdir=runs/dpo",
    "--config.parallel.coordinator=10.0.0.1:8476",
    "--config.parallel.num_processes=2",
    "--config.parallel.process_id=1",
  ]


def test_the_container_is_clean_and_copies_what_is_there():
  file = conftest.ROOT / "Dockerfile"
  done = subprocess.run([tool("hadolint"), file], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  ignored = (conftest.ROOT / ".dockerignore").read_text().split()
  copies = [shlex.split(line)[1:-1] for line in file.read_text().splitlines() if line.startswith("COPY ")]
  sources = [source for each in copies for source in each]
  assert {"dpojax", "configs", "experiments", "setup.cfg"} <= set(sources)
  for source in sources:
    assert (conftest.ROOT / source).exists() and f"!{source}" in ignored, source


def commands_of(page):
  """The lines of a page's blocks of code that start dpojax, whole."""
  text = (conftest.ROOT / "docs" / page).read_text().replace("\\\n", " ")
  return [line for line in text.splitlines() if "--config=" in line]


@pytest.mark.parametrize("page", ["tpu.md", "gpu.md"])
def test_configs_and_files_that_a_page_names_are_there(page):
  lines = commands_of(page)
  assert lines
  for line in lines:
    for word in line.replace('"', " ").replace("'", " ").split():
      if word.startswith("--config="):
        assert pathlib.Path(
          command_line.config_path(word.removeprefix("--config=")).partition(":")[0]
        ).is_file()
  for word in (conftest.ROOT / "docs" / page).read_text().replace("`", " ").split():
    if word.startswith("scripts/") and word.endswith((".sh", ".yaml")):
      assert (conftest.ROOT / word).is_file(), word
