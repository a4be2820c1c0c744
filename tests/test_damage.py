"""Whatever happens to the files of a run, they are read as they were written, or refused by name.

DPOJAX_EXAMPLES=1000 python -m pytest tests/test_damage.py  tries that many damages of each kind of file.
"""

import asyncio
import gc
import os
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies

from dpojax.training.checkpoint import CheckpointError, Checkpoints

TRIED = settings(
  max_examples=int(os.environ.get("DPOJAX_EXAMPLES", 25)),
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Damage(NamedTuple):
  """What is done to one of a folder's files, of which `file` says where in their sorted list it stands."""

  kind: str
  file: float
  place: float
  other: float
  bytes: bytes


DAMAGES = strategies.builds(
  Damage,
  strategies.sampled_from(("flip", "flip", "cut", "empty", "delete", "overwrite", "append", "swap", "move")),
  *[strategies.floats(0, 1, exclude_max=True)] * 3,
  strategies.binary(min_size=1, max_size=64),
)


def do(damage: Damage, folder: pathlib.Path) -> str:
  """Damages one of a folder's files and returns what was done."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  path, other = (files[int(place * len(files))] for place in (damage.file, damage.other))
  content = bytearray(path.read_bytes())
  place = int(damage.place * len(content))
  if damage.kind == "flip" and content:
    content[place] ^= 1 << damage.bytes[0] % 8
  elif damage.kind == "cut":
    del content[place:]
  elif damage.kind == "empty":
    content.clear()
  elif damage.kind == "overwrite":
    content[place : place + len(damage.bytes)] = damage.bytes
  elif damage.kind == "append":
    content += damage.bytes
  elif damage.kind == "swap":
    content = bytearray(other.read_bytes())
  path.write_bytes(content)
  if damage.kind == "delete":
    path.unlink()
  elif damage.kind == "move":
    path.rename(path.with_name("elsewhere"))
  return f"{damage.kind} {path.relative_to(folder)}"


def tree_of(step: int) -> dict:
  """A state of a step: arrays large and small, of three dtypes, a scalar, one that is empty of values."""
  rng = np.random.default_rng(step)
  return {
    "params": {
      "embed": rng.standard_normal((40, 16), np.float32),
      "layers": {
        "kernel": rng.standard_normal((3, 16, 16), np.float32),
        "scale": rng.standard_normal(16).astype(jax.numpy.bfloat16),
      },
    },
    "step": np.asarray(step, np.int32),
    "moments": np.zeros((40, 16), np.float32),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A folder with the checkpoints of steps 1 and 2, ranked by a metric, with a reference that moves."""
  folder = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(folder, keep=0, best="loss", owner=True)
  for step in (1, 2):
    checkpoints.save(step, tree_of(step), {"model": step}, {"loss": 1.0 / step}, reference=tree_of(step + 10))
  checkpoints.close()
  return folder


def assert_is(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]


def read(folder: pathlib.Path) -> int | None:
  """Reads the last sound step as a run does, asserts that it is as it was saved, and returns it."""
  checkpoints = Checkpoints(folder, keep=0, best="loss", owner=True)
  step = checkpoints.last_sound()
  if step is not None:
    state, about = checkpoints.restore(step, tree_of(0))
    assert_is(state, tree_of(step))
    assert about == {"model": step}
    assert_is(checkpoints.restore_reference(step, tree_of(0)), tree_of(step + 10))
  checkpoints.close()
  return step


@TRIED
@given(damage=DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_read(saved, tmp_path_factory, damage):
  folder = tmp_path_factory.mktemp("damaged")
  shutil.copytree(saved, folder, dirs_exist_ok=True)
  do(damage, folder / "checkpoints" / "2")
  assert read(folder) in (1, 2)
  shutil.rmtree(folder)


@TRIED
@given(damages=strategies.lists(DAMAGES, min_size=1, max_size=4))
def test_where_no_checkpoint_is_sound_one_error_names_the_last_and_its_file(saved, tmp_path_factory, damages):
  folder = tmp_path_factory.mktemp("damaged")
  shutil.copytree(saved, folder, dirs_exist_ok=True)
  for damage in damages:
    do(damage, folder / "checkpoints")
  try:
    assert read(folder) in (1, 2)
  except CheckpointError as error:
    assert f"{folder}/checkpoints/" in str(error) and "continue from" in str(error)
  shutil.rmtree(folder)


@TRIED
@given(damage=DAMAGES, part=strategies.sampled_from(["", "params"]))
def test_a_step_that_is_asked_for_is_as_it_was_written_or_refused(saved, tmp_path_factory, damage, part):
  folder = tmp_path_factory.mktemp("damaged")
  shutil.copytree(saved, folder, dirs_exist_ok=True)
  done = do(damage, folder / "checkpoints" / "2")
  checkpoints = Checkpoints(folder, keep=0)
  try:
    state, about = checkpoints.restore_arrays(2, part)
    assert_is(state, tree_of(2)[part] if part else tree_of(2))
    assert about == {"model": 2}
  except CheckpointError as error:
    assert done.split()[1] in str(error) or "digests.json" in str(error) or damage.kind == "swap", error
    assert str(error).endswith("delete that folder to continue from step 1")
  checkpoints.close()
  shutil.rmtree(folder)


@pytest.fixture(scope="module")
def older(saved, tmp_path_factory) -> pathlib.Path:
  """The same as it was written before there were digests."""
  folder = tmp_path_factory.mktemp("older")
  shutil.copytree(saved, folder, dirs_exist_ok=True)
  for step in (1, 2):
    (folder / f"checkpoints/{step}/digests.json").unlink()
    (folder / f"checkpoints/{step}/about/metadata").write_text(f'{{"model": {step}}}')
  return folder


def test_checkpoints_without_digests_are_read_and_it_is_said(older, tmp_path, capsys):
  shutil.copytree(older, tmp_path, dirs_exist_ok=True)
  assert read(tmp_path) == 2
  assert "checkpoints/2 was written without digests: it is read unchecked" in capsys.readouterr().out


# What orbax leaves of a restore that fails is told of when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@TRIED
@given(damage=DAMAGES)
def test_damage_without_digests_ends_in_one_error_or_in_a_tree_of_the_same_shape(
  older, tmp_path_factory, damage
):
  folder = tmp_path_factory.mktemp("damaged")
  shutil.copytree(older, folder, dirs_exist_ok=True)
  do(damage, folder / "checkpoints" / "2")
  checkpoints = Checkpoints(folder, keep=0, owner=True)
  try:
    step = checkpoints.last_sound()
    state, _ = checkpoints.restore(step, tree_of(0))
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, tree_of(2))
    checkpoints.restore_arrays(step)
  except CheckpointError as error:
    assert "checkpoints/2" in str(error)
  checkpoints.close()
  shutil.rmtree(folder)


def test_who_reads_a_workdir_leaves_what_is_being_saved(saved, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  saving = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "checkpoints" / "2", saving)
  reader = Checkpoints(tmp_path, keep=1)
  assert reader.steps() == [1, 2] and reader.last_sound(together=False) == 2
  assert_is(reader.restore_arrays(2)[0], tree_of(2))
  reader.close()
  assert saving.exists() and (tmp_path / "checkpoints" / "1").exists()


@pytest.mark.parametrize("whose, said", [("orbax/handlers.py", False), ("users/handlers.py", True)])
def test_writes_beside_the_first_that_failed_are_not_told_of_again(whose, said, caplog):
  """By asyncio, which tells of a task that nobody asked for its error; of others' tasks it goes on to."""
  code = "async def write():\n  raise ValueError('disk full')"
  scope = {}
  exec(compile(code, f"/site-packages/{whose}", "exec"), scope)

  async def left_alone():
    task = asyncio.ensure_future(scope["write"]())
    await asyncio.sleep(0.01)
    del task
    gc.collect()

  asyncio.run(left_alone())
  assert ("never retrieved" in caplog.text) == said
