"""Orbax checkpoints of a run: the train state and what it belongs to.

The reference is not in them, unless it moves: then the run could not go on without it.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
import sys
from typing import Any, Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from dpojax import config as config_lib
from dpojax.disk import DiskError, disk_errors
from dpojax.errors import UserError
from dpojax.models import hf, lora
from dpojax.models.config import ModelConfig
from dpojax.models.families import HuggingFaceError


class CheckpointError(UserError, RuntimeError):
  """A checkpoint is not there, or belongs to another run; the message says what to do."""


class Policy(NamedTuple):
  """A trained model. `params` are NumPy arrays, `settings` the config of the run they come from."""

  config: ModelConfig
  params: Any
  step: int
  settings: ml_collections.ConfigDict


class Adapter(NamedTuple):
  """A trained adapter. `params` are NumPy arrays, `config` is the model's that it is on."""

  config: ModelConfig
  lora: lora.Lora
  params: Any
  step: int
  settings: ml_collections.ConfigDict


class Checkpoints:
  """The checkpoints of one run, written in the background, each complete or not there at all."""

  def __init__(
      self, workdir: str | os.PathLike, *, keep: int, best: str = "", owner: bool = False):
    """Opens `workdir/checkpoints`.

    Args:
      workdir: the run's folder.
      keep: last n checkpoints kept; 0 keeps all.
      best: an evaluation metric; the checkpoint best by it is kept too.
      owner: whether this run owns the workdir: what a run before it left half written is then removed,
        and said.
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
    self._saving = None
    if owner and (removed := self._remove_half_written()):
      print(f"removed from {self.folder}, half written by a run that was stopped: {', '.join(removed)}",
            flush=True)

  def steps(self) -> list[int]:
    """Returns the steps that can be restored, ascending."""
    return sorted(self._manager.all_steps())

  def save(
      self, step: int, state: Any, about: dict, metrics: dict | None = None, reference: Any = None
  ) -> None:
    """Starts writing the state and what it belongs to, when the save before has ended.

    Whether it succeeds, `check` or `wait` tell.

    Args:
      step: the state's.
      state: what `restore` returns.
      about: JSON values.
      metrics: the evaluation the checkpoint is ranked by.
      reference: a reference that moves; one that does not is not saved.

    Raises:
      DiskError, CheckpointError: this save or the one before could not be written.
    """
    moving = {} if reference is None else {"reference": ocp.args.PyTreeSave(reference)}
    self.wait()
    with self._saving_errors(step):
      self._saving = step
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

  def restore_about(self, step: int) -> dict:
    """Returns what the state at a step belongs to.

    Raises:
      CheckpointError: its files are damaged.
    """
    return self._restore(step, about=ocp.args.JsonRestore()).about

  def _restore(self, step: int, **items) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise many kinds
      earlier = [other for other in self.steps() if other < step]
      raise CheckpointError(
          f"the checkpoint {self.folder / str(step)} cannot be read "
          f"({str(error).strip().splitlines()[0]}); delete that folder to continue from "
          + (f"step {earlier[-1]}" if earlier else "the start")) from error

  def check(self) -> None:
    """Returns at once; to be called often, so that no step is made after a save that failed.

    Raises:
      DiskError, CheckpointError: the last save has ended and could not be written.
    """
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when everything is written.

    Raises:
      DiskError, CheckpointError: it could not be written.
    """
    with self._saving_errors(self._saving):
      self._manager.wait_until_finished()
    self._saving = None

  @contextlib.contextmanager
  def _saving_errors(self, step: int | None) -> Iterator[None]:
    """Turns a failed save into one error, which names the last good step, and removes what there is of it."""
    try:
      with disk_errors(self.folder):
        yield
    except Exception as error:  # orbax and tensorstore raise many kinds
      self._saving = None
      removed = self._remove_half_written()
      kind = DiskError if isinstance(error, DiskError) else CheckpointError
      good = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())
      raise kind(
          f"step {step} could not be saved: {str(error).strip().splitlines()[0]}. "
          + (f"Step {good[-1]} is the last that is saved" if good else "No step is saved")
          + ("; what was half written is removed" if removed else "")) from error

  def _remove_half_written(self) -> list[str]:
    """Removes what Orbax has not renamed to its step, and returns their names; process 0 does it."""
    if jax.process_index() > 0:
      return []
    found = sorted(self.folder.glob("*.orbax-checkpoint-tmp*"))
    for path in found:
      shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]

  def close(self) -> None:
    """Waits and lets go of the folder.

    Raises:
      DiskError, CheckpointError: the last save could not be written.
    """
    self.wait()
    self._manager.close()


class _SaidOnce(logging.Filter):
  """Leaves out what Orbax logs of a failed save, from each of its threads, and of a signal: we raise both."""

  def filter(self, record: logging.LogRecord) -> bool:
    said = record.exc_info or "preemption sync point" in record.getMessage()
    return not (said and "orbax" in record.pathname)


def _show_unless_late(show: Callable) -> Callable:
  """Returns the hook without what tensorstore shows of writes that end after the first of them failed."""
  def shown(unraisable):
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
      show(unraisable)
  return shown


