"""The log-prob primitive against the naive form, in value, gradient and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpojax import log_probs
from dpojax.kernels import distributions, head_on_cpu
from dpojax.kernels import head as head_lib
from experiments.measurements import log_prob_memory


def naive(hidden, head, target, bias=None, soft_cap=None):
  logits = jnp.einsum("...d,vd->...v", hidden, head)
  if bias is not None:
    logits += jnp.broadcast_to(bias, logits.shape)
  if soft_cap is not None:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  return jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]


def world(rng, leading=(3,), length=11, vocab=17, width=5, dtype=np.float32):
  return (
    jnp.asarray(rng.normal(size=(*leading, length, width)), dtype),
    jnp.asarray(rng.normal(size=(vocab, width)), dtype),
    jnp.asarray(rng.integers(vocab, size=(*leading, length))),
  )


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100, None])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_chunks_give_the_naive_log_probs_and_gradients_in_float64(leading, chunk_size, rng):
  with jax.enable_x64(True):
    hidden, head, target = world(rng, leading, dtype=np.float64)
    weights = jnp.asarray(rng.normal(size=target.shape))
    chunked = lambda h, w: jnp.sum(weights * log_probs.token_log_probs(h, w, target, chunk_size=chunk_size))
    plain = lambda h, w: jnp.sum(weights * naive(h, w, target))
    got, got_grads = jax.value_and_grad(chunked, argnums=(0, 1))(hidden, head)
    want, want_grads = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for g, w in zip(got_grads, want_grads):
      assert g.dtype == jnp.float64
      np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("soft_cap", [None, 2.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_bias_and_a_soft_cap_give_the_naive_gradients_in_float64(with_bias, soft_cap, rng):
  with jax.enable_x64(True):
    hidden, head, target = world(rng, dtype=np.float64)
    bias = jnp.asarray(rng.normal(size=17)) if with_bias else None
    weights = jnp.asarray(rng.normal(size=target.shape))

    def total(form):
      score = lambda h, w, b: jnp.sum(weights * form(h, w, target, bias=b, soft_cap=soft_cap))
      return jax.value_and_grad(score, argnums=(0, 1, 2))(hidden, head, bias)

    got, got_grads = total(partial(log_probs.token_log_probs, chunk_size=4))
    want, want_grads = total(naive)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for g, w in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12)


def test_a_head_brings_its_bias_and_cap_wherever_a_head_goes(rng):
  hidden, weights, target = world(rng)
  bias = jnp.asarray(rng.normal(size=17), jnp.float32)
  head = head_lib.Head(weights, bias, 2.5)
  want = log_probs.token_log_probs(hidden, weights, target, bias=bias, soft_cap=2.5)
  np.testing.assert_array_equal(log_probs.token_log_probs(hidden, head, target), want)
  logits = jax.nn.log_softmax(head_lib.logits_of(hidden, head))
  np.testing.assert_allclose(jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0], want, rtol=1e-5)
  grads = jax.jit(jax.grad(lambda head: log_probs.token_log_probs(hidden, head, target).sum()))(head)
  assert grads.bias.shape == (17,) and grads.soft_cap == 0.0


def test_gradients_are_those_of_finite_differences(rng):
  with jax.enable_x64(True):
    hidden, head, target = world(rng, (), length=5, dtype=np.float64)
    check_grads(
      lambda h, w: log_probs.token_log_probs(h, w, target, chunk_size=2),
      (hidden, head),
      order=1,
      modes=["rev"],
    )


def test_a_tied_head_gets_the_gradients_of_both_its_uses(rng):
  with jax.enable_x64(True):
    _, table, target = world(rng, (), dtype=np.float64)
    ids = jnp.asarray(rng.integers(17, size=target.shape))
    got = jax.grad(lambda w: log_probs.token_log_probs(w[ids], w, target, chunk_size=3).sum())(table)
    want = jax.grad(lambda w: naive(w[ids], w, target).sum())(table)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_bfloat16_hidden_states_are_accumulated_in_float32(rng):
  hidden, head, target = world(rng, (), width=256, vocab=999)
  hidden = hidden.astype(jnp.bfloat16)
  got = log_probs.token_log_probs(hidden, head, target)
  want = naive(hidden.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32), target)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-4)
  grad = jax.grad(lambda w: log_probs.token_log_probs(hidden, w, target).sum())(head)
  assert grad.dtype == jnp.float32


def test_log_probs_are_sums_by_slot_and_padding_counts_nowhere(rng):
  hidden, head, _ = world(rng, (2,), length=8)
  source = jnp.asarray([[1, 2, 2, 3, 0], [4, 5, 0, 0, 0]])
  target = jnp.asarray([[3, 1, 4, 1, 0], [5, 9, 0, 0, 0]])
  slot = jnp.asarray([[0, 0, 1, 1, 3], [2, 2, 3, 3, 3]])
  got = log_probs.log_probs(hidden, head, source, target, slot, num_slots=3)
  tokens = naive(jnp.take_along_axis(hidden, source[..., None], axis=1), head, target)
  want = [
    [tokens[0, 0] + tokens[0, 1], tokens[0, 2] + tokens[0, 3], 0.0],
    [0.0, 0.0, tokens[1, 0] + tokens[1, 1]],
  ]
  np.testing.assert_allclose(got.sums, want, rtol=1e-6)
  np.testing.assert_array_equal(got.lengths, [[2, 2, 0], [0, 0, 2]])


def test_logits_at_t_score_the_token_at_t_plus_1(rng):
  logits = jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)
  tokens = jnp.asarray(rng.integers(7, size=(2, 5)))
  mask = jnp.asarray([[1, 0, 0, 1, 1], [0, 1, 1, 1, 0]], bool)
  table = jax.nn.log_softmax(logits)
  want = [
    table[0, 2, tokens[0, 3]] + table[0, 3, tokens[0, 4]],
    sum(table[1, t - 1, tokens[1, t]] for t in (1, 2, 3)),
  ]
  np.testing.assert_allclose(
    log_probs.sequence_log_probs(logits, tokens, mask), jnp.stack(jnp.asarray(want)), rtol=1e-6
  )


def test_wrong_shapes_are_named(rng):
  hidden, head, target = world(rng)
  with pytest.raises(ValueError, match=r"hidden .*\(3, 11, 5\).*target .*\(3, 10\)"):
    log_probs.token_log_probs(hidden, head, target[:, :-1])
  with pytest.raises(ValueError, match=r"head .*\(17, 5\) and bias .*\(5,\)"):
    log_probs.token_log_probs(hidden, head, target, bias=jnp.zeros(5))
  with pytest.raises(ValueError, match=r"logits .*\(4, 7\).*tokens .*\(5,\)"):
    log_probs.sequence_log_prob(jnp.zeros((4, 7)), jnp.zeros(5, int), jnp.ones(5, bool))


def test_peak_memory_does_not_grow_with_the_scored_tokens_times_the_vocabulary():
  """Temporaries beyond the gradients themselves: the naive form's grow with S x V, ours do not."""

  def extra(form, tokens):
    return log_prob_memory.peak_bytes(form, tokens=tokens, vocab=4096, width=16, chunk_size=64)

  chunked = extra("chunked", 4096) - extra("chunked", 1024)
  plain = extra("naive", 4096) - extra("naive", 1024)
  logits = (4096 - 1024) * 4096 * 4
  assert plain >= logits
  assert chunked < 0.05 * logits


