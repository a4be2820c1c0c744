"""The decoder, in Flax Linen: token ids of packed rows in, hidden states out."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpojax.models.attention import TokenIds, attention
from dpojax.models.config import ModelConfig


class Outputs(NamedTuple):
  """What an `apply(params, rows)` returns to the objectives.

  `hidden` [R, L, D]; `head` [V, D], the output embedding; `reward_head` [D], or None.
  """

  hidden: jax.Array
  head: jax.Array
  reward_head: jax.Array | None = None


class Cache(NamedTuple):
  """Keys and values of tokens already seen, for decoding.

  `keys`, `values`: [layers, R, T, M, H]. `ids`: [R, T]; comparison 0 marks an empty slot, which no
  query of comparison 1 sees. `next`: scalar, the first slot to write, the same in every row.
  """

  keys: jax.Array
  values: jax.Array
  ids: TokenIds
  next: jax.Array


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    scale = self.param("scale", nn.initializers.ones, (config.width,))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if config.norm == "layer":
      x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.norm_eps)
    x = jnp.einsum("...d,d->...d", x, scale)
    if config.norm == "layer":
      bias = self.param("bias", nn.initializers.zeros, (config.width,))
      x = x + jnp.broadcast_to(bias, x.shape)
    return x.astype(config.dtype)


class Linear(nn.Module):
  """y = x kernel + bias over the last `len(inputs)` axes of x, in the compute dtype."""

  config: ModelConfig
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in = 1
    for size in self.inputs:
      fan_in *= size
    kernel = self.param(
        "kernel", nn.initializers.normal(self.scale * fan_in**-0.5), self.inputs + self.outputs)
    axes = tuple(range(x.ndim - len(self.inputs), x.ndim))
    y = jax.lax.dot_general(
        x, kernel.astype(x.dtype), ((axes, tuple(range(len(self.inputs)))), ((), ())))
    if self.config.biases:
      bias = self.param("bias", nn.initializers.zeros, self.outputs)
      y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return y


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotary embedding (Su et al. 2021) of [R, L, N, H] at positions [R, L], in two halves."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.einsum("rl,h->rlh", positions.astype(jnp.float32), frequencies)[:, :, None]
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  first, second = x[..., :half], x[..., half:]
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
  """Attention and MLP, each behind a norm and added to the residual stream."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, ids: TokenIds, key_ids: TokenIds, cache):
    config = self.config
    width, heads = (config.width,), (config.heads, config.head_size)
    key_heads = (config.kv_heads, config.head_size)
    residual_scale = (2 * config.layers) ** -0.5

    y = Norm(config, name="attention_norm")(x)
    q = Linear(config, width, heads, name="query")(y)
    k = Linear(config, width, key_heads, name="key")(y)
    v = Linear(config, width, key_heads, name="value")(y)
    if config.positions == "rotary":
      q = rotate(q, ids.position, config.rope_theta)
      k = rotate(k, ids.position, config.rope_theta)
    if cache is not None:
      keys, values, start = cache
      k = jax.lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), start, axis=1)
      v = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), start, axis=1)
      cache = (k, v)
    y = attention(q, k, v, ids, key_ids)
    x = x + Linear(config, heads, width, residual_scale, name="attention_out")(y)

    y = Norm(config, name="mlp_norm")(x)
    hidden = (config.mlp_width,)
    if config.mlp == "swiglu":
      y = nn.silu(Linear(config, width, hidden, name="gate")(y)) * Linear(
          config, width, hidden, name="up")(y)
    else:
      y = nn.gelu(Linear(config, width, hidden, name="up")(y), approximate=True)
    x = x + Linear(config, hidden, width, residual_scale, name="down")(y)
    return x, cache


class Embed(nn.Module):
  """A table of vectors, looked up by id, in the compute dtype."""

  config: ModelConfig
  size: int

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    table = self.param(
        "embedding", nn.initializers.normal(0.02), (self.size, self.config.width))
    return jnp.asarray(table)[ids].astype(self.config.dtype)


class Transformer(nn.Module):
  """A decoder-only Transformer over packed rows.

  Params are a plain dict: `embed`, `positions` (learned ones), `layers` (stacked along axis 0 when
  scanned, else `layer_0`, ...), `final_norm`, `head` (untied ones), `reward_head`.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens, positions, comparison, branch, cache: Cache | None = None):
    """Returns hidden states [R, L, D]; with a cache, the hidden states and the cache after them.

    Args:
      tokens, positions, comparison, branch: [R, L] int32, see `data.packing.Rows`.
      cache: keys and values to attend to besides these tokens, which are written into it.
    """
    config = self.config
    ids = TokenIds(positions, comparison, branch)
    x = Embed(config, config.vocab_size, name="embed")(tokens)
    if config.positions == "learned":
      x = x + Embed(config, config.max_positions, name="positions")(positions)
    if not config.tie_embeddings:
      self.param("head", nn.initializers.normal(0.02), (config.vocab_size, config.width))
    if config.reward_head:
      self.param("reward_head", nn.initializers.zeros, (config.width,))

    key_ids, layer_caches = ids, None
    if cache is not None:
      write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.next, axis=1)
      key_ids = jax.tree.map(write, cache.ids, ids)
      starts = jnp.broadcast_to(cache.next, (config.layers,))
      layer_caches = (cache.keys, cache.values, starts)

    block = Block
    if config.remat != "none":
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      block = nn.remat(
          Block, prevent_cse=not config.scan_layers,
          policy=policy if config.remat == "dots" else None)
    if config.scan_layers:
      stack = nn.scan(
          block, variable_axes={"params": 0}, split_rngs={"params": True},
          in_axes=(nn.broadcast, nn.broadcast, 0), out_axes=0, length=config.layers)
      x, layer_caches = stack(config, name="layers")(x, ids, key_ids, layer_caches)
    else:
      written = []
      for layer in range(config.layers):
        layer_cache = jax.tree.map(lambda a: a[layer], layer_caches)
        x, layer_cache = block(config, name=f"layer_{layer}")(x, ids, key_ids, layer_cache)
        written.append(layer_cache)
      if cache is not None:
        layer_caches = jax.tree.map(lambda *layers: jnp.stack(layers), *written)
    x = Norm(config, name="final_norm")(x)
    if cache is None:
      return x
    return x, Cache(*layer_caches, key_ids, cache.next + tokens.shape[1])


def init_params(config: ModelConfig, key: jax.Array) -> dict:
  """Returns freshly drawn float32 params of the config, a plain nested dict."""
  token = jnp.zeros((1, 1), jnp.int32)
  return jax.jit(Transformer(config).init)(key, token, token, token, token)["params"]


def init_cache(config: ModelConfig, rows: int, length: int) -> Cache:
  """Returns an empty cache for `rows` sequences of at most `length` tokens."""
  shape = (config.layers, rows, length, config.kv_heads, config.head_size)
  empty = jnp.zeros((rows, length), jnp.int32)
  return Cache(
      jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype),
      TokenIds(empty, empty, empty), jnp.zeros((), jnp.int32))


def output_head(params: dict) -> jax.Array:
  """Returns the [V, D] output embedding: the input embedding where the two are tied."""
  return params["head"] if "head" in params else params["embed"]["embedding"]


def make_apply(config: ModelConfig):
  """Returns `apply(params, rows) -> Outputs`, the form every objective takes a model in."""
  model = Transformer(config)

  def apply(params, rows) -> Outputs:
    hidden = model.apply(
        {"params": params}, rows.tokens, rows.positions, rows.comparison, rows.branch)
    return Outputs(hidden, output_head(params), params.get("reward_head"))

  return apply
