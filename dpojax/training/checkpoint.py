"""Orbax checkpoints of a run: the train state and what it belongs to, with digests of their files.

The reference is not in them, unless it moves: then the run could not go on without it. Every process
takes the digests of the files it has written, before the checkpoint is renamed to its place; whatever
is read back is checked against them first.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dpojax.models import hf, lora
from dpojax.models.config import ModelConfig
from dpojax.models.families import HuggingFaceError
from dpojax.models.sharding import path_of
from dpojax.models.tensors import read_json
from dpojax.runtime import paths
from dpojax.runtime.command import say
from dpojax.runtime.digests import DamageError
from dpojax.runtime.disk import DiskError, disk_errors, reached
from dpojax.runtime.errors import UserError
from dpojax.training import checkpoint_files
from dpojax.training import config as config_lib
from dpojax.training.step import average_of

ITEMS = ("state", "about", "reference", "metrics")
"""What a step holds; a reference only if it moves, metrics only if it is ranked by them."""


class CheckpointError(UserError, RuntimeError):
  """A checkpoint is not there, or belongs to another run; the message says what to do."""


class Policy(NamedTuple):
  """A trained model. `params` are NumPy arrays, `settings` the config of the run they come from.

  `stop_ids` are those that ended a response in training, none where the run is too old to tell.
  """

  config: ModelConfig
  params: Any
  step: int
  settings: ml_collections.ConfigDict
  stop_ids: tuple[int, ...] = ()


class Adapter(NamedTuple):
  """A trained adapter. `params` are NumPy arrays, `config` is the model's that it is on."""

  config: ModelConfig
  lora: lora.Lora
  params: Any
  step: int
  settings: ml_collections.ConfigDict
  stop_ids: tuple[int, ...] = ()