@pytest.mark.parametrize("chunk_size", [2, 4])  # 6 and 12 tokens; of the latter's last chunk, pieces of 3
@pytest.mark.parametrize("block, soft_cap", [(4, None), (4, 2.5), (2048, None)])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # the form in blocks, and the plain loop
def test_masked_tokens_and_blocks_of_the_vocabulary_give_the_naive_gradients(
  platform, block, soft_cap, chunk_size, rng, monkeypatch
):
  monkeypatch.setattr(head_on_cpu, "CPU_BLOCK", block)  # 17 ids: five blocks, the last overlaps
  for module in (log_probs, head_lib):
    monkeypatch.setattr(module, "platform", lambda: platform)
  with jax.enable_x64(True):
    hidden, head, target = world(rng, dtype=np.float64)
    bias = jnp.asarray(rng.normal(size=17))
    where = jnp.asarray(rng.random(target.shape) < 0.4)
    weights = jnp.asarray(rng.normal(size=target.shape))

    def total(form):
      return jax.value_and_grad(lambda h, w, b: jnp.sum(weights * form(h, w, b)), argnums=(0, 1, 2))(
        hidden, head, bias
      )

    got, got_grads = total(
      lambda h, w, b: log_probs.token_log_probs(
        h, w, target, where=where, bias=b, soft_cap=soft_cap, chunk_size=chunk_size
      )
    )
    want, want_grads = total(lambda h, w, b: jnp.where(where, naive(h, w, target, b, soft_cap), 0))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for g, w in zip(got_grads, want_grads, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12)


def test_no_token_that_counts_is_zero_everywhere(rng):
  hidden, head, target = world(rng)
  nothing = jnp.zeros(target.shape, bool)
  value, grads = jax.value_and_grad(
    lambda h, w: jnp.sum(log_probs.token_log_probs(h, w, target, where=nothing)), argnums=(0, 1)
  )(hidden, head)
  assert value == 0 and not any(np.any(grad) for grad in grads)


