"""Sampling: the cache changes nothing, the draws are the model's, the log-probs the primitive's."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dpojax.data import packing
from dpojax.kernels import few_tokens
from dpojax.kernels.head import logits_of
from dpojax.kernels.platform import built_for
from dpojax.models import sharding, transformer
from dpojax.sample import by_layers, decoding
from dpojax.sample import sampler as sampling
from dpojax.training import objectives, parallel
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
    padded[: len(tokens)] = tokens
    tokens.append(int(jnp.argmax(last_logits(padded, len(tokens)))))
  return tokens[len(prompt) :]


@pytest.mark.parametrize("count", [7, 16], ids=["as_they_lie", "turned"])
@pytest.mark.parametrize("make_config", [worlds.llama, worlds.gpt2, worlds.gptj])
def test_greedy_sampling_is_argmax_without_a_cache(make_config, count, rng):
  config = make_config()
  params, padded = worlds.params_of(config), prompts(rng)
  assert few_tokens.are_worth_turning(params, len(LENGTHS), count) == (count == 16)
  got = sampler(config, max_new_tokens=count)(params, padded, LENGTHS, jax.random.key(0), 0.0)
  for i, length in enumerate(LENGTHS):
    assert got.tokens[i, 0].tolist() == greedy_without_cache(config, params, padded[i, :length], count)


@pytest.mark.parametrize(
  "tokens, rounds, dtype, where, worth",
  [
    (2, 16, "float32", "cpu", True),
    (64, 1000, "float32", "cpu", True),
    (1, 1000, "float32", "cpu", False),  # read as it lies
    (65, 1000, "float32", "cpu", False),  # of many tokens the arithmetic counts
    (2, 15, "float32", "cpu", False),
    (2, 16, "bfloat16", "cpu", False),
    (2, 16, "float32", "tpu", False),
    (2, 16, "float32", "gpu", False),
  ],
)
def test_weights_are_turned_for_many_steps_of_few_tokens_on_cpus(tokens, rounds, dtype, where, worth):
  weights = {"kernel": jax.ShapeDtypeStruct((8, 8), dtype)}
  with built_for(where):
    assert few_tokens.are_worth_turning(weights, tokens, rounds) == worth
    large = weights | {"head": jax.ShapeDtypeStruct((2**15, 2**14), dtype)}
    assert not few_tokens.are_worth_turning(large, tokens, rounds)


@pytest.mark.parametrize("make_config", [worlds.llama, worlds.gpt2, worlds.gptj])
def test_turned_kernels_give_the_products_of_those_as_they_lie(make_config, rng):
  config, params = transformer.unrolled(make_config(), worlds.params_of(make_config()))
  ids, one = prompts(rng), jnp.ones((4, 6), jnp.int32)
  hidden = lambda variables: transformer.Transformer(config).apply(variables, ids, one, one, 0 * one)
  turned = transformer.turned(config, params)
  # Of kernels that are not a number nothing but the turned ones can have been read.
  lost = jax.tree_util.tree_map_with_path(
    lambda path, x: x * jnp.nan if sharding.path_of(path).endswith("kernel") else x, params
  )
  got = hidden({"params": lost, transformer.TURNED: turned})
  np.testing.assert_allclose(got, hidden({"params": params}), rtol=1e-5, atol=1e-6)


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
  drawn = jax.device_get(
    sampler(config, max_new_tokens=6, num_samples=3, stop_id=7)(params, padded, LENGTHS, jax.random.key(1))
  )
  examples = [
    (padded[i, : LENGTHS[i]], [drawn.tokens[i, k, : drawn.lengths[i, k]] for k in range(3)]) for i in range(4)
  ]
  rows = packing.fill(
    examples, np.arange(4), 4, packing.RowShape(24, 18, 1), num_responses=3, example=range(4)
  )
  scores = objectives.response_log_probs(transformer.make_apply(config)(params, rows), rows, num_responses=3)
  np.testing.assert_allclose(drawn.log_probs, scores.sums[:, 0], rtol=1e-4)
  np.testing.assert_array_equal(drawn.lengths, scores.lengths[:, 0])


def test_the_stages_of_decoding_join(rng):
  """76 tokens of Gemma's kind: the third stage has room for 12 and looks back through 64."""
  config = worlds.gemma(layer_windows=(3, 70, 0), layers=3)
  params, padded = worlds.params_of(config), prompts(rng)
  got = sampler(config, max_new_tokens=76, num_samples=2)(
    params, padded[:2], LENGTHS[:2], jax.random.key(0), 0.0
  )
  for i in range(2):
    want = greedy_without_cache(config, params, padded[i, : LENGTHS[i]], 76)
    assert got.tokens[i, 0].tolist() == got.tokens[i, 1].tolist() == want


def softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def chi_square(tokens, probs):
  """Pearson's statistic over the ids of a probability that is not 0; no others may be there."""
  counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(probs))
  there = probs > 0
  assert not counts[~there].any()
  want = counts.sum() * probs[there]
  return np.sum(np.square(counts[there] - want) / want)


def truncated(probs, top_p, top_k):
  """Probabilities with those that top-k and then top-p leave out set to 0, renormalised."""
  order = np.argsort(-probs)
  kept = order[: top_k or len(probs)]
  share = probs[kept] / probs[kept].sum()
  kept = kept[: 1 + int(np.sum(np.cumsum(share) < top_p))]
  result = np.zeros_like(probs)
  result[kept] = probs[kept] / probs[kept].sum()
  return result


@pytest.fixture(scope="module")
def eight_ids():
  """A sampler of the first token of 8 ids, and the logits it draws from."""
  config = worlds.llama(vocab_size=8)
  params = worlds.params_of(config)
  prompt = np.array([[1, 2, 3]], np.int32)
  sample = sampler(config, max_new_tokens=1, num_samples=4096)
  position = jnp.arange(3)[None]
  one = jnp.ones_like(position)
  hidden = transformer.Transformer(config).apply({"params": params}, prompt, position, one, 0 * one)
  logits = np.asarray(transformer.output_head(params) @ hidden[0, -1], np.float64)
  return lambda *knobs: sample(params, prompt, np.array([3]), jax.random.key(5), *knobs).tokens, logits


@pytest.mark.parametrize(
  "temperature, top_p, top_k",
  [
    (1.0, 1.0, 0),
    (0.5, 1.0, 0),
    (1.0, 0.7, 0),
    (2.0, 0.9, 0),
    (1.0, 1.0, 3),
    (0.7, 0.6, 5),
    (1.0, 1e-6, 0),
    (1.0, 1.0, 1),
  ],
)
def test_draws_follow_the_softmax_and_its_truncations(temperature, top_p, top_k, eight_ids):
  """Chi-square of 4,096 first tokens of 8 ids; 24.3 is passed by chance once in a thousand."""
  draw, logits = eight_ids
  probs = truncated(softmax(logits / temperature), top_p, top_k)
  assert chi_square(draw(temperature, top_p, top_k), probs) < 24.3


