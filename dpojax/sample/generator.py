"""Draws samples of prompts in batches of few shapes, and scores them under policy and reference."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.data import packing
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.runtime.errors import ConfigError
from dpojax.sample import decoding
from dpojax.sample.draws import Draw
from dpojax.training import parallel, weights
from dpojax.training import reference as reference_lib

_NARROWEST = 16

_PADDING = 4096
"""Tokens of padding that a batch may read rather than be two, of two widths, each compiled by itself."""


class Sample(NamedTuple):
  """One response: its ids with the stop id, its log-probs, and whether a stop id ended it.

  `reference_log_prob` is None where there is no reference.
  """

  ids: list[int]
  log_prob: float
  reference_log_prob: float | None
  finished: bool


class _Placed(NamedTuple):
  """A model on the devices and what is compiled for it; models of one config share that."""

  config: ModelConfig
  params: Any
  sample: Callable
  score: Callable


class Generator:
  """Draws samples of prompts in batches of few shapes; beside a reference scores them by the training
  primitive, which both models' log-probs are then of."""

  def __init__(
    self,
    policy: weights.Loaded,
    reference: weights.Loaded | None,
    draw: Draw,
    *,
    eos: int,
    batch_size: int,
    devices: parallel.Mesh,
  ):
    """Places the params.

    Args:
      policy: the model samples are of.
      reference: the model they are also scored under, or None.
      draw: how they are drawn.
      eos: the tokenizer's EOS.
      batch_size: prompts of a batch, rounded up to what the devices share evenly.
      devices: the mesh.
    """
    self.draw, self._devices = draw, devices
    self.batch_size = -(-batch_size // devices.row_multiple) * devices.row_multiple
    self._longest = min(
      (m.config.longest for m in (policy, reference) if m and m.config.longest), default=None
    )
    self._stops = tuple(dict.fromkeys((eos, *policy.stop_ids, *draw.stop_ids)))
    self._models, self._laid_out = [], []
    for model in (policy, reference) if reference is not None else (policy,):
      self._laid_out.append(model.config)
      config, params = transformer.unrolled(model.config, model.params)
      # Where a model came from changes no program: without it policy and reference share theirs.
      config = dataclasses.replace(config, published="")
      same = [other for other in self._models if other.config == config]
      self._models.append(
        same[0]._replace(params=devices.place(params)) if same else self._placed(config, params)
      )

  def _placed(self, config: ModelConfig, params: Any) -> "_Placed":
    devices, draw = self._devices, self.draw
    score = reference_lib.make_score_step(
      transformer.make_apply(config), num_responses=draw.num_samples, chunk_size=None
    )
    return _Placed(
      config,
      devices.place(params),
      decoding.make_sampler(
        devices, config, max_new_tokens=draw.max_new_tokens, num_samples=draw.num_samples, stop_id=self._stops
      ),
      devices.lift(devices.map_rows(score), donate_state=False),
    )

  def of_reference(self) -> "Generator":
    """Returns the generator of the reference's samples, scored under it and then the policy."""
    other = copy.copy(self)
    other._models = self._models[::-1]
    return other

  def renew(self, *params: Any) -> None:
    """Takes other params of its models, in their order; those that are not given are let go."""
    params = [*params, *[None] * (len(self._models) - len(params))]
    self._models = [
      model._replace(
        params=None if each is None else self._devices.place(transformer.unrolled(config, each)[1])
      )
      for model, config, each in zip(self._models, self._laid_out, params)
    ]

  @property
  def longest_prompt(self) -> int | None:
    """Tokens a prompt may have, None without a bound."""
    return self._longest and self._longest - self.draw.max_new_tokens

  def batches(self, lengths: Sequence[int]) -> list[list[int]]:
    """Returns which prompts are drawn together, given their lengths: those of nearly one width."""
    order = sorted(range(len(lengths)), key=lambda i: (self._width(lengths[i]), i))
    batches = []
    for i in order:
      # Sorted by width, so a batch is as wide as its last prompt: padding costs reading, another width a
      # compile.
      wider = self._width(lengths[i]) - self._width(lengths[batches[-1][0]]) if batches else 0
      if not batches or len(batches[-1]) == self.batch_size or wider * len(batches[-1]) > _PADDING:
        batches.append([])
      batches[-1].append(i)
    return batches

  def __call__(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> list[list[Sample]]:
    """Returns the samples of each prompt of a batch.

    Args:
      prompts: ids, as `batches` puts them together.
      numbers: with the seed they decide the draws, whatever the batch.
    """
    count, size = len(prompts), self.batch_size
    # The last batch is filled up with its last prompt: one shape, and samples that nobody takes.
    full = lambda values: [*values, *[values[-1]] * (size - count)]
    lengths = np.array(full([len(prompt) for prompt in prompts]), np.int32)
    padded = np.zeros((size, self._width(int(lengths.max()))), np.int32)
    for row, prompt in zip(padded, full(prompts)):
      row[: len(prompt)] = prompt
    # A key a prompt, by its number: the same samples in any batch, so a killed run may batch otherwise.
    seeds = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(self.draw.seed), np.array(full(numbers), np.int32)
    )
    policy = self._models[0]
    drawn = self._devices.collect_rows(
      policy.sample(
        policy.params,
        *self._devices.place_all_rows((padded, lengths)),
        jax.random.wrap_key_data(self._devices.place_all_rows(np.asarray(jax.random.key_data(seeds)))),
        self.draw.temperature,
        self.draw.top_p,
        self.draw.top_k,
      )
    )
    ids = [
      [tokens[:n].tolist() for tokens, n in zip(*each)]
      for each in zip(drawn.tokens[:count], drawn.lengths[:count])
    ]
    if len(self._models) == 1:  # nothing to compare with: a second program would only tell the same
      scores = [np.asarray(drawn.log_probs[:count])]
    else:
      scores = self._scores(prompts, ids, padded.shape[1])
    scored = lambda b, k: [float(of[b, k]) for of in scores] + [None] * (2 - len(scores))
    return [
      [Sample(each, *scored(b, k), each[-1] in self._stops) for k, each in enumerate(of)]
      for b, of in enumerate(ids)
    ]

  def _scores(self, prompts, ids, width: int) -> list[np.ndarray]:
    """Returns log-probs [prompts, K] under each model; a row holds a prompt and its samples."""
    room = min(self.draw.max_new_tokens, _rounded(max(len(each) for of in ids for each in of)))
    scored = self.draw.num_samples * room
    rows = packing.fill(
      [(np.array(prompt), [np.array(each) for each in of]) for prompt, of in zip(prompts, ids)],
      np.arange(len(prompts)),
      self.batch_size,
      packing.RowShape(width + scored, scored, 1),
      num_responses=self.draw.num_samples,
      example=range(len(prompts)),
    )
    rows = self._devices.place_all_rows(rows)
    return [
      self._devices.collect_rows(model.score(model.params, rows)[0])[: len(prompts), 0]
      for model in self._models
    ]

  def _width(self, length: int) -> int:
    width = _rounded(length)
    return width if self.longest_prompt is None else min(width, self.longest_prompt)


def make_mesh(fsdp: int, tensor: int) -> parallel.Mesh:
  """Returns the mesh over all devices.

  Raises:
    ConfigError: the axes do not fit the devices.
  """
  if jax.process_count() > 1:
    raise ConfigError("sampling runs in one process; give each a file of prompts of its own")
  try:
    return parallel.Mesh(fsdp=fsdp, tensor=tensor)
  except ValueError as error:
    raise ConfigError(
      str(error).replace("parallel.data x fsdp x tensor", "data x --fsdp x --tensor")
    ) from error


def _rounded(length: int) -> int:
  """A length, rounded up so that few shapes are compiled."""
  return max(_NARROWEST, power_of_two(length))


def power_of_two(count: int) -> int:
  """Returns the least power of two that is not below a count of at least 1."""
  return 1 << (count - 1).bit_length()
