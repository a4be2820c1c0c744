"""GGUF files, the form of llama.cpp, as Hugging Face folders: metadata to config.json, tensors dequantised.

The architectures are a table. What a file says that the table does not know is refused by name, so
that nothing that changes the model is passed over. The `gguf` package reads and dequantises.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dpojax.models import families, hf, rotary
from dpojax.models.config import RopeScaling
from dpojax.models.families import HuggingFaceError

TENSORS = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
"""Modules of a file and of a folder; those of layer n follow `blk.n.` and `model.layers.n.`."""

CONFIG = {
  "context_length": "max_position_embeddings",
  "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "rope.freq_base": "rope_theta",
}
"""Keys of a file, behind its architecture, and of a config.json."""

CHECKED = (
  "vocab_size",
  "rope.dimension_count",
  "attention.key_length",
  "attention.value_length",
  "rope.scaling.type",
  "rope.scaling.factor",
)
"""Other keys that are understood: they agree with the tensors, or stretch positions evenly."""


PLAIN = {"F64", "F32", "F16", "BF16"}
"""Types of tensors that are numbers, not blocks of quantised ones."""

ROPE_FACTORS = "rope_freqs.weight"
"""What each rotary frequency of a Llama 3.1 is divided by; llama.cpp keeps no other word of it."""


class Architecture(NamedTuple):
  """What llama.cpp does to a model of `transformers` of one type.

  Attributes:
    model_type: its config.json's.
    permuted: whether rows of query and key are in the order of neighbours that are rotated together, not
      of halves.
    changes: (tensor names of the file) -> what its config.json says besides.
  """

  model_type: str
  permuted: bool
  changes: Callable[[set[str]], dict[str, Any]] = lambda names: {}


ARCHITECTURES = {
  "llama": Architecture(
    "llama",
    True,
    lambda names: {
      "attention_bias": "blk.0.attn_output.bias" in names,
      "mlp_bias": "blk.0.ffn_up.bias" in names,
    },
  ),
  "qwen2": Architecture("qwen2", False, lambda names: {"use_sliding_window": False}),
  "qwen3": Architecture(
    "qwen3",
    False,
    lambda names: {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in names},
  ),
}
"""By `general.architecture`."""


class File(NamedTuple):
  """A GGUF file. `values` is its metadata, `tensors` the reader's entries by name."""

  path: pathlib.Path
  values: dict[str, Any]
  tensors: dict[str, Any]

  def get(self, key: str) -> Any:
    """Returns a value of the metadata.

    Raises:
      HuggingFaceError: the file has none.
    """
    if key not in self.values:
      raise HuggingFaceError(f"{self.path} has no {key!r} in its metadata; convert the model to GGUF again")
    return self.values[key]

  def quantisation(self) -> dict[str, dict[str, int]]:
    """Returns what a config.json says of weights that were quantised: nothing of others."""
    return {} if self.types().keys() <= PLAIN else {"dequantized_from": self.types()}

  def types(self) -> dict[str, int]:
    """Returns how many tensors are of each type, by its name, the most frequent first."""
    names = [tensor.tensor_type.name for tensor in self.tensors.values()]
    return dict(sorted(((name, names.count(name)) for name in set(names)), key=lambda each: -each[1]))