logging.getLogger("absl").addFilter(_SaidOnce())
sys.unraisablehook = _show_unless_late(sys.unraisablehook)


def load_policy(workdir: str | os.PathLike, step: int | None = None) -> Policy:
  """Returns the policy of a run: of its last checkpoint, or of the one at `step`.

  That of an adapter is merged into the base the run's settings name.

  Raises:
    CheckpointError: there is no such run, or no such checkpoint in it, or the base is not there.
  """
  policy, about = _load(workdir, step)
  adapter = config_lib.lora_of(policy.settings)
  if adapter is None:
    return policy
  base = _base_of(policy.settings, about, workdir)
  return policy._replace(params=lora.merge(base, policy.params, adapter))


def load_model_config(workdir: str | os.PathLike) -> ModelConfig:
  """Returns the dimensions of a run's model, without its weights.

  Raises:
    CheckpointError: there is no such run, or no checkpoint in it.
  """
  with _opened(workdir) as (checkpoints, step):
    return ModelConfig(**checkpoints.restore_about(step)["model"])


def load_adapter(workdir: str | os.PathLike, step: int | None = None) -> Adapter:
  """Returns the adapter of a run: of its last checkpoint, or of the one at `step`.

  Raises:
    CheckpointError: there is no such run or checkpoint, or it trained no adapter.
  """
  policy, _ = _load(workdir, step)
  adapter = config_lib.lora_of(policy.settings)
  if adapter is None:
    raise CheckpointError(f"{workdir} holds no adapter: it was run with lora.rank=0")
  return Adapter(policy.config, adapter, policy.params, policy.step, policy.settings)


def load_weights(
    name: str, *, place: hf.Place | None = None, dtype: str = "float32", scan_layers: bool = True
) -> Policy | hf.Model:
  """Returns the `config` and `params` of a run's workdir, a Hugging Face folder or a hub name.

  Args:
    name: the workdir, folder or hub name.
    place: where the params of a Hugging Face model are kept; those of a run are NumPy arrays.
    dtype: of the params; a reward head stays float32.
    scan_layers: of a Hugging Face model; a run has its own.

  Raises:
    CheckpointError: the folder is neither a model nor a run's workdir.
    HuggingFaceError: the model cannot be fetched or is not supported.
  """
  name = os.path.expanduser(name)
  if hf.is_model(name):
    return hf.load(name, place=place, dtype=dtype, scan_layers=scan_layers)
  policy = load_policy(name)
  return policy._replace(params={
      name: part if name == lora.WHOLE else jax.tree.map(
          lambda x: np.asarray(x, jnp.dtype(dtype)), part) for name, part in policy.params.items()})


def _load(workdir: str | os.PathLike, step: int | None) -> tuple[Policy, dict]:
  """What a run has trained, and what its checkpoint says of itself."""
  settings = load_settings(workdir)
  with _opened(workdir, step) as (checkpoints, step):
    params, about = checkpoints.restore_arrays(step, "params")
  return Policy(ModelConfig(**about["model"]), params, step, settings), about


@contextlib.contextmanager
def _opened(
    workdir: str | os.PathLike, step: int | None = None) -> Iterator[tuple[Checkpoints, int]]:
  """Opens the checkpoints of a run; gives the last step where none is named."""
  load_settings(workdir)
  checkpoints = Checkpoints(workdir, keep=0)
  steps = checkpoints.steps()
  if not steps or (step is not None and step not in steps):
    raise CheckpointError(
        f"{workdir} holds no checkpoint" + (f" of step {step}" if step is not None else "")
        + f"; it holds {steps}. Run it with checkpoint_every > 0")
  yield checkpoints, steps[-1] if step is None else step
  checkpoints.close()


def _base_of(
    settings: ml_collections.ConfigDict, about: dict, workdir: str | os.PathLike) -> Any:
  """The params that a run's adapter is on."""
  name = settings.model.checkpoint
  try:
    params = load_weights(
        name, dtype=settings.model.param_dtype, scan_layers=settings.model.scan_layers).params
  except (CheckpointError, HuggingFaceError) as error:
    raise CheckpointError(
        f"{workdir} holds an adapter on {name!r}, which cannot be read ({error}); put it back, or "
        f"write where it is now as model.checkpoint into {workdir}/config.json") from error
  params = {key: part for key, part in params.items() if key != lora.WHOLE}
  if fingerprint(params) != about["reference"]:
    raise CheckpointError(
        f"{workdir} holds an adapter on other weights than {name!r} has now; bring those back")
  return params


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

  digest, checksum = hashlib.sha256(), jax.jit(checksum)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    sums = jax.device_get(checksum(leaf))  # one at a time: a device need not hold all of them
    digest.update(f"{name} {leaf.shape} {leaf.dtype} {sums.tolist()}\n".encode())
  return digest.hexdigest()


def _into(target: Any) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
      target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def _higher_is_better(metric: str) -> bool:
  return metric not in ("loss", "nll_per_token")
