"""Writes a run's policy as a Hugging Face folder, which transformers and all that builds on it read.

python -m dpojax.export --workdir=RUN --out=FOLDER [--step=N] [--dtype=bfloat16]

The folder has the config.json, the tensor names and the dtype of the model the run started from, a
model of our own the form of a LLaMA or GPT-2; the tokenizer's files lie beside the weights.
"""

import argparse
import os
import pathlib
import sys

from dpojax import checkpoint
from dpojax.checkpoint import CheckpointError
from dpojax.data import tokenization
from dpojax.data.examples import DataError
from dpojax.disk import DiskError
from dpojax.models import hf
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
  source = pathlib.Path(policy.settings.tokenizer).expanduser()
  if source.is_dir():
    hf.copy_tokenizer(source, out)
  else:
    tokenizer.save_pretrained(out)
  return policy.step


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument("--out", required=True, help="folder to write, empty or new")
  parser.add_argument("--step", type=int, help="of the checkpoint; by default the last")
  parser.add_argument("--dtype", default="", choices=list(hf.DTYPES), help="by default as published")
  options = parser.parse_args()
  try:
    step = export(options.workdir, options.out, step=options.step, dtype=options.dtype)
  except (CheckpointError, DataError, HuggingFaceError, DiskError) as error:
    sys.exit(f"error: {error}")
  print(f"the policy of step {step} of {options.workdir} is in {options.out}")


if __name__ == "__main__":
  main()
