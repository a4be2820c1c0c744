"""Published model families as tables of differences: their config.json and their tensors' names.

A family reads a config.json into the one `ModelConfig`, and names for each parameter of the one
decoder the tensor that holds it. Values are those of `transformers`, defaults included.
"""

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dpojax.models.config import LARGEST, ROPE_SCALINGS, ModelConfig, RopeScaling
from dpojax.runtime.errors import UserError

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Dtypes of tensors and their names in safetensors files."""


class HuggingFaceError(UserError, ValueError):
  """A folder cannot be read or written; the message names the file, the value and the fix."""


def shown(value: Any) -> str:
  """Returns a value for a message, cut where it is long."""
  return str(value)[:200] if isinstance(value, Exception) else _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


class Tensor(NamedTuple):
  """Where a parameter lies in a folder.

  Attributes:
    name: the tensor's; {} stands for the layer.
    shape: its dimensions, in the letters of `dimensions`.
    part: (tensor, config) -> the parameter but for its shape: a view, never a copy, so that writing
      into it writes the tensor.
  """

  name: str
  shape: str
  part: Callable[[np.ndarray, ModelConfig], np.ndarray] = lambda x, config: x


class Family(NamedTuple):
  """One architecture of `transformers`.

  Attributes:
    architecture: the class in config.json.
    read: config.json -> `ModelConfig`.
    prefix: of the tensors of the model without its head; a folder of the bare model drops it.
    tensors: parameter -> `Tensor`; parameters of a block are named without their layer. A family
      that has none of a kind of parameter may list it all the same.
    aliases: other names a tensor has in some folders.
    ignored: ends of the names of tensors that hold no parameter.
  """

  architecture: str
  read: Callable[["Settings"], ModelConfig]
  prefix: str
  tensors: dict[str, Tensor]
  aliases: dict[str, str] = {}
  ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

  @property
  def inputs_first(self) -> bool:
    """Whether matrices are [inputs, outputs], the Conv1D of GPT-2, not [outputs, inputs]."""
    return self.tensors["up/kernel"].shape == "D F"


INTEGERS = {
  key: LARGEST[ours]
  for ours, keys in {
    "vocab_size": ["vocab_size"],
    "width": ["hidden_size", "n_embd"],
    "layers": ["num_hidden_layers", "n_layer", "max_window_layers", "sliding_window_pattern"],
    "heads": ["num_attention_heads", "n_head"],
    "kv_heads": ["num_key_value_heads"],
    "head_size": ["head_dim", "rotary_dim"],
    "mlp_width": ["intermediate_size", "n_inner"],
    "max_positions": [
      "max_position_embeddings",
      "n_positions",
      "sliding_window",
      "original_max_position_embeddings",
    ],
  }.items()
  for key in keys
}
"""Keys of a config.json that are integers, and what they may be at most; 0 and null have meanings."""

NUMBERS = (
  "rms_norm_eps",
  "layer_norm_eps",
  "layer_norm_epsilon",
  "rope_theta",
  "rope_local_base_freq",
  "rotary_emb_base",
  "rotary_pct",
  "partial_rotary_factor",
  "query_pre_attn_scalar",
  "attn_logit_softcapping",
  "final_logit_softcapping",
)
"""Keys that are numbers, from 0 to `LARGEST_NUMBER`."""

# No number of a published config comes near it; infinities, and what a float32 does not hold, go beyond.
LARGEST_NUMBER = 1e12

BOOLEANS = (
  "tie_word_embeddings",
  "attention_bias",
  "mlp_bias",
  "use_sliding_window",
  "use_parallel_residual",
  "scale_attn_weights",
)


class Settings:
  """A config.json being read; keys that nobody asks for are kept in the file and change nothing."""

  def __init__(self, values: dict[str, Any]):
    """Takes the values.

    Raises:
      HuggingFaceError: a number is none, or beyond any model's: told before anything is made of it.
    """
    self.values = values
    for key, value in values.items():
      if key in INTEGERS and value is not None and not (type(value) is int and 0 <= value <= INTEGERS[key]):
        raise HuggingFaceError(
          f'config.json has "{key}": {shown(value)}; it must be an integer from 0 to {INTEGERS[key]}'
        )
      if key in BOOLEANS and value not in (None, False, True):
        raise HuggingFaceError(f'config.json has "{key}": {shown(value)}; it must be true or false')
    _check_numbers(values)

  def get(self, key: str, default: Any = ...) -> Any:
    """Returns a value: the default where the key is not there, None where it is null.

    Raises:
      HuggingFaceError: the key is not there and has no default.
    """
    if key in self.values:
      return self.values[key]
    if default is ...:
      raise HuggingFaceError(f'config.json has no "{key}"; it needs one')
    return default

  def one_of(self, key: str, default: Any, meanings: dict) -> Any:
    """Returns what a value means.

    Raises:
      HuggingFaceError: the value has no meaning here.
    """
    value = self.get(key, default)
    if value not in meanings:
      raise HuggingFaceError(
        f'config.json has "{key}": {shown(value)}, which is not supported; supported are '
        f"{', '.join(map(repr, meanings))}"
      )
    return meanings[value]

  def refuse(self, **harmless: tuple) -> None:
    """Refuses keys with values other than those that leave the model as it is; None always does."""
    for key, values in harmless.items():
      if self.get(key, None) not in (None, *values):
        raise HuggingFaceError(f'config.json has "{key}": {shown(self.get(key))}, which is not supported')


def _check_numbers(values: dict[str, Any]) -> None:
  """Refuses what is no number where one belongs, in the rotary parameters too."""
  for key, value in values.items():
    if key in ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention"):
      if not isinstance(value, (dict, type(None))):
        raise HuggingFaceError(f'config.json has "{key}": {shown(value)}; it must be an object')
      for name, number in (value or {}).items():
        if type(number) in (int, float) and not abs(number) <= LARGEST_NUMBER:
          raise HuggingFaceError(
            f'config.json has "{name}": {shown(number)}; it must be at most {LARGEST_NUMBER:g}'
          )
      _check_numbers(value or {})
    elif (
      key in NUMBERS
      and value is not None
      and not (type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER)
    ):
      raise HuggingFaceError(
        f'config.json has "{key}": {shown(value)}; it must be a number from 0 to {LARGEST_NUMBER:g}'
      )


def dimensions(config: ModelConfig, shape: str) -> tuple[int, ...]:
  """Returns the sizes of a shape such as "A D" or "3D A".

  V vocabulary, P positions, D width, A all heads, K all key heads, H one head, F hidden of the MLP.
  """
  sizes = dict(
    V=config.vocab_size,
    P=config.max_positions,
    D=config.width,
    H=config.head_size,
    A=config.heads * config.head_size,
    K=config.kv_heads * config.head_size,
    F=config.mlp_width,
  )
  return tuple(int(size[:-1] or 1) * sizes[size[-1]] for size in shape.split())


def transposed(x: np.ndarray, config: ModelConfig) -> np.ndarray:
  """A matrix [outputs, inputs], as `torch.nn.Linear` keeps it."""
  # torch multiplies x W^T; our kernels are [inputs, outputs]. A transposed view costs nothing until it is
  # placed.
  return x.T


def third(i: int) -> Callable:
  """Query (0), key or value of GPT-2's one matrix [D, 3 D], and of its bias."""

  def part(x, config):
    return x[..., i * config.width : (i + 1) * config.width]

  return part


