"""The tiny models of the model vectors: their config.json, weights by formula, and inputs. No torch.

Each case turns on what its family has that others have not, at sizes where it matters: windows
shorter than the sequences, heads that are not width / heads, layers that fill no whole period.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy

VECTORS = pathlib.Path(__file__).parent / "models.npz"
VOCAB = 29
_SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-6,
}
_GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_NEOX = {
  "architectures": ["GPTNeoXForCausalLM"],
  "model_type": "gpt_neox",
  "vocab_size": VOCAB,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 32,
  "layer_norm_eps": 1e-5,
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_SIZES}

CASES = {
  "gpt2": {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    **_GPT,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
  },
  "gptj": {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    **_GPT,
    "n_head": 2,
    "rotary_dim": 4,
    "n_inner": 24,
    "tie_word_embeddings": False,
  },
  "neox": {
    **_NEOX,
    "hidden_act": "gelu",
    "rotary_pct": 0.5,
    "rotary_emb_base": 100,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
  },
  "neox_sequential": {
    **_NEOX,
    "hidden_act": "gelu_fast",
    "use_parallel_residual": False,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {
      "rope_type": "linear",
      "factor": 2.0,
      "rope_theta": 50.0,
      "partial_rotary_factor": 1.0,
    },
  },
  "llama1": {
    **_LLAMA,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_scaling": {"type": "linear", "factor": 4.0},
  },
  "llama2_dynamic": {**_LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
  "llama3": {
    **_LLAMA,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16,
    },
  },
  "mistral": {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    **_SIZES,
    "sliding_window": 4,
    "head_dim": 6,
  },
  "qwen2": {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **_SIZES,
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 1,
  },
  "qwen3_yarn": {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    **_SIZES,
    "head_dim": 8,
    "attention_bias": True,
    "rope_parameters": {
      "rope_type": "yarn",
      "factor": 4.0,
      "rope_theta": 100.0,
      "original_max_position_embeddings": 16,
    },
  },
  "gemma1": {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    **_SIZES,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "gelu",
  },
  "gemma2": {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    **_SIZES,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 1.5,
    "hidden_activation": "gelu_pytorch_tanh",
  },
  "gemma3": {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    **_SIZES,
    "num_hidden_layers": 5,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 3,
    "sliding_window_pattern": 2,
    "rope_theta": 1000.0,
    "rope_local_base_freq": 10.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  },
}

PROMPTS = ([3, 14, 15, 9, 26], [5, 7, 8])
RESPONSES = (([11, 2, 20, 0], [11, 4, 17, 23, 1, 6]), ([28, 2, 19, 9, 12, 27, 0], [13, 0]))
"""Two comparisons of two responses; sequence 2 i + k is prompt i with response k."""


def sequences() -> list[tuple[list[int], int]]:
  """Returns the ids of each sequence, and the length of its prompt."""
  return [
    (prompt + response, len(prompt))
    for prompt, responses in zip(PROMPTS, RESPONSES)
    for response in responses
  ]


def weight(sequence, position):
  """What the log-prob of the token at a position of a sequence is multiplied by in the loss."""
  return np.cos(1.7 * sequence + 0.3 * position)


def tensor(name: str, shape) -> np.ndarray:
  """Returns a tensor's values, which depend on its name only and are exact in bfloat16.

  Norms' scales are about 1, or about 0 where 1 is added to them, as values of any norm may be.
  """
  seed = np.uint64(sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**63)
  with np.errstate(over="ignore"):  # SplitMix64
    x = (np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint64) + seed) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
  values = (x % np.uint64(127)).astype(np.float32) - 63
  scale_of_norm = name.endswith(".weight") and len(shape) == 1
  return ((values / 128 + 1 if scale_of_norm else values / 128).reshape(shape)).astype(np.float32)


def tensors_of(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  """Returns the weights of a case, float32."""
  return {name: tensor(name, shape) for name, shape in shapes.items()}


def load_vectors() -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
  """Returns what the vectors say of themselves, and each case's arrays."""
  with np.load(VECTORS) as stored:
    about = json.loads(str(stored["about"]))
    return about, {
      case: {key: stored[f"{case}/{key}"] for key in ("hidden", "logits", "grads")}
      for case in about["tensors"]
    }


def write_folder(folder, case: str, tensors: dict[str, np.ndarray], **changes) -> None:
  """Writes a case as a Hugging Face folder, with safetensors' own writer; changes are of its config."""
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(CASES[case] | changes))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
