"""Loading: position is step, no prompt on both sides of a split, shuffled labels, and processes."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest

from dpojax.data import loader
from dpojax.data.packing import Rows
from dpojax.data.tokenized import Tokenized


def tokenized(rng, count=60, prompts=20):
  """Comparisons over few prompts, so that prompts recur."""
  pool = [rng.integers(100, size=rng.integers(1, 8)) for _ in range(prompts)]
  examples = [
    (pool[rng.integers(prompts)], [rng.integers(100, size=rng.integers(1, 9)) for _ in "ab"])
    for _ in range(count)
  ]
  lengths = np.array([[len(p), *map(len, rs)] for p, rs in examples], np.int32)
  ids = np.concatenate([part for p, rs in examples for part in (p, *rs)]).astype(np.int32)
  offsets = np.concatenate([[0], lengths.sum(axis=1).cumsum()])
  return Tokenized(lengths, ids, offsets, np.arange(count, dtype=np.int32), {}, "fingerprint")


def make(subset, **changes):
  return loader.Loader(subset, **(dict(seed=0, batch_size=8, row_length=64) | changes))


def assert_same_rows(a: Rows, b: Rows):
  for name in Rows._fields:
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_batch_depends_on_its_step_and_nothing_else(rng):
  subset = loader.all_of(tokenized(rng))
  straight = list(make(subset).training(0, 20))
  assert [batch.step for batch in straight] == list(range(20))
  resumed = list(make(subset).training(13, 20))
  for batch, again in zip(straight[13:], resumed, strict=True):
    assert_same_rows(batch.rows, again.rows)
  assert any(not np.array_equal(straight[0].rows.example, batch.rows.example) for batch in straight[7:8])


def test_an_epoch_holds_every_comparison_at_most_once(rng):
  batches = list(make(loader.all_of(tokenized(rng))).training(0, 7))
  examples = np.concatenate([batch.rows.example.ravel() for batch in batches])
  examples = examples[examples >= 0]
  assert len(examples) == 56 == len(np.unique(examples))
  assert all(batch.comparisons == 8 for batch in batches)


def test_tokens_are_counted_for_each_response_as_if_nothing_were_shared(rng):
  data = tokenized(rng)
  batch = next(make(loader.all_of(data)).training(0, 1))
  used = batch.rows.example[batch.rows.example >= 0]
  prompt, chosen, rejected = data.lengths[used].T
  assert batch.tokens == np.sum(2 * prompt + chosen + rejected)


def test_no_prompt_is_both_trained_on_and_held_out(rng):
  subset = loader.all_of(tokenized(rng))
  train, held_out = loader.hold_out(subset, 15)
  assert len(train) + len(held_out) == len(subset) and len(held_out) >= 15
  prompts = lambda part: {part.comparison(i)[0].tobytes() for i in range(len(part))}
  assert not prompts(train) & prompts(held_out)
  again, _ = loader.hold_out(subset, 15)
  np.testing.assert_array_equal(train.index, again.index)


def test_sft_takes_the_last_comparison_of_each_prompt(rng):
  subset = loader.last_of_each_prompt(loader.all_of(tokenized(rng)))
  last = {}
  for i in range(60):
    last[subset.data[i][0].tobytes()] = i
  assert subset.index.tolist() == sorted(last.values())


def test_prompts_that_only_look_alike_are_two(rng):
  """Eight bytes of a digest are kept: where they are the same, the ids decide."""
  data = tokenized(rng)
  alike = dataclasses.replace(data, kept_prompts=np.zeros(len(data), np.uint64))
  np.testing.assert_array_equal(
    loader.last_of_each_prompt(loader.all_of(alike)).index,
    loader.last_of_each_prompt(loader.all_of(data)).index,
  )


def test_the_held_out_are_the_first_by_their_prompts_sha256(rng):
  data = tokenized(rng)
  _, held_out = loader.hold_out(loader.all_of(data), 15)
  digest = lambda i: hashlib.sha256(data[i][0].astype(np.int32).tobytes()).digest()
  order = sorted(range(len(data)), key=digest)
  last = digest(order[14])
  assert held_out.index.tolist() == sorted(i for i in order if digest(i) <= last)


def test_shuffled_labels_swap_half_of_the_pairs_and_their_lengths(rng):
  data = tokenized(rng)
  subset = loader.shuffle_labels(loader.all_of(data), seed=0)
  assert 15 < subset.swapped.sum() < 45
  for i in range(60):
    prompt, responses = subset.comparison(i)
    np.testing.assert_array_equal(subset.lengths[i], [len(prompt), *map(len, responses)])
    np.testing.assert_array_equal(responses[0], data[i][1][1 if subset.swapped[i] else 0])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_fill_the_rows_of_one(processes, rng):
  subset = loader.all_of(tokenized(rng))
  whole = list(make(subset, shards=4).training(0, 7))
  parts = [
    list(
      make(subset, shards=4, span=lambda rows, i=i: (i * rows // processes, rows // processes)).training(0, 7)
    )
    for i in range(processes)
  ]
  for batch, *pieces in zip(whole, *parts):
    assert_same_rows(
      batch.rows, jax.tree.map(lambda *parts: np.concatenate(parts), *(piece.rows for piece in pieces))
    )
    assert {piece.tokens for piece in pieces} == {batch.tokens}


def test_an_evaluation_covers_everything_once(rng):
  batches = list(make(loader.all_of(tokenized(rng))).evaluation())
  examples = np.concatenate([batch.rows.example.ravel() for batch in batches])
  assert sorted(examples[examples >= 0]) == list(range(60))
  assert [batch.comparisons for batch in batches] == [8] * 7 + [4]
  assert len({batch.rows.tokens.shape for batch in batches}) == 1


def test_rows_taken_in_parts_are_dealt_evenly_and_hold_the_same_comparisons(rng):
  subset = loader.all_of(tokenized(rng))
  whole, dealt = make(subset), make(subset, shards=2, rows_at_once=1)
  assert len(set(dealt.plan().rows.tolist())) == 1
  for batch, other in zip(whole.training(0, 5), dealt.training(0, 5)):
    ids = lambda rows: sorted(rows.example[rows.example >= 0].tolist())
    assert ids(batch.rows) == ids(other.rows)
    held = (other.rows.example >= 0).any(axis=1).reshape(2, -1)  # by shard and part
    used = held.sum(axis=1)
    assert abs(used[0] - used[1]) <= 1 and all(
      row[:n].all() and not row[n:].any() for row, n in zip(held, used)
    )


def test_what_is_scored_goes_with_its_response(rng):
  data = tokenized(rng)
  mask = rng.random(len(data.ids)) < 0.5
  masked = dataclasses.replace(data, mask=mask)
  plain, subset = loader.all_of(data), loader.shuffle_labels(loader.all_of(masked), seed=0)
  mismatched = loader.mismatched(subset, seed=0, max_length=20)
  assert plain.scored(0) is None and loader.mismatched(plain, seed=0, max_length=20).scored(0) is None
  for i in range(60):
    prompt, responses = subset.comparison(i)
    place = int(data.offsets[i]) + len(prompt)
    own = np.split(mask[place : int(data.offsets[i + 1])], np.cumsum(data.lengths[i, 1:])[:-1])
    for one, other in zip(subset.scored(i), own[::-1] if subset.swapped[i] else own):
      np.testing.assert_array_equal(one, other)
    counts = [each[0 if len(prompt) else 1 :].sum() for each in subset.scored(i)]
    np.testing.assert_array_equal(subset.scored_lengths[i], counts)
    assert [len(each) for each in mismatched.comparison(i)[1]] == [len(each) for each in mismatched.scored(i)]
  whole = plain.scored_lengths
  np.testing.assert_array_equal(whole, plain.lengths[:, 1:] - (plain.lengths[:, :1] == 0))