def third_of_each_head(i: int) -> Callable:
  """Query (0), key or value of NeoX's one matrix [N 3 H, D], and of its bias, as [..., N, H]."""

  def part(x, config):
    # NeoX keeps query, key and value of one head together; GPT-2 keeps all queries, then all keys, then all
    # values.
    heads = x.reshape(config.heads, 3, config.head_size, *x.shape[1:])[:, i]
    return np.moveaxis(heads, -1, 0) if x.ndim == 2 else heads

  return part


def _linears(names: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
  """Kernel and bias of `torch.nn.Linear`s: {ours: (theirs, outputs and inputs)}."""
  tensors = {}
  for ours, (theirs, shape) in names.items():
    tensors[f"{ours}/kernel"] = Tensor(f"{theirs}.weight", shape, transposed)
    tensors[f"{ours}/bias"] = Tensor(f"{theirs}.bias", shape.split()[0])
  return tensors


def _norms(names: dict[str, str], shape: str = "D") -> dict[str, Tensor]:
  """Scale and bias of norms: {ours: theirs}."""
  tensors = {}
  for ours, theirs in names.items():
    tensors[f"{ours}/scale"] = Tensor(f"{theirs}.weight", shape)
    tensors[f"{ours}/bias"] = Tensor(f"{theirs}.bias", shape)
  return tensors


LLAMA = {
  "embed/embedding": Tensor("model.embed_tokens.weight", "V D"),
  "head": Tensor("lm_head.weight", "V D"),
  **_norms(
    {
      "final_norm": "model.norm",
      "attention_norm": "model.layers.{}.input_layernorm",
      "mlp_norm": "model.layers.{}.post_attention_layernorm",
    }
  ),
  **_norms(
    {"query_norm": "model.layers.{}.self_attn.q_norm", "key_norm": "model.layers.{}.self_attn.k_norm"}, "H"
  ),
  **_linears(
    {
      "query": ("model.layers.{}.self_attn.q_proj", "A D"),
      "key": ("model.layers.{}.self_attn.k_proj", "K D"),
      "value": ("model.layers.{}.self_attn.v_proj", "K D"),
      "attention_out": ("model.layers.{}.self_attn.o_proj", "D A"),
      "gate": ("model.layers.{}.mlp.gate_proj", "F D"),
      "up": ("model.layers.{}.mlp.up_proj", "F D"),
      "down": ("model.layers.{}.mlp.down_proj", "D F"),
    }
  ),
}

# Of the same name as Llama's norm before the MLP, but behind attention: Gemma 2 has four norms a layer.
GEMMA2 = LLAMA | _norms(
  {
    "attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
  }
)

GPT2 = {
  "embed/embedding": Tensor("transformer.wte.weight", "V D"),
  "positions/embedding": Tensor("transformer.wpe.weight", "P D"),
  "head": Tensor("lm_head.weight", "V D"),
  **_norms(
    {
      "final_norm": "transformer.ln_f",
      "attention_norm": "transformer.h.{}.ln_1",
      "mlp_norm": "transformer.h.{}.ln_2",
    }
  ),
  **{
    f"{name}/{leaf}": Tensor(f"transformer.h.{{}}.attn.c_attn.{theirs}", shape, third(i))
    for i, name in enumerate(("query", "key", "value"))
    for leaf, theirs, shape in (("kernel", "weight", "D 3D"), ("bias", "bias", "3D"))
  },
  "attention_out/kernel": Tensor("transformer.h.{}.attn.c_proj.weight", "D D"),
  "attention_out/bias": Tensor("transformer.h.{}.attn.c_proj.bias", "D"),
  "up/kernel": Tensor("transformer.h.{}.mlp.c_fc.weight", "D F"),
  "up/bias": Tensor("transformer.h.{}.mlp.c_fc.bias", "F"),
  "down/kernel": Tensor("transformer.h.{}.mlp.c_proj.weight", "F D"),
  "down/bias": Tensor("transformer.h.{}.mlp.c_proj.bias", "D"),
}

GPTJ = {
  "embed/embedding": Tensor("transformer.wte.weight", "V D"),
  "head": Tensor("lm_head.weight", "V D"),
  "head_bias": Tensor("lm_head.bias", "V"),
  **_norms({"final_norm": "transformer.ln_f", "attention_norm": "transformer.h.{}.ln_1"}),
  **_linears(
    {
      "query": ("transformer.h.{}.attn.q_proj", "A D"),
      "key": ("transformer.h.{}.attn.k_proj", "K D"),
      "value": ("transformer.h.{}.attn.v_proj", "K D"),
      "attention_out": ("transformer.h.{}.attn.out_proj", "D A"),
      "up": ("transformer.h.{}.mlp.fc_in", "F D"),
      "down": ("transformer.h.{}.mlp.fc_out", "D F"),
    }
  ),
}

NEOX = {
  "embed/embedding": Tensor("gpt_neox.embed_in.weight", "V D"),
  "head": Tensor("embed_out.weight", "V D"),
  **_norms(
    {
      "final_norm": "gpt_neox.final_layer_norm",
      "attention_norm": "gpt_neox.layers.{}.input_layernorm",
      "mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    }
  ),
  **{
    f"{name}/{leaf}": Tensor(
      f"gpt_neox.layers.{{}}.attention.query_key_value.{theirs}", shape, third_of_each_head(i)
    )
    for i, name in enumerate(("query", "key", "value"))
    for leaf, theirs, shape in (("kernel", "weight", "3A D"), ("bias", "bias", "3A"))
  },
  **_linears(
    {
      "attention_out": ("gpt_neox.layers.{}.attention.dense", "D A"),
      "up": ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "F D"),
      "down": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "D F"),
    }
  ),
}

