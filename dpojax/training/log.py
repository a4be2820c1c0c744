"""What a run tells while it trains."""

import sys

import ml_collections
import numpy as np
import tqdm

from dpojax.runtime import paths
from dpojax.runtime.command import is_main, say
from dpojax.training.metrics import MetricsWriter


class Log:
  """What a run tells: files, a bar with the time left on a terminal, and plain lines.

  `last` holds the last metrics of each split, `evaluations` those of each evaluation by step.
  """

  def __init__(self, workdir: paths.Path, config: ml_collections.ConfigDict, first: int):
    self.last: dict[str, dict[str, float]] = {}
    self.evaluations: dict[int, dict[str, float]] = {}
    self._steps = config.steps
    self._writer = (
      MetricsWriter(
        workdir, after_step=first or -1, wandb_project=config.wandb_project, settings=config.to_dict()
      )
      if is_main()
      else None
    )
    self._bar = tqdm.tqdm(
      total=config.steps, initial=first, unit="step", disable=not (is_main() and sys.stderr.isatty())
    )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._bar.close()
    if self._writer is not None:
      self._writer.close()

  def advance(self) -> None:
    """Moves the bar by a step."""
    self._bar.update(1)

  def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step, but those of nothing (such as margins of no pairs)."""
    metrics = {name: value for name, value in metrics.items() if not np.isnan(value)}
    self.last[split] = metrics
    if split == "eval":
      self.evaluations[step] = metrics
    if self._writer is not None:
      self._writer.write(step, split, metrics)
    names = (
      "loss",
      "rewards/accuracies",
      "rewards/margins",
      "objective/scores",
      "objective/kl",
      "kl",
      "score",
      "tokens",
      "grad_norm",
      "pairs_per_second",
    )
    text = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    # Else the line would be written into the bar.
    with tqdm.tqdm.external_write_mode(file=sys.stdout):
      say(f"step {step}/{self._steps}  {split}  {text}")
