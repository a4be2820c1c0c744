"""What numbers of a dtype are summed in."""

import jax.numpy as jnp


def wide_of(dtype) -> jnp.dtype:
  """Returns what products and sums of a dtype are kept in: float32 at least."""
  return jnp.promote_types(dtype, jnp.float32)
