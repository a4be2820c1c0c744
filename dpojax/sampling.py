"""Sampling with a KV cache and static shapes.

A prompt is read once, and its keys and values are kept once, whatever the number of samples drawn
from it. Prompts are padded on the right; positions are those of each sequence, so no padding ever
stands before a token. What changes from one draw to the next, temperature, top-k and top-p, is
traced: a sweep over it compiles once.
"""

from typing import Any, Callable, NamedTuple, Sequence

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
    log_probs: [B, K] float32 summed log-prob of the sample under the model, at temperature 1 and
      of all ids, whatever it was drawn with.
  """

  tokens: jax.Array
  lengths: jax.Array
  log_probs: jax.Array


def make_sampler(
    config: ModelConfig, *, max_new_tokens: int, num_samples: int = 1,
    stop_id: int | Sequence[int] | None = None,
) -> Callable[..., Samples]:
  """Returns `sample(params, prompts, lengths, key, temperature, top_p, top_k)`, to be jitted.

  Args:
    config: the model's. Where its layers are scanned, the sampler cuts them apart once a call, a
      copy of their weights; `transformer.unrolled` beforehand saves that.
    max_new_tokens: `T`, tokens a sample has at most.
    num_samples: `K`, samples of each prompt.
    stop_id: the id, or ids, that end a sample.

  Args of the sampler, of which all but the first four may be left out:
    params: the model's, on one device or cut over a mesh.
    prompts: [B, W] int32 ids, padded on the right.
    lengths: [B] int32 tokens of each prompt, at least 1.
    key: a `jax.random.key`, or [B] of them; one of its own gives a prompt the same samples alone and
      in any company.
    temperature: logits are divided by it before the draw; 0 takes the likeliest token.
    top_p: only the likeliest ids are drawn that together have this much of the probability; 1 is
      all of them.
    top_k: only the k likeliest ids are drawn, and top_p is of their probability; 0 is all of them.
      Ids as likely as the last one that is drawn are drawn too.
  """
  stops = jnp.atleast_1d(jnp.asarray(() if stop_id is None else stop_id, jnp.int32))

  def sample(params: Any, prompts: jax.Array, lengths: jax.Array, key: jax.Array,
             temperature: float | jax.Array = 1.0, top_p: float | jax.Array = 1.0,
             top_k: int | jax.Array = 0) -> Samples:
    batch, width = prompts.shape
    if config.longest is not None and width + max_new_tokens > config.longest:
      raise ValueError(
          f"prompts of up to {width} tokens and {max_new_tokens} new ones are longer than the "
          f"{config.longest} positions the model has; lower max_new_tokens or cut the prompts")
    rows = batch * num_samples
    repeat = lambda x: jnp.repeat(x, num_samples, axis=0)
    last, cache = transformer.read_prompts(
        config, params, prompts, lengths, rows=rows, room=max_new_tokens)
    decoder_config, params = transformer.unrolled(config, params)
    decoder = transformer.Transformer(decoder_config)
    head = transformer.make_head(config, params)
    starts, keys = repeat(lengths), _keys_of_samples(key, batch, num_samples)

    def unfinished(carry):
      step, _, _, done, *_ = carry
      return (step < max_new_tokens) & ~jnp.all(done)

    def extend(carry):
      step, logits, cache, done, tokens, counts, log_probs = carry
      keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
      token = draw(logits, keys_now, temperature, top_p, top_k)
      chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
      log_probs += jnp.where(done, 0.0, chosen - jax.nn.logsumexp(logits, axis=-1))
      token = jnp.where(done, 0, token)
      tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
      counts += ~done
      done |= jnp.any(jnp.equal(*jnp.broadcast_arrays(token[:, None], stops[None])), axis=1)
      one = jnp.ones((rows, 1), jnp.int32)
      hidden, cache = decoder.apply(
          {"params": params}, token[:, None], (starts + step)[:, None], one, 0 * one, cache)
      return step + 1, logits_of(hidden[:, 0], head), cache, done, tokens, counts, log_probs

    carry = (
        0, repeat(logits_of(last, head)), cache, jnp.zeros(rows, bool),
        jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.float32))
    *_, tokens, counts, log_probs = jax.lax.while_loop(unfinished, extend, carry)
    return Samples(*(
        x.reshape(batch, num_samples, *x.shape[1:]) for x in (tokens, counts, log_probs)))

  return sample


def draw(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array
) -> jax.Array:
  """Returns one id a row, [R] int32, from logits [R, V] and a key a row; knobs as in the sampler."""
  def random():
    scaled = logits / temperature
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    truncating = (top_p < 1) | ((top_k > 0) & (top_k < logits.shape[-1]))
    weights = jax.lax.cond(truncating, lambda w: likeliest(w, top_p, top_k), lambda w: w, weights)
    return _pick(weights, jax.vmap(jax.random.uniform)(keys))

  return jax.lax.cond(
      jnp.asarray(temperature) > 0, random, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def likeliest(weights: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
  """Returns weights [R, V] in [0, 1] with those that top-k and then top-p leave out set to 0.

  Nothing is sorted: the least weight that stays is found bit by bit, a pass over the ids for each.
  """
  count = jnp.where(top_k > 0, top_k, weights.shape[-1])
  weights = _at_least(weights, _threshold(
      weights, lambda kept: jnp.sum(kept > 0, axis=-1) >= count))
  mass = jnp.where(top_p < 1, top_p, 2.0) * jnp.sum(weights, axis=-1)
  return _at_least(weights, _threshold(weights, lambda kept: jnp.sum(kept, axis=-1) >= mass))


def _threshold(weights: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Returns the largest value [R] such that the weights at least as large are enough, 0 if none is.

  Floats of one sign are ordered as their bits are, so that is a bisection of integers.
  """
  as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    fits = enough(_at_least(weights, as_float(middle)))
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

  above_one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
  low = jnp.zeros(weights.shape[0], jnp.int32)
  return as_float(jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, above_one)))[0])