class Checkpoints:
  """The checkpoints of one run, written in the background, each complete or not there at all."""

  def __init__(self, workdir: str | os.PathLike, *, keep: int, best: str = "", owner: bool = False):
    """Opens `workdir/checkpoints`.

    Args:
      workdir: the run's folder.
      keep: last n checkpoints kept; 0 keeps all.
      best: an evaluation metric; the checkpoint best by it is kept too.
      owner: whether this run owns the workdir and saves in it: what a run before it left half written is
        then removed, and said. Otherwise nothing is written or removed, so that a run which is saving can
        be looked at.
    """
    policies = ocp.checkpoint_managers.preservation_policy
    kept = [policies.LatestN(keep)] if keep else [policies.PreserveAll()]
    if best:
      kept.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics[best],
          n=1,
          reverse=not _higher_is_better(best),
          # One that a signal asked for has none, and is the other policy's to keep.
          keep_checkpoints_without_metrics=False,
        )
      )
    self.folder = paths.absolute(workdir) / "checkpoints"
    if paths.is_remote(self.folder):
      checkpoint_files.let_orbax_write_to_buckets()
    self._writing = 0
    # What training makes does not get smaller: compressing took more time than all the rest.
    arrays = lambda: checkpoint_files.Arrays(use_compression=False)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        async_options=ocp.AsyncOptions(
          # Between the last byte and the rename: a step has its digests before anybody can take it for whole.
          post_finalization_callback=lambda: checkpoint_files.seal(self.folder, self._writing)
        ),
      ),
      item_handlers={"state": arrays(), "about": ocp.JsonCheckpointHandler(), "reference": arrays()},
    )
    self._checked: set[tuple[int, str]] = set()  # (step, item), once a run: they are not read again
    self._saving: int | None = None
    if owner and (removed := self._remove_half_written()):
      print(
        f"removed from {self.folder}, half written by a run that was stopped: {', '.join(removed)}",
        flush=True,
      )

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
    moving = {} if reference is None else {"reference": checkpoint_files.Save(reference)}
    # One save at a time: the error of the one before belongs to its own step.
    self.wait()
    with self._saving_errors(step):
      self._saving = self._writing = step
      self._manager.save(
        step,
        metrics=metrics,
        args=ocp.args.Composite(
          state=checkpoint_files.Save(state), about=ocp.args.JsonSave(about | checkpoint_files.MARK), **moving
        ),
      )

  def last_sound(self, *, together: bool = True) -> int | None:
    """Returns the last step whose files are as they were written, or None where there is no step.

    Damaged ones after it are told of.

    Args:
      together: whether this is the run itself, in all its processes: damaged ones are then moved out
        of the way, into `workdir/damaged`. Else nothing is moved.

    Raises:
      CheckpointError: none is sound.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        if not self._check(step, ITEMS, together=together):
          say(f"the checkpoint {self.folder / str(step)} was written without digests: it is read unchecked")
        return step
      except CheckpointError as error:
        if step == steps[0]:
          raise
        say(f"{error}; the one before is taken")
        if together:
          self._set_aside(step)
    return None

  def restore(self, step: int, target: Any) -> tuple[Any, dict]:
    """Returns the state at a step, placed as the target is, and what it belongs to.

    Raises:
      CheckpointError: its files are damaged.
    """
    restored = self._restore(step, state=_into(target), about=ocp.args.JsonRestore())
    return restored.state, _without_mark(restored.about)

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
    # Before orbax reads the tree: of damaged files its metadata may already tell something else.
    self._check(step, ("state", "about"))
    try:
      tree = checkpoint_files.tree_of(self.folder / str(step) / "state")
      tree = {part: tree[part]} if part else tree
    except Exception as error:  # of a step without digests; orbax raises many kinds
      raise self._unreadable(step, error) from error
    as_array = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    restored = self._restore(
      step,
      about=ocp.args.JsonRestore(),
      state=checkpoint_files.Restore(
        tree, partial_restore=bool(part), restore_args=jax.tree.map(as_array, tree)
      ),
    )
    return restored.state[part] if part else restored.state, _without_mark(restored.about)

  def restore_about(self, step: int) -> dict:
    """Returns what the state at a step belongs to.

    Raises:
      CheckpointError: its files are damaged.
    """
    return _without_mark(self._restore(step, about=ocp.args.JsonRestore()).about)

  def _restore(self, step: int, **items) -> Any:
    self._check(step, items)
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise self._unreadable(step, error) from error

  def _check(self, step: int, items: Iterable[str], *, together: bool = False) -> bool:
    """Checks items of a step against their digests, once; returns False where there are none."""
    missing = {item for item in items if (step, item) not in self._checked}
    if not missing:
      return True
    try:
      has_digests = checkpoint_files.check(self.folder / str(step), missing, together=together)
    except DamageError as error:
      raise self._unreadable(step, error) from error
    self._checked |= {(step, item) for item in missing}
    return has_digests

  def _unreadable(self, step: int, error: Exception) -> CheckpointError:
    earlier = [other for other in self.steps() if other < step]
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return CheckpointError(
      f"the checkpoint {self.folder / str(step)} cannot be read ({reason}); delete that folder to "
      "continue from " + (f"step {earlier[-1]}" if earlier else "the start")
    )

  def _set_aside(self, step: int) -> None:
    """Moves a step to `workdir/damaged`, under a name that is free."""
    if jax.process_index() == 0:
      with disk_errors(self.folder):
        aside = self.folder.parent / "damaged"
        paths.make_folder(aside)
        name = next(
          name
          for i in itertools.count()
          if not (aside / (name := f"{step}.{i}" if i else str(step))).exists()
        )
        # Moved and not deleted: what is damaged may still be wanted, and only its owner can judge that.
        paths.move(self.folder / str(step), aside / name)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
    self._manager.reload()

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
      good = checkpoint_files.steps(self.folder)
      raise kind(
        f"step {step} could not be saved: {str(error).strip().splitlines()[0]}. "
        + (f"Step {good[-1]} is the last that is saved" if good else "No step is saved")
        + ("; what was half written is removed" if removed else "")
      ) from error

  def _remove_half_written(self) -> list[str]:
    """Removes what Orbax has not renamed to its step, and returns their names; process 0 does it."""
    if jax.process_index() > 0:
      return []
    found = checkpoint_files.half_written(self.folder)
    for path in found:
      paths.remove(path)
    return [path.name for path in found]

  def close(self) -> None:
    """Waits and lets go of the folder.

    Raises:
      DiskError, CheckpointError: the last save could not be written.
    """
    self.wait()
    self._manager.close()


class _SaidOnce(logging.Filter):
  """Leaves out what is logged of a failed save, and by Orbax of a signal: we raise both.

  Orbax logs from each of its threads, asyncio each of the writes but the first.
  """

  def filter(self, record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if "orbax" in record.pathname:
      return not (record.exc_info or "preemption sync point" in text)
    # Whether asyncio comes to say it hangs on when a task is collected.
    return not ("exception was never retrieved" in text and "orbax" in text)


def _show_unless_late(show: Callable) -> Callable:
  """Returns the hook without what tensorstore shows of writes that end after the first of them failed."""

  def shown(unraisable):
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
      show(unraisable)

  return shown


# Of the process and not of a run: orbax logs from threads that know of no run.
for _logger in ("absl", "asyncio"):
  logging.getLogger(_logger).addFilter(_SaidOnce())
sys.unraisablehook = _show_unless_late(sys.unraisablehook)


def load_policy(workdir: str | os.PathLike, step: int | None = None) -> Policy:
  """Returns the policy of a run: of its last checkpoint, or of the one at `step`.

  Where the run's optimizer averages params, it is their average. That of an adapter is merged into
  the base the run's settings name.

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
  return Adapter(policy.config, adapter, policy.params, policy.step, policy.settings, policy.stop_ids)


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
  return policy._replace(
    params={
      name: part if name == lora.WHOLE else jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), part)
      for name, part in policy.params.items()
    }
  )


