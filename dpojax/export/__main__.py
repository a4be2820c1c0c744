"""Writes a run's policy as a Hugging Face folder, which transformers and all that builds on it read.

python -m dpojax.export --workdir=RUN --out=FOLDER [--step=N] [--dtype=bfloat16]
python -m dpojax.export --workdir=RUN --out=FOLDER --lora [--base=NAME] [--step=N]

The folder has the config.json, the tensor names and the dtype of the model the run started from, a
model of our own the form of a LLaMA or GPT-2; the tokenizer's files lie beside the weights. Its
generation_config.json lists every id that ended a response in training, and those that the model
ended with before. A policy trained as an adapter is merged into its base; with --lora the adapter is
written alone, for PEFT. What was written is read back and held to the policy.
"""

import argparse

from dpojax.models.families import DTYPES


def main():
  parser = argparse.ArgumentParser(prog="dpojax.export", description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument("--out", required=True, help="folder to write, empty or new")
  parser.add_argument("--step", type=int, help="of the checkpoint; by default the last")
  parser.add_argument("--dtype", default="", choices=list(DTYPES), help="by default as published")
  parser.add_argument("--lora", action="store_true", help="the adapter alone, for PEFT")
  parser.add_argument("--base", default="", help="where PEFT finds the base, with --lora")
  options = parser.parse_args()
  if options.lora and options.dtype or options.base and not options.lora:
    parser.error("--dtype is for whole models, and --base for --lora")
  from dpojax.export import writer  # here, for --help and an error of the command line need no jax
  from dpojax.runtime.command import command

  with command():
    if options.lora:
      done = writer.export_adapter(options.workdir, options.out, step=options.step, base=options.base)
    else:
      done = writer.export(options.workdir, options.out, step=options.step, dtype=options.dtype)
  what = "adapter" if options.lora else "policy"
  print(
    f"the {what} of step {done.step} of {options.workdir} is in {options.out}; texts end at "
    f"{' '.join(map(str, done.stop_ids))}",
    *done.notes,
    sep="\n",
  )


if __name__ == "__main__":
  main()
