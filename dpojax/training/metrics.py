"""Where a run's numbers go: metrics.jsonl, TensorBoard, and Weights & Biases if asked.

TensorBoard's files are written on this machine, and copied from time to time where the workdir is in a
bucket.
"""

import concurrent.futures
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import event_file_writer

from dpojax.runtime import appending, paths
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
    self.path = paths.of(workdir) / "metrics.jsonl"
    with disk_errors(self.path.parent):
      lines = read_metrics(workdir)
      # The steps behind the checkpoint are made again, and would stand there twice.
      kept = [line for line in lines if line["step"] <= after_step]
      self._file = appending.Appended(self.path, "".join(json.dumps(line) + "\n" for line in kept))
    self._copied = _Copied(self.path.parent / "tensorboard")
    self._events = event_file_writer.EventFileWriter(str(self._copied.here))
    if kept or lines:
      # TensorBoard's word for the same: it drops what older files have of steps from here on.
      restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._events.add_event(event_pb2.Event(step=after_step + 1, wall_time=time.time(), session_log=restart))
    self._wandb = None
    if wandb_project:
      # An extra, and slow to import: only for who asks for it.
      import wandb

      self._wandb = wandb.init(
        project=wandb_project,
        dir=str(paths.scratch() if paths.is_remote(workdir) else workdir),
        config=settings,
        name=self.path.parent.name,
        resume="allow",
        # The same for every start in a workdir: a run that continues is one run there too.
        id=paths.absolute(workdir).as_posix().replace("/", "-").replace(":", "-")[-100:],
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
    with disk_errors(self.path.parent):
      self._copied.from_time_to_time(self._events.flush)
    if self._wandb is not None:
      self._wandb.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

  def close(self) -> None:
    self._file.close()
    self._events.close()
    self._copied.close()
    if self._wandb is not None:
      self._wandb.finish()


_COPY_EVERY = 60.0
"""Seconds; on this machine TensorBoard's own writer waits twice as long before it writes."""


class _Copied:
  """A folder of a workdir that is written on this machine, and copied where the workdir is in a bucket."""

  def __init__(self, folder: paths.Path):
    self._folder, self._remote, self._last = folder, paths.is_remote(folder), time.monotonic()
    self.here = pathlib.Path(tempfile.mkdtemp(dir=paths.scratch())) if self._remote else folder
    self._thread = concurrent.futures.ThreadPoolExecutor(1)  # which starts none before it has to copy
    self._copying: concurrent.futures.Future | None = None

  def from_time_to_time(self, flush: Callable[[], None]) -> None:
    """Starts to copy it, by a thread of its own, if that is due.

    Raises:
      Exception: the copy before could not be made.
    """
    if not self._remote or time.monotonic() - self._last < _COPY_EVERY:
      return
    if self._copying is not None:
      if not self._copying.done():
        return
      self._copying.result()
    flush()
    self._last = time.monotonic()
    self._copying = self._thread.submit(paths.upload, self.here, self._folder)

  def close(self) -> None:
    """Copies what is there, for the last time."""
    if self._remote:
      self._thread.shutdown()
      paths.upload(self.here, self._folder)


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl; a last line cut off by a kill is left out."""
  return read_lines(paths.of(workdir) / "metrics.jsonl")


def read_lines(path: paths.Path) -> list[dict]:
  """Returns the lines of a JSONL file, none if it is not there; one cut off by a kill is left out."""
  if not appending.exists(path):
    return []
  return [json.loads(line) for line in appending.read(path).splitlines(keepends=True) if line.endswith("\n")]
