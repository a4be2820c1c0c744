"""Sampling with a KV cache and static shapes.

A prompt is read once, and its keys and values are kept once, whatever the number of samples drawn
from it. Prompts are padded on the right; positions are those of each sequence, so no padding ever
stands before a token. What changes from one draw to the next, temperature, top-k and top-p, is
traced: a sweep over it compiles once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.kernels import few_tokens
from dpojax.kernels.cut_head import logits_of_few
from dpojax.kernels.platform import arrays_are_cut, at_most, row_axes
from dpojax.models import sharding, transformer
from dpojax.models.config import ModelConfig

_FIRST_STAGE = 32


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
  config: ModelConfig,
  *,
  max_new_tokens: int,
  num_samples: int = 1,
  stop_id: int | Sequence[int] | None = None,
  in_place: bool = False,
) -> Callable[..., Samples]:
  """Returns `sample(params, prompts, lengths, key, temperature, top_p, top_k)`, to be jitted.

  Args:
    config: the model's. Where its layers are scanned, the sampler cuts them apart once a call, a
      copy of their weights; `transformer.unrolled` beforehand saves that.
    max_new_tokens: `T`, tokens a sample has at most.
    num_samples: `K`, samples of each prompt.
    stop_id: the id, or ids, that end a sample.
    in_place: of weights that are cut where the sampler is traced, whether they stay where they are, and are
      not brought together at its beginning; see `decoding`.

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
  stops = stops_of(stop_id)

  def sample(params: Any, *args: Any, **knobs: Any) -> Samples:
    if in_place or not sharding.is_cut():
      return decoded(config, params, *args, **knobs)
    # Layers by themselves first: a stack that was brought together would be copied to be cut apart.
    alone, params = transformer.unrolled(config, params)
    params = sharding.whole(params, config.dtype)
    with sharding.uncut():
      return decoded(alone, params, *args, **knobs)

  def decoded(
    config: ModelConfig,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
  ) -> Samples:
    batch, width = prompts.shape
    check_lengths(config, width, max_new_tokens)
    rows = batch * num_samples
    repeat = lambda x: jnp.repeat(x, num_samples, axis=0)
    # With the layers as they are, scanned or not: one pass is long enough for a scan. Decoding is not.
    last, part = transformer.read_prompts(config, params, prompts, lengths)
    # Cast before the loop: a step reads every weight once and would cast it as often.
    decoder_config, params = transformer.unrolled(config, in_compute_dtype(config, params))
    decoder, variables = transformer.Transformer(decoder_config), {"params": params}
    # Weights that stay cut where they are go through `sharding.product` alone.
    if not sharding.is_cut() and few_tokens.are_worth_turning(params, rows, max_new_tokens):
      variables[transformer.TURNED] = transformer.turned(decoder_config, params)
    together = in_place or arrays_are_cut()
    head = transformer.make_head(config, params)
    starts = repeat(lengths)
    # Beforehand, of key, sample and place alone: the loop carries no keys.
    uniform = uniform_of_samples(key, batch, num_samples, max_new_tokens)

    def going(done):
      # A batch goes on until its last sample is done; devices that exchange vectors, until all of them are.
      left = ~jnp.all(done)
      return jax.lax.psum(left.astype(jnp.int32), row_axes()) > 0 if together and row_axes() else left

    def extend(carry):
      drawn, _, hidden, cache = carry
      place = starts + drawn.step
      token, drawn = drawn.extended(logits_of_few(hidden, head), uniform, stops, temperature, top_p, top_k)
      one = jnp.ones((rows, 1), jnp.int32)
      hidden, cache = decoder.apply(variables, token[:, None], place[:, None], one, 0 * one, cache)
      return drawn, going(drawn.done), hidden[:, 0], cache

    seen, drawn, left, hidden = [part], nothing_drawn(rows, max_new_tokens), True, repeat(last)
    # What a stage has written is only read by the next: later, longer rooms do not slow the first tokens.
    for start, end in stages(width, max_new_tokens):
      cache = transformer.make_cache(config, seen, rows=rows, room=end - start)
      with at_most(end - start), sharding.in_place() if in_place else contextlib.nullcontext():
        drawn, left, hidden, cache = jax.lax.while_loop(
          lambda carry, end=end: (carry[0].step < end) & carry[1], extend, (drawn, left, hidden, cache)
        )
      seen = [*cache.seen, cache.written]
    return drawn.samples(num_samples)

  return sample


def stops_of(stop_id: int | Sequence[int] | None) -> np.ndarray:
  """Returns the ids that end a sample, [S]."""
  return np.atleast_1d(np.asarray(() if stop_id is None else stop_id, np.int32))


def check_lengths(config: ModelConfig, width: int, max_new_tokens: int) -> None:
  """Raises ValueError where the model has fewer positions than prompts and new tokens take."""
  if config.longest is not None and width + max_new_tokens > config.longest:
    raise ValueError(
      f"prompts of up to {width} tokens and {max_new_tokens} new ones are longer than the "
      f"{config.longest} positions the model has; lower max_new_tokens or cut the prompts"
    )