def read(path: str | os.PathLike) -> File:
  """Returns a file's metadata and where its tensors are.

  Raises:
    HuggingFaceError: there is none, it is no GGUF or damaged, or the gguf package is not there.
  """
  path = pathlib.Path(path)
  try:
    import gguf  # an extra: who reads no such file needs none
  except ImportError as error:
    raise HuggingFaceError(f"{path} is read by the gguf package; pip install 'dpojax[gguf]'") from error
  try:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
      # The reader slices: of a file that was cut off it gives what is there, without a word.
      if tensor.data.nbytes != tensor.n_bytes:
        raise ValueError(f"tensor {name} has {tensor.data.nbytes} bytes of {tensor.n_bytes}")
  except (ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
    raise HuggingFaceError(f"{path} cannot be read as GGUF ({error}); fetch it again") from error
  return File(path, values, tensors)


def config_of(file: File) -> dict[str, Any]:
  """Returns the config.json of a file's model.

  Raises:
    HuggingFaceError: its architecture is not in the table, or a value of its metadata not understood.
  """
  name = file.get("general.architecture")
  if name not in ARCHITECTURES:
    raise HuggingFaceError(
      f"{file.path} is of architecture {name!r}, which is not supported; supported are "
      f"{', '.join(ARCHITECTURES)}: convert the published folder instead"
    )
  architecture = ARCHITECTURES[name]
  ours = {
    key.removeprefix(f"{name}."): value for key, value in file.values.items() if key.startswith(f"{name}.")
  }
  for key, value in ours.items():
    if key not in CONFIG and key not in CHECKED:
      raise HuggingFaceError(f"{file.path} says {name}.{key} = {_short(value)}, which is not supported")
  values = _sizes(file, name, ours)
  return {
    "architectures": [families.FAMILIES[architecture.model_type].architecture],
    "model_type": architecture.model_type,
    "hidden_act": "silu",
    "vocab_size": _vocabulary(file, ours),
    "tie_word_embeddings": "output.weight" not in file.tensors,
    **values,
    **_rope_scaling(file, name, ours, values),
    **architecture.changes(set(file.tensors)),
    "torch_dtype": "float32",
    **file.quantisation(),
  }


def write(folder: str | os.PathLike, file: File, *, dtype: str = "float32", **token_ids) -> dict[str, Any]:
  """Writes a file's model as a Hugging Face folder, a tensor at a time, and returns its config.json.

  Args:
    folder: where to; made if missing.
    file: from `read`.
    dtype: of all tensors.
    **token_ids: bos_token_id and the like, for the config.json; None is left out.

  Raises:
    HuggingFaceError: the file has other tensors than its metadata describe, or one cannot be used.
    DiskError: the disk is full or cannot be written.
  """
  config = (
    config_of(file)
    | {"torch_dtype": dtype}
    | {key: value for key, value in token_ids.items() if value is not None}
  )
  sources = {_name(file, name): name for name in file.tensors if name != ROPE_FACTORS}
  shapes = hf.tensor_shapes(config)
  for what, names in (("lacks", shapes.keys() - sources.keys()), ("has", sources.keys() - shapes.keys())):
    if names:
      raise HuggingFaceError(
        f"{file.path} {what} tensors that its metadata {'ask' if what == 'lacks' else 'do not ask'} for: "
        f"{', '.join(sorted(sources.get(name, name) for name in names)[:5])}"
      )
  for name, source in sources.items():
    # GGUF counts dimensions from the one that lies together.
    shape = tuple(int(n) for n in reversed(file.tensors[source].shape))
    if shape != shapes[name]:
      raise HuggingFaceError(
        f"{file.path}: tensor {source} is {list(shape)} but the metadata make it {list(shapes[name])}"
      )
  heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
  permuted = ARCHITECTURES[file.get("general.architecture")].permuted

  def tensor(name: str) -> np.ndarray:
    values = _dequantized(file, sources[name])
    module = name.split(".")[-2]
    if permuted and module in heads:
      # llama.cpp's converter turned rows so that rotated pairs are neighbours; a Hugging Face Llama has them
      # in halves.
      values = halves_of_neighbours(values, heads[module])
    return _rounded(file, sources[name], values, dtype)

  hf.write_tensors(folder, config, tensor, dtype)
  return config


def halves_of_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
  """Returns rows of heads in which 2 i and 2 i + 1 are rotated together, so that i and H / 2 + i are."""
  pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantized(file: File, name: str) -> np.ndarray:
  import gguf

  tensor = file.tensors[name]
  try:
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
  except (NotImplementedError, ValueError) as error:
    raise HuggingFaceError(
      f"{file.path}: tensor {name} is of type {tensor.tensor_type.name}, which the gguf package cannot "
      f"dequantise ({error})"
    ) from error
  bad = values[~np.isfinite(values)]
  if bad.size:
    raise HuggingFaceError(
      f"{file.path}: tensor {name} holds {bad[0]}, {bad.size} of {values.size} values "
      "are not finite; fetch the file again"
    )
  return values


def _rounded(file: File, name: str, values: np.ndarray, dtype: str) -> np.ndarray:
  with np.errstate(over="ignore"):
    rounded = values.astype(jnp.dtype(dtype))
  if not np.all(np.isfinite(rounded)):
    raise HuggingFaceError(
      f"{file.path}: tensor {name} holds {values[np.abs(values).argmax()]}, which does "
      f"not fit {dtype}; take --dtype=float32"
    )
  return rounded


def _name(file: File, name: str) -> str:
  """Returns what a file's tensor is called in a folder."""
  layer, rest = "", name
  if name.startswith("blk."):
    _, number, rest = name.split(".", 2)
    layer = f"model.layers.{number}."
  module, _, leaf = rest.rpartition(".")
  if module not in TENSORS or leaf not in ("weight", "bias"):
    raise HuggingFaceError(f"{file.path} has a tensor {name}, which is not supported")
  return f"{layer}{TENSORS[module]}.{leaf}"


def _sizes(file: File, name: str, ours: dict[str, Any]) -> dict[str, Any]:
  """Returns the numbers of a config.json: a layer's are those of every layer, and heads are rotated whole."""
  heads = file.get(f"{name}.attention.head_count")
  ours = {"rope.freq_base": 10000.0, "attention.head_count_kv": heads} | ours
  values = {
    theirs: ours.get(key) if key in ours else file.get(f"{name}.{key}") for key, theirs in CONFIG.items()
  }
  for key, value in values.items():
    if isinstance(value, (list, str, bool)) or not value > 0:
      raise HuggingFaceError(f"{file.path} makes {key} {_short(value)}; it must be one number above 0")
  # Not always width over heads: Qwen 3 has wider ones.
  size = ours.get("attention.key_length", values["hidden_size"] // heads)
  for key in ("rope.dimension_count", "attention.value_length"):
    if ours.get(key, size) != size:
      raise HuggingFaceError(
        f"{file.path} says {name}.{key} = {ours[key]} of heads of {size}, which is not supported"
      )
  return {key: _decimal(value) for key, value in values.items()} | {"head_dim": size}


def _vocabulary(file: File, ours: dict[str, Any]) -> int:
  """Returns the rows of the embedding, which every token has one of."""
  if "token_embd.weight" not in file.tensors:
    raise HuggingFaceError(f"{file.path} has no tensor token_embd.weight; convert the model to GGUF again")
  rows = int(file.tensors["token_embd.weight"].shape[-1])
  tokens = len(file.values.get("tokenizer.ggml.tokens", ()))
  for what, count in (("tokens", tokens), ("vocab_size", ours.get("vocab_size", rows))):
    if count > rows:
      raise HuggingFaceError(f"{file.path} has {count} {what} but token_embd.weight {rows} rows")
  return rows


def _rope_scaling(file: File, name: str, ours: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
  """Returns how positions are stretched, as a config.json says it."""
  if ROPE_FACTORS in file.tensors:
    given = _dequantized(file, ROPE_FACTORS)
    factor, of = float(given[-1]), (values["head_dim"], values["rope_theta"])
    # The file has quotients only. They are made again with what Llama 3.1 was published with, and compared.
    llama3 = RopeScaling("llama3", factor, original_positions=8192, low=1.0, high=4.0)
    want = rotary.frequencies(*of) / rotary.frequencies(*of, llama3)
    if given.shape != want.shape or not np.allclose(given, want, rtol=1e-4):
      raise HuggingFaceError(
        f"{file.path}: tensor {ROPE_FACTORS} ends with {factor} and is not what Llama 3.1 divides its "
        "rotary frequencies by, which is not supported"
      )
    return {
      "rope_scaling": {
        "rope_type": llama3.name,
        "factor": factor,
        "low_freq_factor": llama3.low,
        "high_freq_factor": llama3.high,
        "original_max_position_embeddings": llama3.original_positions,
      }
    }
  kind = ours.get("rope.scaling.type", "none")
  if kind == "none":
    return {}
  if kind != "linear":
    raise HuggingFaceError(f"{file.path} says {name}.rope.scaling.type = {kind!r}, which is not supported")
  factor = _decimal(file.get(f"{name}.rope.scaling.factor"))
  return {"rope_scaling": {"rope_type": kind, "factor": factor}}


def _decimal(x: float | int) -> float | int:
  """The shortest decimal of a float32, as people wrote it: 1e-5, not 9.99999974738e-06."""
  return x if isinstance(x, int) else float(str(np.float32(x)))


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else f"{text[:57]}..."
