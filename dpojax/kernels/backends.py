"""Which form of attention computes a row: dense, in blocks, or fused. All give the same numbers."""

import jax

from dpojax.kernels import blockwise, fused
from dpojax.kernels import platform as platform_lib
from dpojax.kernels.attention import TokenIds, attention

SHORT = 2 * blockwise.BLOCK
"""Tokens of a row up to which dense scores are the cheapest form."""


def attention_backend(asked: str, *, platform: str, length: int = 0, fits: bool = True) -> str:
  """Returns the form that runs: 'dense', 'blockwise' or 'fused'.

  Args:
    asked: `ModelConfig.attention`.
    platform: what computes: 'cpu', 'gpu' or 'tpu'.
    length: tokens of a row.
    fits: whether the fused form finds room for such a row.

  Raises:
    ValueError: the fused form is asked for and cannot run here.
  """
  if asked == "fused" and platform not in fused.PLATFORMS:
    raise ValueError(
      f"model.attention is 'fused', which under jax {jax.__version__} runs on "
      f"{' and '.join(fused.PLATFORMS)}, not on {platform}; set model.attention='auto'"
    )
  if asked == "fused" and not fits:
    raise ValueError(
      f"model.attention is 'fused' but rows of {length} tokens do not fit this {platform}'s vector "
      "memory; set model.attention='auto', or a smaller row_length"
    )
  if asked != "auto":
    return asked
  if length <= SHORT:
    return "dense"
  return "fused" if platform in fused.PLATFORMS and fits else "blockwise"


def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: TokenIds, *, asked: str, **choices) -> jax.Array:
  """Returns `attention.attention` of tokens among themselves, in the form that suits; padding is any.

  Args:
    q, k, v, ids: see `blockwise.blockwise_attention`.
    asked: `ModelConfig.attention`.
    **choices: scale, window and soft_cap.
  """
  platform = platform_lib.platform()
  fits = q.shape[1] <= SHORT or fused.fits(q, k, platform)  # what is traced for shapes alone is short
  form = attention_backend(asked, platform=platform, length=q.shape[1], fits=fits)
  if form == "fused":
    return fused.fused_attention(q, k, v, ids, **choices)
  if form == "blockwise":
    return blockwise.blockwise_attention(q, k, v, ids, **choices)
  return attention(q, k, v, ids, ids, **choices)
