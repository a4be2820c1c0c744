"""The decoder, in Flax Linen: token ids of packed rows in, hidden states out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpojax.kernels import few_tokens
from dpojax.kernels.attention import KEPT, Keys, TokenIds, cached_attention
from dpojax.kernels.backends import attend
from dpojax.kernels.cut_head import CutHead
from dpojax.kernels.head import Head
from dpojax.kernels.precision import wide_of
from dpojax.models import rotary, sharding
from dpojax.models.config import ModelConfig

SEEN = "seen"
"""The collection in which layers leave keys and values [R, L, M, H], for those who ask."""

ADAPTER = "adapter"
"""The collection in which projections look for low-rank changes of theirs, see `models.lora`."""

TURNED = "turned"
"""The collection in which projections look for their kernels as [outputs, inputs], see `turned`."""


class Outputs(NamedTuple):
  """What an `apply(params, rows)` returns to the objectives.

  `hidden` [R, L, D]; `head`, the output embedding [V, D], or a `Head` where logits have a bias or a
  soft cap, or a `CutHead` inside a mesh; `reward_head` [D], or None.
  """

  hidden: jax.Array
  head: jax.Array | Head | CutHead
  reward_head: jax.Array | None = None


class CachePart(NamedTuple):
  """Keys and values of some tokens: of each layer (k, v), see `attention.Keys`, and `ids` [R, T].

  Comparison 0 marks an empty slot, which no query of comparison 1 sees.
  """

  layers: Sequence[tuple[jax.Array, jax.Array]]
  ids: TokenIds


class Cache(NamedTuple):
  """What `R` rows that are decoded look back at.

  Attributes:
    seen: parts that are only read; one of `R / n` rows is shared by n consecutive rows each.
    written: the part that tokens are written into.
    next: scalar, the first slot of it to write, the same in every row.
  """

  seen: Sequence[CachePart]
  written: CachePart
  next: jax.Array


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config, size = self.config, x.shape[-1:]
    offset = config.norm == "rms_offset"
    scale = self.param("scale", nn.initializers.zeros if offset else nn.initializers.ones, size)
    x = x.astype(wide_of(x.dtype))
    if config.norm == "layer":
      x = x - jnp.mean(x, axis=-1, keepdims=True)
    # As einsum, whose gradient sums products six times as fast as XLA's CPU backend otherwise does.
    x = jnp.einsum("...d,...->...d", x, jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + config.norm_eps))
    scale = scale.astype(x.dtype)
    x = jnp.einsum("...d,d->...d", x, 1.0 + scale if offset else scale)
    if config.norm == "layer":
      bias = self.param("bias", nn.initializers.zeros, size)
      x = x + jnp.broadcast_to(bias, x.shape)
    return x.astype(config.dtype)


class Linear(nn.Module):
  """y = x kernel + bias over the last `len(inputs)` axes of x, in the compute dtype.

  With a low-rank change `a` [*inputs, rank], `b` [rank, *outputs] in `ADAPTER`, + (x a) b.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  bias: bool
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
    leading = x.shape[: x.ndim - len(self.inputs)]
    # As a product of two matrices: XLA's CPU backend multiplies those two to three times as fast as
    # it does the gradients of products with more axes.
    x = x.reshape(-1, fan_in)
    if self.has_variable(TURNED, "kernel"):  # in place of the param, which need not be there
      y = few_tokens.product(x, self.get_variable(TURNED, "kernel"))
    else:
      end = f"{self.name}/kernel"
      kernel = self.param(
        "kernel",
        nn.initializers.normal(self.scale * fan_in**-0.5),
        sharding.held_in_layer(end, self.inputs + self.outputs),
      )
      y = sharding.product(x, kernel, end, len(self.inputs))
    if self.has_variable(ADAPTER, "a"):
      a, b = (self.get_variable(ADAPTER, name).astype(x.dtype) for name in "ab")
      y = y + (x @ a.reshape(fan_in, -1)) @ b.reshape(-1, fan_out)
    y = y.reshape(*leading, *self.outputs)
    if self.bias:
      bias = self.param("bias", nn.initializers.zeros, self.outputs)
      y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return y


# flax's gelu is the tanh form unless told otherwise, which is what GPT-2 and Gemma were trained with.
ACTIVATIONS = {
  "swiglu": nn.silu,
  "geglu": nn.gelu,
  "gelu": nn.gelu,
  "geglu_exact": partial(nn.gelu, approximate=False),
  "gelu_exact": partial(nn.gelu, approximate=False),
}


