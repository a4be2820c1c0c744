"""Where a run's numbers go: metrics.jsonl, TensorBoard, and Weights & Biases if asked."""

import json
import os
import pathlib
import time

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import event_file_writer

from dpojax.runtime.disk import disk_errors


class MetricsWriter:
  """Appends one JSON object a line: `step`, `split`, then the metrics, in plain floats."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    after_step: int,
    wandb_project: str = "",
    settings: dict | None = None,
  ):
    """Opens the files. Lines of steps after `after_step`, and a line cut off, are dropped first.

    A run that was killed and continues from a checkpoint at `after_step` writes them again.
    """
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = read_metrics(workdir)
    kept = [line for line in lines if line["step"] <= after_step]
    temporary = self.path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, self.path)
    self._file = open(self.path, "a", buffering=1)
    self._events = event_file_writer.EventFileWriter(str(pathlib.Path(workdir) / "tensorboard"))
    if kept or lines:
      restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._events.add_event(event_pb2.Event(step=after_step + 1, wall_time=time.time(), session_log=restart))
    self._wandb = None
    if wandb_project:
      import wandb

      self._wandb = wandb.init(
        project=wandb_project,
        dir=str(workdir),
        config=settings,
        name=pathlib.Path(workdir).name,
        resume="allow",
        id=pathlib.Path(workdir).absolute().as_posix().replace("/", "-")[-100:],
      )

  def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step, of a split such as `train`, `eval` or `samples`.

    Raises:
      DiskError: the disk is full.
    """
    with disk_errors(self.path.parent):
      self._file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
    values = [
      summary_pb2.Summary.Value(tag=f"{split}/{name}", simple_value=value) for name, value in metrics.items()
    ]
    self._events.add_event(
      event_pb2.Event(step=step, wall_time=time.time(), summary=summary_pb2.Summary(value=values))
    )
    if self._wandb is not None:
      self._wandb.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

  def close(self) -> None:
    self._file.close()
    self._events.close()
    if self._wandb is not None:
      self._wandb.finish()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl; a last line cut off by a kill is left out."""
  return read_lines(pathlib.Path(workdir) / "metrics.jsonl")


def read_lines(path: pathlib.Path) -> list[dict]:
  """Returns the lines of a JSONL file, none if it is not there; one cut off by a kill is left out."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
