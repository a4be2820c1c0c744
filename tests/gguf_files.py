"""Small GGUF files, written with the gguf package's own writer from models and tokenizers of the tests."""

import gguf

from dpojax.models import hf
from tests.parity import models

SIZES = {
  "vocab_size": 72,
  "hidden_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "intermediate_size": 96,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1000.0,
}
CONFIGS = {
  "llama": SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
  "qwen2": SIZES | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
  "qwen3": SIZES | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
}
"""config.json of the models that `write` can write, by architecture."""

NAMES = {
  "embed_tokens": "token_embd",
  "norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "q_proj": "attn_q",
  "k_proj": "attn_k",
  "v_proj": "attn_v",
  "o_proj": "attn_output",
  "q_norm": "attn_q_norm",
  "k_norm": "attn_k_norm",
  "gate_proj": "ffn_gate",
  "up_proj": "ffn_up",
  "down_proj": "ffn_down",
}


def tensors_of(values):
  """The weights of a config.json, by formula."""
  return {name: models.tensor(name, shape) for name, shape in hf.tensor_shapes(values).items()}


def name_of(name):
  """What llama.cpp calls a tensor."""
  *before, module, leaf = name.split(".")
  layer = f"blk.{before[2]}." if "layers" in before else ""
  return f"{layer}{NAMES[module]}.{leaf}"


def of_neighbours(weights, heads):
  """llama.cpp's `permute`: rows i and H / 2 + i of a head come to stand beside each other."""
  return (
    weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
    .swapaxes(1, 2)
    .reshape(weights.shape)
  )


def tokens_of(tokenizer):
  """A tokenizer's tokens, types and merges, as llama.cpp's converter writes them."""
  model = tokenizer.backend_tokenizer
  special = {token: 3 for token in tokenizer.all_special_tokens}
  vocabulary = model.get_vocab(with_added_tokens=True)
  tokens = sorted(vocabulary, key=vocabulary.get)
  is_byte = lambda token: len(token) == 6 and token.startswith("<0x")
  return tokens, [special.get(token, 6 if is_byte(token) else 1) for token in tokens]


def write(path, values, tensors, kind="F32", *, tokenizer, metadata={}, drop=(), extra={}):
  """Writes a model; matrices are of the kind, such as Q4_1, and norms F32.

  Args:
    path: of the file.
    values: the config.json.
    tensors: weights by the names of a folder.
    kind: of matrices.
    tokenizer: metadata behind `tokenizer.`, from a dict.
    metadata: other keys and values; a value of None leaves a key out.
    drop: tensors of the folder that are left out.
    extra: tensors by their names in the file.
  """
  architecture, metadata = values["model_type"], dict(metadata)
  writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", architecture))
  pairs = {
    f"{architecture}.context_length": values["max_position_embeddings"],
    f"{architecture}.embedding_length": values["hidden_size"],
    f"{architecture}.block_count": values["num_hidden_layers"],
    f"{architecture}.feed_forward_length": values["intermediate_size"],
    f"{architecture}.attention.head_count": values["num_attention_heads"],
    f"{architecture}.attention.head_count_kv": values["num_key_value_heads"],
    f"{architecture}.attention.key_length": values["head_dim"],
    f"{architecture}.rope.dimension_count": values["head_dim"],
    f"{architecture}.vocab_size": values["vocab_size"],
    f"{architecture}.attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
    f"{architecture}.rope.freq_base": values["rope_theta"],
    **tokenizer,
    **metadata,
  }
  for key, value in pairs.items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    elif value is not None:
      writer.add_array(key, value)
  quantised = getattr(gguf.GGMLQuantizationType, kind)
  heads = {"q_proj": values["num_attention_heads"], "k_proj": values["num_key_value_heads"]}
  for name, tensor in tensors.items():
    module = name.split(".")[-2]
    if architecture == "llama" and module in heads:
      tensor = of_neighbours(tensor, heads[module])
    if name not in drop:
      plain = kind == "F32" or tensor.ndim == 1
      writer.add_tensor(
        name_of(name),
        tensor if plain else gguf.quantize(tensor, quantised),
        raw_dtype=None if plain else quantised,
      )
  for name, tensor in extra.items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)
