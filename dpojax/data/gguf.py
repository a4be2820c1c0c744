"""The tokenizer in a GGUF file's metadata as a Hugging Face folder's: tokenizer.json and its config.

A file names its kind of vocabulary and the way text is split before merges are applied; how, is a table.
Splits that are not in it are refused by name: another split gives other ids without a word.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dpojax.data.examples import DataError
from dpojax.runtime.disk import disk_errors

CONTROL, USER_DEFINED = 3, 4
"""Token types of llama.cpp: special tokens, and others that are never cut into pieces."""

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Split(NamedTuple):
  """How a byte-level vocabulary's merges are applied.

  Attributes:
    pre_tokenizers: what cuts a text before them, the bytes themselves left out.
    own_regex: whether GPT-2's own pattern cuts as well.
    ignore_merges: whether a piece that is a token is one, whatever the merges say.
    add_bos: whether BOS is put in front where the file says nothing of it.
    normalizer: of a text before all.
  """

  pre_tokenizers: Callable[[], list]
  own_regex: bool = False
  ignore_merges: bool = False
  add_bos: bool = False
  normalizer: Callable[[], Any] = lambda: None


def _pattern(pattern: str) -> Callable[[], list]:
  return lambda: [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]


SPLITS = {
  "gpt-2": Split(list, own_regex=True),
  "smollm": Split(lambda: [pre_tokenizers.Digits(individual_digits=True)], own_regex=True),
  "llama-bpe": Split(_pattern(_CONTRACTION + r"\p{N}{1,3}" + _REST), ignore_merges=True, add_bos=True),
  "qwen2": Split(_pattern(_CONTRACTION + r"\p{N}" + _REST), normalizer=normalizers.NFC),
}
"""By `tokenizer.ggml.pre`; as in the tokenizer.json of the models that it is named after."""

SPECIAL = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "unk_token": "unknown_token_id",
  "pad_token": "padding_token_id",
}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


class Ids(NamedTuple):
  """Special ids of a file; `stop` are those that end a text."""

  bos: int | None
  pad: int | None
  stop: tuple[int, ...]


def write(folder: str | os.PathLike, values: dict[str, Any], path: str | os.PathLike) -> Ids:
  """Writes the tokenizer files of a GGUF file's metadata and returns its special ids.

  Args:
    folder: where to; made if missing.
    values: the metadata.
    path: of the file, for messages.

  Raises:
    DataError: there is no vocabulary, one that is not supported, or one that contradicts itself.
    DiskError: the disk is full or cannot be written.
  """
  folder, given = pathlib.Path(folder), _Metadata(values, path)
  tokens = given.get("tokens")
  if len(set(tokens)) < len(tokens):
    twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
    raise given.error("tokens", f"token {twice!r} stands there twice")
  kind = given.get("model")
  if kind not in ("gpt2", "llama"):
    raise given.error("model", f"{kind!r} is not supported; supported are 'gpt2' and 'llama'")
  if given.get("add_eos_token", False):
    raise given.error("add_eos_token", "an EOS behind every text is not supported")
  tokenizer, add_bos = (_of_bytes if kind == "gpt2" else _of_pieces)(given)
  ids = {key: given.token_id(key) for key in {*SPECIAL.values(), *STOPS}}
  if ids["eos_token_id"] is None:
    raise given.error("eos_token_id", "there is none, which ends every response")
  for token, kind in zip(tokens, given.get("token_type", ())):
    if kind in (CONTROL, USER_DEFINED):
      # As they stand in the text: normalised first they would not be found.
      added = AddedToken(token, normalized=False, special=kind == CONTROL)
      (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([added])
  special = {name: tokens[ids[key]] for name, key in SPECIAL.items() if ids[key] is not None}
  if given.get("add_bos_token", add_bos):
    if ids["bos_token_id"] is None:
      raise given.error("add_bos_token", "a BOS is asked for and there is none")
    tokenizer.post_processor = _with_bos(special["bos_token"], ids["bos_token_id"])
  config = special | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    # transformers' own word for no bound.
    "model_max_length": int(1e30),
  }
  with disk_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if "tokenizer.chat_template" in values:
      (folder / "chat_template.jinja").write_text(values["tokenizer.chat_template"])
  stop = dict.fromkeys(ids[key] for key in STOPS if ids[key] is not None)
  return Ids(ids["bos_token_id"], ids["padding_token_id"], tuple(stop))


class _Metadata(NamedTuple):
  """What a file says of its tokenizer."""

  values: dict[str, Any]
  path: str | os.PathLike

  def get(self, key: str, default: Any = ...) -> Any:
    value = self.values.get(f"tokenizer.ggml.{key}", default)
    if value is ...:
      raise self.error(key, "it is missing; convert the model to GGUF again")
    return value

  def token_id(self, key: str) -> int | None:
    value = self.get(key, None)
    if value is not None and not 0 <= value < len(self.get("tokens")):
      raise self.error(key, f"it is {value} but there are {len(self.get('tokens'))} tokens")
    return value

  def error(self, key: str, what: str) -> DataError:
    return DataError(f"{self.path}, tokenizer.ggml.{key}: {what}")


def _of_bytes(given: _Metadata) -> tuple[tokenizers.Tokenizer, bool]:
  """Returns a byte-level BPE, and whether it puts BOS in front."""
  name = given.get("pre", "gpt-2")
  if name not in SPLITS:
    raise given.error(
      "pre", f"text that is split as {name!r} is not supported; supported are {', '.join(SPLITS)}"
    )
  split = SPLITS[name]
  vocabulary = {token: i for i, token in enumerate(given.get("tokens"))}
  merges = [tuple(merge.split(" ")) for merge in given.get("merges")]
  for merge in merges:
    if len(merge) != 2 or "".join(merge) not in vocabulary:
      raise given.error("merges", f"{' '.join(merge)!r} makes no token")
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges)
  )
  tokenizer.normalizer = split.normalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [*split.pre_tokenizers(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.own_regex)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer, split.add_bos


def _of_pieces(given: _Metadata) -> tuple[tokenizers.Tokenizer, bool]:
  """Returns a BPE of SentencePiece's, whose merges follow from the scores; it puts BOS in front."""
  tokens, scores = given.get("tokens"), given.get("scores")
  if len(scores) != len(tokens):
    raise given.error("scores", f"there are {len(scores)} but {len(tokens)} tokens")
  vocabulary = {token: i for i, token in enumerate(tokens)}
  # SentencePiece merges the pair whose token scores highest; of equal scores in the order of its ids.
  merges = [
    (-scores[i], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
    for i, token in enumerate(tokens)
    for cut in range(1, len(token))
    if token[:cut] in vocabulary and token[cut:] in vocabulary
  ]
  unknown = given.token_id("unknown_token_id")
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=[merge[3:] for merge in sorted(merges)],
      fuse_unk=True,
      byte_fallback=True,
      unk_token=tokens[0 if unknown is None else unknown],
    )
  )
  # SentencePiece puts a space in front of a text unless it is told not to; decoding takes it off again.
  prefix = given.get("add_space_prefix", True)
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme="first" if prefix else "never", split=False
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(" ", 1, 0)] if prefix else []),
    ]
  )
  return tokenizer, True


def _with_bos(name: str, token: int) -> processors.TemplateProcessing:
  return processors.TemplateProcessing(
    single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, token)]
  )
