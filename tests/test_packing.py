"""Packing: exact steps, packed rows that equal each sequence alone, and plans that are pure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.data import packing
from dpojax.models import transformer
from dpojax.training import objectives
from tests import worlds


def alone_log_prob(config, params, tokens, first, length):
  """Summed log-prob of tokens[first:length], from the plain causal logits of that one sequence."""
  positions = jnp.arange(tokens.shape[0])[None]
  one = jnp.ones_like(positions)
  hidden = transformer.Transformer(config).apply({"params": params}, tokens[None], positions, one, 0 * one)
  logits = jnp.einsum("ld,vd->lv", hidden[0], transformer.output_head(params))
  chosen = jax.nn.log_softmax(logits)[jnp.arange(len(tokens) - 1), tokens[1:]]
  place = jnp.arange(1, len(tokens))
  return jnp.sum(chosen, where=(place >= first) & (place < length))


def by_example(scores, rows, num_examples):
  """[R, P, K] -> [examples, K] in the order of the examples."""
  there = np.asarray(rows.example) >= 0
  order = np.asarray(rows.example)[there]
  assert sorted(order) == list(range(num_examples))
  return jnp.zeros((num_examples, scores.shape[-1])).at[order].set(scores[there])


@pytest.mark.parametrize("make_config", [worlds.llama, worlds.gpt2])
@pytest.mark.parametrize("num_responses", [1, 2, 4])
def test_packed_rows_equal_single_sequences(make_config, num_responses, rng):
  config = make_config()
  params = worlds.params_of(config)
  examples = worlds.comparisons(rng, 8, num_responses)
  rows = worlds.packed(examples, row_length=64)
  assert rows.tokens.shape[0] < len(examples)
  weights = jnp.asarray(rng.normal(size=(len(examples), num_responses)), jnp.float32)
  apply = transformer.make_apply(config)

  @jax.jit
  def packed(params):
    scores = objectives.response_log_probs(apply(params, rows), rows, num_responses=num_responses)
    scores = by_example(scores.sums, rows, len(examples))
    return jnp.sum(scores * weights), scores

  longest = max(len(p) + max(map(len, rs)) for p, rs in examples)
  alone = jax.jit(jax.value_and_grad(lambda params, *sequence: alone_log_prob(config, params, *sequence)))
  want, want_grads = np.zeros_like(weights), jax.tree.map(jnp.zeros_like, params)
  for i, (prompt, responses) in enumerate(examples):
    for k, response in enumerate(responses):
      ids = np.concatenate([prompt, response])
      sequence = np.pad(ids, (0, longest - len(ids)))
      want[i, k], grads = alone(params, sequence, len(prompt), len(ids))
      want_grads = jax.tree.map(lambda sum_, g: sum_ + weights[i, k] * g, want_grads, grads)

  (_, got), got_grads = jax.value_and_grad(packed, has_aux=True)(params)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_grads))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * np.abs(w).max() + 1e-7 * largest),
    got_grads,
    want_grads,
  )


def test_responses_never_see_each_other_nor_other_comparisons(rng):
  config = worlds.llama()
  params = worlds.params_of(config)
  apply = transformer.make_apply(config)
  examples = worlds.comparisons(rng, 6, 2)
  changed = [(prompt, [responses[0], (responses[1] + 1) % worlds.VOCAB]) for prompt, responses in examples]
  changed[0] = ((examples[0][0] + 1) % worlds.VOCAB, changed[0][1])
  before, after = (
    objectives.response_log_probs(apply(params, rows), rows, num_responses=2).sums
    for rows in (worlds.packed(examples, 64), worlds.packed(changed, 64))
  )
  np.testing.assert_array_equal(before[..., 0], after[..., 0])
  assert np.any(before[..., 1] != after[..., 1])


def random_lengths(rng, count, k=2):
  return rng.integers(1, 60, size=(count, 1 + k))


def test_every_step_holds_exactly_batch_size_comparisons_and_no_row_overflows(rng):
  lengths = random_lengths(rng, 500)
  plan = packing.plan(lengths, seed=3, epoch=0, batch_size=16, row_length=256)
  assert plan.index.shape == (31, 16)
  assert len(np.unique(plan.index)) == 31 * 16
  for index, row, rows in zip(plan.index, plan.row, plan.rows):
    assert row.max() < rows
    assert np.bincount(row, lengths[index].sum(axis=1)).max() <= plan.shape.length
    assert np.bincount(row, lengths[index, 1:].sum(axis=1)).max() <= plan.shape.scored
    assert np.bincount(row).max() <= plan.shape.comparisons


def test_a_plan_is_a_function_of_seed_and_epoch(rng):
  lengths = random_lengths(rng, 200)
  first = packing.plan(lengths, 0, 0, 8, 256)
  for again, same in (
    (packing.plan(lengths, 0, 0, 8, 256), True),
    (packing.plan(lengths, 1, 0, 8, 256), False),
    (packing.plan(lengths, 0, 1, 8, 256), False),
  ):
    assert np.array_equal(first.index, again.index) == same


def test_epochs_share_a_handful_of_shapes(rng):
  lengths = random_lengths(rng, 2000)
  plans = [packing.plan(lengths, 0, epoch, 32, 256) for epoch in range(5)]
  shapes = {(rows, plan.shape) for plan in plans for rows in plan.rows}
  assert len(shapes) <= packing.BUCKETS + 1


def test_the_number_of_rows_is_a_multiple_of_the_devices(rng):
  plan = packing.plan(random_lengths(rng, 200), 0, 0, 10, 256, row_multiple=8)
  assert not np.any(plan.rows % 8)


def test_an_evaluation_sees_every_comparison_once_in_order(rng):
  lengths = random_lengths(rng, 21)
  plan = packing.plan_in_order(lengths, 8, 256)
  assert plan.index.ravel().tolist() == list(range(21)) + [-1] * 3


def test_a_comparison_longer_than_a_row_is_named(rng):
  lengths = random_lengths(rng, 20)
  lengths[7] = 200
  with pytest.raises(packing.PackingError, match="comparison 7 has 600 tokens.*row_length is 256"):
    packing.plan(lengths, 0, 0, 4, 256)


def test_too_few_comparisons_for_a_step_are_named(rng):
  with pytest.raises(packing.PackingError, match="batch_size is 64 but there are 20 comparisons"):
    packing.plan(random_lengths(rng, 20), 0, 0, 64, 256)


def test_a_process_fills_its_rows_only(rng):
  examples = worlds.comparisons(rng, 12, 2)
  lengths = worlds.lengths_of(examples)
  plan = packing.plan_in_order(lengths, 12, 64, row_multiple=4)
  whole, parts = (
    [
      packing.fill(
        examples, plan.row[0], count, plan.shape, num_responses=2, example=range(12), first_row=first
      )
      for first, count in spans
    ]
    for spans in ([(0, plan.rows[0])], [(0, plan.rows[0] // 2), (plan.rows[0] // 2,) * 2])
  )
  joined = jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)
  jax.tree.map(np.testing.assert_array_equal, whole[0], joined)


def test_of_a_masked_response_the_scored_tokens_alone_are_scored(rng):
  config = worlds.llama()
  params = worlds.params_of(config)
  examples = worlds.comparisons(rng, 4, 2)
  masks = [[rng.random(len(response)) < 0.5 for response in responses] for _, responses in examples]
  plan = packing.plan_in_order(worlds.lengths_of(examples), 4, 64)
  rows = packing.fill(
    [(*example, mask) for example, mask in zip(examples, masks)],
    plan.row[0],
    int(plan.rows[0]),
    plan.shape,
    num_responses=2,
    example=range(4),
  )
  scores = jax.jit(
    lambda params: (
      objectives.response_log_probs(transformer.make_apply(config)(params, rows), rows, num_responses=2).sums
    )
  )(params)
  got = by_example(scores, rows, 4)
  alone = jax.jit(lambda *sequence: alone_log_prob(config, params, *sequence))
  for i, ((prompt, responses), of) in enumerate(zip(examples, masks)):
    for k, (response, mask) in enumerate(zip(responses, of)):
      tokens = np.pad(np.concatenate([prompt, response]), (0, 20 - len(prompt) - len(response)))
      each = [alone(tokens, len(prompt) + j, len(prompt) + j + 1) for j in np.flatnonzero(mask)]
      np.testing.assert_allclose(got[i, k], sum(each), rtol=1e-4, atol=1e-4)


def test_steps_packed_some_at_a_time_lie_as_all_at_once(rng, monkeypatch):
  lengths = rng.integers(1, 20, size=(300, 3))
  whole = packing.plan(lengths, 0, 0, 4, 64)
  monkeypatch.setattr(packing, "_STEPS_AT_ONCE", 7)
  for a, b in zip(whole, packing.plan(lengths, 0, 0, 4, 64), strict=True):
    np.testing.assert_array_equal(a, b)