# Of two models' whole distributions.


def naive_kl(hidden, head, reference_hidden, reference_head, bias=None, soft_cap=None):
  def every(hidden, head, bias, soft_cap):
    logits = jnp.einsum("...d,vd->...v", hidden, head)
    if bias is not None:
      logits += jnp.broadcast_to(bias, logits.shape)
    return jax.nn.log_softmax(logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap))

  ours, theirs = every(hidden, head, bias, soft_cap), every(reference_hidden, reference_head, None, None)
  return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
@pytest.mark.parametrize("soft_cap", [None, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kl_from_the_reference_has_the_naive_values_and_gradients_in_float64(
  masked, soft_cap, chunk_size, rng
):
  """The reference is of another width than the policy; it gets no gradient."""
  with jax.enable_x64(True):
    hidden, head, target = world(rng, dtype=np.float64)
    theirs, their_head, _ = world(rng, width=7, dtype=np.float64)
    bias = jnp.asarray(rng.normal(size=17))
    where = jnp.asarray(rng.random(target.shape) < (0.4 if masked else 2))
    weights = jnp.asarray(rng.normal(size=target.shape))

    def total(form):
      return jax.value_and_grad(lambda *x: jnp.sum(weights * form(*x)), argnums=(0, 1, 2, 3, 4))(
        hidden, head, bias, theirs, their_head
      )

    got, got_grads = total(
      lambda h, w, b, r, rw: distributions.token_kl_from(
        h, head_lib.Head(w, b, soft_cap), r, rw, where=where if masked else None, chunk_size=chunk_size
      )
    )
    want, want_grads = total(
      lambda h, w, b, r, rw: jnp.where(where, naive_kl(h, w, *jax.lax.stop_gradient((r, rw)), b, soft_cap), 0)
    )
    np.testing.assert_allclose(got, want, rtol=1e-10)
    for g, w in zip(got_grads, want_grads, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)
    assert not np.any(got_grads[3]) and not np.any(got_grads[4])


def test_the_kl_from_itself_is_0_without_a_gradient_and_never_negative(rng):
  hidden, head, _ = world(rng)
  value, grads = jax.value_and_grad(
    lambda h, w: jnp.sum(distributions.token_kl_from(h, w, hidden, head)), argnums=(0, 1)
  )(hidden, head)
  assert value == 0 and not any(np.any(grad) for grad in grads)
  other = jnp.asarray(rng.normal(size=hidden.shape), jnp.float32)
  assert np.all(distributions.token_kl_from(other, head, hidden, head) > 0)


def test_gradients_of_the_kl_are_those_of_finite_differences(rng):
  with jax.enable_x64(True):
    hidden, head, _ = world(rng, (), length=5, dtype=np.float64)
    theirs, their_head, _ = world(rng, (), length=5, dtype=np.float64)
    check_grads(
      lambda h, w: distributions.token_kl_from(h, w, theirs, their_head, chunk_size=2),
      (hidden, head),
      order=1,
      modes=["rev"],
    )


@pytest.mark.parametrize("share", [0.0, 0.1, -0.1, 1.0])
@pytest.mark.parametrize("chunk_size", [2, None])
def test_mixed_log_probs_are_of_the_mixed_logits(share, chunk_size, rng):
  hidden, head, target = world(rng)
  theirs, their_head, _ = world(rng)
  got = distributions.token_mixed_log_probs(
    hidden, head, theirs, their_head, target, share=share, chunk_size=chunk_size
  )
  both = jnp.concatenate([(1 - share) * hidden, share * theirs], axis=-1)
  want = naive(both, jnp.concatenate([head, their_head], axis=-1), target)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert not np.any(
    jax.grad(
      lambda h: distributions.token_mixed_log_probs(h, head, theirs, their_head, target, share=share).sum()
    )(hidden)
  )


def test_the_kl_from_another_vocabulary_is_refused(rng):
  hidden, head, _ = world(rng)
  with pytest.raises(ValueError, match=r"\(3, 11, 5\) and .*\(17, 5\) .*\(3, 11, 5\) and \(16, 5\)"):
    distributions.token_kl_from(hidden, head, hidden, head[:-1])


def test_peak_memory_of_the_kl_does_not_grow_with_the_scored_tokens_times_the_vocabulary():
  def extra(tokens):
    return log_prob_memory.peak_bytes("kl", tokens=tokens, vocab=4096, width=16, chunk_size=64)

  assert extra(4096) - extra(1024) < 0.05 * (4096 - 1024) * 4096 * 4
