"""The README: its Python runs, its files exist, its keys are keys."""

import re

import jax

from dpojax.online import config as online_config
from dpojax.ppo import config as ppo_config
from dpojax.training import config as config_lib
from tests import conftest

README = (conftest.ROOT / "README.md").read_text()


def test_the_readmes_python_runs():
  blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  assert blocks
  for block in blocks:
    names = {}
    exec(block, names)
    assert names["loss"].shape == (2,)


def test_the_python_of_the_debugging_page_runs_and_prints_from_within_the_step(capfd):
  text = (conftest.ROOT / "docs" / "debugging.md").read_text()
  (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names = {}
  exec(block, names)
  jax.effects_barrier()
  assert "losses [0.693" in capfd.readouterr().out
  assert names["gradient"].chosen.shape == (2,)


def test_every_file_the_readme_names_exists():
  for name in re.findall(r"`((?:dpojax|configs|experiments)/[\w/.]+)`", README):
    assert (conftest.ROOT / name).exists(), name
  for name in re.findall(r"\]\(([\w/.]+)\)", README):
    assert (conftest.ROOT / name).exists(), name


def test_every_key_on_a_command_line_is_a_key():
  pages = [*(conftest.ROOT / "configs").glob("*.py"), *(conftest.ROOT / "docs").glob("*.md")]
  documents = [README, *(path.read_text() for path in pages)]
  keys = {key for text in documents for key in re.findall(r"--config\.([\w.]+)=", text)}
  assert "model.checkpoint" in keys
  known = [config_lib.flatten(each.defaults()) for each in (ppo_config, online_config)]
  assert keys - {"key"} <= set().union(*known)