PLAIN = {"gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
GATED = {
  "silu": "swiglu",
  "swish": "swiglu",
  "gelu_pytorch_tanh": "geglu",
  "gelu_new": "geglu",
  "gelu": "geglu_exact",
}
"""Activations of MLPs without and with a gate."""


def _gpt2(settings: Settings, **changes) -> ModelConfig:
  settings.refuse(scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,))
  width, heads = settings.get("n_embd"), settings.get("n_head")
  return ModelConfig(
    **dict(
      vocab_size=settings.get("vocab_size"),
      width=width,
      layers=settings.get("n_layer"),
      heads=heads,
      kv_heads=heads,
      head_size=width // heads,
      mlp_width=settings.get("n_inner", None) or 4 * width,
      max_positions=settings.get("n_positions"),
      positions="learned",
      norm="layer",
      norm_eps=settings.get("layer_norm_epsilon", 1e-5),
      biases="all",
      mlp=settings.one_of("activation_function", "gelu_new", PLAIN),
      attention_scale=0.0 if settings.get("scale_attn_weights", True) else 1.0,
      tie_embeddings=settings.get("tie_word_embeddings", True),
    )
    | changes
  )


def _gptj(settings: Settings) -> ModelConfig:
  return _gpt2(
    settings,
    positions="interleaved",
    rotary_size=settings.get("rotary_dim", 64),
    residual="shared",
    biases="mlp",
    attention_scale=0.0,
    head_bias=True,
    tie_embeddings=settings.get("tie_word_embeddings", False),
  )


