"""A run's folder: who owns it, which run it holds, whether this one may continue it, whether it has room."""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from dpojax.runtime import paths, processes
from dpojax.runtime.command import is_main
from dpojax.runtime.disk import DiskError, disk_errors, reached
from dpojax.runtime.ownership import owned
from dpojax.training import checkpoint, checkpoint_files, resolve
from dpojax.training import config as config_lib
from dpojax.training.checkpoint import CheckpointError


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> Iterator[paths.Path]:
  """Makes the workdir, owns it, and writes config.json or checks that the run there is the same.

  Of several processes the first does it for all, after they have compared configs and versions.

  Raises:
    DisagreementError: the processes have different ones.
    InUseError: another run owns it.
    ConfigError: it holds a run of another config.
    DiskError: the disk is full or cannot be written.
  """
  workdir = paths.absolute(workdir)
  path = workdir / "config.json"
  with contextlib.ExitStack() as held:

    def open_it():
      with disk_errors(workdir):
        paths.make_folder(workdir)
      # Owned before config.json is read: another run could be writing it.
      held.enter_context(owned(workdir / "run", f"the workdir {workdir}"))
      with disk_errors(workdir):
        dated = with_template_date(config, workdir)
        if path.exists():
          config_lib.check_continues(checkpoint.load_settings(workdir), dated)
        paths.write_whole(path, config_lib.to_json(dated))

    # Before the folder is touched: of processes with different configs none may write.
    processes.agree("config", config_lib.shared(config) | processes.versions())
    if is_main():
      open_it()
    processes.meet("workdir")
    processes.saves_in(workdir, lambda: checkpoint_files.steps(workdir / "checkpoints"))
    yield workdir


def with_template_date(config: ml_collections.ConfigDict, workdir: paths.Path) -> ml_collections.ConfigDict:
  """Returns the config with a day for chat templates: its own, that of the run in the workdir, or today."""
  if config.data.template_date:
    return config
  path = workdir / "config.json"
  kept = config_lib.from_json(path.read_text()).data.get("template_date", "") if path.exists() else ""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    # A template that tells the date would else make other ids of the same data tomorrow, and the run could
    # not be continued.
    config.data.template_date = kept or datetime.date.today().isoformat()
  return config


def open_report(workdir: paths.Path, data: resolve.Data) -> dict:
  """Returns what data_report.json in the workdir says, or nothing, and writes it there if it is not."""
  path = workdir / "data_report.json"
  try:
    with reached(path):
      return json.loads(path.read_text())
  except (OSError, ValueError):
    pass
  if data.report is not None and is_main():
    with disk_errors(workdir):
      paths.write_whole(path, json.dumps(data.report, indent=2, ensure_ascii=False) + "\n")
  return {}


def check_space(workdir: paths.Path, state: Any, config: ml_collections.ConfigDict) -> None:
  """Refuses to start when not even one checkpoint fits the disk; a bucket has room."""
  if not config.checkpoint_every or paths.is_remote(workdir):
    return
  # A reference that moves is saved too, and is as large as the params.
  saved = (state, state.params) if config.reference.sync_every else state
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
  free = shutil.disk_usage(workdir).free
  if free < needed:
    raise DiskError(
      f"a checkpoint takes up to {needed / 2**20:.0f} MiB but the disk of {workdir} has "
      f"{free / 2**20:.0f} MiB free; free some space, or set checkpoint_every=0"
    )


def check_same(was: dict, now: dict, workdir: paths.Path, of_data: str = "") -> None:
  """Refuses to continue a run of another model, of other ids, or beside another reference.

  Args:
    was: what the checkpoint belongs to.
    now: what this run is of.
    workdir: the run's.
    of_data: in what the data differ, in words.
  """
  what = {"model": "another model", "data": "other ids of its data", "reference": "another reference weights"}
  for key, name in what.items():
    if was[key] != now[key]:
      why = f"; what differs is {of_data}" if key == "data" and of_data else ""
      raise CheckpointError(
        f"the run in {workdir} was started with {name} ({was[key]}, now {now[key]}){why}; "
        "bring it back, or start in another workdir"
      )
