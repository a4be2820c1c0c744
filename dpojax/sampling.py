"""Sampling with a KV cache and static shapes.

A prompt is read once, whatever the number of samples drawn from it. Prompts are padded on the
right; positions are those of each sequence, so no padding ever stands before a token.
"""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.log_probs import logits_of
from dpojax.models import transformer
from dpojax.models.config import ModelConfig


class Samples(NamedTuple):
  """Samples of each prompt.

  Attributes:
    tokens: [B, K, T] int32 ids; the stop id ends a sample and is part of it, 0 follows.
    lengths: [B, K] int32 tokens of each sample.
    log_probs: [B, K] float32 summed log-prob of the sample under the model, at temperature 1.
  """

  tokens: jax.Array
  lengths: jax.Array
  log_probs: jax.Array


def make_sampler(
    config: ModelConfig, *, max_new_tokens: int, num_samples: int = 1, stop_id: int | None = None
) -> Callable[..., Samples]:
  """Returns `sample(params, prompts, lengths, key, temperature) -> Samples`, to be jitted.

  Args of the sampler:
    params: the model's.
    prompts: [B, T] int32 ids, padded on the right.
    lengths: [B] int32 tokens of each prompt, at least 1.
    key: a `jax.random.key`.
    temperature: logits are divided by it before the draw; 0 takes the likeliest token.
  """
  model = transformer.Transformer(config)

  def sample(params: Any, prompts: jax.Array, lengths: jax.Array, key: jax.Array,
             temperature: float | jax.Array = 1.0) -> Samples:
    batch, width = prompts.shape
    if config.longest is not None and width + max_new_tokens > config.longest:
      raise ValueError(
          f"prompts of up to {width} tokens and {max_new_tokens} new ones are longer than the "
          f"{config.longest} positions the model has; lower max_new_tokens or cut the prompts")
    head = transformer.make_head(config, params)
    cache = transformer.init_cache(config, batch, width + max_new_tokens)
    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    there = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = model.apply(
        {"params": params}, prompts, positions, there, jnp.zeros_like(prompts), cache)
    last = jax.vmap(lambda row, length: row[length - 1])(hidden, lengths)

    # From here on every prompt stands num_samples times, with the keys and values it has.
    rows = batch * num_samples
    repeat = lambda x, axis: jnp.repeat(x, num_samples, axis=axis)
    cache = cache._replace(
        keys=repeat(cache.keys, 1), values=repeat(cache.values, 1),
        ids=jax.tree.map(lambda x: repeat(x, 0), cache.ids))
    starts = repeat(lengths, 0)

    def draw(logits, key):
      scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
      token = jnp.where(
          temperature > 0, jax.random.categorical(key, scaled), jnp.argmax(logits, axis=-1))
      chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
      return token.astype(jnp.int32), chosen

    def unfinished(carry):
      step, _, _, done, *_ = carry
      return (step < max_new_tokens) & ~jnp.all(done)

    def extend(carry):
      step, logits, cache, done, tokens, counts, log_probs = carry
      token, log_prob = draw(logits, jax.random.fold_in(key, step))
      token = jnp.where(done, 0, token)
      tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
      counts += ~done
      log_probs += jnp.where(done, 0.0, log_prob)
      if stop_id is not None:
        done |= token == stop_id
      one = jnp.ones((rows, 1), jnp.int32)
      hidden, cache = model.apply(
          {"params": params}, token[:, None], (starts + step)[:, None], one, 0 * one, cache)
      return step + 1, logits_of(hidden[:, 0], head), cache, done, tokens, counts, log_probs

    carry = (
        0, repeat(logits_of(last, head), 0), cache, jnp.zeros(rows, bool),
        jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.float32))
    *_, tokens, counts, log_probs = jax.lax.while_loop(unfinished, extend, carry)
    return Samples(*(
        x.reshape(batch, num_samples, *x.shape[1:]) for x in (tokens, counts, log_probs)))

  return sample
