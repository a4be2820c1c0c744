"""Text to ids: template, boundary, truncation, and a report of what was cut and dropped.

Prompt and responses are tokenized apart and joined by ids, so no token spans the boundary and the
prompt's ids are the same in every branch. Joined, they are the text's own ids as nearly as that
allows: a response is tokenized as text that goes on, never as text that begins. This matters to
SentencePiece-like tokenizers, which put a space before a text that begins: there a response is
tokenized behind an anchor whose ids are taken off again, so that " yes" keeps its space and "yes"
gets none.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from typing import Any, Sequence

import numpy as np
import tqdm

from dpojax.data.builders import Comparisons
from dpojax.data.examples import DataError, Example, RecordError
from dpojax.ownership import owned

TRUNCATION_SIDE = {
    "hh": "end", "imdb": "start", "jsonl": "end", "shp": "start", "stack_exchange": "start",
    "tldr": "start"}
"""Which end of an over-long prompt is kept. HH as in the paper's code, where the others keep the
start; for local files the end, because a conversation's last turn is what is answered."""

_VERSION = 1
_CHUNK = 1024
_CHECKED = 512
_ANCHORS = ("\n", "\ue000", "=")
_ARRAYS = ("lengths", "ids", "offsets", "example")


@dataclasses.dataclass(frozen=True)
class Truncation:
  """How long a comparison may be, in tokens, by the rule of the paper's code.

  If the prompt and the longest response exceed `max_length`, the prompt is cut to
  `max_prompt_length`; if they still do, every response is cut to the rest and so loses its EOS.

  Attributes:
    max_length: of the prompt and one response.
    max_prompt_length: of a prompt that is cut.
    keep: which part of it stays, "end" or "start". A BOS stays in front either way.
  """

  max_length: int
  max_prompt_length: int
  keep: str

  def __post_init__(self):
    if not 0 < self.max_prompt_length < self.max_length:
      raise DataError(
          f"data.max_prompt_length is {self.max_prompt_length} and data.max_length "
          f"{self.max_length}; leave room for responses")
    if self.keep not in ("start", "end"):
      raise DataError(f"data.keep is {self.keep!r}; it is 'start' or 'end'")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenized:
  """Comparisons in ids. With a cache directory the arrays are memory-mapped from it.

  Attributes:
    lengths: [N, 1 + K] int32, tokens of the prompt and of each response; 0 is an absent response.
    ids: int32, every comparison's prompt and responses one after another.
    offsets: [N + 1] int64, where in `ids` a comparison starts.
    example: [N] int32, index into the comparisons that were tokenized.
    report: counts of what was cut and dropped, and length percentiles.
    fingerprint: SHA-256 of all that determines the arrays.
  """

  lengths: np.ndarray
  ids: np.ndarray
  offsets: np.ndarray
  example: np.ndarray
  report: dict
  fingerprint: str

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, i: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the prompt's ids and those of each of the K responses, none for an absent one."""
    if not -len(self) <= i < len(self):
      raise IndexError(f"comparison {i} of {len(self)}")
    i %= len(self)
    ids = np.asarray(self.ids[self.offsets[i]:self.offsets[i + 1]])
    prompt, *responses = np.split(ids, np.cumsum(self.lengths[i])[:-1])
    return prompt, responses


def load_tokenizer(name: str) -> Any:
  """Returns the `transformers` tokenizer of a folder or a hub name.

  Raises:
    DataError: there is none, it cannot be fetched, or it has no EOS token.
  """
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there
  import transformers  # slow to import

  if not name:
    raise DataError("config.tokenizer is empty; give a tokenizer's folder or hub name")
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.path.expanduser(name))
  except Exception as error:  # transformers raises many kinds
    reason = str(error).strip().partition("\n")[0]
    raise DataError(
        f"tokenizer {name!r} cannot be loaded ({reason}); give a folder with tokenizer.json, or a "
        "hub name while there is a network") from error
  if tokenizer.eos_token_id is None:
    raise DataError(f"tokenizer {name!r} has no EOS token, which ends every response; set "
                    "eos_token in its tokenizer_config.json")
  return tokenizer


