"""Knobs of losses from columns of the data: read, kept, placed, refused; what beta-DPO remembers."""

import csv
import dataclasses
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dpojax import train
from dpojax.data import builders, loader, tokenization
from dpojax.data.examples import DataError
from dpojax.data.truncation import Truncation
from dpojax.training import config as config_lib
from dpojax.training import resolve
from dpojax.training.config import ConfigError
from dpojax.training.metrics import read_metrics
from experiments import sweep
from tests import worlds

pytestmark = pytest.mark.usefixtures("compiled")

BETAS = [0.05, 0.5, 1, 0.25]


def records_with(betas, key="my_beta"):
  pairs = worlds.pairs(np.random.default_rng(0), len(betas))
  return [
    pair | {"prompt": f"{pair['prompt']} {worlds.NOUNS[i % 8]}", key: beta}
    for i, (pair, beta) in enumerate(zip(pairs, betas))
  ]


def write(path, records):
  """Writes records in the format of the file's name."""
  if path.suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
  elif path.suffix == ".csv":
    with open(path, "w", newline="") as file:
      writer = csv.DictWriter(file, records[0])
      writer.writeheader()
      writer.writerows(records)
  else:
    text = "".join(json.dumps(record) + "\n" for record in records)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
      file.write(text)
  return path


@pytest.fixture
def prepare(tmp_path):
  def prepared(path, **given):
    columns = given.pop("columns", {"beta": "my_beta"})
    return builders.prepare("jsonl", path=path, data_dir=tmp_path / "prepared", columns=columns, **given)

  return prepared


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_column_is_read_from_every_format_and_is_no_ignored_key(name, prepare, tmp_path):
  records = records_with([float(beta) for beta in BETAS])
  data = prepare(write(tmp_path / name, records))
  assert [example.knobs for example in data] == [{"beta": pytest.approx(beta)} for beta in BETAS]
  assert "ignored_keys" not in data.report


def test_numbers_of_other_forms_are_read_and_a_margin_may_be_negative(prepare, tmp_path):
  records = [
    {"prompt": "the film is", "completion": " warm", "label": True, "m": -1.5},
    {
      "messages": [{"role": "user", "content": "film"}, {"role": "assistant", "content": "dull"}],
      "m": "2e-1",
    },
  ]
  data = prepare(write(tmp_path / "a.jsonl", records), columns={"margin": "m"})
  assert [example.knobs["margin"] for example in data] == [-1.5, pytest.approx(0.2)]


@pytest.mark.parametrize(
  "value, said",
  [
    ("missing", '"my_beta" (data.columns.beta) is missing; it must be a number, positive'),
    (None, "is null"),
    (float("nan"), "is nan; it must be positive"),
    (0, "is 0; it must be positive"),
    (-0.1, "is -0.1; it must be positive"),
    (float("inf"), "is inf"),
    (1e-60, "is 1e-60; it must be positive"),
    ("high", "is 'high'; it must be a number"),
    (True, "is 'True'; it must be a number"),
  ],
)
def test_a_value_that_makes_no_sense_is_named_with_its_file_and_line(value, said, prepare, tmp_path):
  records = records_with([0.1, value, 0.3])
  if value == "missing":
    del records[1]["my_beta"]
  path = write(tmp_path / "a.jsonl", records)
  with pytest.raises(DataError) as raised:
    prepare(path)
  assert f"{path} line 2: " in str(raised.value) and said in str(raised.value)
  assert str(raised.value).endswith("correct the record or drop it") and "\n" not in str(raised.value)


def test_the_value_of_a_record_that_is_left_out_is_not_asked_for(prepare, tmp_path):
  records = records_with([0.1, "none", 0.3])
  records[1]["chosen"] = ""
  data = prepare(write(tmp_path / "a.jsonl", records))
  assert len(data) == 2 and data.report["empty_response"] == 1


def test_columns_of_a_published_data_set_need_its_files():
  with pytest.raises(DataError, match="data.columns.beta is set but data.path is empty"):
    builders.prepare("shp", columns={"beta": "score_ratio"})