_keeps_attention = jax.checkpoint_policies.save_only_these_names(KEPT)

REMAT_POLICIES = {
  "full": None,
  "attention": _keeps_attention,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _keeps_attention
  ),
}
"""What is kept of a block for its backward pass, by `ModelConfig.remat`."""


class Block(nn.Module):
  """Attention and MLP, each behind a norm and added to the residual stream.

  `window` is the layer's, see `ModelConfig.layer_windows`.
  """

  config: ModelConfig
  window: int

  @nn.compact
  def __call__(self, x, ids: TokenIds, rotary_tables: dict[int, rotary.RotaryTable], cache):
    config = self.config
    y = Norm(config, name="attention_norm")(x)
    attended, cache = self._attention(y, ids, rotary_tables, cache)
    if config.post_norms:
      attended = Norm(config, name="attention_post_norm")(attended)
    # GPT-J and GPT-NeoX add attention and MLP to the same stream; GPT-J feeds both from one norm ('shared').
    if config.residual == "sequential":
      x = x + attended
    if config.residual != "shared":
      y = Norm(config, name="mlp_norm")(x)
    y = self._mlp(y)
    if config.post_norms:
      y = Norm(config, name="mlp_post_norm")(y)
    return x + y if config.residual == "sequential" else x + (attended + y), cache

  def _attention(self, y, ids, rotary_tables, cache):
    config = self.config
    width, heads = (config.width,), (config.heads, config.head_size)
    key_heads = (config.kv_heads, config.head_size)
    bias = config.biases in ("qkv", "attention", "all")
    q = Linear(width, heads, bias, name="query")(y)
    k = Linear(width, key_heads, bias, name="key")(y)
    v = Linear(width, key_heads, bias, name="value")(y)
    # Before the rotation, as Qwen 3 and Gemma 3 do: a norm over the head would not commute with it.
    if config.query_key_norms:
      q, k = Norm(config, name="query_norm")(q), Norm(config, name="key_norm")(k)
    if config.positions != "learned":
      turn = partial(
        rotary.rotate, table=rotary_tables[self.window], interleaved=config.positions == "interleaved"
      )
      q, k = turn(q), turn(k)
    form = dict(scale=config.attention_scale, window=self.window, soft_cap=config.attention_soft_cap)
    if cache is not None:
      seen, written, start = cache
      write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, jnp.moveaxis(new, 1, 2).astype(old.dtype), start, axis=2
      )
      written = written._replace(k=write(written.k, k), v=write(written.v, v))
      cache = (written.k, written.v)
      y = cached_attention(q, ids, (*seen, written), **form)
    else:
      # Left for whoever asks: a sampler's prompt pass takes them, in a train step XLA drops them.
      self.sow(SEEN, "keys_and_values", (k, v), init_fn=lambda: None, reduce_fn=lambda _, new: new)
      y = attend(q, k, v, ids, asked=config.attention, **form)
    out = Linear(
      heads, width, config.biases in ("attention", "all"), self._residual_scale(), name="attention_out"
    )
    return out(y), cache

  def _mlp(self, y):
    config = self.config
    width, hidden, bias = (config.width,), (config.mlp_width,), config.biases in ("mlp", "all")
    activation = ACTIVATIONS[config.mlp]
    if config.mlp in ("gelu", "gelu_exact"):
      y = activation(Linear(width, hidden, bias, name="up")(y))
    else:
      y = activation(Linear(width, hidden, bias, name="gate")(y)) * Linear(width, hidden, bias, name="up")(y)
    return Linear(hidden, width, bias, self._residual_scale(), name="down")(y)

  def _residual_scale(self):
    # Every layer adds twice to the stream, whose variance should not grow with them (Radford et al. 2019,
    # Sec. 2.3).
    return (2 * self.config.layers) ** -0.5


def rotary_tables_of(config: ModelConfig, positions: jax.Array) -> dict[int, rotary.RotaryTable]:
  """Returns the rotary_tables of tokens in layers of each window; none where positions are learned."""
  if config.positions == "learned":
    return {}
  size, rotary_tables = config.rotary_size or config.head_size, {}
  # A table a window and not a layer: Gemma 3's layers with a window turn by a base of their own.
  for window in dict.fromkeys(config.layer_windows):
    theta, scaling = config.rope_theta, config.rope_scaling
    if window and config.local_rope_theta:
      theta, scaling = config.local_rope_theta, None
    rotary_tables[window] = rotary.rotary_table(
      positions,
      rotary.frequencies(size, theta, scaling),
      magnitude=1.0 if scaling is None else scaling.magnitude,
    )
  return rotary_tables


