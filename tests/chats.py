"""Small tokenizers, trained here, and chat templates that behave as published ones do."""

import functools
import json
import pathlib

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEMPLATES = {
  path.stem: path.read_text()
  for path in sorted((pathlib.Path(__file__).parent / "chat_templates").glob("*.jinja"))
}

_SPECIAL = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]
_TEXT = [
  "The quick brown fox jumps over the lazy dog. What is the way to the sea? Left, then right.",
  "You are of help. Today is Monday, the first of May. user assistant system tool",
  "\n\nmodel <think>\nhm\n</think>\n",
  '[call] weather {"town": "Aberg"} Tools: {"type": "function", "function": {"name": "weather"}}',
  "caffè, naïve, 12.50\n",
  "one\n\n\ntwo\n\n\n",
]


@functools.cache
def byte_level() -> str:
  """A byte-level BPE tokenizer as JSON: GPT-2's kind, of which spaces are left out of where tokens stand."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
  made.train_from_iterator(
    _TEXT * 3,
    trainers.BpeTrainer(
      vocab_size=600,
      special_tokens=_SPECIAL,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return made.to_str()


@functools.cache
def sentencepiece_like() -> str:
  """A BPE tokenizer as JSON that writes spaces as letters, puts one in front, and has bytes for the rest."""
  made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  made.train_from_iterator(
    [text.replace("\n", " ") for text in _TEXT] * 3,
    trainers.BpeTrainer(vocab_size=500, special_tokens=_SPECIAL, show_progress=False, max_token_length=6),
  )
  model = json.loads(made.to_str())["model"]
  for byte in range(256):
    model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
  made.model = models.BPE(
    model["vocab"],
    [tuple(pair) for pair in model["merges"]],
    unk_token="<unk>",
    byte_fallback=True,
    fuse_unk=True,
  )
  made.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
  )
  return made.to_str()


KINDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like}


def tokenizer(kind: str, template: str = "", eos: str = "</s>") -> transformers.PreTrainedTokenizerFast:
  """A tokenizer of a kind with a chat template."""
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(KINDS[kind]()),
    bos_token="<s>",
    eos_token=eos,
    unk_token="<unk>",
  )
  made.chat_template = template or None
  return made
