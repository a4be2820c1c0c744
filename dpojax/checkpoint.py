"""Orbax checkpoints of a run: the train state and what it belongs to.

The reference is not in them, unless it moves: then the run could not go on without it.
"""

import hashlib
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from dpojax import config as config_lib
from dpojax.disk import disk_errors
from dpojax.models.config import ModelConfig


class CheckpointError(RuntimeError):
  """A checkpoint is not there, or belongs to another run; the message says what to do."""


class Policy(NamedTuple):
  """A trained model. `params` are NumPy arrays, `settings` the config of the run they come from."""

  config: ModelConfig
  params: Any
  step: int
  settings: ml_collections.ConfigDict


class Checkpoints:
  """The checkpoints of one run, written in the background, each complete or not there at all."""

  def __init__(self, workdir: str | os.PathLike, *, keep: int, best: str = ""):
    """Opens `workdir/checkpoints`.

    Args:
      workdir: the run's folder.
      keep: last n checkpoints kept; 0 keeps all.
      best: an evaluation metric; the checkpoint best by it is kept too.
    """
    policies = ocp.checkpoint_managers.preservation_policy
    kept = [policies.LatestN(keep)] if keep else [policies.PreserveAll()]
    if best:
      kept.append(policies.BestN(
          get_metric_fn=lambda metrics: metrics[best], n=1, reverse=not _higher_is_better(best),
          keep_checkpoints_without_metrics=False))
    self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(
        self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept)),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(), "about": ocp.JsonCheckpointHandler(),
                       "reference": ocp.PyTreeCheckpointHandler()})

  def steps(self) -> list[int]:
    """Returns the steps that can be restored, ascending."""
    return sorted(self._manager.all_steps())

  def save(
      self, step: int, state: Any, about: dict, metrics: dict | None = None, reference: Any = None
  ) -> None:
    """Starts writing the state and what it belongs to; an earlier failure is raised here.

    Args:
      step: the state's.
      state: what `restore` returns.
      about: JSON values.
      metrics: the evaluation the checkpoint is ranked by.
      reference: a reference that moves; one that does not is not saved.

    Raises:
      DiskError: the disk is full or the folder cannot be written.
    """
    moving = {} if reference is None else {"reference": ocp.args.PyTreeSave(reference)}
    with disk_errors(self.folder):
      self._manager.save(
          step, metrics=metrics, args=ocp.args.Composite(
              state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave(about), **moving))

  def restore(self, step: int, target: Any) -> tuple[Any, dict]:
    """Returns the state at a step, placed as the target is, and what it belongs to.

    Raises:
      CheckpointError: its files are damaged.
    """
    restored = self._restore(
        step, state=_into(target), about=ocp.args.JsonRestore())
    return restored.state, restored.about

  def restore_reference(self, step: int, target: Any) -> Any:
    """Returns the reference that moves, as it was at a step, placed as the target is.

    Raises:
      CheckpointError: its files are damaged.
    """
    return self._restore(step, reference=_into(target)).reference

  def restore_arrays(self, step: int, part: str = "") -> tuple[Any, dict]:
    """Returns the state, or one part of it such as `params`, as NumPy arrays in plain dicts.

    Raises:
      CheckpointError: its files are damaged.
    """
    tree = self._manager.item_metadata(step).state.tree
    tree = {part: tree[part]} if part else tree
    as_array = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    restored = self._restore(
        step, about=ocp.args.JsonRestore(), state=ocp.args.PyTreeRestore(
            tree, partial_restore=bool(part), restore_args=jax.tree.map(as_array, tree)))
    return restored.state[part] if part else restored.state, restored.about

  def _restore(self, step: int, **items) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise many kinds
      earlier = [other for other in self.steps() if other < step]
      raise CheckpointError(
          f"the checkpoint {self.folder / str(step)} cannot be read "
          f"({str(error).strip().splitlines()[0]}); delete that folder to continue from "
          + (f"step {earlier[-1]}" if earlier else "the start")) from error

  def wait(self) -> None:
    """Returns when everything is written.

    Raises:
      DiskError: the disk is full or the folder cannot be written.
    """
    with disk_errors(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and lets go of the folder."""
    self.wait()
    self._manager.close()


def load_policy(workdir: str | os.PathLike, step: int | None = None) -> Policy:
  """Returns the policy of a run: of its last checkpoint, or of the one at `step`.

  Raises:
    CheckpointError: there is no such run, or no such checkpoint in it.
  """
  workdir = pathlib.Path(workdir)
  settings = load_settings(workdir)
  checkpoints = Checkpoints(workdir, keep=0)
  steps = checkpoints.steps()
  if not steps or (step is not None and step not in steps):
    raise CheckpointError(
        f"{workdir} holds no checkpoint" + (f" of step {step}" if step is not None else "")
        + f"; it holds {steps}. Run it with checkpoint_every > 0")
  step = steps[-1] if step is None else step
  params, about = checkpoints.restore_arrays(step, "params")
  checkpoints.close()
  return Policy(ModelConfig(**about["model"]), params, step, settings)


def load_settings(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """Returns the config a workdir's run was started with.

  Raises:
    CheckpointError: the folder is no run's workdir.
  """
  path = pathlib.Path(workdir) / "config.json"
  try:
    return config_lib.from_json(path.read_text())
  except FileNotFoundError as error:
    raise CheckpointError(
        f"{workdir} is not the workdir of a run: {path} does not exist") from error


def fingerprint(params: Any) -> str:
  """Returns a digest of paths, shapes, dtypes and every bit, the same under any sharding."""
  def checksum(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{leaf.dtype.itemsize * 8}").astype(jnp.uint32)
    weight = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      weight = weight * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    mixed = (bits ^ (bits >> 15)) * (2 * weight + 1) * jnp.uint32(2654435761)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)])

  leaves = jax.tree_util.tree_leaves_with_path(params)
  sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(checksum, tree))([leaf for _, leaf in leaves]))
  digest = hashlib.sha256()
  for (path, leaf), sum_ in zip(leaves, sums):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    digest.update(f"{name} {leaf.shape} {leaf.dtype} {sum_.tolist()}\n".encode())
  return digest.hexdigest()


def _into(target: Any) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
      target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def _higher_is_better(metric: str) -> bool:
  return metric not in ("loss", "nll_per_token")
