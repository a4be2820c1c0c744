"""The sampler over the devices of a mesh, each with its own prompts, and where weights are while it decodes.

A step of decoding reads every weight for a few tokens. Of weights that are cut over `fsdp`, either

- all are brought together once a batch of prompts, in the compute dtype, and then nothing travels, if a
  device has room for them beside its cache;
- or they stay where they are, and the vectors of tokens travel to them, see `sharding.product`. Prompts, of
  many tokens, are read layer by layer as in a training step.

To bring each layer together for each token, as a training step would, sends the whole model for every token.

A single CPU decodes large layers by a program of each, see `by_layers`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpojax.models.config import ModelConfig
from dpojax.runtime.command import say
from dpojax.sample import by_layers, sampler
from dpojax.training import parallel

_LOGITS = 4
"""Arrays as large as the logits of a step that a draw holds at once."""

_USED = 0.9
"""What of a device's memory is given out: a tenth is left to what is not counted."""


def make_program(
  devices: parallel.Mesh,
  config: ModelConfig,
  *,
  max_new_tokens: int,
  num_samples: int = 1,
  stop_id: int | Sequence[int] | None = None,
  in_place: bool = False,
) -> parallel.CompiledStep:
  """Returns `sample(params, (prompts, lengths, keys), (temperature, top_p, top_k))` over the devices.

  Args:
    devices: the mesh.
    config, max_new_tokens, num_samples, stop_id: see `sampler.make_sampler`.
    in_place: whether weights stay where they are.
  """
  sample = sampler.make_sampler(
    config, max_new_tokens=max_new_tokens, num_samples=num_samples, stop_id=stop_id, in_place=in_place
  )
  return devices.lift(
    devices.map_rows(lambda params, rows, knobs: sample(params, *rows, *knobs)), donate_state=False
  )


def make_sampler(
  devices: parallel.Mesh,
  config: ModelConfig,
  *,
  max_new_tokens: int,
  num_samples: int = 1,
  stop_id: int | Sequence[int] | None = None,
  free: Callable[[], int] = parallel.free_memory,
) -> Callable[..., sampler.Samples]:
  """Returns `sample(params, prompts, lengths, keys, temperature, top_p, top_k)` over the devices.

  Args:
    devices: the mesh.
    config, max_new_tokens, num_samples, stop_id: see `sampler.make_sampler`.
    free: gives the bytes that are left of a device's memory; asked before the first batch of each shape.

  Args of what is returned, of which the last three may be left out:
    params, prompts, lengths: as `Mesh.place` and `Mesh.place_rows` place them.
    keys: [B], one of each prompt.
    temperature, top_p, top_k: see `sampler.make_sampler`.
  """
  known = dict(max_new_tokens=max_new_tokens, num_samples=num_samples)
  programs = [
    make_program(devices, config, stop_id=stop_id, in_place=in_place, **known) for in_place in (False, True)
  ]
  of_layers = by_layers.make_sampler(config, stop_id=stop_id, **known)
  in_place: dict[tuple[int, ...], bool] = {}

  def sample(params, prompts, lengths, keys, temperature=1.0, top_p=1.0, top_k=0):
    if by_layers.applies(config, params, devices.mesh.size):
      return of_layers(params, prompts, lengths, keys, temperature, top_p, top_k)
    shape = prompts.shape
    if shape not in in_place:
      stays = False
      if devices.mesh.shape["fsdp"] > 1:
        needed, left = bytes_together(devices, config, params, shape, **known), _USED * free()
        stays = needed > left
        if stays not in in_place.values():
          say(_said(stays, needed, left))
      in_place[shape] = stays
    return programs[in_place[shape]](params, (prompts, lengths, keys), (temperature, top_p, top_k))

  return sample


def bytes_together(
  devices: parallel.Mesh,
  config: ModelConfig,
  params: Any,
  shape: tuple[int, ...],
  *,
  max_new_tokens: int,
  num_samples: int,
) -> int:
  """Returns the bytes a device takes to decode with weights brought together, besides those it holds.

  Args:
    devices: the mesh.
    config: the model's.
    params: its params, or their shapes.
    shape: of all prompts, [B, W].
    max_new_tokens, num_samples: of each prompt.
  """
  size = np.dtype(config.dtype).itemsize
  prompts, width = shape[0] // devices.row_multiple, shape[1]
  # Each stage of decoding copies what the one before it has written.
  tokens = prompts * (width + 2 * num_samples * max_new_tokens)
  cache = tokens * config.layers * 2 * config.kv_heads * config.head_size * size
  logits = _LOGITS * 4 * prompts * num_samples * config.vocab_size
  # Of the layer that reads the prompts: the stream, heads, and what is inside of its MLP.
  vectors = 2 * config.width + 2 * config.heads * config.head_size + 3 * config.mlp_width
  return devices.bytes_together(params, size) + cache + logits + prompts * width * vectors * size


def _said(stays: bool, needed: float, left: float) -> str:
  there = f"{needed / 2**30:.3g} GiB with their cache, of {left / 2**30:.3g} that a device has left"
  if not stays:
    return f"sampling with weights brought together once a batch: {there}"
  return (
    f"sampling with weights where they are cut: brought together they would take {there}; with a larger "
    "tensor axis, or fewer prompts at once, they take less"
  )
