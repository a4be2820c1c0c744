"""A run's policy, or its adapter, as a Hugging Face folder."""

import os
import pathlib
import tempfile
from typing import Any, NamedTuple

from dpojax.data import tokenization
from dpojax.export import verify
from dpojax.models import hf, peft
from dpojax.models.families import HuggingFaceError
from dpojax.runtime import paths
from dpojax.runtime.disk import disk_errors
from dpojax.training import checkpoint, weights


class Exported(NamedTuple):
  """What was written.

  Attributes:
    step: of the checkpoint.
    stop_ids: what the folder's generation_config.json ends a text with.
    notes: what reading it back has found, and what a user of the folder has to know.
  """

  step: int
  stop_ids: tuple[int, ...]
  notes: tuple[str, ...]


def export(
  workdir: str | os.PathLike, out: str | os.PathLike, *, step: int | None = None, dtype: str = ""
) -> Exported:
  """Writes the policy of a run to a folder, and reads it back.

  Raises:
    CheckpointError: there is no such run or checkpoint.
    DataError: the run's tokenizer cannot be loaded.
    HuggingFaceError: the folder is not empty, the model has no form in one, or what was written is
      not the policy.
    DiskError: the disk is full or cannot be written.
  """
  policy = checkpoint.load_policy(workdir, step)
  tokenizer = tokenization.load_tokenizer(policy.settings.tokenizer)
  token_ids, stop_ids = _token_ids(policy, tokenizer)
  hf.save(out, policy.config, policy.params, dtype=dtype, **token_ids)
  _write_tokenizer(tokenizer, policy.settings.tokenizer, out)
  # A folder that is not the policy would be found by whoever is surprised by it, much later.
  checked = verify.check(out, policy.config, policy.params, tokenizer, stop_ids)
  return Exported(policy.step, stop_ids, (str(checked),))


def export_adapter(
  workdir: str | os.PathLike, out: str | os.PathLike, *, step: int | None = None, base: str = ""
) -> Exported:
  """Writes the adapter of a run to a folder that PEFT reads, and reads it back where its base is.

  Args:
    workdir: of the run.
    out: the folder, empty or new.
    step: of the checkpoint; by default the last.
    base: where PEFT finds the base; by default where the run did.

  Raises:
    CheckpointError: there is no such run or checkpoint, or it has no adapter.
    DataError: the run's tokenizer cannot be loaded.
    HuggingFaceError: the folder is not empty, PEFT could not load the base, or what was written is not
      the adapter.
    DiskError: the disk is full or cannot be written.
  """
  adapter = checkpoint.load_adapter(workdir, step)
  started = adapter.settings.model.checkpoint
  # PEFT finds the base by this name: a workdir of ours it cannot load.
  if not base and (not hf.is_model(started) or peft.is_adapter_folder(started)):
    raise HuggingFaceError(
      f"the adapter of {workdir} is on {started!r}, which is no Hugging Face model that PEFT could "
      f"load; write that one with dpojax.export or PEFT, and name its folder with --base"
    )
  base = base or started
  tokenizer = tokenization.load_tokenizer(adapter.settings.tokenizer)
  token_ids, stop_ids = _token_ids(adapter, tokenizer)
  peft.save(out, adapter.config, adapter.params, adapter.lora, base=base)
  hf.save_generation_config(out, adapter.config, **token_ids)
  _write_tokenizer(tokenizer, adapter.settings.tokenizer, out)
  notes = [_read_back(workdir, adapter, out, base, tokenizer, stop_ids)]
  if set(stop_ids) != set(weights.published_stop_ids(adapter.config)):
    notes.append(
      f"transformers generates with the base's generation_config.json, which does not end at {stop_ids}: "
      f"give generate the one of {out}, by generation_config=GenerationConfig.from_pretrained(FOLDER)"
    )
  return Exported(adapter.step, stop_ids, tuple(notes))


def _token_ids(
  trained: checkpoint.Policy | checkpoint.Adapter, tokenizer: Any
) -> tuple[dict[str, int | list[int] | None], tuple[int, ...]]:
  """Returns the special ids that a folder is written with, and all that end a text in it.

  Every id that ended a response in training does, and what the model ended with before still may.
  """
  stop_ids = tuple(
    dict.fromkeys(
      (*(trained.stop_ids or [tokenizer.eos_token_id]), *weights.published_stop_ids(trained.config))
    )
  )
  return dict(
    bos_token_id=tokenizer.bos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=list(stop_ids) if len(stop_ids) > 1 else stop_ids[0],
  ), stop_ids


def _read_back(
  workdir: str | os.PathLike,
  adapter: checkpoint.Adapter,
  out: str | os.PathLike,
  base: str,
  tokenizer: Any,
  stop_ids: tuple[int, ...],
) -> str:
  """Holds an adapter's folder to the merged policy, if the base that it names is there.

  The run's own is, or was fetched once; another that is no folder is not fetched for this.
  """
  # To read it back would be to fetch gigabytes that nobody has asked for.
  if base != adapter.settings.model.checkpoint and not hf.is_model_folder(os.path.expanduser(base)):
    return f"not read back: the base {base!r} is no folder here"
  policy = checkpoint.load_policy(workdir, adapter.step)
  return str(
    verify.check(
      out, policy.config, policy.params, tokenizer, stop_ids, merged=adapter.settings.model.param_dtype
    )
  )


def _write_tokenizer(tokenizer: Any, name: str, out: str | os.PathLike) -> None:
  source = paths.of(name)
  if source.is_dir():
    hf.copy_tokenizer(source, out)
  elif paths.is_remote(out):
    with disk_errors(out), tempfile.TemporaryDirectory() as here:
      tokenizer.save_pretrained(here)
      paths.upload(pathlib.Path(here), paths.of(out))
  else:
    tokenizer.save_pretrained(out)
