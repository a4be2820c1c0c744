"""Holds an exported folder to the policy it was written from, by reading it as anyone would.

Compared are the tokenizer's ids of texts and of a conversation, the ids that generation stops at, the
model's config, every parameter, and the log-prob of a text.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data import packing, tokenization
from dpojax.data.examples import DataError
from dpojax.models import hf, transformer
from dpojax.models.config import ModelConfig
from dpojax.models.families import HuggingFaceError
from dpojax.runtime import paths
from dpojax.training import reference

TEXTS = ("Which way is north?\n\nUp, and a little to the left: about 3 km.", " na\u00efve \u2603\n")
CONVERSATION = [
  {"role": "user", "content": "Which way?"},
  {"role": "assistant", "content": "Left."},
  {"role": "user", "content": "And then?"},
]
LONGEST = 64
"""Tokens of the text that is scored."""

MERGED = {"float32": 1e-5, "bfloat16": 2.0**-7}
"""By the dtype of a base's params: what an adapter merged in another order may make of a parameter,
relative to the largest of its kind."""


class Checked(NamedTuple):
  """What reading back has found.

  Attributes:
    dtypes: the parameters are the policy's in one of these.
    tokens: how many were scored.
    policy, written: their log-prob in nats, under the policy and under the folder's model.
  """

  dtypes: tuple[str, ...]
  tokens: int
  policy: float
  written: float

  def __str__(self) -> str:
    return (
      f"read back: the policy's params in {' and '.join(self.dtypes)}; log-prob of {self.tokens} "
      f"tokens {self.written:.4f}, the policy's {self.policy:.4f}"
    )


def check(
  folder: str | os.PathLike,
  config: ModelConfig,
  params: dict,
  tokenizer: Any,
  stop_ids: Sequence[int],
  *,
  merged: str = "",
) -> Checked:
  """Returns what a folder's model is, if it is the policy.

  The params are taken out of the tree as they are compared, so that no two models are in memory.

  Args:
    folder: of a model, or of an adapter whose base can be read.
    config: the policy's.
    params: its params, NumPy arrays in dicts, which are empty afterwards.
    tokenizer: the run's.
    stop_ids: what generation is to stop at.
    merged: dtype of the base's params in the run where the folder is of an adapter, else ''.

  Raises:
    HuggingFaceError: the folder is not the policy; the message names what differs.
  """
  folder = paths.of(folder)
  ids = [*_check_ids(folder, tokenizer)[: min(LONGEST, config.longest or LONGEST) - 1], stop_ids[0]]
  _check_stop_ids(folder, stop_ids)
  # Scored first: the comparison below takes the params apart, so that no two models are in memory.
  before, left, dtypes = _log_prob(config, params, ids), _taken(params), {}

  def compared(path, leaf, read):
    theirs = read((slice(None),) * len(leaf.shape))
    if merged:
      _check_close(folder, path, left.pop(path), theirs, MERGED[merged])
    else:
      dtypes[_dtype_of(folder, path, left.pop(path), theirs)] = None
    return theirs

  written = hf.load(folder, place=compared, scan_layers=config.scan_layers)
  _check_config(folder, config, written.config)
  after = _log_prob(config, written.params, ids)
  # Rounded weights give another log-prob, which is then told and not held to the policy's.
  rounded = tuple(dtype for dtype in dtypes if dtype != "float32")
  if not merged and not rounded and not np.isclose(after, before, rtol=1e-5):
    raise _differs(folder, f"log-prob of {len(ids) - 1} tokens", before, after)
  return Checked(rounded or ("float32",), len(ids) - 1, before, after)


def _check_ids(folder: paths.Path, tokenizer: Any) -> list[int]:
  """Returns the ids of the first text, which the folder's tokenizer gives too, and of all others."""
  try:
    written = tokenization.load_tokenizer(str(folder))
  except DataError as error:
    raise HuggingFaceError(f"{folder} cannot be read back: {error}") from error
  if tokenizer.chat_template and not written.chat_template:
    raise _differs(folder, "the chat template", repr(tokenizer.chat_template), "missing")
  conversations = [CONVERSATION] if tokenizer.chat_template else []
  encode = lambda tokenizer: [
    str(each) if isinstance(each, DataError) else each[0]
    for each in tokenization.encode_prompts([*TEXTS, *conversations], tokenizer, longest=10**6, keep="end")
  ]
  ours, theirs = encode(tokenizer), encode(written)
  for what, one, other in zip((*map(repr, TEXTS), "a conversation"), ours, theirs):
    if one != other:
      raise _differs(folder, f"ids of {what}", one, other)
  if written.eos_token_id != tokenizer.eos_token_id:
    raise _differs(folder, "the tokenizer's EOS", tokenizer.eos_token_id, written.eos_token_id)
  return ours[0]