def test_draws_follow_the_softmax_over_ids_of_several_blocks(rng):
  """500 ids; 575 is passed by chance once in a hundred."""
  logits = rng.normal(size=500, scale=0.7)
  logits[100:300] = -np.inf
  uniform = jax.random.uniform(jax.random.key(1), (50, 1000))
  wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (1000, 500))
  drawn = jax.jit(
    lambda uniform: jax.lax.map(lambda each: sampling.draw(wide, each, 1.0, 1.0, 0)[0], uniform)
  )(uniform)
  assert chi_square(drawn, softmax(logits)) < 575


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("ids", [5, 128, 300])
def test_greedy_takes_the_first_of_the_largest_and_reports_its_log_prob(rows, ids, rng):
  logits = np.float32(rng.integers(4, size=(rows, ids)))
  least = -(-rows // 5)
  logits[:least] = -np.inf
  logits[:least, ids // 2] = -1e30
  token, log_prob = jax.jit(sampling.draw)(logits, np.zeros(rows), 0.0, 1.0, 0)
  want = np.argmax(logits, axis=-1)
  np.testing.assert_array_equal(token, want)
  np.testing.assert_allclose(
    log_prob, jax.nn.log_softmax(logits)[np.arange(rows), want], rtol=1e-5, atol=1e-6
  )


def test_a_sweep_over_temperature_top_p_and_top_k_compiles_once():
  config, traces = worlds.llama(), []

  def sample(*args):
    traces.append(args)
    return sampling.make_sampler(config, max_new_tokens=2)(*args)

  jitted = jax.jit(sample)
  for knobs in ((1.0, 1.0, 0), (0.0, 1.0, 0), (0.3, 0.5, 0), (1.5, 1.0, 4)):
    jitted(worlds.params_of(config), np.ones((1, 2), np.int32), np.array([2]), jax.random.key(0), *knobs)
  assert len(traces) == 1


@pytest.mark.parametrize("few", [4, 256])
@settings(max_examples=60, deadline=None)
@given(
  hnp.arrays(np.float32, (3, 16), elements=st.floats(0, 1, width=32)),
  st.floats(0.05, 0.99),
  st.integers(0, 20),
)
def test_what_stays_is_the_fewest_likeliest_with_their_ties(few, weights, top_p, top_k):
  """Found among the few largest that are sorted, or, where they are not enough, among all."""
  weights[:, 0] = 1.0
  got = np.asarray(LIKELIEST(weights, top_p, top_k, few=few))
  for row, kept in zip(weights, got):
    ordered = np.sort(row)[::-1]
    if 0 < top_k < 16:
      row = np.where(row >= ordered[top_k - 1], row, 0)
      ordered = np.sort(row)[::-1]
    sums = np.cumsum(ordered.astype(np.float64))
    enough = int(np.sum(sums < top_p * sums[-1] * (1 - 1e-6)))
    barely = int(np.sum(sums < top_p * sums[-1] * (1 + 1e-6)))
    least = (ordered[enough], ordered[min(barely, 15)])
    assert any(np.array_equal(kept, np.where(row >= each, row, 0)) for each in least)


LIKELIEST = jax.jit(sampling.likeliest, static_argnames="few")


def test_a_prompt_gets_the_samples_of_its_key_alone_and_beside_longer_ones(rng):
  config = worlds.llama()
  params, padded = worlds.params_of(config), prompts(rng)
  keys = jax.random.split(jax.random.key(8), 4)
  sample = sampler(config, max_new_tokens=6, num_samples=3)
  together = sample(params, padded, LENGTHS, keys)
  alone = sample(params, padded[1:2, : LENGTHS[1]], LENGTHS[1:2], keys[1:2])
  np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
  np.testing.assert_allclose(alone.log_probs[0], together.log_probs[1], rtol=1e-4)


@pytest.mark.parametrize(
  "data, fsdp, tensor, memory",
  [(2, 2, 2, {}), (1, 4, 1, dict(free=lambda: 0)), (2, 2, 2, dict(free=lambda: 0))],
  ids=["together", "in_place", "in_place_under_tensor"],
)
def test_params_cut_over_a_mesh_give_the_same_samples(data, fsdp, tensor, memory, rng, capsys):
  config = worlds.llama(vocab_size=64, layers=1)
  params, padded, keys = worlds.params_of(config), prompts(rng), jax.random.split(jax.random.key(4), 4)
  # As many tokens as weights are turned for, where they are not left in place.
  known = dict(max_new_tokens=16, num_samples=2, stop_id=tuple(range(32)))
  want = jax.jit(sampling.make_sampler(config, **known))(params, padded, LENGTHS, keys, 0.8, 0.9)
  assert len(np.unique(want.lengths.max(1))) > 1  # devices have their last sample done at different times
  devices = parallel.Mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
  sample = decoding.make_sampler(devices, config, **known, **memory)
  got = sample(devices.place(params), *devices.place_rows((padded, LENGTHS), 4), keys, 0.8, 0.9)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-4)
  assert ("where they are cut" if memory else "brought together once a batch") in capsys.readouterr().out


BY_LAYERS = {
  "greedy": (worlds.llama, dict(max_new_tokens=7), (0.0,)),
  "weights_turned": (worlds.llama, dict(max_new_tokens=16, stop_id=tuple(range(16))), (0.7,)),
  "top_p_of_top_k": (worlds.gpt2, dict(max_new_tokens=9, num_samples=3), (1.3, 0.8, 5)),
  "bfloat16": (lambda: worlds.gptj(dtype="bfloat16"), dict(max_new_tokens=8, num_samples=2), (1.0, 0.9)),
  "scaled_embeddings_and_windows": (
    lambda: worlds.gemma(layer_windows=(3, 70, 0), layers=3),
    dict(max_new_tokens=76, num_samples=2, stop_id=3),
    (1.0, 1.0, 0),
  ),
}


@pytest.mark.parametrize("make_config, known, knobs", BY_LAYERS.values(), ids=BY_LAYERS)
def test_programs_of_one_layer_give_the_samples_of_one_of_all(make_config, known, knobs, rng, monkeypatch):
  config, params = transformer.unrolled(make_config(), worlds.params_of(make_config()))
  padded, keys = prompts(rng), jax.random.split(jax.random.key(4), 4)
  want = sampler(config, **known)(params, padded, LENGTHS, keys, *knobs)
  monkeypatch.setattr(by_layers, "_BYTES", 0)  # as a command asks for them, whose layers are large
  devices = parallel.Mesh(devices=jax.devices()[:1])
  sample = decoding.make_sampler(devices, config, **known)
  by_layers._extended.clear_cache()
  got = sample(devices.place(params), *devices.place_rows((padded, LENGTHS), 4), keys, *knobs)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.lengths, want.lengths)
  np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-4)
  # Layers that are alike are one program: of each window, and of each stage's room.
  stages = len(list(sampling.stages(padded.shape[1], known["max_new_tokens"])))
  assert by_layers._extended._cache_size() == len(set(config.layer_windows)) * stages
  # Nor is anything of the caller's given away: arrays of no device in particular, twice.
  sample = by_layers.make_sampler(config, **known)
  for _ in range(2):
    np.testing.assert_array_equal(sample(params, padded, LENGTHS, keys, *knobs).tokens, want.tokens)


