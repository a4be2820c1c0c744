"""Writes a run's policy as a Hugging Face folder, which transformers and all that builds on it read.

python -m dpojax.export --workdir=RUN --out=FOLDER [--step=N] [--dtype=bfloat16]
python -m dpojax.export --workdir=RUN --out=FOLDER --lora [--base=NAME] [--step=N]

The folder has the config.json, the tensor names and the dtype of the model the run started from, a
model of our own the form of a LLaMA or GPT-2; the tokenizer's files lie beside the weights. A policy
trained as an adapter is merged into its base; with --lora the adapter is written alone, for PEFT.
"""

import argparse
import os
import pathlib

from dpojax import checkpoint
from dpojax.command import command
from dpojax.data import tokenization
from dpojax.models import hf, peft
from dpojax.models.families import HuggingFaceError


def export(
    workdir: str | os.PathLike, out: str | os.PathLike, *, step: int | None = None, dtype: str = ""
) -> int:
  """Writes the policy of a run to a folder and returns the step it is of.

  Raises:
    CheckpointError: there is no such run or checkpoint.
    DataError: the run's tokenizer cannot be loaded.
    HuggingFaceError: the folder is not empty, or the model has no form in one.
    DiskError: the disk is full or cannot be written.
  """
  policy = checkpoint.load_policy(workdir, step)
  tokenizer = tokenization.load_tokenizer(policy.settings.tokenizer)
  hf.save(
      out, policy.config, policy.params, dtype=dtype, bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
  _write_tokenizer(tokenizer, policy.settings.tokenizer, out)
  return policy.step


def export_adapter(
    workdir: str | os.PathLike, out: str | os.PathLike, *, step: int | None = None, base: str = ""
) -> int:
  """Writes the adapter of a run to a folder that PEFT reads and returns the step it is of.

  Args:
    workdir: of the run.
    out: the folder, empty or new.
    step: of the checkpoint; by default the last.
    base: where PEFT finds the base; by default where the run did.

  Raises:
    CheckpointError: there is no such run or checkpoint, or it has no adapter.
    DataError: the run's tokenizer cannot be loaded.
    HuggingFaceError: the folder is not empty, or PEFT could not load the base.
    DiskError: the disk is full or cannot be written.
  """
  adapter = checkpoint.load_adapter(workdir, step)
  started = adapter.settings.model.checkpoint
  if not base and (not hf.is_model(started) or peft.is_adapter_folder(started)):
    raise HuggingFaceError(
        f"the adapter of {workdir} is on {started!r}, which is no Hugging Face model that PEFT could "
        f"load; write that one with dpojax.export or PEFT, and name its folder with --base")
  tokenizer = tokenization.load_tokenizer(adapter.settings.tokenizer)
  peft.save(out, adapter.config, adapter.params, adapter.lora, base=base or started)
  _write_tokenizer(tokenizer, adapter.settings.tokenizer, out)
  return adapter.step


def _write_tokenizer(tokenizer, name: str, out: str | os.PathLike) -> None:
  source = pathlib.Path(name).expanduser()
  if source.is_dir():
    hf.copy_tokenizer(source, out)
  else:
    tokenizer.save_pretrained(out)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument("--out", required=True, help="folder to write, empty or new")
  parser.add_argument("--step", type=int, help="of the checkpoint; by default the last")
  parser.add_argument("--dtype", default="", choices=list(hf.DTYPES), help="by default as published")
  parser.add_argument("--lora", action="store_true", help="the adapter alone, for PEFT")
  parser.add_argument("--base", default="", help="where PEFT finds the base, with --lora")
  options = parser.parse_args()
  if options.lora and options.dtype or options.base and not options.lora:
    parser.error("--dtype is for whole models, and --base for --lora")
  with command():
    if options.lora:
      step = export_adapter(options.workdir, options.out, step=options.step, base=options.base)
    else:
      step = export(options.workdir, options.out, step=options.step, dtype=options.dtype)
  what = "adapter" if options.lora else "policy"
  print(f"the {what} of step {step} of {options.workdir} is in {options.out}")


if __name__ == "__main__":
  main()
