"""What stands around the commands: their flags, their names, and configs found by name from anywhere."""

import configparser
import importlib.metadata
import os
import re
import subprocess
import sys

import jax
import pytest

from dpojax.runtime import command_line, commands
from tests import conftest

NAMES = sorted(path.stem for path in (conftest.ROOT / "configs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert command_line.config_path(name) == str(conftest.ROOT / "configs" / f"{name}.py")
  assert command_line.config_path(f"{name}:arg:more").endswith(f"configs/{name}.py:arg:more")


def test_a_path_is_taken_before_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "dpo.py").touch()
  assert command_line.config_path("dpo.py:hh") == "dpo.py:hh"
  assert command_line.config_path("dpo:hh") == f"{conftest.ROOT}/configs/dpo.py:hh"


@pytest.mark.parametrize("name", ["nothing", "configs/nothing.py:hh", "folder/dpo", ""])
def test_a_config_that_is_not_there_is_refused_with_the_names_there_are(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(command_line.CommandLineError, match=", ".join(NAMES)) as error:
    command_line.config_path(name)
  assert repr(name) in str(error.value)


def test_a_name_is_resolved_wherever_it_stands_on_a_command_line():
  path = f"{conftest.ROOT}/configs/dpo.py"
  line = ["x", "--config.beta=0.2", "--config", "dpo:hh", "--workdir=dpo"]
  assert command_line.with_config_path(line) == [*line[:3], f"{path}:hh", line[4]]
  assert command_line.with_config_path(["x", "--config=dpo"]) == ["x", f"--config={path}"]
  assert command_line.with_config_path(["x", "--config"]) == ["x", "--config"]


def run(*arguments, cwd):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(conftest.ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "ppo", "online"])
def test_help_is_had_without_jax(command, tmp_path):
  lines = (
    "import atexit, runpy, sys",
    "atexit.register(lambda: print('jax' in sys.modules))",
    "sys.argv = ['x', '--help']",
    f"runpy.run_module('dpojax.{command}', run_name='__main__')",
  )
  done = run("-c", "\n".join(lines), cwd=tmp_path)
  assert "--workdir" in done.stdout and done.stdout.endswith("False\n")


def test_the_help_of_train_tells_its_flags_and_an_unknown_config_the_known_ones(tmp_path):
  told = run(
    "-c",
    "from dpojax import train; import sys; sys.argv = ['dpojax-train', '--help']; train.cli()",
    cwd=tmp_path,
  )
  assert all(flag in told.stdout for flag in ("--config", "--workdir", "--[no]dry_run")), told
  assert told.stdout.startswith("Trains a model on comparisons")
  refused = run("-m", "dpojax.train", "--config=nothing", cwd=tmp_path)
  assert refused.returncode == 1
  assert re.fullmatch(r"error: --config is 'nothing'.*: dpo, .*\n", refused.stderr), refused.stderr


def test_every_command_that_pip_installs_is_there_to_be_called():
  setup = configparser.ConfigParser()
  setup.read(conftest.ROOT / "setup.cfg")
  scripts = dict(
    line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].split("\n")[1:]
  )
  assert {
    f"dpojax-{each}" for each in ("train", "sample", "evaluate", "export", "plan", "ppo", "online")
  } < scripts.keys()
  for place in scripts.values():
    assert callable(importlib.metadata.EntryPoint("", place, "").load())


def test_the_version_is_that_of_the_package():
  assert commands.version().startswith(
    f"dpojax {importlib.metadata.version('dpojax')} (jax {jax.__version__},"
  )
