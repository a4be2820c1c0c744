"""A stored reference: the same training as with the model, computed once, found again, never mixed up."""

import concurrent.futures
import json
import time

import numpy as np
import pytest

from dpojax import train
from dpojax.data import loader
from dpojax.data.tokenized import Tokenized
from dpojax.runtime.disk import DiskError
from dpojax.training import reference
from dpojax.training.metrics import read_metrics
from tests import worlds

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def settings(words, tmp_path_factory):
  """What runs share: data, cache and the SFT they start from."""
  folder = tmp_path_factory.mktemp("given")
  path = worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 120))
  given = dict(tokenizer=words, path=path, cache_dir=str(folder / "cache"))
  train.run(worlds.run_config("sft", **given, steps=10), folder / "sft")
  return given | {"model.checkpoint": str(folder / "sft"), "steps": 6, "eval_every": 3}


def stored(settings, **changes):
  return worlds.run_config("dpo", **settings | {"reference.mode": "stored"} | changes)


def assert_same_run(one, other):
  for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
    assert (a["step"], a["split"]) == (b["step"], b["split"])
    for name in ("loss", "logps/chosen", "log_ratios/rejected", "rewards/margins"):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)


def no_reference_pass(*_, **__):
  raise AssertionError("the reference was computed again")


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"data.shuffle_labels": True},
    {"parallel.strategy": "mesh", "parallel.fsdp": 2},
    {"row_length": 32, "rows_at_once": 1},
  ],
  ids=["pmap", "shuffled", "mesh", "parts"],
)
def test_a_stored_reference_gives_the_inline_run(changes, settings, tmp_path):
  train.run(worlds.run_config("dpo", **settings | changes), tmp_path / "inline")
  train.run(stored(settings | changes), tmp_path / "stored")
  assert_same_run(tmp_path / "inline", tmp_path / "stored")


def test_the_next_run_of_a_sweep_finds_it_and_another_start_does_not(settings, tmp_path, monkeypatch):
  train.run(stored(settings), tmp_path / "first")
  with monkeypatch.context() as patch:
    patch.setattr(reference, "make_score_step", lambda *_, **__: no_reference_pass)
    train.run(stored(settings, beta=0.5, seed=3, batch_size=8), tmp_path / "second")
    with pytest.raises(Exception, match="computed again"):
      train.run(stored(settings, **{"model.checkpoint": str(tmp_path / "first")}), tmp_path / "other")
  shorter = {"data.max_length": 31}
  train.run(worlds.run_config("dpo", **settings | shorter), tmp_path / "short")
  train.run(stored(settings | shorter), tmp_path / "short_stored")
  assert_same_run(tmp_path / "short", tmp_path / "short_stored")


def examples(count=50):
  rng = np.random.default_rng(0)
  lengths = np.stack([rng.integers(2, 6, count) for _ in range(3)], axis=1).astype(np.int32)
  offsets = np.concatenate([[0], lengths.sum(1).cumsum()])
  return Tokenized(
    lengths,
    np.arange(offsets[-1], dtype=np.int32),
    offsets,
    np.arange(count, dtype=np.int32) * 3 + 1,
    {},
    "fingerprint",
  )


class Scorer:
  """Gives every response its example's number and its own; stops after some batches."""

  def __init__(self, stop_after=10**9, wait=0.0):
    self.batches, self.stop_after, self.wait = 0, stop_after, wait

  def __call__(self, batch):
    if self.batches == self.stop_after:
      raise KeyboardInterrupt
    self.batches += 1
    time.sleep(self.wait)
    examples = batch.rows.example
    return examples[..., None] + np.array([0.25, 0.5], np.float32), examples


def compute(folder, scorer, identity=None):
  make_loader = lambda subset: loader.Loader(subset, seed=0, batch_size=5, row_length=32)
  return reference.stored_log_probs(
    loader.all_of(examples()), identity or {"weights": "w"}, folder, scorer, make_loader
  )


WANT = (np.arange(50) * 3 + 1)[:, None] + np.array([0.25, 0.5])


def test_a_computation_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
  monkeypatch.setattr(reference, "_FLUSH", 2)
  first, second, third = Scorer(stop_after=5), Scorer(), Scorer()
  with pytest.raises(KeyboardInterrupt):
    compute(tmp_path, first)
  np.testing.assert_array_equal(compute(tmp_path, second), WANT)
  np.testing.assert_array_equal(compute(tmp_path, third), WANT)
  assert (first.batches, second.batches, third.batches) == (5, 6, 0)


def test_of_two_at_once_one_computes_and_the_other_reads_what_it_made(tmp_path, capsys):
  first, second = Scorer(wait=0.05), Scorer(wait=0.05)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for values in pool.map(lambda scorer: compute(tmp_path, scorer), (first, second)):
      np.testing.assert_array_equal(values, WANT)
  assert sorted((first.batches, second.batches)) == [0, 10]  # 50 comparisons, 5 a batch
  assert f"waiting for the stored reference {tmp_path}/" in capsys.readouterr().out


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: content[:200],
    lambda content: b"",
    lambda content: content[:100] + b"\0" + content[101:],
    lambda content: bytes(len(content)),
    lambda content: content.replace(content[-40:], bytes(40)),
  ],
)
def test_a_damaged_file_is_named_and_computed_again(damage, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(reference, "_FLUSH", 4)
  whole, again, then = Scorer(), Scorer(), Scorer()
  compute(tmp_path, whole)
  file, *others = sorted(tmp_path.glob("*/*.array_record"))
  file.write_bytes(damage(file.read_bytes()))
  np.testing.assert_array_equal(compute(tmp_path, again), WANT)
  told = capsys.readouterr().err
  if again.batches:
    assert f"{file} is damaged" in told and again.batches == 4 < whole.batches
  np.testing.assert_array_equal(compute(tmp_path, then), WANT)
  assert then.batches == 0 and others


def test_a_file_of_another_store_is_not_believed(tmp_path, capsys):
  compute(tmp_path / "a", Scorer())
  compute(
    tmp_path / "b",
    lambda batch: (batch.rows.example[..., None] + np.zeros(2, np.float32), batch.rows.example),
    {"weights": "others"},
  )
  (mine,), (theirs,) = ((tmp_path / name).glob("*/*.array_record") for name in "ab")
  mine.unlink()
  theirs.rename(mine.parent / theirs.name)
  np.testing.assert_array_equal(compute(tmp_path / "a", Scorer()), WANT)
  assert "its digest is another): what was in it is computed again" in capsys.readouterr().err


def test_a_store_of_something_else_in_its_place_is_refused(tmp_path):
  compute(tmp_path, Scorer())
  (about,) = tmp_path.glob("*/about.json")
  about.write_text(json.dumps(json.loads(about.read_text()) | {"weights": "others"}))
  with pytest.raises(reference.StoreError, match="tells of other weights, data or truncation"):
    compute(tmp_path, Scorer())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(DiskError, match="cannot be written"):
    compute(tmp_path / "file", Scorer())


def test_labels_swapped_swap_what_was_stored():
  subset = loader.shuffle_labels(loader.all_of(examples()), seed=0)
  values = np.arange(100.0).reshape(50, 2)
  swapped = subset.in_order(values)
  assert 10 < subset.swapped.sum() < 40
  np.testing.assert_array_equal(swapped[subset.swapped], values[subset.swapped, ::-1])
  np.testing.assert_array_equal(swapped[~subset.swapped], values[~subset.swapped])