def test_a_batch_by_layers_ends_with_its_last_sample(rng, monkeypatch):
  """Every id ends a sample: no layer is asked for a second token, nor for one behind the last."""
  config, params = transformer.unrolled(worlds.llama(), worlds.params_of(worlds.llama()))
  calls, by_one_layer = [], by_layers._extended
  monkeypatch.setattr(by_layers, "_extended", lambda *args: calls.append(args) or by_one_layer(*args))
  for stops, tokens in ((tuple(range(worlds.VOCAB)), 1), (None, 4)):
    calls.clear()
    sample = by_layers.make_sampler(config, max_new_tokens=4, stop_id=stops)
    drawn = sample(params, prompts(rng), LENGTHS, jax.random.key(0))
    assert set(np.asarray(drawn.lengths).ravel()) == {tokens} and len(calls) == (tokens - 1) * config.layers


@pytest.mark.parametrize(
  "platform, devices, width, scan_layers, applies",
  [
    ("cpu", 1, 512, False, True),
    ("cpu", 1, 64, False, False),  # compiled soon, and read sooner than it is called
    ("cpu", 1, 512, True, False),
    ("cpu", 2, 512, False, False),
    ("gpu", 1, 512, False, False),
  ],
)
def test_one_cpu_decodes_large_layers_one_by_one(platform, devices, width, scan_layers, applies):
  config = worlds.llama(width=width, scan_layers=scan_layers)
  with built_for(platform):
    assert by_layers.applies(config, worlds.shapes_of(config), devices) == applies


def test_a_sample_ends_with_a_stop_id_and_nothing_follows(rng):
  config, stops = worlds.llama(vocab_size=8), (2, 5)
  drawn = jax.device_get(
    sampler(config, max_new_tokens=20, num_samples=16, stop_id=stops)(
      worlds.params_of(config), prompts(rng) % 8, LENGTHS, jax.random.key(2)
    )
  )
  assert len(set(drawn.lengths.ravel())) > 3
  for tokens, length in zip(drawn.tokens.reshape(-1, 20), drawn.lengths.ravel()):
    assert not np.isin(tokens[: length - 1], stops).any() and not np.any(tokens[length:])
    assert tokens[length - 1] in stops or length == 20
  ended = drawn.tokens.reshape(-1, 20)[np.arange(64), drawn.lengths.ravel() - 1]
  assert set(stops) <= set(ended)


def test_samples_of_a_prompt_differ_and_the_key_decides_them(rng):
  config = worlds.llama()
  sample = functools.partial(
    sampler(config, max_new_tokens=6, num_samples=4), worlds.params_of(config), prompts(rng), LENGTHS
  )
  first, again, other = (sample(jax.random.key(key)).tokens for key in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other) and np.any(first[:, 0] != first[:, 1])


def test_samples_longer_than_the_positions_are_refused():
  config = worlds.gpt2(max_positions=8)
  with pytest.raises(ValueError, match="up to 6 tokens and 3 new ones are longer than the 8"):
    jax.eval_shape(
      sampling.make_sampler(config, max_new_tokens=3),
      worlds.params_of(config),
      np.zeros((1, 6), np.int32),
      np.array([6]),
      jax.random.key(0),
    )