def test_betas_go_through_the_token_cache_and_are_part_of_what_the_data_are(prepare, words, tmp_path):
  records = records_with([0.1, 0.2, 0.3])
  records[1]["rejected"] = " film" * 40  # cut, not dropped
  tokenizer = tokenization.load_tokenizer(words)

  def tokens(records, columns, cache=tmp_path / "tokens"):
    data = prepare(write(tmp_path / "a.jsonl", records), columns=columns)
    return tokenization.tokenize(data, tokenizer, truncation=Truncation(32, 16, "end"), cache_dir=cache)

  made, read = (tokens(records, {"beta": "my_beta"}) for _ in range(2))
  for each in (made, read, tokens(records, {"beta": "my_beta"}, cache=None)):
    np.testing.assert_array_equal(each.knobs["beta"], np.array([0.1, 0.2, 0.3], np.float32))
    assert each.fingerprint == made.fingerprint
  without = tokens(records, {})
  assert not without.knobs and without.fingerprint != made.fingerprint
  assert tokens(records_with([0.1, 0.2, 0.4]), {"beta": "my_beta"}).fingerprint != made.fingerprint
  as_margin = tokens(records, {"margin": "my_beta"})
  assert as_margin.fingerprint != made.fingerprint and list(as_margin.knobs) == ["margin"]


def test_a_split_a_swap_and_a_borrowed_response_keep_each_comparisons_knobs(rng):
  from tests.test_loader import make, tokenized

  betas = rng.random(60).astype(np.float32)
  data = dataclasses.replace(tokenized(rng), knobs={"beta": betas})
  rest, held_out = loader.hold_out(loader.shuffle_labels(loader.all_of(data), 0), 10)
  for subset in (rest, held_out, loader.mismatched(rest, 0, 64)):
    np.testing.assert_array_equal(
      subset.knobs["beta"], betas[[subset.example(i) for i in range(len(subset))]]
    )
    batch = next(make(subset).training(0, 1))
    there = batch.rows.example >= 0
    np.testing.assert_array_equal(batch.rows.knobs["beta"][there], betas[batch.rows.example[there]])


# Runs.


@pytest.fixture(scope="module")
def given(words, tmp_path_factory):
  """(betas, changes) -> the config of a DPO run whose pairs bring these betas."""
  folder = tmp_path_factory.mktemp("columns")
  pairs = worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 40))
  small = {"eval_every": 0, "steps": 2, "checkpoint_every": 2, "batch_size": 16, "check_memory": False}
  train.run(worlds.run_config("sft", words, pairs, folder / "cache", **small), folder / "sft")

  def config(betas=None, **changes):
    path = pairs
    if betas is not None:
      path = str(write(folder / f"{abs(hash(tuple(betas)))}.jsonl", records_with(betas, "b")))
      changes = {"data.columns.beta": "b"} | changes
    small_dpo = small | {"model.checkpoint": str(folder / "sft"), "steps": 3, "checkpoint_every": 0}
    return worlds.run_config("dpo", words, path, folder / "cache", **small_dpo | changes)

  return config


def losses_of(config, workdir):
  train.run(config, workdir)
  return [line["loss"] for line in read_metrics(workdir) if line["split"] == "train"]


MIXED = [0.1, 0.7] * 20


@pytest.fixture(scope="module")
def mixed(given, tmp_path_factory):
  """The workdir of a run of pairs of two betas, and its losses."""
  folder = tmp_path_factory.mktemp("mixed")
  return folder, losses_of(given(MIXED), folder)


def test_pairs_of_one_beta_are_a_run_at_that_beta_and_of_several_are_not(given, mixed, tmp_path):
  one = [0.4] * 40
  at = losses_of(given(one, **{"data.columns.beta": "", "beta": 0.4}), tmp_path / "config")
  got = losses_of(given(one, beta=5.0), tmp_path / "column")
  np.testing.assert_allclose(got, at, rtol=1e-6)
  folder, several = mixed
  assert abs(several[-1] - at[-1]) > 1e-4
  lines = [line for line in read_metrics(folder) if line["split"] == "train"]
  assert all(0.1 < line["beta"] < 0.7 for line in lines)
  report = json.loads((folder / "data_report.json").read_text())
  assert report["training"]["columns"] == {"beta of 'b'": {"least": 0.1, "median": 0.4, "largest": 0.7}}