class Period(nn.Module):
  """One block a window of the layer pattern, `block_0`, ..."""

  config: ModelConfig
  block: type[nn.Module]

  @nn.compact
  def __call__(self, x, ids, rotary_tables, cache):
    for i, window in enumerate(self.config.layer_windows):
      x, _ = self.block(self.config, window, name=f"block_{i}")(x, ids, rotary_tables, cache)
    return x, None


class Embed(nn.Module):
  """A table of vectors, looked up by id, in the compute dtype."""

  config: ModelConfig
  size: int

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    end, shape = f"{self.name}/embedding", (self.size, self.config.width)
    table = self.param("embedding", nn.initializers.normal(0.02), sharding.held(end, shape))
    return sharding.embedded(table, ids, end, self.config.dtype)


def embedded(
  config: ModelConfig,
  table_of: Callable[[str, int], Callable[[jax.Array], jax.Array]],
  tokens: jax.Array,
  positions: jax.Array,
) -> jax.Array:
  """Returns what the first layer reads, [R, L, D].

  Args:
    config: the model's.
    table_of: gives the look-up in the table of a name and a size.
    tokens, positions: [R, L] int32.
  """
  x = table_of("embed", config.vocab_size)(tokens)
  if config.embedding_scale != 1.0:
    # Rounded to the compute dtype first, as Gemma was trained: in bfloat16 the root of 3072 is 55.5.
    x = x * jnp.asarray(config.embedding_scale, x.dtype)
  if config.positions == "learned":
    x = x + table_of("positions", config.max_positions)(positions)
  return x


