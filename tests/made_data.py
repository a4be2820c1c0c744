"""Dialogues, sentences and tokenizers made here, in the layout and with the habits of the published ones.

The tokenizers are trained on the dialogues: one of bytes, as GPT-2's, and one as Llama 2's, which puts
BOS and a space before a text, knows runs of spaces and writes what it does not know as bytes.
"""

import gzip
import json
import pathlib

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

NAME = "made"
"""Of the folder `write` is given, which tells it from one of published data."""

HH = {"used": 500, "empty_response": 4, "different_prompts": 5}
"""Dialogues, by what becomes of them."""

SENTENCES = 1400

SUBJECTS = "the dog|my sister|an old friend|the 2nd train|nobody|our teacher|it|the café".split("|")
VERBS = "likes|has never seen|looks for|writes about|can't find|prefers|explains|paid $3.50 for".split("|")
OBJECTS = "the way north|a warm coat|its house|good advice|the naïve question|tea & bread|snow".split("|")
ENDS = ".|!|?|...|; that is all.|, isn’t it?|:\n- one\n- two| — “well”, I am told.|  (twice)".split("|")
ODD = " | ☃|\t|\n\n|北はどちらですか。|e = mc^2|if x < 1:\n    return y\n|👍🏽|<b>no</b>".split("|")
"""Words of the texts, with the characters, spaces and line ends that real ones have too."""


def write(folder: pathlib.Path) -> None:
  """Writes the files that published data have, under their names."""
  rng = np.random.default_rng(0)
  dialogues = [_dialogue(rng) for _ in range(HH["used"])]
  sound = "\n\nHuman: Why?\n\nAssistant: So."
  for rejected, reason in (
    (sound.removesuffix("So."), "empty_response"),
    (sound.replace("Why", "How"), "different_prompts"),
  ):
    dialogues += [{"chosen": sound, "rejected": rejected} for _ in range(HH[reason])]
  _write_lines(folder / "hh_harmless_base_test.jsonl.gz", dialogues)
  _write_lines(
    folder / "movie_review_sentences.jsonl.gz",
    [
      {"text": " ".join(_sentence(rng) for _ in range(rng.integers(1, 4))), "label": i % 2}
      for i in range(SENTENCES)
    ],
  )
  texts = [text for dialogue in dialogues for text in dialogue.values()]
  texts += ["a b c d e f", "I am"] * 50
  for name, make in (("gpt2", _of_bytes), ("llama2", _like_sentencepiece)):
    made, special = make(texts)
    path = folder / "tokenizers" / name
    path.mkdir(parents=True)
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
      json.dumps({"tokenizer_class": "TokenizersBackend", "clean_up_tokenization_spaces": False} | special)
    )


def _write_lines(path: pathlib.Path, records: list[dict]) -> None:
  with gzip.open(path, "wt") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)


def _sentence(rng: np.random.Generator) -> str:
  odd = rng.choice(ODD) if rng.random() < 0.2 else ""
  return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}{odd}{rng.choice(ENDS)}"


def _dialogue(rng: np.random.Generator) -> dict[str, str]:
  """One of 1 to 8 turns, which ends in two answers; a few turns are long."""
  say = lambda: " ".join(_sentence(rng) for _ in range(rng.geometric(0.15)))
  prompt = "".join(f"\n\nHuman: {say()}\n\nAssistant: {say()}" for _ in range(rng.integers(0, 8)))
  prompt += f"\n\nHuman: {say()}\n\nAssistant:"
  return {side: f"{prompt} {mark}{say()}" for side, mark in (("chosen", "Yes: "), ("rejected", "No: "))}


def _of_bytes(texts: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=1000,
      special_tokens=["<|endoftext|>"],
      show_progress=False,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ),
  )
  return tokenizer, dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")


def _like_sentencepiece(texts: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """Merges learned inside words are applied to the text as a whole, so spaces merge with each other first."""
  words = tokenizers.Tokenizer(models.BPE())
  words.pre_tokenizer = pre_tokenizers.Metaspace()
  lines = [line for text in texts for line in text.split("\n") if line.isascii()]
  words.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=900, show_progress=False))
  learned = json.loads(words.to_str())["model"]
  special = ["<unk>", "<s>", "</s>"]
  spaces = ["▁" * 2**n for n in range(1, 5)]
  vocabulary = [
    *special,
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *spaces,
    *sorted(learned["vocab"], key=learned["vocab"].get),
  ]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(vocabulary)},
      merges=[(space[len(space) // 2 :],) * 2 for space in spaces] + [tuple(m) for m in learned["merges"]],
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  tokenizer.add_special_tokens(special)
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
  )
  return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
