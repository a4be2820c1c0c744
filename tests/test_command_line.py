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


HEAVY = {
  "jax",
  "flax",
  "optax",
  "orbax",
  "transformers",
  "tensorflow_datasets",
  "grain",
  "pyarrow",
  "tensorboard",
}

DATA = ("--config.data.path=x", "--config.model.checkpoint=x")


@pytest.mark.parametrize(
  "command, told, arguments",
  [
    *[
      (command, flag, ("--help",))
      for command, flag in {
        **dict.fromkeys(("train", "sample", "evaluate", "export", "ppo", "online"), "--workdir"),
        "plan": "--topology",
        "models.from_gguf": "--out",
        "runtime.commands": "from-gguf",
      }.items()
    ],
    ("train", "error: --config is 'nothing'", ("--config=nothing", "--workdir=x")),
    ("train", "--workdir is missing", ("--config=dpo",)),
    (
      "train",
      "error: config.betta is not a key; did you mean beta?",
      ("--config=dpo", "--config.betta=1", "--workdir=x"),
    ),
    ("train", "error: config.beta.x is not a key", ("--config", "dpo", "--config.beta.x=1", "--workdir=x")),
    ("train", "error: config.data.path is empty", ("--config=dpo", "--workdir=x", DATA[1])),
    (
      "train",
      "error: config.beta is -1.0; it must be positive",
      ("--config=dpo", "--workdir=x", *DATA, "--config.beta=-1"),
    ),
    ("plan", "error: config.tokenizer is empty", ("--config=dpo", DATA[0])),
    ("ppo", "error: config.ppo.reward is empty", ("--config=ppo", "--workdir=x", *DATA)),
    (
      "ppo",
      "error: config.ppo.clip is -1.0",
      ("--config=ppo", "--workdir=x", *DATA, "--config.ppo.reward=x", "--config.ppo.clip=-1"),
    ),
    ("online", "error: config.online.judge is empty", ("--config=online", "--workdir=x", *DATA)),
    ("sample", "error: --top_p is 2.0", ("--workdir=x", "--prompts=x", "--out=y", "--top_p=2")),
    ("evaluate", "error: give --workdir", ("--out=x",)),
    ("models.from_gguf", "error: 'nothing' is no file", ("nothing", "--out=x")),
    ("export", "--base for --lora", ("--workdir=x", "--out=y", "--base=z")),
  ],
)
def test_help_and_what_a_user_can_mend_at_once_are_told_without_anything_heavy(
  command, told, arguments, tmp_path
):
  lines = (
    "import atexit, runpy, sys",
    f"atexit.register(lambda: print('heavy:', sorted({HEAVY!r} & sys.modules.keys())))",
    f"sys.argv = ['x', *{arguments!r}]",
    f"runpy.run_module('dpojax.{command}', run_name='__main__', alter_sys=True)",
    *["from dpojax.runtime import commands; commands.main()"] * (command == "runtime.commands"),
  )
  done = run("-c", "\n".join(lines), cwd=tmp_path)
  assert told in done.stdout + done.stderr, done
  assert done.stdout.endswith("heavy: []\n") and "Traceback" not in done.stderr, done


def test_a_defect_in_a_config_is_shown_whole(tmp_path):
  (tmp_path / "mine.py").write_text("def get_config():\n  return None.keys\n")
  done = run("-m", "dpojax.train", "--config=mine.py", "--config.beta=1", "--workdir=x", cwd=tmp_path)
  assert done.returncode == 1 and "mine.py" in done.stderr and "return None.keys" in done.stderr


def test_the_help_of_train_tells_its_flags_and_an_unknown_config_the_known_ones(tmp_path):
  told = run(
    "-c",
    "from dpojax.train import __main__; import sys; sys.argv = ['dpojax-train', '--help']; __main__.cli()",
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
