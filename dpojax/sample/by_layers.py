"""Decoding by programs of one layer each, which the host calls one after another.

A program of all layers takes XLA the longer the more there are, though they are alike: of SmolLM2-135M 6 s,
before three short answers that take 2. Of one layer it takes a thirtieth of that, and so does what XLA's
library of products sets up in a program's first run. A call takes some 0.15 ms: little where a step reads the
14 MB of that model's layer, too much for small layers, of which a program of all is compiled soon, and on an
accelerator, which would wait for its host.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.kernels import few_tokens
from dpojax.kernels.attention import Keys, TokenIds
from dpojax.kernels.cut_head import logits_of_few
from dpojax.kernels.platform import platform
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.sample import sampler

_BYTES = 8 * 2**20
"""Of a layer's weights: a CPU reads as many in a millisecond, the time of seven calls."""


def applies(config: ModelConfig, params: Any, devices: int) -> bool:
  """Whether a model is decoded so: with these params on so many devices."""
  if platform() != "cpu" or devices > 1 or config.scanned_layers:
    return False
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["layer_0"])) >= _BYTES


def make_sampler(
  config: ModelConfig,
  *,
  max_new_tokens: int,
  num_samples: int = 1,
  stop_id: int | Sequence[int] | None = None,
) -> Callable[..., sampler.Samples]:
  """Returns `sampler.make_sampler`'s function, but one that is not to be jitted.

  Args:
    config: the model's, without a scan over its layers.
    max_new_tokens, num_samples, stop_id: see there.
  """
  stops = sampler.stops_of(stop_id)
  windows = [config.layer_windows[i % len(config.layer_windows)] for i in range(config.layers)]

  def read(around, layers, prompts, lengths) -> tuple[jax.Array, transformer.CachePart]:
    x, ids, tables = _before_prompts(config, around, prompts, lengths)
    seen = []
    for window, layer in zip(windows, layers):
      x, keys_and_values = _through(config, window, layer, x, ids, tables)
      seen.append(keys_and_values)
    return x, transformer.CachePart(seen, ids)

  def sample(params, prompts, lengths, key, temperature=1.0, top_p=1.0, top_k=0) -> sampler.Samples:
    width, rows = prompts.shape[1], len(prompts) * num_samples
    sampler.check_lengths(config, width, max_new_tokens)
    layers = [{"params": params[f"layer_{i}"]} for i in range(config.layers)]
    around = {name: part for name, part in params.items() if not name.startswith("layer_")}

    x, part = read(around, layers, prompts, lengths)
    parts = [part]
    x, starts, drawn = _after_prompts(num_samples, max_new_tokens, x, lengths)
    knobs = _asked_for(config, temperature, top_p, top_k)
    uniform = np.zeros((max_new_tokens, rows), np.float32)  # the likeliest token asks for none
    if "temperature" in knobs:
      uniform = _uniform(len(prompts), num_samples, max_new_tokens, key)

    around, layers = (sampler.in_compute_dtype(config, part) for part in (around, layers))
    if few_tokens.are_worth_turning([around, layers], rows, max_new_tokens):
      layers = [_turned(layer["params"]) for layer in layers]

    for start, end in sampler.stages(width, max_new_tokens):
      cache = transformer.make_cache(config, parts, rows=rows, room=end - start)
      if x.committed:  # zeros that lie on no device in particular would compile a first step of their own
        cache = jax.device_put(cache, x.sharding)
      shared = [[Keys(*part.layers[i], part.ids) for part in cache.seen] for i in range(config.layers)]
      written, written_ids = list(cache.written.layers), cache.written.ids
      before = written_ids.position.shape[1] - end  # of the cache's slots, those of prompts
      for _ in range(start, end):
        x, ids, tables, drawn, left = _next(config, around, x, starts, uniform, drawn, stops, knobs)
        if not left:  # a compiled loop would take the last token through all layers before it ends
          return _samples(drawn, num_samples)
        written_ids, slot = _noted(written_ids, ids, drawn.step, np.int32(before))
        for i, (window, layer) in enumerate(zip(windows, layers)):
          x, written[i] = _extended(
            config, window, layer, x, ids, tables, shared[i], written_ids, slot, written[i]
          )
      parts = [*cache.seen, transformer.CachePart(written, written_ids)]
    return _samples(drawn, num_samples)

  return sample


