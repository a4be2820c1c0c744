"""The dimensions and choices that make a decoder, one dataclass for all families."""

import dataclasses
import json
import math

POSITIONS = ("rotary", "interleaved", "learned")
ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")
NORMS = ("rms", "rms_offset", "layer")
RESIDUALS = ("sequential", "parallel", "shared")
MLPS = ("swiglu", "geglu", "geglu_exact", "gelu", "gelu_exact")
BIASES = ("none", "qkv", "attention", "mlp", "all")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "attention", "dots")
ATTENTIONS = ("auto", "blockwise", "fused")

LARGEST = {
  "vocab_size": 2**24,
  "width": 2**18,
  "layers": 2**12,
  "heads": 2**12,
  "kv_heads": 2**12,
  "head_size": 2**14,
  "mlp_width": 2**22,
  "max_positions": 2**31 - 1,
}
"""The dimensions and what they may be at most, well beyond any model: a wrong number is told, not tried."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the length of pretraining; see `models.rotary`.

  Attributes:
    name: 'linear', 'dynamic', 'yarn' or 'llama3'.
    factor: by how much.
    original_positions: longest sequence of pretraining ('yarn', 'llama3').
    low, high: rotations over the original length below which a frequency is stretched wholly and
      above which it is kept ('llama3': low and high frequency factor; 'yarn': beta slow and fast).
    magnitude: sines and cosines are multiplied by it ('yarn').
    truncate: whether the bounds of the ramp are rounded to whole frequencies ('yarn').
  """

  name: str
  factor: float
  original_positions: int = 0
  low: float = 1.0
  high: float = 4.0
  magnitude: float = 1.0
  truncate: bool = True

  def __post_init__(self):
    if self.name not in ROPE_SCALINGS:
      raise ValueError(
        f"model.rope_scaling.name is {self.name!r}; it must be one of {', '.join(ROPE_SCALINGS)}"
      )
    for name in ("factor", "original_positions", "low", "high", "magnitude"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"model.rope_scaling.{name} is {value!r}; it must be a number, not negative")
    if not self.factor:
      raise ValueError("model.rope_scaling.factor is 0; it must be positive")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only Transformer: the dimensions, and each choice in which the families differ.

  `llama_style` and `gpt2_style` fill in two families' choices; `models.hf` reads those of published
  models.

  Attributes:
    vocab_size: `V`, ids the embedding holds.
    width: `D`, size of the residual stream.
    layers: number of blocks.
    heads: `N`, query heads.
    kv_heads: key and value heads; a divisor of `heads` (grouped-query attention).
    head_size: `H`; width / heads in most families.
    mlp_width: hidden size of the MLP.
    max_positions: longest sequence of training; the size of the table when positions are learned.
    positions: 'rotary' (in two halves), 'interleaved' (rotary in neighbours, as GPT-J), 'learned'.
    rotary_size: leading dimensions of a head that are rotated; 0 is all of them.
    rope_theta: base of the rotary frequencies.
    rope_scaling: how they are stretched, or None.
    local_rope_theta: base in layers with a window, never stretched; 0 treats them as all others.
    layer_windows: keys a query sees in its own sequence, itself included, layer by layer and over
      again from the first; 0 is all of them.
    norm: 'rms', 'rms_offset' (times 1 + scale, as Gemma) or 'layer'.
    norm_eps: added to the variance in norms.
    post_norms: whether what attention and MLP add to the residual stream is normed too.
    query_key_norms: whether the heads of queries and keys are normed, before rotation.
    residual: 'sequential', 'parallel' (attention and MLP read the same stream, each behind its own
      norm, as NeoX) or 'shared' (both behind one norm, as GPT-J).
    mlp: 'swiglu', 'geglu' or 'gelu' (the tanh form, as GPT-2), or the latter two with the exact
      form, 'geglu_exact' and 'gelu_exact'.
    biases: which projections have them: 'none', 'qkv', 'attention' (its output too), 'mlp' or
      'all'; True and False stand for 'all' and 'none'.
    attention_scale: what scores are multiplied by; 0 is 1 / sqrt(head_size).
    attention_soft_cap: scores become cap * tanh(score / cap); 0 leaves them.
    embedding_scale: what the input embedding is multiplied by.
    tie_embeddings: whether the output embedding is the input embedding.
    head_bias: whether logits have a bias.
    logit_soft_cap: logits become cap * tanh(logit / cap); 0 leaves them.
    dtype: compute dtype, 'float32' or 'bfloat16'; parameters are float32.
    remat: what the backward pass recomputes: 'none', 'full' (each block), 'attention' (all but
      what attention has mixed, the part that grows with the square of a sequence) or 'dots' (all but
      matrix products and attention). Rows so short that attention is dense recompute it in either.
    attention: the form of attention: 'blockwise' (plain XLA), 'fused' (a kernel, GPUs and TPUs) or
      'auto' (on each machine the faster one, see `kernels.backends`). It belongs to the machine, not to
      the model: `as_dict` leaves it out.
    scan_layers: one compiled block for all layers, or one a window of the pattern, instead of a
      copy a layer.
    reward_head: adds a scalar head on hidden states, for reward models.
    published: what `models.hf` needs to write the folder a model was read from; '' for our own.
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
  rotary_size: int = 0
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  local_rope_theta: float = 0.0
  layer_windows: tuple[int, ...] = (0,)
  norm: str = "rms"
  norm_eps: float = 1e-5
  post_norms: bool = False
  query_key_norms: bool = False
  residual: str = "sequential"
  mlp: str = "swiglu"
  biases: str = "none"
  attention_scale: float = 0.0
  attention_soft_cap: float = 0.0
  embedding_scale: float = 1.0
  tie_embeddings: bool = False
  head_bias: bool = False
  logit_soft_cap: float = 0.0
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  scan_layers: bool = True
  reward_head: bool = False
  published: str = ""

  def __post_init__(self):
    # The forms JSON gives back.
    replace = lambda name, value: object.__setattr__(self, name, value)
    replace("layer_windows", tuple(self.layer_windows))
    if isinstance(self.rope_scaling, dict):
      replace("rope_scaling", RopeScaling(**self.rope_scaling))
    if isinstance(self.biases, bool):
      replace("biases", "all" if self.biases else "none")

    # The numbers first: what follows divides by them.
    for name, largest in LARGEST.items():
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"model.{name} is {value!r}; it must be a positive integer")
      if value > largest:
        raise ValueError(f"model.{name} is {value}; it must be at most {largest}")
    if self.heads % self.kv_heads:
      raise ValueError(
        f"model.heads is {self.heads} and model.kv_heads {self.kv_heads}; kv_heads must divide heads"
      )
    if self.positions != "learned" and self.head_size % 2:
      raise ValueError(f"model.head_size is {self.head_size}; rotary positions need an even one")
    if self.rotary_size % 2 or not 0 <= self.rotary_size <= self.head_size:
      raise ValueError(
        f"model.rotary_size is {self.rotary_size}; it must be even and at most model.head_size, "
        f"{self.head_size}"
      )
    if not self.layer_windows or min(self.layer_windows) < 0:
      raise ValueError(
        f"model.layer_windows is {self.layer_windows}; it must hold a window a layer of the "
        "pattern, 0 for none"
      )
    for name, allowed in (
      ("positions", POSITIONS),
      ("norm", NORMS),
      ("residual", RESIDUALS),
      ("mlp", MLPS),
      ("biases", BIASES),
      ("dtype", DTYPES),
      ("remat", REMATS),
      ("attention", ATTENTIONS),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")

  @property
  def longest(self) -> int | None:
    """The longest sequence the model is defined for, or None where it has no such bound.

    Learned positions end with their table. 'dynamic' frequencies depend on the length of the whole
    sequence beyond it, which a packed row and a cache do not have.
    """
    bounded = self.positions == "learned" or (
      self.rope_scaling is not None and self.rope_scaling.name == "dynamic"
    )
    return self.max_positions if bounded else None

  @property
  def scanned_layers(self) -> int:
    """How many of the first layers are stacked: whole periods of the pattern, if several."""
    period = len(self.layer_windows)
    periods = self.layers // period
    return periods * period if self.scan_layers and (periods > 1 or period == 1) else 0

  def as_dict(self) -> dict:
    """Returns the config as JSON holds it; `ModelConfig(**config.as_dict())` is the model's config.

    Without `attention`: a checkpoint may be read on another machine.
    """
    # Through JSON and back, so that what a checkpoint is compared with has lists where it has.
    settings = dataclasses.asdict(self)
    del settings["attention"]
    return json.loads(json.dumps(settings))


def llama_style(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  max_positions: int,
  kv_heads: int | None = None,
  **changes,
) -> ModelConfig:
  """RMSNorm, rotary positions, SwiGLU of 8/3 width rounded up to 32, no biases."""
  return ModelConfig(
    **{
      **dict(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_size=width // heads,
        mlp_width=-(-width * 8 // 3 // 32) * 32,
        max_positions=max_positions,
      ),
      **changes,
    }
  )


def gpt2_style(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  max_positions: int,
  kv_heads: int | None = None,
  **changes,
) -> ModelConfig:
  """LayerNorm, learned positions, GELU of four times the width, biases, tied embeddings."""
  return ModelConfig(
    **{
      **dict(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_size=width // heads,
        mlp_width=4 * width,
        max_positions=max_positions,
        positions="learned",
        norm="layer",
        mlp="gelu",
        biases="all",
        tie_embeddings=True,
      ),
      **changes,
    }
  )