def test_a_stored_reference_and_a_mesh_give_the_same_run(given, mixed, tmp_path):
  both = {"reference.mode": "stored", "parallel.strategy": "mesh", "parallel.fsdp": 2}
  np.testing.assert_allclose(losses_of(given(MIXED, **both), tmp_path), mixed[1], rtol=1e-4)


def test_a_sweep_over_another_axis_reads_the_column_and_one_over_beta_is_refused(given, mixed, tmp_path):
  rates = (3e-3, 1e-4)
  table = sweep.run(given(MIXED), tmp_path / "sweep", axis="optimizer.learning_rate", values=rates)
  swept = [
    line["loss"]
    for line in table
    if line["split"] == "train" and line["optimizer.learning_rate"] == pytest.approx(3e-3)
  ]
  np.testing.assert_allclose(swept, mixed[1], rtol=1e-4)
  with pytest.raises(ConfigError, match="a sweep over beta.*data.columns.beta is 'b'"):
    sweep.run(given(MIXED), tmp_path / "beta", values=(0.1, 0.2))


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"data.columns.gap": "g"}, "dpo has no gap"),
    ({"loss": "aot"}, "aot takes one beta for all pairs"),
    (
      {"loss": "mappo", "data.columns.gap": "g", "loss_options.gap": 0.5},
      "loss_options.gap 0.5; set one of them",
    ),
    ({"data.path": "", "data.source": "shp"}, "data.path is empty"),
    ({"objective": "sft", "loss": "sequence_sum"}, "objective='sft' has no beta"),
    ({"objective": "reward", "loss": "bradley_terry"}, "objective='reward' has no beta"),
    ({"loss": "xpo", "loss_options.alpha": 0.1}, "data.columns.sampled_rejected"),
  ],
)
def test_columns_that_nothing_reads_are_refused(given, changes, said):
  config = given(**{"data.columns.beta": "b"} | changes)
  with pytest.raises(ConfigError, match=said):
    config_lib.validate(config)


def test_a_loss_that_takes_less_of_a_knob_names_the_record(given, tmp_path):
  config = given([0.1, 0.0, 0.3] * 10, loss="exo_pair", **{"data.columns.beta": ""})
  with config.unlocked():
    config.data.columns.label_smoothing = "b"
  with pytest.raises(ConfigError, match="record 1 of those used has 0; exo_pair needs one between 0 and 1"):
    resolve.load_data(config)


def test_a_needed_knob_may_come_from_the_data(given):
  config_lib.validate(given(loss="mappo", **{"data.columns.gap": "g"}))
  config_lib.validate(given(loss="odpo", **{"data.columns.margin": "m"}))


# What is remembered from step to step.


def test_beta_dpo_remembers_its_running_margins_and_a_killed_run_continues_with_them(given, tmp_path):
  settings = {"loss": "beta_dpo", "checkpoint_every": 2, "optimizer.learning_rate": 1e-2}
  train.run(given(steps=4, **settings), tmp_path / "whole")
  for steps in (2, 4):
    train.run(given(steps=steps, **settings), tmp_path / "twice")
  whole, twice = (
    [line for line in read_metrics(tmp_path / name) if line["split"] == "train"]
    for name in ("whole", "twice")
  )
  names = [f"running_margins/{name}" for name in ("center", "spread")]
  assert [[line[name] for name in names] for line in whole] == [
    [line[name] for name in names] for line in twice
  ]
  centers = [line[names[0]] for line in whole]
  assert centers[0] == pytest.approx(0, abs=1e-5) and abs(centers[-1]) > 1e-3
  margins = [line["rewards/margins"] / 0.1 for line in whole]
  running = 0.0
  for margin, center in zip(margins, centers):
    running = 0.9 * running + 0.1 * margin
    assert center == pytest.approx(running, rel=1e-4, abs=1e-5)
