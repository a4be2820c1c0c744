"""The decoder: what it computes does not depend on how it is scanned, recomputed or grouped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.kernels import attention
from dpojax.models import config as model_config
from dpojax.models import rotary, transformer
from tests import worlds


def value_and_grads(config, params, rows):
  model = transformer.Transformer(config)
  weights = jnp.cos(jnp.arange(config.width))

  @jax.jit
  @jax.value_and_grad
  def score(params):
    hidden = model.apply({"params": params}, rows.tokens, rows.positions, rows.comparison, rows.branch)
    return jnp.sum(jnp.einsum("rld,d->rl", hidden.astype(jnp.float32), weights), where=rows.comparison > 0)

  return score(params)


def unstacked(params, layers):
  rest = {name: value for name, value in params.items() if name != "layers"}
  return rest | {f"layer_{i}": jax.tree.map(lambda x: x[i], params["layers"]) for i in range(layers)}


@pytest.fixture
def rows(rng):
  return worlds.packed(worlds.comparisons(rng, 6, 2), 64)


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_recomputing_changes_nothing(remat, rows):
  params = worlds.params_of(worlds.llama())
  want, want_grads = value_and_grads(worlds.llama(), params, rows)
  got, grads = value_and_grads(worlds.llama(remat=remat), params, rows)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_grads))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6 * largest), grads, want_grads
  )


def test_scanned_layers_equal_layers_one_by_one(rows):
  params = worlds.params_of(worlds.gpt2())
  want, _ = value_and_grads(worlds.gpt2(), params, rows)
  got, _ = value_and_grads(worlds.gpt2(scan_layers=False), unstacked(params, 2), rows)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_grouped_heads_equal_repeated_key_heads(rows):
  few = worlds.llama(kv_heads=2)
  params = worlds.params_of(few)
  layers = params["layers"] | {
    name: {"kernel": jnp.repeat(params["layers"][name]["kernel"], 2, axis=2)} for name in ("key", "value")
  }
  want, _ = value_and_grads(few, params, rows)
  got, _ = value_and_grads(worlds.llama(kv_heads=4), params | {"layers": layers}, rows)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_rule_of_who_sees_whom():
  """Two comparisons, the first of a prompt of 2 and branches of 2 and 1, and one padding token."""
  ids = attention.TokenIds(
    position=jnp.asarray([[0, 1, 2, 3, 2, 0, 1, 0]]),
    comparison=jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 0]]),
    branch=jnp.asarray([[0, 0, 1, 1, 2, 0, 1, 0]]),
  )
  want = """
      x.......
      xx......
      xxx.....
      xxxx....
      xx..x...
      .....x..
      .....xx.
      .......x""".split()
  np.testing.assert_array_equal(attention.visible(ids, ids)[0], [[c == "x" for c in line] for line in want])


def test_a_window_counts_positions_of_the_sequence_not_places_in_the_row():
  """A branch of 2 behind one of 3 sees the end of their prompt as if the first were not there."""
  ids = attention.TokenIds(
    position=jnp.asarray([[0, 1, 2, 3, 4, 2, 3]]),
    comparison=jnp.ones((1, 7), int),
    branch=jnp.asarray([[0, 0, 1, 1, 1, 2, 2]]),
  )
  want = """
      x......
      xx.....
      .xx....
      ..xx...
      ...xx..
      .x...x.
      .....xx""".split()
  np.testing.assert_array_equal(
    attention.visible(ids, ids, window=2)[0], [[c == "x" for c in line] for line in want]
  )


def test_attention_is_softmax_over_what_is_seen(rng):
  q, k, v = (jnp.asarray(rng.normal(size=(1, 3, 1, 4)), jnp.float32) for _ in range(3))
  ids = attention.TokenIds(jnp.arange(3)[None], jnp.ones((1, 3), int), jnp.zeros((1, 3), int))
  got = attention.attention(q, k, v, ids, ids)[0, :, 0]
  for t in range(3):
    weights = jax.nn.softmax(k[0, : t + 1, 0] @ q[0, t, 0] / 2.0)
    np.testing.assert_allclose(got[t], weights @ v[0, : t + 1, 0], rtol=1e-5)


def test_rotation_depends_on_distance_only(rng):
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
  at = lambda x, position: rotary.rotate(
    x, rotary.rotary_table(jnp.asarray([[position]]), rotary.frequencies(8, 10000.0))
  )
  near = jnp.sum(at(q, 5) * at(k, 3))
  np.testing.assert_allclose(jnp.sum(at(q, 25) * at(k, 23)), near, rtol=1e-4)
  assert abs(jnp.sum(at(q, 25) * at(k, 20)) - near) > 1e-3


def test_bfloat16_computes_near_float32_and_keeps_float32_params(rows):
  config = worlds.llama(dtype="bfloat16")
  params = transformer.init_params(config, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  outputs = transformer.make_apply(config)(params, rows)
  want = transformer.make_apply(worlds.llama())(params, rows)
  assert outputs.hidden.dtype == jnp.bfloat16
  np.testing.assert_allclose(outputs.hidden.astype(jnp.float32), want.hidden, atol=0.1)


def test_the_parameter_count_is_gpt2s():
  config = model_config.gpt2_style(vocab_size=50257, width=768, layers=12, heads=12, max_positions=1024)
  shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808


@pytest.mark.parametrize(
  "config",
  [
    worlds.gpt2(),
    worlds.gemma(),
    worlds.llama(rope_scaling=model_config.RopeScaling("yarn", 4.0, 16), biases=True),
  ],
)
def test_a_config_is_itself_after_json(config):
  again = model_config.ModelConfig(**json.loads(json.dumps(config.as_dict())))
  assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"layers": 0}, "model.layers is 0; it must be a positive integer"),
    ({"kv_heads": 3}, "model.heads is 4 and model.kv_heads 3; kv_heads must divide heads"),
    ({"head_size": 7}, "model.head_size is 7; rotary positions need an even one"),
    ({"rotary_size": 5}, "model.rotary_size is 5; it must be even and at most model.head_size, 8"),
    ({"layer_windows": ()}, r"model.layer_windows is \(\); it must hold a window a layer"),
    ({"rope_scaling": {"name": "ntk", "factor": 2.0}}, "model.rope_scaling.name is 'ntk'; it must be"),
    ({"remat": "some"}, "model.remat is 'some'; it must be one of none, full, attention, dots"),
  ],
)
def test_impossible_dimensions_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    worlds.llama(**changes)
