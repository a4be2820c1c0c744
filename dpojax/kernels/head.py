"""The output head: logits of hidden states, their gradients, and how scored tokens are walked over in chunks.

`dpojax.log_probs`, its form on CPUs and what is computed of two models' logits are all made of these.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.kernels.few_tokens import product
from dpojax.kernels.platform import arrays_are_cut, at_most, platform
from dpojax.kernels.precision import wide_of

CHUNK_ELEMENTS = 2**24
"""Logits held at once when no chunk size is given: 2**24 float32 values, 64 MiB."""

ACCELERATOR_CHUNK_ELEMENTS = 2**27
"""The same on GPUs and TPUs, 512 MiB: each chunk reads and writes the head's whole gradient once, which
takes longer than the products of the few tokens that a smaller one holds."""

_CPU_CUTS = 4
"""Pieces the last chunk of a row is cut into on CPUs, where those of padding alone are left out."""


class Head(NamedTuple):
  """An output embedding whose logits have more to them; it stands wherever a `head` does.

  `weights` [V, D]; `bias` [V], added to the logits, or None; `soft_cap`, a constant scalar that
  makes a logit cap * tanh(logit / cap), or None.
  """

  weights: jax.Array
  bias: jax.Array | None = None
  soft_cap: jax.Array | float | None = None


def as_head(head: jax.Array | Head) -> Head:
  """Returns a head as a `Head`."""
  return head if isinstance(head, Head) else Head(head)


def logits_of(hidden: jax.Array, head: jax.Array | Head) -> jax.Array:
  """Returns the logits [..., V] of hidden states [..., D], all at once; for a few tokens.

  See `few_tokens.product`: to read the head is most of the work.
  """
  head = as_head(head)
  weights = head.weights.astype(hidden.dtype)
  return shaped(product(hidden, weights, dtype=wide_of(hidden.dtype)), head)


def wide_zeros(x) -> jax.Array:
  return jnp.zeros(jnp.shape(x), wide_of(jnp.result_type(x)))


def logits_of_chunk(hidden: jax.Array, head: Head) -> jax.Array:
  """Logits [..., V] of the head in the dtype of the hidden states, accumulated in float32."""
  logits = jnp.einsum(
    "...d,vd->...v", hidden, head.weights.astype(hidden.dtype), preferred_element_type=wide_of(hidden.dtype)
  )
  return shaped(logits, head)


def shaped(logits: jax.Array, head: Head) -> jax.Array:
  """Logits with the bias and the soft cap of the head."""
  if head.bias is not None:
    logits += jnp.broadcast_to(head.bias.astype(logits.dtype), logits.shape)
  if head.soft_cap is not None:
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
  return logits


def target_logits(hidden: jax.Array, head: Head, target: jax.Array) -> jax.Array:
  """The logit [C, t] of each token's own target."""
  # Ids are checked before any step: no mode that looks at each of them is needed.
  weights = head.weights.at[target].get(mode="promise_in_bounds").astype(hidden.dtype)
  bias = None if head.bias is None else head.bias[target]
  logits = jnp.einsum("ctd,ctd->ct", hidden, weights, preferred_element_type=wide_of(hidden.dtype))
  return shaped(logits, Head(weights, bias, head.soft_cap))


def through_head(logits_grad, logits, hidden, head, weights, head_grad) -> tuple[jax.Array, Head]:
  """Returns the gradient [t, D] of hidden states from that of their logits, and the head's, added to it."""
  # The derivative of cap * tanh(x / cap), from its value.
  if head.soft_cap is not None:
    logits_grad *= 1.0 - jnp.square(logits / head.soft_cap)
  bias_grad = head_grad.bias
  if bias_grad is not None:
    bias_grad += jnp.sum(logits_grad, axis=0)
  # In the compute dtype for the two products, which are most of the backward pass; both sum in float32.
  logits_grad = logits_grad.astype(hidden.dtype)
  weights_grad = head_grad.weights + jnp.einsum(
    "tv,td->vd", logits_grad, hidden, preferred_element_type=head_grad.weights.dtype
  )
  hidden_grad = jnp.einsum("tv,vd->td", logits_grad, weights, preferred_element_type=wide_of(hidden.dtype))
  return hidden_grad, Head(weights_grad, bias_grad, head_grad.soft_cap)


