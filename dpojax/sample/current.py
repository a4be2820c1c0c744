"""The policy of a run that is under way, as a generator of samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from dpojax.models import lora
from dpojax.models.config import ModelConfig
from dpojax.sample.draws import Draw
from dpojax.sample.generator import Generator
from dpojax.training import config as config_lib
from dpojax.training import parallel, weights


class Current:
  """Keeps what is compiled for a run's policy and reference, and no params between two draws."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    model: ModelConfig,
    stop_ids: tuple[int, ...],
    draw: Draw,
    *,
    eos: int,
    batch_size: int,
    devices: parallel.Replicas | parallel.Mesh,
  ):
    """Compiles nothing yet.

    Args:
      config: of the run.
      model: that is trained.
      stop_ids: that end a response besides `eos`, the tokenizer's.
      draw: how samples are drawn.
      eos: the tokenizer's EOS.
      batch_size: prompts of a batch.
      devices: what the run's params are placed on.
    """
    self._config, self._model, self._stop_ids = config, model, stop_ids
    self._draw, self._eos, self._batch_size, self._devices = draw, eos, batch_size, devices
    # A sampler knows meshes only; of a `pmap` run the params are collected and placed anew.
    self.mesh = devices if isinstance(devices, parallel.Mesh) else parallel.Mesh()
    self._merge = _make_merge(config_lib.lora_of(config), devices)
    self._generator = None

  def generator(self, params: Any, reference: Any | None) -> Generator:
    """Returns the generator of samples of params, which scores them under the reference too.

    Args:
      params: placed; an adapter's with `reference` for its base.
      reference: placed, or None where there is none at hand.
    """
    params, reference = (tree and self._devices.collect(tree) for tree in (params, reference))
    # Merged for the draw: a step of decoding then has one product a projection.
    if self._merge is not None:
      params = self._merge(reference, params)
    if self._generator is None:
      loaded = lambda params: (
        params
        and weights.Loaded(
          self._model, params, self._config.tokenizer, "the policy", self._config, self._stop_ids
        )
      )
      self._generator = Generator(
        loaded(params),
        loaded(reference),
        self._draw,
        eos=self._eos,
        batch_size=self._batch_size,
        devices=self.mesh,
      )
    else:
      self._generator.renew(params, reference)
    return self._generator


def _make_merge(
  adapter: lora.Lora | None, devices: parallel.Replicas | parallel.Mesh
) -> Callable[[Any, Any], Any] | None:
  """Returns `merge(base, adapter)` of what `devices.collect` gives, or None where there is no adapter."""
  if adapter is None:
    return None
  if isinstance(devices, parallel.Replicas):
    return functools.partial(lora.merge, lora=adapter)

  def merge(base, params):
    merged = lora.merge(base, params, adapter, xp=jnp)
    # Where the base is: no device, and no process, holds a whole model.
    return jax.lax.with_sharding_constraint(merged, devices.shardings(merged))

  return devices.lift(merge, donate_state=False)
