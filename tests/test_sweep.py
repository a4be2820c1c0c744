"""Sweeps: a member is the run it would be alone, a kill changes nothing, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpojax import train
from dpojax.runtime.errors import ConfigError
from dpojax.training.metrics import read_metrics
from experiments import sweep
from tests import worlds

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """DPO from a short SFT run, so that there is a reference."""
  folder = tmp_path_factory.mktemp("sweep")
  worlds.save_tokenizer(folder / "tokenizer")
  path = worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 80))
  args = (str(folder / "tokenizer"), path, folder / "cache")
  train.run(worlds.run_config("sft", *args, steps=2), folder / "sft")
  return worlds.run_config(
    "dpo", *args, **{"model.checkpoint": str(folder / "sft"), "log_every": 2, "steps": 4}
  )


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("swept")
  seen = []
  table = sweep.run(
    config,
    folder,
    seeds=(0, 1),
    values=(0.1, 1.0),
    at_once=2,
    measure_every=2,
    measure=lambda member, step, params: seen.append((member, step)) or norm(params),
  )
  return folder, table, seen


def norm(params):
  return {"norm": sum(float(np.linalg.norm(leaf)) for leaf in jax.tree.leaves(params))}


def lines_of(table, split):
  return {(line["beta"], line["seed"], line["step"]): line for line in table if line["split"] == split}


def test_a_member_is_the_run_it_would_be_alone(config, swept, tmp_path):
  with config.unlocked():
    alone = config.copy_and_resolve_references()
  alone.beta, alone.seed = 1.0, 1
  train.run(alone, tmp_path / "alone")
  for split in ("train", "eval"):
    lines = lines_of(swept[1], split)
    for line in read_metrics(tmp_path / "alone"):
      if line["split"] == split:
        ours = lines[(1.0, 1, line["step"])]
        for name in ("loss", "rewards/margins", "log_ratios/chosen"):
          assert ours[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), (split, name)


def test_every_member_is_trained_evaluated_and_measured(swept):
  _, table, seen = swept
  members = {(beta, seed) for beta in (0.1, 1.0) for seed in (0, 1)}
  assert {key[:2] for key in lines_of(table, "train")} == members
  first = [line["loss"] for key, line in lines_of(table, "train").items() if key[2] == 1]
  np.testing.assert_allclose(first, np.log(2), rtol=1e-5)
  assert sorted({step for _, step in seen}) == [0, 2, 4] and len(seen) == 3 * len(members)
  measured = lines_of(table, "measured")
  assert {measured[(*member, 0)]["norm"] for member in members} == {measured[(0.1, 0, 0)]["norm"]}
  assert len({measured[(*member, 4)]["norm"] for member in members}) == len(members)


def test_a_sweep_that_was_stopped_goes_on_to_the_same_table(config, swept, tmp_path):
  folder, table, _ = swept
  shutil.copytree(folder, tmp_path / "stopped")
  for unfinished in ("done", "table.jsonl"):
    (tmp_path / "stopped" / "members_2" / unfinished).unlink()
  shutil.rmtree(tmp_path / "stopped" / "members_2")
  calls = []
  again = sweep.run(
    config,
    tmp_path / "stopped",
    seeds=(0, 1),
    values=(0.1, 1.0),
    at_once=2,
    measure_every=2,
    measure=lambda member, step, params: calls.append(member) or norm(params),
  )
  assert again == table
  assert {member.number for member in calls} == {2, 3}
  assert sweep.read_table(tmp_path / "stopped") == table
  (tmp_path / "stopped" / "members_2" / "done").unlink()  # killed after its last checkpoint
  assert sweep.run(config, tmp_path / "stopped", seeds=(0, 1), values=(0.1, 1.0), at_once=2) == table


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(axis="steps", values=(1, 2)), "cannot be over 'steps'"),
    (dict(values=(0.1, 0.1)), "give each once"),
    (dict(values=(0.1, -1.0)), "beta"),
    (dict(seeds=()), "at least one"),
  ],
)
def test_what_cannot_be_swept_is_refused_by_name(config, tmp_path, arguments, message):
  with pytest.raises(ConfigError, match=message):
    sweep.run(config, tmp_path, **arguments)


def test_another_sweep_in_the_same_folder_is_refused(config, swept):
  with pytest.raises(ConfigError, match="other members"):
    sweep.run(config, swept[0], seeds=(0, 1), values=(0.1, 2.0), at_once=2)


def test_a_sweep_in_a_bucket_is_refused(config):
  with pytest.raises(ConfigError, match=r"^--workdir is gs://bucket/sweep, and an experiment writes to a"):
    sweep.run(config, "gs://bucket/sweep")


def test_what_only_a_single_run_can_do_is_refused(config, tmp_path):
  other = config.copy_and_resolve_references()
  other.parallel.fsdp = 2
  with pytest.raises(ConfigError, match="parallel.fsdp"):
    sweep.run(other, tmp_path)


def test_a_reference_that_moves_is_each_members_own_and_is_there_again_after_a_kill(config, tmp_path):
  with config.unlocked():
    moving = config.copy_and_resolve_references()
  moving.reference.sync_every, moving.reference.sync_alpha = 1, 0.5
  moving.eval_every, moving.checkpoint_every = 0, 2
  table = sweep.run(moving, tmp_path / "swept", values=(0.1, 1.0))
  with moving.unlocked():
    alone = moving.copy_and_resolve_references()
  alone.beta = 1.0
  train.run(alone, tmp_path / "alone")
  ours = lines_of(table, "train")
  for line in read_metrics(tmp_path / "alone"):
    if line["split"] == "train":
      assert ours[(1.0, 0, line["step"])]["loss"] == pytest.approx(line["loss"], rel=1e-4)

  def killed(member, step, params):
    if step == 3:
      raise KeyboardInterrupt
    return {}

  with pytest.raises(KeyboardInterrupt):
    sweep.run(moving, tmp_path / "killed", values=(0.1, 1.0), measure=killed, measure_every=3)
  again = sweep.run(moving, tmp_path / "killed", values=(0.1, 1.0))
  assert [line for line in again if line["split"] == "train"] == table


def test_a_table_is_read_without_a_line_that_a_kill_cut_off(tmp_path):
  (tmp_path / "table.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step"')
  assert sweep.read_table(tmp_path) == [{"step": 1}]