def _check_stop_ids(folder: paths.Path, stop_ids: Sequence[int]) -> None:
  path = folder / "generation_config.json"
  ids = json.loads(path.read_text()).get("eos_token_id")
  if set(stop_ids) != {*(ids if isinstance(ids, list) else [ids])}:
    raise _differs(path, "eos_token_id", list(stop_ids), ids)


def _check_config(folder: paths.Path, ours: ModelConfig, theirs: ModelConfig) -> None:
  left_open = dict(published="", dtype=ours.dtype, remat=ours.remat, attention=ours.attention)
  one, other = (vars(dataclasses.replace(each, **left_open)) for each in (ours, theirs))
  for name, value in one.items():
    if value != other[name]:
      raise _differs(folder / "config.json", name, value, other[name])


def _taken(params: dict, path: str = "") -> dict[str, np.ndarray]:
  """Empties a tree of params and returns its leaves by their path."""
  leaves = {}
  while params:
    name, value = params.popitem()
    leaves |= _taken(value, f"{path}{name}/") if isinstance(value, dict) else {path + name: value}
  return leaves


def _dtype_of(folder: paths.Path, path: str, ours: np.ndarray, theirs: np.ndarray) -> str:
  """Returns the dtype in which a parameter is the policy's."""
  # Bit for bit in one of them: a tolerance would pass a wrong permutation of small weights.
  for dtype in ("float32", "bfloat16", "float16"):
    with np.errstate(over="ignore"):
      rounded = np.asarray(ours, jnp.dtype(dtype)).astype(np.float32)
    if np.array_equal(rounded, theirs, equal_nan=True):
      return dtype
  raise _differs(folder, f"parameter {path}, largest difference", 0.0, _largest(ours, theirs))


def _check_close(
  folder: paths.Path, path: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float
) -> None:
  apart = _largest(ours, theirs)
  if not apart <= tolerance * np.abs(ours).max():
    raise _differs(folder, f"parameter {path}, largest difference", 0.0, apart)


def _largest(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.abs(np.asarray(ours, np.float32) - theirs).max())


def _log_prob(config: ModelConfig, params: Any, ids: list[int]) -> float:
  """Returns the log-prob of all ids behind the first, in float32 on the host; so few need no fused form."""
  config = dataclasses.replace(config, dtype="float32", remat="none", attention="auto")
  example = (np.array(ids[:1], np.int32), [np.array(ids[1:], np.int32)])
  lengths = np.array([[1, len(ids) - 1]])
  rows = packing.fill(
    [example], np.zeros(1, int), 1, packing.row_shape(lengths, len(ids)), num_responses=1, example=[0]
  )
  score = reference.make_score_step(transformer.make_apply(config), num_responses=1, chunk_size=None)
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    return float(score(params, rows)[0][0, 0, 0])


def _differs(where: paths.Path, what: str, ours: Any, theirs: Any) -> HuggingFaceError:
  return HuggingFaceError(
    f"{where}, read back, is not what was trained: {what} was {ours} and is {theirs} there; do not "
    "use the folder, and report it"
  )