class Chunks(NamedTuple):
  """How tokens are cut into C chunks of t.

  `order` [T] puts the tokens that count first; without it chunks run along S and hold tokens of
  every leading index. `count` is the number of chunks to compute, counted in `cuts` pieces a chunk.
  """

  order: jax.Array | None
  size: int
  number: int
  count: jax.Array | int
  cuts: int

  def split(self, x: jax.Array, *, tail: int = 0) -> jax.Array:
    """[..., S] with `tail` more axes -> [C, t] with them."""
    leading = x.ndim - 1 - tail
    rest = x.shape[leading + 1 :]
    if self.order is not None:
      x = x.reshape(-1, *rest)[self.order]
      leading = 0
    padding = self.number * self.size - x.shape[leading]
    x = jnp.pad(x, [(0, 0)] * leading + [(0, padding)] + [(0, 0)] * tail)
    x = x.reshape(*x.shape[:leading], self.number, self.size, *rest)
    return jnp.moveaxis(x, leading, 0).reshape(self.number, -1, *rest)

  def join(self, x: jax.Array, shape: tuple[int, ...], *, tail: int = 0) -> jax.Array:
    """The inverse: [C, t] -> `shape`, [..., S]."""
    rest = x.shape[2:]
    if self.order is not None:
      flat = x.reshape(-1, *rest)[: self.order.size]
      # An order names every place once, which lets the scatter write without looking for conflicts.
      return jnp.zeros_like(flat).at[self.order].set(flat, unique_indices=True).reshape(*shape, *rest)
    *leading, length = shape
    x = x.reshape(self.number, *leading, self.size, *rest)
    x = jnp.moveaxis(x, 0, len(leading)).reshape(*leading, -1, *rest)
    return jax.lax.slice_in_dim(x, 0, length, axis=len(leading))


def default_size(vocabulary: int) -> int:
  """Returns the tokens of a chunk whose logits are as many as are held at once."""
  elements = CHUNK_ELEMENTS if platform() == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
  return elements // vocabulary


def in_chunks(
  shape: tuple[int, ...], where: jax.Array | None, *, size: int, per_index: bool = False
) -> Chunks:
  """Returns how tokens of a shape [..., S] are cut.

  Args:
    shape: of the tokens.
    where: the tokens that count, or None for all.
    size: tokens of a chunk.
    per_index: whether `size` is of each leading index, as users give it, or of all together.
  """
  *leading, length = shape
  rows, tokens = math.prod(leading), math.prod(shape)
  size = size * rows if per_index else size
  if where is None or arrays_are_cut():
    # Tokens of other devices must not be brought together: chunks run along S, the same of every row.
    size = min(max(1, size // max(1, rows)), max(1, length))
    number = -(-length // size)
    count = number
    if where is not None:  # up to the last token that counts of any row
      last = jnp.max(jnp.where(where, jnp.arange(1, length + 1), 0), initial=0)
      count = -(-last // size)
    return Chunks(None, size, number, count, 1)
  size = min(max(1, size), max(1, tokens))
  cuts = _CPU_CUTS if platform() == "cpu" and size % _CPU_CUTS == 0 else 1
  where = where.reshape(-1)
  count = -(-jnp.sum(where) // (size // cuts))
  # Stable, so that tokens keep their order and neighbours' hidden states are still read together.
  return Chunks(jnp.argsort(~where, stable=True), size, -(-tokens // size), count, cuts)


def over_chunks(count, cuts: int, step: Callable, read: Any, written: Any, carry: Any):
  """Returns what `step(c, read, written, carry) -> (written, carry)` makes of the chunks c that count.

  `read` and `written` are trees of [C, t, ...], of the last chunk only the pieces that count; `count`
  is of pieces, see `Chunks`.
  """

  def loop(first, last, read, written, carry):
    return jax.lax.fori_loop(first, last, lambda c, both: step(c, read, *both), (written, carry))

  if cuts == 1:
    with at_most(jax.tree.leaves(read)[0].shape[0]):
      return loop(0, count, read, written, carry)
  # Whole chunks first, then the last one piece by piece: at most a piece is computed for nothing.
  whole = count // cuts
  in_pieces = partial(jax.tree.map, lambda x: x.reshape(-1, x.shape[1] // cuts, *x.shape[2:]))
  written, carry = loop(0, whole, read, written, carry)
  pieces, carry = loop(whole * cuts, count, in_pieces(read), in_pieces(written), carry)
  return jax.tree.map(lambda x, like: x.reshape(like.shape), pieces, written), carry
