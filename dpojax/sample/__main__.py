"""Samples from a policy: a file of prompts in, a file of responses and their log-probs out.

python -m dpojax.sample --workdir=RUN --prompts=FILE.jsonl --out=FILE.jsonl \\
    [--temperature=0.7 --top_p=0.95 --num_samples=4 --max_new_tokens=256 ...]

The prompts are those of any file that can be trained on (docs/data.md); responses need not be there.
A line of the output is a sample: `index` (the prompt's record, from 0), `sample`, `prompt` (with `tools`
and `chat_template_kwargs` where it has any), `response`, `log_prob` and `reference_log_prob` (summed over
the response, at temperature 1), `tokens`, and `finished` (false where `max_new_tokens` cut it off). Started
again after a kill the same command goes on, to the same file. `--out` with `.config.json` in place of its
ending says what it was sampled with.
"""

import argparse

from dpojax.runtime.errors import in_one_line
from dpojax.sample.draws import add_draw_arguments, draw_of


def main():
  parser = argparse.ArgumentParser(prog="dpojax.sample", description=__doc__.splitlines()[0])
  parser.add_argument(
    "--workdir",
    "--checkpoint",
    dest="model",
    required=True,
    help="a run's workdir, a Hugging Face folder or a hub name",
  )
  parser.add_argument("--prompts", required=True, help="a file that can be trained on, such as .jsonl")
  parser.add_argument("--form", default="", help="of its records (docs/data.md); by default recognised")
  parser.add_argument(
    "--on_error", default="skip", choices=("skip", "raise"), help="records without a prompt"
  )
  parser.add_argument("--out", required=True, help=".jsonl to write, or to go on with")
  parser.add_argument("--max_prompt_length", type=int, default=0, help="by default the run's")
  parser.add_argument("--limit", type=int, default=0, help="prompts read; 0 is all")
  add_draw_arguments(parser)
  options = parser.parse_args()
  with in_one_line():
    draw = draw_of(options)
  from dpojax.runtime.command import command  # here, for --help and an error of the command line need no jax
  from dpojax.sample import files
  from dpojax.training import resolve

  with command():
    resolve.use_compile_cache()
    means = files.run(
      options.model,
      options.prompts,
      options.out,
      draw,
      step=options.step,
      reference=options.reference,
      batch_size=options.batch_size,
      limit=options.limit,
      max_prompt_length=options.max_prompt_length,
      fsdp=options.fsdp,
      tensor=options.tensor,
      form=options.form,
      on_error=options.on_error,
    )
  print("  ".join(f"{name} {value:.4g}" for name, value in means.items()))


if __name__ == "__main__":
  main()