def _at_least(weights: jax.Array, threshold: jax.Array) -> jax.Array:
  return jnp.where(weights >= jnp.broadcast_to(threshold[:, None], weights.shape), weights, 0.0)


_BLOCK = 128


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns the id [R] at which the running sum of weights [R, V] passes uniform [R] of the total.

  One random number a row, not one an id. The sum runs over blocks of ids first, then over the ids of
  the block in which it passes.
  """
  rows, ids = weights.shape
  weights = jnp.pad(weights, ((0, 0), (0, -ids % _BLOCK))).reshape(rows, -1, _BLOCK)
  blocks = jnp.cumsum(jnp.sum(weights, axis=-1), axis=-1)
  target = uniform * blocks[:, -1]
  passed = lambda sums, target: jnp.sum(
      sums <= jnp.broadcast_to(target[:, None], sums.shape), axis=-1)
  take = lambda x, index: jax.vmap(lambda row, i: row[i])(x, index)
  block = passed(blocks, target)
  within = take(weights, block)
  rest = target - jnp.where(block > 0, take(blocks, jnp.maximum(block - 1, 0)), 0.0)
  # Sums of a block in another order differ in their last bits: never beyond its last id of weight.
  last = _BLOCK - 1 - jnp.argmax(within[:, ::-1] > 0, axis=-1)
  return (block * _BLOCK + jnp.minimum(passed(jnp.cumsum(within, axis=-1), rest), last)).astype(
      jnp.int32)


def _keys_of_samples(key: jax.Array, batch: int, num_samples: int) -> jax.Array:
  """Returns a key for each sample of each prompt, [B K]."""
  each = jax.vmap(jax.random.fold_in, (None, 0))
  keys = each(key, jnp.arange(batch)) if key.ndim == 0 else key
  if keys.shape != (batch,):
    raise ValueError(f"key is {keys.shape}; give one key, or one for each of {batch} prompts")
  return jax.vmap(each, (0, None))(keys, jnp.arange(num_samples)).reshape(-1)
