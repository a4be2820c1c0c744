"""What XLA is told before it is first used: sums that it gets wrong on CPUs unless it is told."""

import os

import jax
import jax.numpy as jnp

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"

WRONG_SUMS = (
  "XLA adds up some sums wrong in this process, on a CPU and without a word: set "
  f'os.environ["XLA_FLAGS"] = "{_FLAG}=-reduce" before jax is first used, as every command does'
)


def keep_sums_right() -> None:
  """Keeps XLA from giving sums to YNNPACK, which on CPUs adds some of them up wrong and says nothing.

  jaxlib 0.10.2 to 0.12.0 do, where products with a constant matrix or other sums go into a sum: it comes out
  a fraction of what it is, or at 1e22 (jax-ml/jax issue 39103, of which a part is mended). Derivatives of
  sums are full of such products: the gradient of a norm's scale was a seventh of itself. Matrix products
  stay with YNNPACK. To be called before jax is first used; what XLA_FLAGS says of it stands.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if _FLAG not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=-reduce".strip()


def sums_are_right() -> bool:
  """Whether this process compiles a sum right that YNNPACK adds up wrong; not tried where it was told."""
  if _FLAG in os.environ.get("XLA_FLAGS", "") or jax.default_backend() != "cpu":
    return True
  x = jnp.ones((5, 64, 64))
  by_scale = jax.jit(jax.grad(lambda scale: jnp.sum((x * scale) @ jnp.ones((64, 7)))))(jnp.ones(64))
  return bool(jnp.all(by_scale == 5 * 64 * 7))
