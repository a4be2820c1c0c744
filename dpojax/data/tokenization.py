"""Comparisons in ids: tokenized by all cores, kept in a cache, and with a report of what was cut and dropped.

`templates` renders conversations, `conversations` finds what of them is scored, `encoder` makes ids of texts
and conversations, `truncation` cuts them, `tokenizing` makes arrays of them.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from dpojax.data import pool, tokenized
from dpojax.data.comparisons import Comparisons
from dpojax.data.encoder import Encoder
from dpojax.data.examples import DataError, Example, RecordError
from dpojax.data.shortening import Room
from dpojax.data.templates import Reading, reads_the_clock
from dpojax.data.tokenized import Growing, Tokenized
from dpojax.data.tokenizing import Part, Settings, Tokenizing
from dpojax.data.truncation import Truncation, cut, cut_prompt
from dpojax.runtime import mirror, paths
from dpojax.runtime.ownership import owned

_VERSION = 2
_CHUNK = 1024
PARALLEL = 8 * _CHUNK
"""Comparisons from which on processes are started: those take seconds to start."""


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
    # Code of a folder is not run: it came from anywhere.
    tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_folder(name), trust_remote_code=False)
  except Exception as error:  # transformers raises many kinds
    reason = str(error).strip().partition("\n")[0]
    if "trust_remote_code" in str(error):
      raise DataError(
        f"tokenizer {name!r} cannot be loaded: it is code of its own, which dpojax does not run; give a "
        "folder with tokenizer.json"
      ) from error
    raise DataError(
      f"tokenizer {name!r} cannot be loaded ({reason}); give a folder with tokenizer.json, or a "
      "hub name while there is a network"
    ) from error
  if tokenizer.eos_token_id is None:
    raise DataError(
      f"tokenizer {name!r} has no EOS token, which ends every response; set "
      "eos_token in its tokenizer_config.json"
    )
  return tokenizer


def _tokenizer_folder(name: str) -> str:
  """Returns a tokenizer's folder or hub name as `transformers` takes it: a bucket's is copied here."""
  folder = paths.of(name)
  if not paths.is_remote(folder):
    return str(folder)
  here = pathlib.Path(tempfile.mkdtemp(dir=paths.scratch()))
  # Beside a tokenizer may lie a model's weights, which are no part of it.
  names = {each for each in paths.files_under(folder) if "/" not in each}
  paths.download(folder, here, {each for each in names if each.endswith(_OF_TOKENIZERS)})
  return str(here)


_OF_TOKENIZERS = (".json", ".txt", ".model", ".jinja")


def tokenize(
  comparisons: Comparisons,
  tokenizer: Any,
  *,
  truncation: Truncation,
  reading: Reading = Reading(),
  num_responses: int | None = None,
  fewest: int | None = None,
  cache_dir: str | os.PathLike | None = None,
  workers: int | None = None,
) -> Tokenized:
  """Returns the comparisons in ids, from the cache if they were tokenized before.

  Args:
    comparisons: prompts and responses in text or messages.
    tokenizer: from `load_tokenizer`.
    truncation: how long they may be.
    reading: how texts and conversations are read.
    num_responses: `K`, how many responses to keep, the best; None keeps all of them.
    fewest: comparisons with fewer responses among those are dropped; `num_responses` unless given.
    cache_dir: where arrays are kept, under a digest of all they are made from; None keeps them in memory.
    workers: processes that tokenize; 0 is this one alone, None as many as cores for what is worth it. The ids
      are the same.

  Raises:
    DataError: no comparison is left, conversations but no chat template, or no room on the disk.
  """
  settings = Settings(truncation, reading, num_responses, (num_responses or 1) if fewest is None else fewest)
  inputs = _inputs(comparisons, tokenizer, settings)
  if cache_dir is None:
    return _tokenize(comparisons, tokenizer, settings, inputs, workers)
  key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
  folder = paths.of(cache_dir) / key
  is_there = lambda: mirror.is_sound(folder, without=False)
  if not is_there():
    with owned(folder, f"the token cache {folder}", wait=True):
      if not is_there():  # else another process has made it while this one waited
        here = mirror.local(folder)
        with tokenized.unfinished(here) as path:
          data = _tokenize(comparisons, tokenizer, settings, inputs, workers, path)
          tokenized.write(data, path, here)
        mirror.push(folder)
  return tokenized.load(mirror.local(folder))


def tokenize_answers(
  answers: Sequence[tuple[str | list[dict] | Example, str | list[dict]]],
  tokenizer: Any,
  *,
  truncation: Truncation,
  reading: Reading = Reading(),
) -> Tokenized:
  """Returns (prompt, response) pairs in ids, every one of them; an empty response is EOS alone.

  A prompt may be an example, which then gives its tools too.

  Raises:
    DataError: one cannot be tokenized, or is a conversation without a chat template.
  """
  encoder = Encoder(tokenizer, reading)
  room, counts = Room(truncation.max_length, truncation.keep), collections.Counter()
  examples = [_example(prompt)._replace(responses=(response,)) for prompt, response in answers]
  lengths, ids, scored = [], [], []
  for i, (each, example) in enumerate(zip(encoder.encode(examples, room), examples)):
    # Whoever scores answers wants a number for each, an empty one too.
    if isinstance(each, RecordError) and each.reason == "empty_response":
      (each,) = encoder.encode([example._replace(responses=("",))], room)
    if isinstance(each, RecordError):
      raise DataError(f"response {i + 1}: {each}") from each
    if not each.responses[0]:
      each = each._replace(
        prompt=encoder.prompts([example], room)[0], responses=[[encoder.eos]], scored=[[True]]
      )
    each = cut(each, truncation, bos=encoder.bos, ends=encoder.ids.special, counts=counts)
    lengths.append([len(each.prompt), len(each.responses[0])])
    ids += [*each.prompt, *each.responses[0]]
    scored += [*[False] * len(each.prompt), *each.scored[0]]
  return tokenized.arrays(
    np.array(lengths, np.int32),
    np.array(ids, np.int32),
    np.array(scored, bool),
    np.arange(len(answers), dtype=np.int32),
    dict(counts),
  )


def encode(
  examples: Sequence[Example], tokenizer: Any, reading: Reading = Reading()
) -> list[tuple[list[int], list[list[int]]]]:
  """Returns the ids of each prompt and of its responses, untruncated.

  A text starts with BOS if the tokenizer puts one there, and with EOS if it would be empty; every response to
  it ends with EOS. Conversations are what their template writes, up to the end of the answer. What a special
  token's name in a text is, such as "</s>", is the reading's to say; those that a template writes are tokens.

  Raises:
    DataError: an example cannot be tokenized, or there is no chat template for a conversation.
  """
  encoded = Encoder(tokenizer, reading).encode(examples)
  for each in encoded:
    if isinstance(each, RecordError):
      raise each
  return [(each.prompt, each.responses) for each in encoded]


def encode_prompts(
  prompts: Sequence[str | list[dict] | Example],
  tokenizer: Any,
  *,
  longest: int,
  keep: str,
  reading: Reading = Reading(),
  counts: collections.Counter | None = None,
) -> list[tuple[list[int], bool] | RecordError]:
  """Returns the ids of each prompt and whether it was cut, or what is wrong with it.

  Args:
    prompts: texts or conversations, which get the template's generation prompt behind them; or
      examples, which give their tools too and whose responses do not count.
    tokenizer: from `load_tokenizer`.
    longest: tokens a prompt may have; of a longer one the rest is left out.
    keep: which part of that stays, as in `Truncation`.
    reading: how they are read.
    counts: what was seen of them is added to it, by the names in `COUNTS`.

  Raises:
    DataError: there is no chat template for a conversation.
  """
  encoder, examples = Encoder(tokenizer, reading), [_example(prompt) for prompt in prompts]
  bos = lambda example: encoder.bos if isinstance(example.prompt, str) else tokenizer.bos_token_id
  encoded = [
    each
    if isinstance(each, RecordError)
    else (cut_prompt(each, longest, keep, bos(example)), len(each) > longest)
    for each, example in zip(encoder.prompts(examples, Room(longest, keep)), examples)
  ]
  if counts is not None:
    counts.update(encoder.counts)
  return encoded


def decode_response(tokenizer: Any, prompt: Sequence[int], response: Sequence[int]) -> str:
  """Returns the text of a response's ids behind a prompt's, special tokens left out.

  What is decoded is both, because a tokenizer may leave out the space a text starts with.
  """
  decode = lambda ids: tokenizer.decode(
    list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  # A prompt that ends within a letter of several bytes decodes otherwise by itself.
  before, both = decode(prompt), decode([*prompt, *response])
  return both[len(before) :] if both.startswith(before) else decode(response)


def _example(prompt: str | list[dict] | Example) -> Example:
  return prompt if isinstance(prompt, Example) else Example(prompt, ())


def _tokenize(
  comparisons: Comparisons,
  tokenizer: Any,
  settings: Settings,
  inputs: dict,
  workers: int | None,
  folder: pathlib.Path | None = None,
) -> Tokenized:
  """Returns the comparisons in ids, of which those of tokens are written into the folder as they are made."""
  at = lambda name: None if folder is None else folder / f"{name}.npy"
  with contextlib.ExitStack() as stack:
    ids, scored = Growing(np.int32, at("ids")), Growing(bool, at("mask"))
    stack.callback(ids.close)
    stack.callback(scored.close)
    counts, dropped, first, scored_count = collections.Counter(), collections.Counter(), {}, 0
    kept = []
    for part in _parts(comparisons, Tokenizing(tokenizer, settings, comparisons), workers):
      ids.append(part.ids)
      scored.append(part.scored)
      scored_count += int(part.scored.sum())
      counts, dropped, first = counts + part.counts, dropped + part.dropped, part.first | first
      kept.append((part.lengths, part.example, part.prompts, part.knobs))
    ids, scored = ids.finish(), scored.finish()
  lengths, example, prompts, brought = zip(*kept) if kept else ((), (), (), ())
  if not sum(map(len, lengths)):
    why = "; ".join(first.values())
    raise DataError(
      f"none of {len(comparisons)} comparisons can be used ({dict(dropped)}); check "
      f"data.path and the tokenizer. The first: {why}"
    )
  width = 1 + settings.num_responses if settings.num_responses else max(x.shape[1] for x in lengths)
  lengths = np.concatenate([np.pad(x, [(0, 0), (0, width - x.shape[1])]) for x in lengths])
  brought = [each for each in brought if each]
  knobs = {name: np.concatenate([each[name] for each in brought]) for name in (brought[0] if brought else ())}
  responses = lengths[:, 1:]
  ended = {
    str(tokenizer.convert_ids_to_tokens(key[1])): count
    for key, count in counts.items()
    if isinstance(key, tuple)
  }
  report = {
    "examples": len(comparisons),
    "used": len(lengths),
    "dropped": dict(dropped),
    **{name: counts[name] for name in COUNTS},
    "ended_by": ended,
    "stop_ids": [key[1] for key, _ in counts.most_common() if isinstance(key, tuple)],
    "lengths": {
      "prompt": _percentiles(lengths[:, 0]),
      "comparison": _percentiles(lengths.sum(axis=1)),
      "response": _percentiles(responses[responses > 0]),
    },
    "first": first,
    "inputs": inputs,
  }
  return tokenized.arrays(
    lengths,
    ids,
    scored,
    np.concatenate(example),
    report,
    scored_count=scored_count,
    prompts=np.concatenate(prompts),
    knobs=knobs,
  )


COUNTS = (
  "prompts_cut",
  "responses_cut",
  "responses_without_eos",
  "prompts_started_with_eos",
  "with_special_tokens_in_text",
  "with_special_tokens_that_the_template_reads",
  "prompts_rendered_otherwise_with_an_answer",
  "with_text_that_the_template_leaves_out",
  "with_calls_that_the_template_leaves_out",
  "with_tools_that_the_template_leaves_out",
  "responses_ended_with_eos_that_the_template_lacks",
  "without_bos",
  "slow",
  "checked",
  "changed_by_tokenizer",
)
"""What a report counts; the last two: of the first comparisons, those whose ids decode to another
text, as with a tokenizer that lower-cases."""


def _parts(comparisons: Comparisons, tokenizing: Tokenizing, workers: int | None) -> Iterator[Part]:
  """Yields the parts of a data set in order, and shows how far they are."""
  if workers is None:
    workers = pool.cores() if len(comparisons) >= PARALLEL else 0
  # Read where they are tokenized, as they are needed: all of them may be more than memory.
  chunks = ((start, start + _CHUNK) for start in range(0, len(comparisons), _CHUNK))
  parts = pool.ordered(tokenizing, chunks, workers) if workers > 1 else (tokenizing(*each) for each in chunks)
  seen = sys.stderr.isatty()
  bar = tqdm.tqdm(
    total=len(comparisons),
    desc="tokenizing",
    unit="comparisons",
    unit_scale=True,
    disable=not seen and len(comparisons) < PARALLEL,
    mininterval=0.1 if seen else 10.0,
  )
  with bar:
    for number, part in enumerate(parts):
      bar.update(min(_CHUNK, len(comparisons) - number * _CHUNK))
      yield part


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
  points = (5, 50, 95, 100)
  values = np.percentile(lengths, points, method="nearest")
  return {str(point): int(value) for point, value in zip(points, values)}


def _inputs(comparisons: Comparisons, tokenizer: Any, settings: Settings) -> dict:
  """Returns all that decides the ids of a data set, as JSON with digests of what is long."""
  reading = dataclasses.asdict(settings.reading)
  reading["date"] = str(settings.reading.day()) if reads_the_clock(tokenizer) else ""
  digest = lambda value: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
  return {
    "records": comparisons.fingerprint,
    "tokenizer": digest(_tokenizer_identity(tokenizer)),
    "chat_template": digest(tokenizer.chat_template),
    **{
      f"data.{key}": each
      for key, each in {
        **dataclasses.asdict(settings.truncation),
        "special_tokens": reading["special_tokens"],
        "score": reading["score"],
        "template_date": reading["date"],
        "template_arguments": reading["arguments"],
      }.items()
    },
    "num_responses": settings.num_responses,
    "fewest": settings.fewest,
    "version": _VERSION,
    # Another version of any of them may make other ids of the same text.
    **{name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")},
  }


def _tokenizer_identity(tokenizer: Any) -> dict:
  """Returns what decides a tokenizer's ids of text, as JSON."""
  if tokenizer.is_fast:
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    # What a caller has set last changes no id of ours.
    model.update(truncation=None, padding=None)
  else:
    model = sorted(tokenizer.get_vocab().items())
  return {
    "model": model,
    "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    # Whether BOS or EOS are added is told in several places, and differently by version: asked instead.
    "adds": tokenizer("a")["input_ids"],
  }
