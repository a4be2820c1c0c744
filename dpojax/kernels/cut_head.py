"""Log-probs under an output head whose columns are cut over devices: a block of words is gathered at a time.

The numbers of `dpojax.log_probs`. Each device walks over the vocabulary for its own tokens, with a running
log-normaliser and each token's own logit, so that neither the head nor its gradient is ever whole anywhere:
a block's gradient is summed over the devices in float32 and cut as soon as it is made. A block is gathered
once in each pass.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.kernels.gathering import MeshAxis, all_gather, gather, scatter_sum, summed_products
from dpojax.kernels.head import Head, logits_of, shaped
from dpojax.kernels.platform import at_most
from dpojax.kernels.precision import wide_of

TOKENS, WORDS = 2048, 8192
"""Of the logits that are held at once, 64 MiB."""

# Finite, so that two of them differ by 0 and not by nan.
_LEAST = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CutHead:
  """A head of which a device holds some columns; it stands wherever a `Head` does.

  `weights` [V, D / devices]; `bias` [V] or None; `soft_cap` as of `Head`; `over` what it is cut over;
  `frozen` says that nobody asks for its gradient, which is then 0.
  """

  weights: jax.Array
  bias: jax.Array | None
  soft_cap: jax.Array | float | None
  over: MeshAxis = dataclasses.field(metadata={"static": True})
  frozen: bool = dataclasses.field(default=False, metadata={"static": True})

  def gathered(self, dtype: Any) -> Head:
    """Returns the whole head, in a dtype; for what needs all logits of a token at once."""
    return Head(gather(self.weights, self.over, 1, dtype), self.bias, self.soft_cap)


def without_gradient(head: jax.Array | Head | CutHead) -> jax.Array | Head | CutHead:
  """Returns a head of which no gradient is asked for: of a `CutHead` then none is made, nor sent."""
  return dataclasses.replace(head, frozen=True) if isinstance(head, CutHead) else head


def whole_head(head: jax.Array | Head | CutHead, dtype: Any) -> jax.Array | Head:
  """Returns a head as all devices have it, for what reads the whole next-token distribution at once."""
  return head.gathered(dtype) if isinstance(head, CutHead) else head


def logits_of_few(hidden: jax.Array, head: jax.Array | Head | CutHead) -> jax.Array:
  """Returns the logits [T, V] of a few hidden states [T, D]; a `CutHead` stays where it is."""
  if not isinstance(head, CutHead):
    return logits_of(hidden, head)
  logits = summed_products(hidden, head.weights.astype(hidden.dtype).T, head.over)
  return shaped(logits, Head(head.weights, head.bias, head.soft_cap))


class _Form(NamedTuple):
  """The static choices: the mesh's axis, parts of the vocabulary that lie on devices of the `tensor` axis,
  words a block of each, and whether no gradient is asked for."""

  over: MeshAxis
  parts: int
  words: int
  frozen: bool


def chunk_tokens(vocabulary: int) -> int:
  """Returns the tokens of a chunk, of which a block of words makes the logits that are held at once."""
  del vocabulary
  return TOKENS


def chunked_log_probs(
  hidden: jax.Array, head: CutHead, target: jax.Array, count: jax.Array | int
) -> jax.Array:
  """Returns log-probs [C, t] of the targets [C, t] of hidden states [C, t, D]; of `count` chunks only."""
  mesh = jax.sharding.get_abstract_mesh()
  parts = dict(zip(mesh.axis_names, mesh.axis_sizes)).get("tensor", 1)
  vocabulary = head.weights.shape[0]
  # A block takes a stretch of every part, so that all devices of the tensor axis work on each.
  parts = parts if vocabulary % parts == 0 else 1
  form = _Form(head.over, parts, min(WORDS // parts or 1, vocabulary // parts), head.frozen)
  return _log_probs(hidden, head.weights, head.bias, head.soft_cap, target, count, form)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _log_probs(hidden, weights, bias, soft_cap, target, count, form):
  return _forward(hidden, weights, bias, soft_cap, target, count, form)[0]


def _block(b, weights, bias, dtype, form):
  """Returns where block b starts in each part, its words [parts, n], which are new, its weights and bias."""
  size = weights.shape[0] // form.parts
  # All blocks are of one size: the last ends where the vocabulary does and repeats words of the one before.
  start = jnp.minimum(b * form.words, size - form.words)
  place = start + jnp.arange(form.words)
  words = jnp.arange(form.parts)[:, None] * size + place[None]
  cut = lambda x: jax.lax.dynamic_slice_in_dim(
    x.reshape(form.parts, size, *x.shape[1:]), start, form.words, 1
  )
  whole = all_gather(cut(weights).astype(dtype), form.over, 2)
  return start, words, place >= b * form.words, whole, None if bias is None else cut(bias)


def _logits(hidden, whole, bias, soft_cap, new):
  """Logits [t, parts, n] of a block; of words that an earlier block had, none."""
  logits = jnp.einsum("td,pvd->tpv", hidden, whole, preferred_element_type=wide_of(hidden.dtype))
  # XLA would rather make this product again for each that reads it than keep it.
  logits = jax.lax.optimization_barrier(logits)
  logits = shaped(logits, Head(whole, bias, soft_cap))
  return logits, jnp.broadcast_to(new, logits.shape)


def _blocks(weights, form) -> int:
  return -(-(weights.shape[0] // form.parts) // form.words)


def _forward(hidden, weights, bias, soft_cap, target, count, form):
  kind = wide_of(hidden.dtype)

  # Blocks outside, tokens inside: a block travels once a pass, however many chunks of tokens there are.
  def of_block(b, carry):
    _, words, new, whole, block_bias = _block(b, weights, bias, hidden.dtype, form)

    def of_chunk(c, carry):
      most, total, own = carry
      logits, there = _logits(hidden[c], whole, block_bias, soft_cap, new)
      masked = jnp.where(there, logits, _LEAST)
      largest = jnp.maximum(most[c], jnp.max(masked, axis=(1, 2)))
      grown = jnp.sum(jnp.exp(masked - largest[:, None, None]), axis=(1, 2))
      # Of a word that stands in two blocks the logit must be added once.
      is_own = there & (words[None] == target[c][:, None, None])
      return (
        most.at[c].set(largest),
        total.at[c].set(total[c] * jnp.exp(most[c] - largest) + grown),
        own.at[c].add(jnp.sum(jnp.where(is_own, logits, 0), axis=(1, 2))),
      )

    with at_most(target.shape[0]):
      return jax.lax.fori_loop(0, count, of_chunk, carry)

  zeros = jnp.zeros(target.shape, kind)
  most, total, own = jax.lax.fori_loop(0, _blocks(weights, form), of_block, (zeros + _LEAST, zeros, zeros))
  # Tokens of chunks that were left out have summed nothing.
  normaliser = most + jnp.log(jnp.where(total > 0, total, 1))
  return own - normaliser, (hidden, weights, bias, soft_cap, target, count, normaliser)


def _backward(form, residuals, cotangent):
  hidden, weights, bias, soft_cap, target, count, normaliser = residuals
  size, sum_dtype = weights.shape[0] // form.parts, wide_of(weights.dtype)

  def of_block(b, carry):
    hidden_grad, weights_grad, bias_grad = carry
    start, words, new, whole, block_bias = _block(b, weights, bias, hidden.dtype, form)

    def of_chunk(c, carry):
      hidden_grad, whole_grad, block_bias_grad = carry
      logits, there = _logits(hidden[c], whole, block_bias, soft_cap, new)
      probs = jnp.exp(logits - normaliser[c][:, None, None])
      is_own = words[None] == target[c][:, None, None]
      grad = jnp.where(there, (is_own - probs) * cotangent[c][:, None, None], 0)
      if soft_cap is not None:
        grad *= 1.0 - jnp.square(logits / soft_cap)
      if block_bias_grad is not None:
        block_bias_grad += jnp.sum(grad, axis=0)
      grad = grad.astype(hidden.dtype)
      part = jnp.einsum("tpv,pvd->td", grad, whole, preferred_element_type=hidden_grad.dtype)
      if form.frozen:
        return hidden_grad.at[c].add(part), whole_grad, block_bias_grad
      whole_grad += jnp.einsum("tpv,td->pvd", grad, hidden[c], preferred_element_type=whole_grad.dtype)
      return hidden_grad.at[c].add(part), whole_grad, block_bias_grad

    # Of a frozen head a scalar is carried in the gradient's place: nothing is summed, nothing is sent.
    zeros = jnp.zeros(() if form.frozen else whole.shape, sum_dtype)
    bias_zeros = None if block_bias is None else jnp.zeros(block_bias.shape, wide_of(block_bias.dtype))
    with at_most(target.shape[0]):
      hidden_grad, whole_grad, block_bias_grad = jax.lax.fori_loop(
        0, count, of_chunk, (hidden_grad, zeros, bias_zeros)
      )
    if not form.frozen:
      mine = scatter_sum(whole_grad, form.over, 2)
      weights_grad = _added(weights_grad, mine, start)
    if bias_grad is not None:
      bias_grad = _added(bias_grad, block_bias_grad, start)
    return hidden_grad, weights_grad, bias_grad

  carry = (
    jnp.zeros(hidden.shape, wide_of(hidden.dtype)),
    jnp.zeros((form.parts, size, weights.shape[1]), sum_dtype),
    None if bias is None else jnp.zeros((form.parts, size), wide_of(bias.dtype)),
  )
  hidden_grad, weights_grad, bias_grad = jax.lax.fori_loop(0, _blocks(weights, form), of_block, carry)
  return (
    hidden_grad.astype(hidden.dtype),
    weights_grad.reshape(weights.shape).astype(weights.dtype),
    None if bias is None else bias_grad.reshape(bias.shape).astype(bias.dtype),
    None if soft_cap is None else jnp.zeros_like(jnp.asarray(soft_cap)),
    None,
    None,
  )


def _added(total, part, start):
  """Returns the total [parts, size, ...] with a part [parts, n, ...] added at a start."""
  there = jax.lax.dynamic_slice_in_dim(total, start, part.shape[1], 1)
  return jax.lax.dynamic_update_slice_in_dim(total, there + part, start, 1)


_log_probs.defvjp(_forward, _backward)