class Drawn(NamedTuple):
  """What has been drawn of R samples.

  Attributes:
    step: scalar, tokens that were asked for.
    done: [R] whether a stop id has ended it.
    tokens, lengths, log_probs: [R, T], [R], [R], see `Samples`.
  """

  step: jax.Array
  done: jax.Array
  tokens: jax.Array
  lengths: jax.Array
  log_probs: jax.Array

  def extended(
    self, logits: jax.Array, uniform: jax.Array, stops: jax.typing.ArrayLike, *knobs: Any
  ) -> tuple[jax.Array, "Drawn"]:
    """Returns the next id of each sample, [R], and what has been drawn with it.

    Args:
      logits: [R, V].
      uniform: [T, R], a random number for each token.
      stops: [S] ids that end a sample.
      knobs: temperature, top_p and top_k.
    """
    token, log_prob = draw(logits, uniform[self.step], *knobs)
    # A sample that is done goes on through the loop with token 0, and counts nowhere.
    token = jnp.where(self.done, 0, token)
    ends = jnp.any(jnp.equal(*jnp.broadcast_arrays(token[:, None], stops[None])), axis=1)
    return token, Drawn(
      self.step + 1,
      self.done | ends,
      jax.lax.dynamic_update_slice_in_dim(self.tokens, token[:, None], self.step, axis=1),
      self.lengths + ~self.done,
      self.log_probs + jnp.where(self.done, 0.0, log_prob),
    )

  def samples(self, num_samples: int) -> Samples:
    """Returns them by prompts, each of K consecutive samples."""
    split = lambda x: x.reshape(-1, num_samples, *x.shape[1:])
    return Samples(split(self.tokens), split(self.lengths), split(self.log_probs))


def nothing_drawn(rows: int, max_new_tokens: int) -> Drawn:
  """Returns what has been drawn of R samples before their first token."""
  return Drawn(
    jnp.zeros((), jnp.int32),
    jnp.zeros(rows, bool),
    jnp.zeros((rows, max_new_tokens), jnp.int32),
    jnp.zeros(rows, jnp.int32),
    jnp.zeros(rows, jnp.float32),
  )


def in_compute_dtype(config: ModelConfig, params: Any) -> Any:
  """Casts once what every step would cast again: kernels and embeddings."""

  def cast(path, leaf):
    return leaf.astype(config.dtype) if path[-1].key in ("kernel", "embedding", "head") else leaf

  return jax.tree_util.tree_map_with_path(cast, params)


