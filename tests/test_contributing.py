"""The worked changes of CONTRIBUTING.md apply to this tree, what it names is there, and versions agree."""

import configparser
import re
import subprocess

import pytest
import yaml

from tests import conftest

PAGE = (conftest.ROOT / "CONTRIBUTING.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", DIFFS, ids=["loss", "family", "form"])
def test_a_worked_change_applies_to_this_tree(text):
  done = subprocess.run(
    ["git", "apply", "--check", "-C1", "-"], input=text, cwd=conftest.ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_every_part_of_the_table_is_a_part_of_ci_and_every_job_too():
  script = (conftest.ROOT / ".ci" / "run").read_text()
  parts = re.search(r"^all=\((.*)\)$", script, re.MULTILINE)[1].split()
  assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == parts
  workflow = yaml.safe_load((conftest.ROOT / ".github" / "workflows" / "ci.yml").read_text())
  assert set(workflow["jobs"]["part"]["strategy"]["matrix"]["part"]) == set(parts) - {"hh", "published"}


def test_every_file_the_page_names_is_there():
  for name in re.findall(
    r"(?:tests|docs|training|models|data)/[\w/]+\.(?:py|md)|\.ci/run",
    PAGE.replace("tests/test_MODULE.py", ""),
  ):
    assert any((folder / name).exists() for folder in (conftest.ROOT, conftest.ROOT / "dpojax")), name


def test_citation_changelog_and_package_have_one_version():
  setup = configparser.ConfigParser()
  setup.read(conftest.ROOT / "setup.cfg")
  version = setup["metadata"]["version"]
  citation = yaml.safe_load((conftest.ROOT / "CITATION.cff").read_text())
  assert citation["version"] == version
  assert re.search(rf"^## {re.escape(version)}\b", (conftest.ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert [each["year"] for each in citation["references"]] == [2023]


def test_modules_of_before_the_redesign_are_importable_nowhere():
  table = (
    (conftest.ROOT / "CHANGELOG.md")
    .read_text()
    .partition("Modules, all under")[2]
    .partition("Names within")[0]
  )
  before = {
    name
    for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    for name in re.findall(r"`([a-z_.]+)`", row)
  }
  assert {"parts", "sampling", "models.fused"} < before
  for name in before - {"log_probs", "train"}:
    assert not (conftest.ROOT / "dpojax" / (name.replace(".", "/") + ".py")).exists(), name
