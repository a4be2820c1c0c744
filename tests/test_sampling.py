"""Sampling: the cache changes nothing, the draws are the model's, the log-probs the primitive's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import objectives, sampling
from dpojax.data import packing
from dpojax.log_probs import logits_of
from dpojax.models import transformer
from tests import worlds

LENGTHS = np.array([3, 1, 6, 5], np.int32)


def prompts(rng):
  return rng.integers(worlds.VOCAB, size=(4, 6)).astype(np.int32)


def sampler(config, **options):
  return jax.jit(sampling.make_sampler(config, **options))


def greedy_without_cache(config, params, prompt, count):
  tokens = list(prompt)
  model = transformer.Transformer(config)
  @jax.jit
  def last_logits(padded, length):
    position = jnp.arange(padded.shape[0])[None]
    one = jnp.ones_like(position)
    hidden = model.apply({"params": params}, padded[None], position, one, 0 * one)
    return logits_of(hidden[0, length - 1], transformer.make_head(config, params))
  for _ in range(count):
    padded = np.zeros(len(prompt) + count, np.int32)
    padded[:len(tokens)] = tokens
    tokens.append(int(jnp.argmax(last_logits(padded, len(tokens)))))
  return tokens[len(prompt):]


@pytest.mark.parametrize("make_config", [worlds.llama, worlds.gpt2, worlds.gptj, worlds.gemma])
def test_greedy_sampling_is_argmax_without_a_cache(make_config, rng):
  config = make_config()
  params, padded = worlds.params_of(config), prompts(rng)
  got = sampler(config, max_new_tokens=7)(params, padded, LENGTHS, jax.random.key(0), 0.0)
  for i, length in enumerate(LENGTHS):
    assert got.tokens[i, 0].tolist() == greedy_without_cache(config, params, padded[i, :length], 7)


def test_what_stands_behind_a_prompt_is_never_read(rng):
  config = worlds.llama()
  params, padded = worlds.params_of(config), prompts(rng)
  sample = sampler(config, max_new_tokens=5, num_samples=2)
  want = sample(params, padded, LENGTHS, jax.random.key(3))
  other = np.where(np.arange(6) < LENGTHS[:, None], padded, (padded + 1) % worlds.VOCAB)
  got = sample(params, other, LENGTHS, jax.random.key(3))
  np.testing.assert_array_equal(got.tokens, want.tokens)


def test_log_probs_are_those_of_the_training_primitive(rng):
  """The samples of a prompt are the branches of one comparison."""
  config = worlds.gptj(logit_soft_cap=2.0)
  params, padded = worlds.params_of(config), prompts(rng)
  drawn = jax.device_get(sampler(config, max_new_tokens=6, num_samples=3, stop_id=7)(
      params, padded, LENGTHS, jax.random.key(1)))
  examples = [(padded[i, :LENGTHS[i]], [drawn.tokens[i, k, :drawn.lengths[i, k]] for k in range(3)])
              for i in range(4)]
  rows = packing.fill(examples, np.arange(4), 4, packing.RowShape(24, 18, 1), num_responses=3,
                      example=range(4))
  scores = objectives.response_log_probs(
      transformer.make_apply(config)(params, rows), rows, num_responses=3)
  np.testing.assert_allclose(drawn.log_probs, scores.sums[:, 0], rtol=1e-4)
  np.testing.assert_array_equal(drawn.lengths, scores.lengths[:, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature, rng):
  """Chi-square of 4,096 first tokens of 8 ids; 24.3 is passed by chance once in a thousand."""
  config = worlds.llama(vocab_size=8)
  params = worlds.params_of(config)
  prompt = np.array([[1, 2, 3]], np.int32)
  drawn = sampler(config, max_new_tokens=1, num_samples=4096)(
      params, prompt, np.array([3]), jax.random.key(5), temperature)
  position = jnp.arange(3)[None]
  one = jnp.ones_like(position)
  hidden = transformer.Transformer(config).apply({"params": params}, prompt, position, one, 0 * one)
  probs = jax.nn.softmax(transformer.output_head(params) @ hidden[0, -1] / temperature)
  counts = np.bincount(np.asarray(drawn.tokens).ravel(), minlength=8)
  assert np.sum(np.square(counts - 4096 * probs) / (4096 * probs)) < 24.3


def test_a_sample_ends_with_the_stop_id_and_nothing_follows(rng):
  config = worlds.llama(vocab_size=8)
  drawn = jax.device_get(sampler(config, max_new_tokens=20, num_samples=16, stop_id=2)(
      worlds.params_of(config), prompts(rng) % 8, LENGTHS, jax.random.key(2)))
  assert len(set(drawn.lengths.ravel())) > 3
  for tokens, length in zip(drawn.tokens.reshape(-1, 20), drawn.lengths.ravel()):
    assert 2 not in tokens[:length - 1] and not np.any(tokens[length:])
    assert tokens[length - 1] == 2 or length == 20


def test_samples_of_a_prompt_differ_and_the_key_decides_them(rng):
  config = worlds.llama()
  sample = functools.partial(
      sampler(config, max_new_tokens=6, num_samples=4), worlds.params_of(config), prompts(rng), LENGTHS)
  first, again, other = (sample(jax.random.key(key)).tokens for key in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other) and np.any(first[:, 0] != first[:, 1])


def test_samples_longer_than_the_positions_are_refused():
  config = worlds.gpt2(max_positions=8)
  with pytest.raises(ValueError, match="up to 6 tokens and 3 new ones are longer than the 8"):
    jax.eval_shape(
        sampling.make_sampler(config, max_new_tokens=3), worlds.params_of(config),
        np.zeros((1, 6), np.int32), np.array([6]), jax.random.key(0))
