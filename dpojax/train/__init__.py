"""Trains a model on comparisons: SFT, DPO or a reward model; `python -m dpojax.train`.

Begin with `loop`, the run from top to bottom. `run` is the door to it, behind which jax is.
"""

import os
from typing import TYPE_CHECKING

import ml_collections

if TYPE_CHECKING:
  from dpojax.training import resolve


def run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike, *, data: "resolve.Data | None" = None
) -> dict[str, float]:
  """Trains as the config says; see `dpojax.train.loop.run`."""
  from dpojax.train import loop  # here, for --help and an error of the command line need no jax

  return loop.run(config, workdir, data=data)