def _asked_for(config: ModelConfig, temperature: Any, top_p: Any, top_k: Any) -> dict[str, float]:
  """Returns those knobs of a draw that are on: of the others, known here, nothing need be compiled."""
  on = {}
  if temperature > 0:
    on["temperature"] = float(temperature)
    if top_p < 1:
      on["top_p"] = float(top_p)
    if 0 < top_k < config.vocab_size:
      on["top_k"] = int(top_k)
  return on


@partial(jax.jit, static_argnums=0)
def _before_prompts(config, around, prompts, lengths):
  """Returns what the first layer reads of prompts, their ids, and rotary tables."""
  ids = transformer.ids_of_prompts(prompts, lengths)
  return _embedded(config, around, prompts, ids)


def _embedded(config: ModelConfig, around: Any, tokens: jax.Array, ids: TokenIds):
  table_of = lambda name, size: partial(
    transformer.Embed(config, size, name=name).apply, {"params": around[name]}
  )
  x = transformer.embedded(config, table_of, tokens, ids.position)
  return x, ids, transformer.rotary_tables_of(config, ids.position)


@partial(jax.jit, static_argnums=(0, 1))
def _through(config, window, layer, x, ids, tables):
  """Returns what a layer makes of prompts, and its keys and values."""
  x, _, sown = transformer.apply_block(config, window, True, layer, x, ids, tables, None)
  return x, transformer.by_key_heads(sown[transformer.SEEN]["keys_and_values"])


@partial(jax.jit, static_argnums=(0, 1))
def _after_prompts(num_samples, max_new_tokens, x, lengths):
  """Returns the last states of prompts, [R, 1, D], their lengths, [R], and nothing drawn."""
  repeat = lambda x: jnp.repeat(x, num_samples, axis=0)
  drawn = sampler.nothing_drawn(len(lengths) * num_samples, max_new_tokens)
  return repeat(transformer.last_of_prompts(x, lengths))[:, None], repeat(lengths), drawn


@partial(jax.jit, static_argnums=(0, 1, 2))
def _uniform(batch, num_samples, max_new_tokens, key):
  return sampler.uniform_of_samples(key, batch, num_samples, max_new_tokens)


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _next(config, around, x, starts, uniform, drawn, stops, knobs):
  """Draws a token of each sample from what the last layer left; returns what the first one reads of it.

  Also what has been drawn with it, and whether there is a token to come.
  """
  hidden = transformer.Norm(config).apply({"params": around["final_norm"]}, x)[:, 0]
  position = (starts + drawn.step)[:, None]
  logits = logits_of_few(hidden, transformer.make_head(config, around))
  token, drawn = drawn.extended(
    logits, uniform, stops, knobs.get("temperature", 0.0), knobs.get("top_p", 1.0), knobs.get("top_k", 0)
  )
  one = jnp.ones_like(position)
  left = (drawn.step < drawn.tokens.shape[1]) & ~jnp.all(drawn.done)
  return *_embedded(config, around, token[:, None], TokenIds(position, one, 0 * one)), drawn, left


@partial(jax.jit, donate_argnums=0)
def _noted(written_ids, ids, step, before):
  """Returns the ids of a cache with those of one token more a sample, and the slot of these."""
  slot = before + step - 1
  write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)
  return jax.tree.map(write, written_ids, ids), slot


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=9)
def _extended(config, window, layer, x, ids, tables, shared, written_ids, slot, written):
  """Returns what a layer makes of one token a sample, and its keys and values with those of it."""
  cache = (shared, Keys(*written, written_ids), slot)
  x, written, _ = transformer.apply_block(config, window, False, layer, x, ids, tables, cache)
  return x, written


_samples = jax.jit(sampler.Drawn.samples, static_argnums=1)


@jax.jit
def _turned(params):
  """Returns the variables of a layer with kernels turned and in no other form: calls take few arrays."""
  rest = {name: {key: x for key, x in part.items() if key != "kernel"} for name, part in params.items()}
  return {"params": rest, transformer.TURNED: transformer.turned_layer(params)}