def _load(workdir: str | os.PathLike, step: int | None) -> tuple[Policy, dict]:
  """What a run has trained, and what its checkpoint says of itself."""
  settings = load_settings(workdir)
  with _opened(workdir, step) as (checkpoints, step):
    if config_lib.averages(settings):
      state, about = checkpoints.restore_arrays(step)
      params = average_of(state["params"], state["opt_state"])
    else:
      params, about = checkpoints.restore_arrays(step, "params")
  return Policy(
    ModelConfig(**about["model"]), params, step, settings, tuple(about.get("stop_ids", ()))
  ), about


@contextlib.contextmanager
def _opened(workdir: str | os.PathLike, step: int | None = None) -> Iterator[tuple[Checkpoints, int]]:
  """Opens the checkpoints of a run; gives the last step where none is named."""
  load_settings(workdir)
  checkpoints = Checkpoints(workdir, keep=0)
  steps = checkpoints.steps()
  found = checkpoints.last_sound(together=False) if step is None else step
  if found is None or found not in steps:
    raise CheckpointError(
      f"{workdir} holds no checkpoint"
      + (f" of step {step}" if step is not None else "")
      + f"; it holds {steps}. Run it with checkpoint_every > 0"
    )
  yield checkpoints, found
  checkpoints.close()


def _base_of(settings: ml_collections.ConfigDict, about: dict, workdir: str | os.PathLike) -> Any:
  """The params that a run's adapter is on."""
  name = settings.model.checkpoint
  try:
    params = load_weights(
      name, dtype=settings.model.param_dtype, scan_layers=settings.model.scan_layers
    ).params
  except (CheckpointError, HuggingFaceError) as error:
    raise CheckpointError(
      f"{workdir} holds an adapter on {name!r}, which cannot be read ({error}); put it back, or "
      f"write where it is now as model.checkpoint into {workdir}/config.json"
    ) from error
  params = {key: part for key, part in params.items() if key != lora.WHOLE}
  # An adapter on other weights is another model, which would answer without any error.
  if fingerprint(params) != about["reference"]:
    raise CheckpointError(
      f"{workdir} holds an adapter on other weights than {name!r} has now; bring those back"
    )
  return params


def load_settings(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """Returns the config a workdir's run was started with.

  Raises:
    CheckpointError: the folder is no run's workdir.
  """
  path = paths.of(workdir) / "config.json"
  with reached(path):
    is_there = path.exists()
  if not is_there:
    raise CheckpointError(f"{workdir} is not the workdir of a run: {path} does not exist")
  try:
    settings = config_lib.from_json(json.dumps(read_json(path)))
    for key in ("tokenizer", "model.checkpoint"):
      config_lib.flatten(settings)[key]
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise CheckpointError(
      f"{workdir} is neither a model nor the workdir of a run ({path}: {error})"
    ) from error
  return settings


def fingerprint(params: Any) -> str:
  """Returns a digest of paths, shapes, dtypes and every bit, the same under any sharding."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path_of(path)
    # On devices each sums what it has: no weight is brought to the host for its digest.
    sums = _host_checksum(leaf) if isinstance(leaf, np.ndarray) else jax.device_get(_checksum(leaf))
    digest.update(f"{name} {leaf.shape} {leaf.dtype} {sums.tolist()}\n".encode())
  return digest.hexdigest()


_CHECKSUM_BLOCK = 2**16  # its few arrays lie in a core's cache


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
  """Two sums, modulo 2**32, of an array's bits mixed with their places: [2] uint32."""
  place = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  bits = jax.lax.bitcast_convert_type(leaf, f"uint{leaf.dtype.itemsize * 8}").astype(jnp.uint32)
  return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in _mixed(bits, place)])


def _mixed(bits, place):
  """Bits and their places as two arrays, whose sums are the checksum; of jax or NumPy, as those given are."""
  # By an odd number of the place, so that no value drops out and equal values in other places count
  # otherwise; then by 2^32 over the golden ratio (Knuth), which spreads neighbours. Sums do not hang on the
  # order of devices.
  mixed = (bits ^ (bits >> 15)) * (2 * place + 1) * np.uint32(2654435761)
  return mixed, mixed ^ (mixed >> 13)


def _host_checksum(leaf: np.ndarray) -> np.ndarray:
  """`_checksum` of an array of the host, without a program: many of a model's arrays are small."""
  flat, sums = leaf.reshape(-1), np.zeros(2, np.uint32)
  for start in range(0, flat.size, _CHECKSUM_BLOCK):
    block = flat[start : start + _CHECKSUM_BLOCK]
    bits = block.view(f"uint{8 * block.itemsize}").astype(np.uint32)
    place = np.arange(start, start + block.size, dtype=np.int64).astype(np.uint32)
    sums += np.array([x.sum(dtype=np.uint32) for x in _mixed(bits, place)])
  return sums


def _without_mark(about: dict) -> dict:
  return {key: value for key, value in about.items() if key not in checkpoint_files.MARK}


def _into(target: Any) -> checkpoint_files.Restore:
  return checkpoint_files.Restore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def _higher_is_better(metric: str) -> bool:
  # All others that an evaluation has, such as accuracies and margins, are better the higher they are.
  return metric not in ("loss", "nll_per_token")
