"""Rotary positions (Su et al. 2021) and the stretchings of their frequencies that models ship."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.models.config import RopeScaling


def frequencies(size: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Returns the angle a position turns each of size / 2 pairs by, [size / 2] float32.

  'linear' divides all by the factor (Chen et al. 2023). 'dynamic' leaves sequences of at most
  `max_positions` as they are; longer ones are refused elsewhere, see `ModelConfig.longest`. 'yarn'
  (Peng et al. 2023, Eq. 17-23) and 'llama3' divide the slow ones and keep the fast ones, with a
  ramp between.
  """
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
    first, last = max(first, 0), min(last, size - 1)
    last = last if last != first else first + 0.001
    kept = 1.0 - np.clip((np.arange(size // 2) - first) / (last - first), 0.0, 1.0)
  return (kept * plain + (1.0 - kept) * stretched).astype(np.float32)


def rotate(
    x: jax.Array, positions: jax.Array, frequencies: jax.Array, *, magnitude: float = 1.0,
    interleaved: bool = False,
) -> jax.Array:
  """Returns [R, L, N, H] heads rotated by their positions [R, L].

  Args:
    x: queries or keys. With F frequencies the first 2 F dimensions of a head are rotated.
    positions: of the tokens in their sequences.
    frequencies: [F], from `frequencies`.
    magnitude: what the rotated dimensions are multiplied by.
    interleaved: whether a pair is two neighbours; else it is one of each half.
  """
  half = frequencies.shape[0]
  angles = jnp.einsum("rl,h->rlh", positions.astype(jnp.float32), frequencies)[:, :, None]
  # Once for all heads: compilers would otherwise work them out again for each.
  sin, cos = jax.lax.optimization_barrier((magnitude * jnp.sin(angles), magnitude * jnp.cos(angles)))
  # A pair turns as itself times cos plus its other half times -sin or sin: the halves change places,
  # which CPUs do in vectors, where they put pieces together number by number.
  turned, rest = x[..., :2 * half], x[..., 2 * half:]
  pairs, axis = ((half, 2), -1) if interleaved else ((2, half), -2)
  pair = turned.reshape(*x.shape[:-1], *pairs)
  sin = jnp.stack((-sin, sin), axis=axis)
  pair = pair * jnp.expand_dims(cos, axis) + jnp.flip(pair, axis) * sin
  turned = pair.reshape(turned.shape).astype(x.dtype)
  return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
