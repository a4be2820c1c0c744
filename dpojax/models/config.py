"""The dimensions and choices that make a decoder, one dataclass for all families."""

import dataclasses

POSITIONS = ("rotary", "learned")
NORMS = ("rms", "layer")
MLPS = ("swiglu", "gelu")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only Transformer. `llama_style` and `gpt2_style` fill in the two families' choices.

  Attributes:
    vocab_size: `V`, ids the embedding holds.
    width: `D`, size of the residual stream.
    layers: number of blocks.
    heads: `N`, query heads.
    kv_heads: key and value heads; a divisor of `heads` (grouped-query attention).
    head_size: `H`; width / heads in most families.
    mlp_width: hidden size of the MLP.
    max_positions: longest sequence; the size of the table when positions are learned.
    positions: 'rotary' or 'learned'.
    norm: 'rms' or 'layer'.
    mlp: 'swiglu' or 'gelu' (the tanh form, as GPT-2).
    biases: whether projections and MLP have biases.
    tie_embeddings: whether the output embedding is the input embedding.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the variance in norms.
    dtype: compute dtype, 'float32' or 'bfloat16'; parameters are float32.
    remat: what the backward pass recomputes: 'none', 'full' (each block) or 'dots' (all but
      matrix products).
    scan_layers: one compiled block for all layers instead of a copy a layer.
    reward_head: adds a scalar head on hidden states, for reward models.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  mlp_width: int
  max_positions: int
  positions: str = "rotary"
  norm: str = "rms"
  mlp: str = "swiglu"
  biases: bool = False
  tie_embeddings: bool = False
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  dtype: str = "float32"
  remat: str = "none"
  scan_layers: bool = True
  reward_head: bool = False

  def __post_init__(self):
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width",
                 "max_positions"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"model.{name} is {value!r}; it must be a positive integer")
    if self.heads % self.kv_heads:
      raise ValueError(
          f"model.heads is {self.heads} and model.kv_heads {self.kv_heads}; "
          "kv_heads must divide heads")
    if self.positions == "rotary" and self.head_size % 2:
      raise ValueError(f"model.head_size is {self.head_size}; rotary positions need an even one")
    for name, allowed in (("positions", POSITIONS), ("norm", NORMS), ("mlp", MLPS),
                          ("dtype", DTYPES), ("remat", REMATS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
            f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")


def llama_style(
    *, vocab_size: int, width: int, layers: int, heads: int, max_positions: int,
    kv_heads: int | None = None, **changes
) -> ModelConfig:
  """RMSNorm, rotary positions, SwiGLU of 8/3 width rounded up to 32, no biases."""
  return ModelConfig(**{**dict(
      vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads or heads,
      head_size=width // heads, mlp_width=-(-width * 8 // 3 // 32) * 32,
      max_positions=max_positions), **changes})


def gpt2_style(
    *, vocab_size: int, width: int, layers: int, heads: int, max_positions: int,
    kv_heads: int | None = None, **changes
) -> ModelConfig:
  """LayerNorm, learned positions, GELU of four times the width, biases, tied embeddings."""
  return ModelConfig(**{**dict(
      vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads or heads,
      head_size=width // heads, mlp_width=4 * width, max_positions=max_positions,
      positions="learned", norm="layer", mlp="gelu", biases=True, tie_embeddings=True), **changes})
