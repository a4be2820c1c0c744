"""Rotary positions (Su et al. 2021) and the stretchings of their frequencies that models ship."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.kernels.platform import arrays_are_cut, platform
from dpojax.models.config import RopeScaling


def frequencies(size: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Returns the angle a position turns each of size / 2 pairs by, [size / 2] float32.

  'linear' divides all by the factor (Chen et al. 2023). 'dynamic' leaves sequences of at most
  `max_positions` as they are; longer ones are refused elsewhere, see `ModelConfig.longest`. 'yarn'
  (Peng et al. 2023, Eq. 17-23) and 'llama3' divide the slow ones and keep the fast ones, with a
  ramp between.
  """
  # In float64 with NumPy: float32 powers of 10,000 are off by more than log-probs are compared to.
  exponents = np.arange(0, size, 2) / size
  plain = theta**-exponents
  if scaling is None or scaling.name == "dynamic":
    return plain.astype(np.float32)
  stretched = plain / scaling.factor
  if scaling.name == "linear":
    kept = 0.0
  elif scaling.name == "llama3":
    rotations = scaling.original_positions * plain / (2 * math.pi)
    kept = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
  else:

    def pair_of(rotations):
      wavelength = scaling.original_positions / (rotations * 2 * math.pi)
      return size * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_of(scaling.high), pair_of(scaling.low)
    if scaling.truncate:
      first, last = math.floor(first), math.ceil(last)
    # As transformers has it, down to the thousandth that keeps the ramp from dividing by 0.
    first, last = max(first, 0), min(last, size - 1)
    last = last if last != first else first + 0.001
    kept = 1.0 - np.clip((np.arange(size // 2) - first) / (last - first), 0.0, 1.0)
  return (kept * plain + (1.0 - kept) * stretched).astype(np.float32)


class RotaryTable(NamedTuple):
  """How far tokens are turned: `cos` and `sin` [R, L, F] float32 of F frequencies."""

  cos: jax.Array
  sin: jax.Array


def rotary_table(positions: jax.Array, frequencies: jax.Array, *, magnitude: float = 1.0) -> RotaryTable:
  """Returns the rotary table of tokens at positions [R, L] of their sequences.

  Args:
    positions: of the tokens.
    frequencies: [F], from `frequencies`.
    magnitude: what turned dimensions are multiplied by.
  """
  angles = jnp.einsum("rl,h->rlh", positions.astype(jnp.float32), frequencies)
  of = lambda angles: RotaryTable(magnitude * jnp.cos(angles), magnitude * jnp.sin(angles))
  if platform() != "cpu" or angles.size % 2 or arrays_are_cut():
    return of(angles)
  # On CPUs they would be worked out again in whatever reads them, for every head and layer, which is a
  # tenth of a model's time. What a loop gives is kept, and a loop of one round would be none.
  return jax.tree.map(lambda x: x.reshape(angles.shape), jax.lax.map(of, angles.reshape(2, -1)))


def rotate(x: jax.Array, table: RotaryTable, *, interleaved: bool = False) -> jax.Array:
  """Returns heads [R, L, N, H] turned; the first 2 F dimensions of each, and the others as they are.

  Args:
    x: queries or keys.
    table: of the tokens.
    interleaved: whether a pair is two neighbours; else it is one of each half.
  """
  cos, sin = (each[:, :, None] for each in table)
  half = cos.shape[-1]
  turned, rest = x[..., : 2 * half], x[..., 2 * half :]
  if interleaved:
    first, second = turned[..., ::2], turned[..., 1::2]
  else:
    first, second = turned[..., :half], turned[..., half:]
  # In float32 throughout: the tables are, and bfloat16 angles would blur far positions.
  pair = (first * cos - second * sin, second * cos + first * sin)
  if interleaved:
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
  else:
    turned = jnp.concatenate(pair, axis=-1)
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