class Transformer(nn.Module):
  """A decoder-only Transformer over packed rows.

  Params are a plain dict: `embed`, `positions` (learned ones), `layers` (the scanned ones, stacked
  along axis 0; with a pattern of windows `layers/block_0`, ...), `layer_0`, ... (those that are not
  scanned), `final_norm`, `head` (untied ones), `head_bias`, `reward_head`.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens, positions, comparison, branch, cache: Cache | None = None):
    """Returns hidden states [R, L, D]; with a cache, the hidden states and the cache after them.

    Args:
      tokens, positions, comparison, branch: [R, L] int32, see `data.packing.Rows`.
      cache: keys and values to attend to besides these tokens, which are written into it. Layers
        that are scanned take none: see `unrolled`.
    """
    config = self.config
    ids = TokenIds(positions, comparison, branch)
    x = embedded(config, lambda name, size: Embed(config, size, name=name), tokens, positions)
    # Declared here and applied elsewhere: logits of all tokens are never made, see `dpojax.log_probs`.
    if not config.tie_embeddings:
      self.param(
        "head", nn.initializers.normal(0.02), sharding.held("head", (config.vocab_size, config.width))
      )
    if config.head_bias:
      self.param("head_bias", nn.initializers.zeros, (config.vocab_size,))
    if config.reward_head:
      self.param("reward_head", nn.initializers.zeros, (config.width,))

    layer_caches = [None] * config.layers
    if cache is not None:
      write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.next, axis=1)
      written_ids = jax.tree.map(write, cache.written.ids, ids)
      layer_caches = [
        (
          [Keys(*part.layers[i], part.ids) for part in cache.seen],
          Keys(*cache.written.layers[i], written_ids),
          cache.next,
        )
        for i in range(config.layers)
      ]
    x, written = self._layers(x, ids, layer_caches)
    x = Norm(config, name="final_norm")(x)
    if cache is None:
      return x
    return x, Cache(cache.seen, CachePart(written, written_ids), cache.next + tokens.shape[1])

  def _layers(self, x, ids, caches):
    """The blocks: first the scanned ones, then the others. Returns the caches of the latter too."""
    config = self.config
    windows, scanned = config.layer_windows, config.scanned_layers
    period, rotary_tables = len(windows), rotary_tables_of(config, ids.position)

    def rematerialised(prevent_cse):
      block, policy = Block, REMAT_POLICIES.get(config.remat)
      # Without rematerialisation too a gathered weight is let go of and gathered again in the backward pass:
      # to keep those of all layers would be to hold the model whole.
      if sharding.gathers():
        whole = partial(sharding.whole, dtype=config.dtype)
        block = nn.map_variables(Block, ["params", ADAPTER], trans_in_fn=whole)
        if config.remat == "none":
          policy = sharding.keep_but_gathered
      elif config.remat == "none":
        return block
      return nn.remat(block, prevent_cse=prevent_cse, policy=policy)

    written = []
    if scanned:
      block = rematerialised(prevent_cse=False)
      scan = partial(
        nn.scan,
        variable_axes={"params": 0, SEEN: 0, ADAPTER: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * 3,
        length=scanned // period,
      )
      if period == 1:
        x, _ = scan(block)(config, windows[0], name="layers")(x, ids, rotary_tables, None)
      else:
        x, _ = scan(Period)(config, block, name="layers")(x, ids, rotary_tables, None)
    # Under scan XLA cannot merge the recomputation with the first pass anyway; outside it has to be kept from
    # it.
    block = rematerialised(prevent_cse=True)
    once = block is Block and not self.is_initializing()
    for i in range(scanned, config.layers):
      name, window = f"layer_{i}", windows[i % period]
      if once:
        variables = {
          kind: self.variables[kind][name] for kind in self.variables if name in self.variables[kind]
        }
        x, cache, seen = apply_block(
          config, window, self.is_mutable_collection(SEEN), variables, x, ids, rotary_tables, caches[i]
        )
        for kind, found in seen.items():
          self.put_variable(kind, name, found)
      else:
        x, cache = block(config, window, name=name)(x, ids, rotary_tables, caches[i])
      written.append(cache)
    return x, written


@partial(jax.jit, static_argnums=(0, 1, 2))
def apply_block(config: ModelConfig, window: int, with_seen: bool, variables, x, ids, rotary_tables, cache):
  """A block as a function of its variables: of layers that are alike Python goes through one only."""
  (x, cache), seen = Block(config, window, parent=None).apply(
    variables, x, ids, rotary_tables, cache, mutable=[SEEN] if with_seen else []
  )
  return x, cache, seen


def init_params(config: ModelConfig, key: jax.Array) -> dict:
  """Returns freshly drawn float32 params of the config, a plain nested dict."""
  # Under jit XLA drops the forward pass that init makes: only the draws are left.
  token = jnp.zeros((1, 1), jnp.int32)
  return jax.jit(Transformer(config).init)(key, token, token, token, token)["params"]


def unrolled(config: ModelConfig, tree: dict) -> tuple[ModelConfig, dict]:
  """Returns the same model without a scan over its layers, the form that decodes.

  A step of decoding is so short that to cut a layer out of the stack costs as much as to use it.

  Args:
    config: the model's.
    tree: its params; NumPy arrays are cut into views.
  """
  period = len(config.layer_windows)
  layers = {}
  for i in range(config.scanned_layers):
    stacked = tree["layers"] if period == 1 else tree["layers"][f"block_{i % period}"]
    layers[f"layer_{i}"] = jax.tree.map(lambda x: x[i // period], stacked)
  rest = {name: part for name, part in tree.items() if name != "layers"}
  return dataclasses.replace(config, scan_layers=False, remat="none"), rest | layers


def turned(config: ModelConfig, tree: dict) -> dict:
  """Returns `TURNED`: the kernels of layers by themselves as [outputs, inputs], for steps of few tokens.

  Args:
    config: the model's, `unrolled`.
    tree: its params.
  """
  layers = (f"layer_{i}" for i in range(config.layers))
  return {name: turned_layer(tree[name]) for name in layers}


def turned_layer(modules: dict) -> dict:
  """Returns `TURNED` of one layer, of whose params."""
  return {
    name: {"kernel": _turned(modules[name]["kernel"], 2 if name == "attention_out" else 1)}
    for name in modules
    if "kernel" in modules[name]
  }


def _turned(kernel: jax.Array, inputs: int) -> jax.Array:
  # Turned before it is flattened: the other way round XLA copies it twice.
  fan_in = math.prod(kernel.shape[:inputs])
  return jnp.moveaxis(kernel, range(inputs), range(-inputs, 0)).reshape(-1, fan_in)


def laid_out(config: ModelConfig, tree: dict, scan_layers: bool) -> dict:
  """Returns params, NumPy arrays, with their layers stacked for a scan or each by itself."""
  one_by_one = unrolled(config, tree)[1]
  period = len(config.layer_windows)
  scanned = dataclasses.replace(config, scan_layers=scan_layers).scanned_layers
  if not scanned:
    return one_by_one
  stack = lambda first: jax.tree.map(
    lambda *x: np.stack(x), *(one_by_one[f"layer_{i}"] for i in range(first, scanned, period))
  )
  layers = stack(0) if period == 1 else {f"block_{i}": stack(i) for i in range(period)}
  there = {f"layer_{i}" for i in range(scanned)}
  return {name: part for name, part in one_by_one.items() if name not in there} | {"layers": layers}


def read_prompts(
  config: ModelConfig, params: dict, prompts: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, CachePart]:
  """Returns the last hidden state of each prompt, [B, D], and the keys and values of prompts.

  Args:
    config: the model's.
    params: its params.
    prompts: [B, W] int32 ids, padded on the right.
    lengths: [B] int32 tokens of each prompt, at least 1.
  """
  ids = ids_of_prompts(prompts, lengths)
  hidden, variables = Transformer(config).apply({"params": params}, prompts, *ids, mutable=[SEEN])
  _, seen = unrolled(config, variables[SEEN])
  seen = [seen[f"layer_{i}"]["keys_and_values"] for i in range(config.layers)]
  # Only the last token's logits are wanted: of all others no head is ever applied.
  return last_of_prompts(hidden, lengths), CachePart(by_key_heads(seen), ids)


def ids_of_prompts(prompts: jax.Array, lengths: jax.Array) -> TokenIds:
  """Returns the ids [B, W] of tokens of prompts that are padded on the right to W."""
  positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
  # As comparison 1 and padding 0: the rule of packed rows masks the prompt's padding.
  there = (positions < lengths[:, None]).astype(jnp.int32)
  return TokenIds(positions, there, jnp.zeros_like(there))


def last_of_prompts(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
  """Returns what hidden states [B, W, D] are at the last token of each prompt, [B, D]."""
  return jax.vmap(lambda row, length: row[length - 1])(hidden, lengths)


def by_key_heads(sown: Any) -> Any:
  """Returns keys and values as caches have them, [R, M, T, H], of those that layers leave, [R, T, M, H]."""
  return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), sown)


def make_cache(config: ModelConfig, seen: Sequence[CachePart], *, rows: int, room: int) -> Cache:
  """Returns a cache with room for that many tokens behind what was seen.

  Parts that have all rows are put in front of the room, in one array: then a step makes one product
  with all of them.
  """
  dtype = seen[0].layers[0][0].dtype
  shared = [part for part in seen if part.ids.position.shape[0] != rows]
  whole = [part for part in seen if part.ids.position.shape[0] == rows]
  start = sum(part.ids.position.shape[1] for part in whole)
  empty = jax.ShapeDtypeStruct((rows, config.kv_heads, room, config.head_size), dtype)
  layers = [_with_room(2, (empty, empty), [part.layers[i] for part in whole]) for i in range(config.layers)]
  no_ids = jax.ShapeDtypeStruct((rows, room), jnp.int32)
  # Comparison 0 marks slots that are not written yet: no query sees them, so no length is needed.
  ids = _with_room(1, TokenIds(no_ids, no_ids, no_ids), [part.ids for part in whole])
  return Cache(shared, CachePart(layers, ids), jnp.asarray(start, jnp.int32))


@partial(jax.jit, static_argnums=(0, 1))
def _with_room(axis: int, room: Any, parts: list) -> Any:
  """Returns trees of arrays, one behind the other along an axis, and zeros of the shapes of `room` behind."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), room)
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=axis), *parts, zeros)


def output_head(params: dict) -> jax.Array:
  """Returns the [V, D] output embedding: the input embedding where the two are tied."""
  return params["head"] if "head" in params else params["embed"]["embedding"]


def make_head(config: ModelConfig, params: dict) -> jax.Array | Head | CutHead:
  """Returns what turns hidden states into logits: the output embedding, a `Head` of it, or a `CutHead`."""
  end = "head" if "head" in params else "embed/embedding"
  bias = params.get("head_bias") if config.head_bias else None
  return sharding.head_of(end, output_head(params), bias, config.logit_soft_cap or None)


def make_apply(config: ModelConfig):
  """Returns `apply(params, rows) -> Outputs`, the form every objective takes a model in.

  Other collections than params are its keywords.
  """
  model = Transformer(config)

  def apply(params, rows, **collections) -> Outputs:
    hidden = model.apply(
      {"params": params} | collections, rows.tokens, rows.positions, rows.comparison, rows.branch
    )
    return Outputs(hidden, make_head(config, params), params.get("reward_head"))

  return apply