def tokenize(
    comparisons: Comparisons, tokenizer: Any, *, truncation: Truncation,
    num_responses: int | None = None, fewest: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Tokenized:
  """Returns the comparisons in ids, from the cache if they were tokenized before.

  Args:
    comparisons: prompts and responses in text.
    tokenizer: from `load_tokenizer`.
    truncation: how long they may be.
    num_responses: `K`, how many responses to keep, the best; None keeps all of them.
    fewest: comparisons with fewer responses among those are dropped; `num_responses` unless given.
    cache_dir: where arrays are kept, under their fingerprint; None keeps them in memory.

  Raises:
    DataError: no comparison is left, conversations but no chat template, or no room on the disk.
  """
  fewest = (num_responses or 1) if fewest is None else fewest
  identity = {
      "version": _VERSION, "comparisons": comparisons.fingerprint,
      "tokenizer": _tokenizer_identity(tokenizer), "truncation": dataclasses.asdict(truncation),
      "num_responses": num_responses, "fewest": fewest}
  fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
  if cache_dir is None:
    return Tokenized(
        *_tokenize(comparisons, tokenizer, truncation, num_responses, fewest), fingerprint=fingerprint)
  folder = pathlib.Path(cache_dir).expanduser() / fingerprint
  if not folder.exists():
    with owned(folder, f"the token cache {folder}", wait=True):
      if not folder.exists():  # else another process has made it while this one waited
        _store(folder, *_tokenize(comparisons, tokenizer, truncation, num_responses, fewest))
  arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
  return Tokenized(*arrays, json.loads((folder / "report.json").read_text()), fingerprint)


def tokenize_answers(
    answers: Sequence[tuple[str | list[dict], str]], tokenizer: Any, *, truncation: Truncation
) -> Tokenized:
  """Returns (prompt, response) pairs in ids, every one of them; an empty response is EOS alone.

  Raises:
    DataError: one cannot be tokenized, or is a conversation without a chat template.
  """
  encoder, counts = _Encoder(tokenizer), collections.Counter()
  encoded = encoder.encode([Example(prompt, (response,)) for prompt, response in answers])
  for i, (each, (prompt, _)) in enumerate(zip(encoded, answers)):
    if isinstance(each, RecordError) and each.reason == "empty_response":
      each, = encoder.encode([Example(prompt, ("",))])
    if isinstance(each, RecordError):
      raise DataError(f"response {i + 1}: {each}") from each
    ids, (response,) = each
    encoded[i] = _cut((ids, [response or [encoder.eos]]), truncation, encoder, counts)
  lengths = np.array([[len(prompt), len(response)] for prompt, (response,) in encoded], np.int32)
  ids = np.array([i for prompt, (response,) in encoded for i in (*prompt, *response)], np.int32)
  offsets = np.concatenate([np.zeros(1, np.int64), lengths.sum(axis=1, dtype=np.int64).cumsum()])
  return Tokenized(lengths, ids, offsets, np.arange(len(answers), dtype=np.int32), dict(counts), "")


Encoded = tuple[list[int], list[list[int]]]
"""A prompt's ids, and each response's."""


def encode(examples: Sequence[Example], tokenizer: Any) -> list[Encoded]:
  """Returns the ids of each prompt and of its responses, untruncated.

  A prompt starts with BOS if the tokenizer puts one there, and with EOS if it would be empty; every
  response ends with EOS. A special token's name in a text, such as "</s>", is text; in a
  conversation, those that the chat template writes are special tokens.

  Raises:
    DataError: an example cannot be tokenized, there is no chat template for a conversation, or it
      does not render an answer behind the prompt.
  """
  encoded = _Encoder(tokenizer).encode(examples)
  for each in encoded:
    if isinstance(each, RecordError):
      raise each
  return encoded


def encode_prompts(
    prompts: Sequence[str | list[dict]], tokenizer: Any, *, longest: int, keep: str
) -> list[tuple[list[int], bool] | RecordError]:
  """Returns the ids of each prompt and whether it was cut, or what is wrong with it.

  Args:
    prompts: texts or conversations; these get the template's generation prompt behind them.
    tokenizer: from `load_tokenizer`.
    longest: tokens a prompt may have; of a longer one the rest is left out.
    keep: which part of that stays, as in `Truncation`.

  Raises:
    DataError: there is no chat template for a conversation.
  """
  encoder = _Encoder(tokenizer)
  encoded = encoder.encode([Example(prompt, ()) for prompt in prompts])
  ids = [each if isinstance(each, RecordError) else each[0] for each in encoded]
  return [each if isinstance(each, RecordError)
          else (_cut_prompt(each, longest, keep, encoder.bos), len(each) > longest) for each in ids]


def decode_response(tokenizer: Any, prompt: Sequence[int], response: Sequence[int]) -> str:
  """Returns the text of a response's ids behind a prompt's, special tokens left out.

  What is decoded is both, because a tokenizer may leave out the space a text starts with.
  """
  decode = lambda ids: tokenizer.decode(
      list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
  before, both = decode(prompt), decode([*prompt, *response])
  return both[len(before):] if both.startswith(before) else decode(response)


class _Encoder:
  """A tokenizer with its habits found out: whether it adds BOS and a space before a text."""

  def __init__(self, tokenizer: Any):
    self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
    alone, behind, newline = self._ids(["a", "\na", "\n"], special=False)
    self.adds_space = behind[len(newline):] != alone
    self.bos = tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] != alone[:1] else None
    names = set(tokenizer.all_special_tokens) | {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    self.special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

  def encode(self, examples: Sequence[Example]) -> list[Encoded | RecordError]:
    """Returns ids of each example, or what is wrong with it; no ids for an absent response."""
    present = [example._replace(responses=tuple(filter(None, example.responses)))
               for example in examples]
    return [_with_absent(example, encoded)
            for example, encoded in zip(examples, self._encode_present(present))]

  def _encode_present(self, examples: Sequence[Example]) -> list[Encoded | RecordError]:
    texts = [self._texts(example) for example in examples]
    out = list(texts)
    for chat in (False, True):
      chosen = [i for i, example in enumerate(examples) if isinstance(texts[i], list)
                and isinstance(example.prompt, str) != chat]
      flat = iter(self._ids_behind([text for i in chosen for text in texts[i]], chat))
      for i in chosen:
        out[i] = self._framed([next(flat) for _ in texts[i]], chat)
    return out

  def decode(self, prompt: list[int], response: list[int]) -> str:
    """Returns the text of a prompt and a response, BOS and EOS left out."""
    frame = 1 if prompt[:1] in ([self.bos], [self.eos]) else 0
    return self.tokenizer.decode(prompt[frame:] + response[:-1], clean_up_tokenization_spaces=False)

  def _framed(self, ids: list[list[int]], chat: bool) -> Encoded | RecordError:
    """Puts BOS in front of the prompt, or EOS in place of nothing, and EOS behind each response.

    What a template writes after its own EOS, such as a newline, is left out.
    """
    prompt, *responses = ids
    if self.bos is not None and prompt[:1] != [self.bos]:
      prompt = [self.bos, *prompt]
    if chat:
      responses = [each[:each.index(self.eos)] if self.eos in each else each for each in responses]
    elif any(self.eos in each for each in ids):
      return RecordError("eos_in_text", "the tokenizer makes EOS of plain text")
    if not all(responses):
      return RecordError("empty_response", "the tokenizer leaves nothing of a response")
    return prompt or [self.eos], [each + [self.eos] for each in responses]

  def _texts(self, example: Example) -> list[str] | RecordError:
    """Returns the prompt and the responses as they are to be tokenized."""
    if isinstance(example.prompt, str):
      if example.prompt:
        return [self._beginning(example.prompt), *example.responses]
      return ["", *map(self._beginning, example.responses)]
    try:
      prompt, *responses = self._rendered(example)
    except RecordError as error:
      return error
    return [prompt if self.special.match(prompt) else self._beginning(prompt), *responses]

  def _beginning(self, text: str) -> str:
    """Returns a text with the space the tokenizer adds in front, even if it has one already."""
    return f" {text}" if self.adds_space else text

  def _rendered(self, example: Example) -> list[str]:
    """Returns a conversation's prompt and responses, as the chat template writes them.

    Names of special tokens in a message are marked inside, so that they are not taken for such.
    """
    if not self.tokenizer.chat_template:
      raise DataError(
          f"the data are conversations but tokenizer {self.tokenizer.name_or_path!r} has no chat "
          "template; take a chat model's tokenizer, or give plain text prompts")
    mark = lambda text: self.special.sub(lambda m: m[0][0] + _MARK + m[0][1:], text)
    messages = [{**message, "content": mark(message["content"])} for message in example.prompt]
    answers = [{"role": "assistant", "content": mark(text)} for text in example.responses]
    render = functools.partial(self.tokenizer.apply_chat_template, tokenize=False)
    try:
      prompt = render(messages, add_generation_prompt=True)
      full = [render([*messages, answer]) for answer in answers]
    except Exception as error:  # a template refuses with jinja's errors, and fails with any
      raise RecordError("refused_by_template", f"the chat template fails ({error})") from error
    if not all(text.startswith(prompt) for text in full):
      raise DataError(
          f"the chat template of tokenizer {self.tokenizer.name_or_path!r} does not put an answer "
          "behind the prompt that it renders with add_generation_prompt=True; correct the template")
    return [prompt, *(text[len(prompt):] for text in full)]

  def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
    """Returns ids of texts; `special` tells whether special tokens' names are special tokens."""
    if not texts:
      return []
    return self.tokenizer(
        texts, add_special_tokens=False, split_special_tokens=not special, verbose=False,
        return_attention_mask=False, return_token_type_ids=False)["input_ids"]

  def _ids_behind(self, texts: list[str], special: bool) -> list[list[int]]:
    """Returns ids of texts that stand behind another."""
    marked = {i for i, text in enumerate(texts) if special and _MARK in text}
    rest = [text for i, text in enumerate(texts) if i not in marked]
    ids = iter((self._ids_behind_anchor if self.adds_space else self._ids)(rest, special))
    return [self._ids_of_marked(text) if i in marked else next(ids) for i, text in enumerate(texts)]

  def _ids_behind_anchor(self, texts: list[str], special: bool) -> list[list[int]]:
    for anchor in _ANCHORS:
      head, *ids = self._ids([anchor, *(anchor + text for text in texts)], special)
      if all(each[:len(head)] == head for each in ids):
        return [each[len(head):] for each in ids]
    raise DataError(
        f"tokenizer {self.tokenizer.name_or_path!r} merges the start of a response with whatever "
        "stands before it; use another tokenizer")

  def _ids_of_marked(self, text: str) -> list[int]:
    """Returns ids of a rendered text in which some names of special tokens are marked as text."""
    ids = []
    for piece in re.split(f"({self.special.pattern})", text):
      if self.special.fullmatch(piece):
        ids.append(self.tokenizer.convert_tokens_to_ids(piece))
      else:
        ids += self._ids_behind([piece.replace(_MARK, "")], special=False)[0]
    return ids


def _with_absent(example: Example, encoded: Encoded | RecordError) -> Encoded | RecordError:
  if isinstance(encoded, RecordError):
    return encoded
  ids = iter(encoded[1])
  return encoded[0], [next(ids) if response else [] for response in example.responses]


_MARK = "\ufdd0"
"""A code point that Unicode keeps free for uses inside a program."""


def _tokenize(
    comparisons: Comparisons, tokenizer: Any, truncation: Truncation, num_responses: int | None,
    fewest: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
  """Returns the arrays and the report of `Tokenized`."""
  encoder = _Encoder(tokenizer)
  counts, dropped = collections.Counter(), collections.Counter()
  lengths, ids, index = [], [], []
  chunks = range(0, len(comparisons), _CHUNK)
  for start in tqdm.tqdm(chunks, "tokenizing", disable=not sys.stderr.isatty()):
    numbers = range(start, min(start + _CHUNK, len(comparisons)))
    examples = [_best(comparisons[i], num_responses) for i in numbers]
    for i, example, encoded in zip(numbers, examples, encoder.encode(examples)):
      try:
        present = sum(map(bool, example.responses))
        if present < fewest:
          raise RecordError("too_few_responses", f"it has {present}")
        prompt, responses = _cut(encoded, truncation, encoder, counts)
      except RecordError as error:
        dropped[error.reason] += 1
        continue
      if i < _CHECKED and isinstance(example.prompt, str):
        k = next(k for k, response in enumerate(example.responses) if response)
        text = encoder.decode(encoded[0], encoded[1][k])
        counts["checked"] += 1
        counts["changed_by_tokenizer"] += text != example.prompt + example.responses[k]
      lengths.append([len(prompt), *map(len, responses)])
      ids.append(np.array([token for part in (prompt, *responses) for token in part], np.int32))
      index.append(i)
  if not index:
    raise DataError(f"none of {len(comparisons)} comparisons can be used ({dict(dropped)}); check "
                    "data.path and the tokenizer")
  width = 1 + num_responses if num_responses else max(map(len, lengths))
  padded = np.array([each + [0] * (width - len(each)) for each in lengths], np.int32)
  totals = padded.sum(axis=1, dtype=np.int64)
  responses = padded[:, 1:]
  report = {
      "examples": len(comparisons), "used": len(index), "dropped": dict(dropped),
      **{name: counts[name] for name in _COUNTS},
      "lengths": {"prompt": _percentiles(padded[:, 0]), "comparison": _percentiles(totals),
                  "response": _percentiles(responses[responses > 0])}}
  offsets = np.concatenate([np.zeros(1, np.int64), totals.cumsum()])
  return padded, np.concatenate(ids), offsets, np.array(index, np.int32), report


_COUNTS = ("prompts_cut", "responses_cut", "responses_without_eos", "prompts_started_with_eos",
           "checked", "changed_by_tokenizer")
"""What a report counts; the last two: of the first comparisons, those whose ids decode to another
text, as with a tokenizer that lower-cases."""


def _best(example: Example, num_responses: int | None) -> Example:
  return example._replace(responses=example.responses[:num_responses])


def _cut(
    encoded: Encoded | RecordError, truncation: Truncation, encoder: _Encoder,
    counts: collections.Counter,
) -> Encoded:
  """Returns the ids as `Truncation` has them; raises RecordError where no comparison is left."""
  if isinstance(encoded, RecordError):
    raise encoded
  prompt, responses = encoded
  longest = max(map(len, responses))
  most = truncation.max_prompt_length
  if len(prompt) + longest > truncation.max_length:
    prompt = _cut_prompt(prompt, most, truncation.keep, encoder.bos)
  if len(prompt) + longest > truncation.max_length:
    responses = [each[:truncation.max_length - most] for each in responses]
  if len(set(map(tuple, responses))) < len(responses):
    same = len(set(map(tuple, encoded[1]))) < len(responses)
    reason = "identical_responses" if same else "identical_after_truncation"
    raise RecordError(reason, "two responses are the same ids")
  cut = sum(len(each) < len(whole) for each, whole in zip(responses, encoded[1]))
  counts["prompts_cut"] += len(prompt) < len(encoded[0])
  counts["responses_cut"] += cut
  counts["responses_without_eos"] += sum(each[-1:] not in ([], [encoder.eos]) for each in responses)
  counts["prompts_started_with_eos"] += encoder.bos is None and encoded[0] == [encoder.eos]
  return prompt, responses


def _cut_prompt(prompt: list[int], most: int, keep: str, bos: int | None) -> list[int]:
  if len(prompt) <= most:
    return prompt
  if keep == "start":
    return prompt[:most]
  head = prompt[:1] if prompt[0] == bos else []
  return head + prompt[len(prompt) - most + len(head):]


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
  points = (5, 50, 95, 100)
  values = np.percentile(lengths, points, method="nearest")
  return {str(point): int(value) for point, value in zip(points, values)}


def _tokenizer_identity(tokenizer: Any) -> dict:
  """Returns what decides a tokenizer's ids, as JSON."""
  if tokenizer.is_fast:
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    model.update(truncation=None, padding=None)
  else:
    model = sorted(tokenizer.get_vocab().items())
  return {
      "model": model, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
      "chat_template": tokenizer.chat_template, "adds": tokenizer("a")["input_ids"]}


def _store(
    folder: pathlib.Path, lengths: np.ndarray, ids: np.ndarray, offsets: np.ndarray,
    example: np.ndarray, report: dict,
):
  """Writes the arrays to a temporary folder and renames it: a folder in the cache is complete."""
  unfinished = None
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-")
    for name, array in zip(_ARRAYS, (lengths, ids, offsets, example)):
      np.save(os.path.join(unfinished, name), array)
    pathlib.Path(unfinished, "report.json").write_text(json.dumps(report))
    os.rename(unfinished, folder)
  except OSError as error:
    if not folder.exists():  # else another process was faster
      raise DataError(
          f"could not write tokenized data to {folder.parent} ({error}); free space there, or set "
          "data.cache_dir to a folder with room") from error
  finally:
    if unfinished:
      shutil.rmtree(unfinished, ignore_errors=True)