def _neox(settings: Settings) -> ModelConfig:
  width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
  rope = _rope(
    settings,
    {
      "rope_theta": settings.get("rotary_emb_base", 10000.0),
      "partial_rotary_factor": settings.get("rotary_pct", 0.25),
    },
  )
  rotary_size = int(width // heads * rope.pop("fraction"))
  return ModelConfig(
    vocab_size=settings.get("vocab_size"),
    width=width,
    layers=settings.get("num_hidden_layers"),
    heads=heads,
    kv_heads=heads,
    head_size=width // heads,
    mlp_width=settings.get("intermediate_size"),
    max_positions=settings.get("max_position_embeddings"),
    rotary_size=rotary_size,
    norm="layer",
    norm_eps=settings.get("layer_norm_eps", 1e-5),
    residual="parallel" if settings.get("use_parallel_residual", True) else "sequential",
    mlp=settings.one_of("hidden_act", "gelu", PLAIN),
    biases="all" if settings.get("attention_bias", True) else "mlp",
    tie_embeddings=settings.get("tie_word_embeddings", False),
    **rope,
  )


def _llama(settings: Settings, **changes) -> ModelConfig:
  width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
  attention, mlp = settings.get("attention_bias", False), settings.get("mlp_bias", False)
  rope = {}
  if "rope_theta" not in changes:
    rope = _rope(settings, {"rope_theta": settings.get("rope_theta", 10000.0)})
    _whole_heads(rope.pop("fraction"))
  return ModelConfig(
    **dict(
      vocab_size=settings.get("vocab_size"),
      width=width,
      layers=settings.get("num_hidden_layers"),
      heads=heads,
      kv_heads=settings.get("num_key_value_heads", None) or heads,
      head_size=settings.get("head_dim", None) or width // heads,
      mlp_width=settings.get("intermediate_size"),
      max_positions=settings.get("max_position_embeddings"),
      norm_eps=settings.get("rms_norm_eps", 1e-6),
      biases={(0, 0): "none", (1, 0): "attention", (0, 1): "mlp", (1, 1): "all"}[attention, mlp],
      mlp=changes.get("mlp") or settings.one_of("hidden_act", "silu", GATED),
      tie_embeddings=settings.get("tie_word_embeddings", False),
    )
    | rope
    | changes
  )


def _mistral(settings: Settings) -> ModelConfig:
  return _llama(
    settings,
    kv_heads=settings.get("num_key_value_heads", 8) or settings.get("num_attention_heads"),
    layer_windows=(settings.get("sliding_window", 4096) or 0,),
  )


def _qwen2(settings: Settings, **changes) -> ModelConfig:
  window = settings.get("sliding_window", 4096) if settings.get("use_sliding_window", False) else 0
  return _llama(
    settings,
    **dict(
      biases="qkv",
      layer_windows=_windows(settings, window, lambda layer: layer >= settings.get("max_window_layers", 28)),
    )
    | changes,
  )


def _qwen3(settings: Settings) -> ModelConfig:
  biases = "attention" if settings.get("attention_bias", False) else "none"
  return _qwen2(settings, biases=biases, head_size=settings.get("head_dim", 128), query_key_norms=True)


def _gemma(settings: Settings, **changes) -> ModelConfig:
  settings.refuse(use_bidirectional_attention=(False,))
  return _llama(
    settings,
    **dict(
      head_size=settings.get("head_dim", 256),
      norm="rms_offset",
      mlp="geglu",
      embedding_scale=settings.get("hidden_size") ** 0.5,
      tie_embeddings=settings.get("tie_word_embeddings", True),
    )
    | changes,
  )


def _gemma1(settings: Settings) -> ModelConfig:
  for key in ("hidden_act", "hidden_activation"):  # 'gelu' was written where the tanh form is meant
    settings.one_of(key, None, {None: 0, "gelu": 0, "gelu_pytorch_tanh": 0})
  return _gemma(settings)


def _gemma2(settings: Settings, **changes) -> ModelConfig:
  return _gemma(
    settings,
    **dict(
      mlp=settings.one_of("hidden_activation", "gelu_pytorch_tanh", GATED),
      post_norms=True,
      attention_scale=settings.get("query_pre_attn_scalar", 256) ** -0.5,
      attention_soft_cap=settings.get("attn_logit_softcapping", 50.0) or 0.0,
      logit_soft_cap=settings.get("final_logit_softcapping", 30.0) or 0.0,
      layer_windows=_windows(settings, settings.get("sliding_window", 4096), lambda layer: layer % 2 == 0),
    )
    | changes,
  )


def _gemma3(settings: Settings) -> ModelConfig:
  settings.refuse(attn_logit_softcapping=())
  pattern = settings.get("sliding_window_pattern", 6)
  # Newer files tell rotary parameters by kind of layer, older ones each by a key of its own.
  parameters = settings.get("rope_parameters", None) or {}
  wide = _rope(
    settings, {"rope_theta": settings.get("rope_theta", 1e6)}, parameters.get("full_attention") or {}
  )
  local = _rope(
    Settings({}),
    {"rope_theta": settings.get("rope_local_base_freq", 1e4)},
    parameters.get("sliding_attention") or {},
  )
  _whole_heads(wide.pop("fraction"))
  if local["rope_scaling"] is not None:
    raise HuggingFaceError(
      "config.json scales the rotary positions of layers with a window, which is not supported"
    )
  return _gemma2(
    settings,
    query_key_norms=True,
    attention_soft_cap=0.0,
    logit_soft_cap=settings.get("final_logit_softcapping", None) or 0.0,
    local_rope_theta=local["rope_theta"],
    layer_windows=_windows(
      settings, settings.get("sliding_window", 4096), lambda layer: (layer + 1) % pattern
    ),
    **wide,
  )


def _windows(settings: Settings, window: int | None, has_one: Callable) -> tuple[int, ...]:
  """The shortest pattern of windows that gives every layer its own."""
  layers = settings.get("num_hidden_layers")
  kinds = settings.get("layer_types", None) or [
    "sliding_attention" if has_one(layer) else "full_attention" for layer in range(layers)
  ]
  unknown = set(kinds) - {"sliding_attention", "full_attention"}
  if unknown or len(kinds) != layers:
    raise HuggingFaceError(
      f'config.json has "layer_types": {shown(kinds)}, which is not supported; it must hold '
      "'sliding_attention' or 'full_attention' for each layer"
    )
  windows = [(window or 0) if kind == "sliding_attention" else 0 for kind in kinds]
  # The shorter the pattern, the fewer blocks are compiled: see `ModelConfig.scanned_layers`.
  period = next(p for p in range(1, layers + 1) if windows[p:] == windows[:-p])
  return tuple(windows[:period])


def _rope(settings: Settings, defaults: dict, parameters: dict | None = None) -> dict:
  """`rope_theta`, `rope_scaling` and the rotated fraction of a head, from either form of the file.

  One form has "rope_theta" and "rope_scaling", the newer one "rope_parameters" with both.
  """
  if parameters is None:
    parameters = settings.get("rope_parameters", None) or {}
  old = settings.get("rope_scaling", None) or {}
  values = defaults | {key: value for key, value in (parameters | old).items() if value is not None}
  rope = {
    "rope_theta": float(values["rope_theta"]),
    "rope_scaling": None,
    "fraction": values.get("partial_rotary_factor", 1.0),
  }
  # "type" is what older files have.
  name = values.get("rope_type", values.get("type", "default"))
  if name == "default":
    return rope
  if name not in ROPE_SCALINGS:
    raise HuggingFaceError(
      f"config.json has rotary positions of type {shown(name)}, which is not supported; supported "
      f"are default, {', '.join(ROPE_SCALINGS)}"
    )
  scaling = {"name": name, "factor": float(values.get("factor", 1.0))}
  if name in ("yarn", "llama3"):
    # Where a file does not tell it, the model's own length is what was stretched from.
    scaling["original_positions"] = (
      settings.get("original_max_position_embeddings", None)
      or values.get("original_max_position_embeddings")
      or settings.get("max_position_embeddings")
    )
  if name == "llama3":
    scaling |= {"low": values["low_freq_factor"], "high": values["high_freq_factor"]}
  if name == "yarn":
    scaling |= {
      "low": values.get("beta_slow") or 1,
      "high": values.get("beta_fast") or 32,
      "truncate": values.get("truncate", True),
      "magnitude": _yarn_magnitude(values),
    }
  return rope | {"rope_scaling": RopeScaling(**scaling)}


def _yarn_magnitude(values: dict) -> float:
  """0.1 ln(factor) + 1 (Peng et al. 2023, Eq. 22), unless the file has another."""
  if values.get("attention_factor") is not None:
    return float(values["attention_factor"])
  grown = lambda weight: 0.1 * weight * np.log(values["factor"]) + 1 if values["factor"] > 1 else 1.0
  if values.get("mscale") and values.get("mscale_all_dim"):
    return float(grown(values["mscale"]) / grown(values["mscale_all_dim"]))
  return float(grown(1))


def _whole_heads(fraction: float) -> None:
  if fraction != 1:
    raise HuggingFaceError(
      f'config.json has "partial_rotary_factor": {fraction}, which this family does not support'
    )


# Older files hold masks and frequencies as well, which are no parameters.
_GPT_BUFFERS = (".attn.bias", ".attn.masked_bias")
_NEOX_BUFFERS = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")

FAMILIES = {
  "gpt2": Family("GPT2LMHeadModel", _gpt2, "transformer.", GPT2, ignored=_GPT_BUFFERS),
  "gptj": Family("GPTJForCausalLM", _gptj, "transformer.", GPTJ, ignored=_GPT_BUFFERS),
  "gpt_neox": Family(
    "GPTNeoXForCausalLM", _neox, "gpt_neox.", NEOX, {"embed_out.weight": "lm_head.weight"}, _NEOX_BUFFERS
  ),
  "llama": Family("LlamaForCausalLM", _llama, "model.", LLAMA),
  "mistral": Family("MistralForCausalLM", _mistral, "model.", LLAMA),
  "qwen2": Family("Qwen2ForCausalLM", _qwen2, "model.", LLAMA),
  "qwen3": Family("Qwen3ForCausalLM", _qwen3, "model.", LLAMA),
  "gemma": Family("GemmaForCausalLM", _gemma1, "model.", LLAMA),
  "gemma2": Family("Gemma2ForCausalLM", _gemma2, "model.", GEMMA2),
  "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, "model.", GEMMA2),
}
"""Families by the "model_type" of their config.json."""


def family_of(values: dict[str, Any]) -> Family:
  """Returns the family of a config.json.

  Raises:
    HuggingFaceError: it is none of those supported.
  """
  kind, architectures = values.get("model_type"), values.get("architectures") or []
  if (
    not isinstance(kind, str)
    or not isinstance(architectures, list)
    or not all(isinstance(each, str) for each in architectures)
  ):
    raise HuggingFaceError(
      f'config.json has "model_type": {shown(kind)} and "architectures": {shown(architectures)}; they '
      "must be a name and a list of names"
    )
  family = FAMILIES.get(kind)
  if family is None or (architectures and family.architecture not in architectures):
    raise HuggingFaceError(
      f"the model is a {', '.join(architectures)[:200] or 'model'} of type {shown(kind)}, which is not "
      f"supported; supported are {', '.join(f.architecture for f in FAMILIES.values())}"
    )
  return family


def read_config(values: dict[str, Any]) -> ModelConfig:
  """Returns the `ModelConfig` of a config.json.

  Raises:
    HuggingFaceError: the architecture, or a value, is not supported.
  """
  settings = Settings(values)
  settings.refuse(quantization_config=())
  try:
    return family_of(values).read(settings)
  except HuggingFaceError:
    raise
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise HuggingFaceError(f"config.json makes no model: {repr(error)[:200]}") from error


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Returns a config.json for a model of our own dimensions, as a LLaMA or a GPT-2.

  Raises:
    HuggingFaceError: it is neither.
  """
  llama = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_size,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "attention_bias": config.biases in ("attention", "all"),
    "mlp_bias": config.biases in ("mlp", "all"),
    "tie_word_embeddings": config.tie_embeddings,
  }
  gpt2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "vocab_size": config.vocab_size,
    "n_embd": config.width,
    "n_layer": config.layers,
    "n_head": config.heads,
    "n_inner": config.mlp_width,
    "n_positions": config.max_positions,
    "layer_norm_epsilon": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }
  # Written, read again and compared: what the form cannot say would be lost otherwise.
  ours = _without_how(config)
  for values in (llama, gpt2):
    if _without_how(read_config(values)) == ours:
      return values
  raise HuggingFaceError(
    "the model is neither a LLaMA nor a GPT-2 and was not read from a Hugging Face folder, so "
    f"there is no config.json for it: {config}"
  )


def _without_how(config: ModelConfig) -> dict[str, Any]:
  """The config without what says how it is computed."""
  how = ("dtype", "remat", "attention", "scan_layers", "reward_head", "published")
  return {name: value for name, value in vars(config).items() if name not in how}