def stages(width: int, max_new_tokens: int) -> Iterator[tuple[int, int]]:
  """Yields the (start, end) of tokens that are decoded by a loop each, behind prompts of that width.

  A step looks through all the room there is, filled or not, and each loop is compiled by itself and
  copies what was seen before it. So there are few stages for long samples, short ones for samples that
  all end early, and none that is short beside the prompt.
  """
  start, shortest = 0, _FIRST_STAGE
  if max_new_tokens <= 2 * _FIRST_STAGE:  # compiling a second loop takes longer than it saves
    shortest = max_new_tokens
  while start < max_new_tokens:
    length = max(shortest, width // 8, min(start, max_new_tokens // 4))
    yield start, min(start + length, max_new_tokens)
    start += length


def draw(
  logits: jax.Array, uniform: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns one id a row, [R] int32, from logits [R, V], and its log-prob at temperature 1 of all ids.

  `uniform` [R] in [0, 1) are the random numbers: the same one takes the same id. The other knobs are
  the sampler's; of numbers of Python's only what they ask for is compiled.
  """
  largest, most, normaliser = _summary(logits)

  def random():
    scaled = logits / temperature
    weights = jnp.exp(scaled - (most / temperature)[:, None])
    token = _pick(likeliest(weights, top_p, top_k), uniform)
    return token, jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]

  # A cond and not a select: a greedy step skips the exponentials, and a division by 0 as well.
  token, logit = _either(temperature > 0, random, lambda: (largest, most))
  return token, logit - normaliser


def likeliest(weights: jax.Array, top_p: jax.Array, top_k: jax.Array, *, few: int = 256) -> jax.Array:
  """Returns weights [R, V] in [0, 1] with those that top-k and then top-p leave out set to 0.

  The least that stays is mostly among the `few` largest, which are sorted; otherwise it is searched
  for among all.
  """

  def by_count(weights):
    wanted = jnp.full(weights.shape[0], top_k, weights.dtype)
    return _keep(weights, lambda w: (w > 0).astype(w.dtype), wanted, few)

  def by_mass(weights):
    return _keep(weights, lambda w: w, top_p * jnp.sum(weights, axis=-1), few)

  same = lambda weights: weights
  weights = _either((top_k > 0) & (top_k < weights.shape[-1]), by_count, same, weights)
  return _either(top_p < 1, by_mass, same, weights)


def _either(first: bool | jax.Array, one: Callable, other: Callable, *args: jax.Array) -> Any:
  """Returns what one of two functions gives: chosen here if that is known, and as the program runs if not."""
  if isinstance(first, (bool, np.bool_)):
    return (one if first else other)(*args)
  return jax.lax.cond(first, one, other, *args)


def _keep(
  weights: jax.Array, worth: Callable[[jax.Array], jax.Array], wanted: jax.Array, few: int
) -> jax.Array:
  """Returns the fewest largest weights of each row that are worth as much as wanted [R], others 0.

  The search is a bisection of integers: floats of one sign are ordered as their bits are.
  """
  wide = lambda x: jnp.broadcast_to(x[:, None], weights.shape)
  above = lambda least: jnp.where(weights >= wide(least), weights, 0.0)
  as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
  # A vocabulary is expensive to sort, and few ids hold nearly all of the mass.
  largest, _ = jax.lax.top_k(weights, min(few, weights.shape[-1]))
  sums = jnp.cumsum(worth(largest), axis=-1)

  def of_largest():
    place = jnp.sum(sums < jnp.broadcast_to(wanted[:, None], sums.shape), axis=-1)
    return jnp.take_along_axis(largest, place[:, None], axis=-1)[:, 0]

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    fits = jnp.sum(worth(above(as_float(middle))), axis=-1) >= wanted
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

  def of_all():
    low = jnp.zeros(weights.shape[0], jnp.int32)
    # Weights are in [0, 1], whose bits are less than 2^30: thirty halvings end at one.
    high = jnp.full_like(low, jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1)
    return as_float(jax.lax.fori_loop(0, 30, halve, (low, high))[0])

  return above(jax.lax.cond(jnp.all(sums[:, -1] >= wanted), of_largest, of_all))


_BLOCK = 128

_SIDE_BY_SIDE = 8
"""Rows from which on logits are summarised with rows last."""


def _in_blocks(x: jax.Array, fill: float, *, axis: int = 1) -> jax.Array:
  """Cuts an axis of V ids into [ceil(V / block), block]."""
  padding = [(0, -size % _BLOCK if i == axis else 0) for i, size in enumerate(x.shape)]
  x = jnp.pad(x, padding, constant_values=fill)
  return x.reshape(*x.shape[:axis], -1, _BLOCK, *x.shape[axis + 1 :])


_take = jax.vmap(lambda row, index: row[index])


def _summary(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the first id with the largest logit [R], that logit, and log sum exp, of logits [R, V].

  In steps that compilers turn into vectors: over ids of a block, then over blocks. Many rows lie side
  by side, as the head's product leaves them; of few, ids do.
  """
  many = len(logits) >= _SIDE_BY_SIDE
  block, ids = (0, 1) if many else (1, 2)
  blocks = _in_blocks(logits.T if many else logits, -jnp.inf, axis=block)
  wide = lambda x: jnp.expand_dims(x, (block, ids))
  of_blocks = jnp.max(blocks, axis=ids)
  most, best = jnp.max(of_blocks, axis=block), jnp.argmax(of_blocks, axis=block)
  total = jnp.sum(jnp.sum(jnp.exp(blocks - wide(most)), axis=ids), axis=block)
  of_best = jnp.squeeze(jnp.take_along_axis(blocks, wide(best), axis=block), block)
  largest = best * _BLOCK + jnp.argmax(of_best, axis=ids - 1)
  return largest.astype(jnp.int32), most, most + jnp.log(total)


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns the id [R] at which the running sum of weights [R, V] passes uniform [R] of the total.

  One random number a row, not one an id. The sum runs over blocks of ids first, then over the ids of
  the block in which it passes.
  """
  weights = _in_blocks(weights, 0.0)
  blocks = jnp.cumsum(jnp.sum(weights, axis=-1), axis=-1)
  # Of what the weights really sum to: rounding must not leave a gap behind the last id.
  target = uniform * blocks[:, -1]
  passed = lambda sums, target: jnp.sum(sums <= jnp.broadcast_to(target[:, None], sums.shape), axis=-1)
  block = passed(blocks, target)
  within = _take(weights, block)
  # What is left of it within the block.
  rest = target - jnp.where(block > 0, _take(blocks, jnp.maximum(block - 1, 0)), 0.0)
  # Sums of a block in another order differ in their last bits: never beyond its last id of weight.
  last = _BLOCK - 1 - jnp.argmax(within[:, ::-1] > 0, axis=-1)
  return (block * _BLOCK + jnp.minimum(passed(jnp.cumsum(within, axis=-1), rest), last)).astype(jnp.int32)


def uniform_of_samples(key: jax.Array, batch: int, num_samples: int, max_new_tokens: int) -> jax.Array:
  """Returns a random number for each token of each sample of each prompt, [T, B K]."""
  each = jax.vmap(jax.random.fold_in, (None, 0))
  keys = each(key, jnp.arange(batch)) if key.ndim == 0 else key
  if keys.shape != (batch,):
    raise ValueError(f"key is {keys.shape}; give one key, or one for each of {batch} prompts")
  keys = jax.vmap(each, (0, None))(keys, jnp.arange(num_samples)).reshape(-1)
  of_token = lambda step: jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step)))(keys)
  return jax.vmap(of_token)(jnp.arange(max_new_tokens))
