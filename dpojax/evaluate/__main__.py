"""Measures a run's policy against its reference, or two files of samples against each other.

python -m dpojax.evaluate --workdir=RUN --out=FILE.json [--pairs=FILE.jsonl] [--scorer=...] [...]
python -m dpojax.evaluate --ours=SAMPLES.jsonl --theirs=FILE.jsonl --judge=... --out=FILE.json [...]

The first measures on held-out pairs (those the run held out, or `--pairs`): preference accuracy,
margin, perplexity, and the CHES score of their two answers, whose highest are the pairs that displace
probability; `--pair_scores=FILE.jsonl` writes every pair with its own. And on samples to their prompts: KL
to the reference, lengths, and the mean of a scorer, the workdir of a reward model's run or module:function
of (prompt, response). With `--pairs` RUN may be a Hugging Face folder, which has no reference of its own.

The second gives the win rate of the first file's responses. The other file is of samples to the
same prompts too, or of pairs, whose chosen responses count. The judge is a reward model's workdir,
module:function of (prompt, response) -> number or of (prompt, A, B) -> 'A', 'B' or 'tie', or the URL
of an OpenAI-compatible server, whose answers are kept: started again, nothing is asked twice.
"""

import argparse

from dpojax.runtime.errors import ConfigError, in_one_line
from dpojax.sample.draws import add_draw_arguments, draw_of


def main():
  parser = argparse.ArgumentParser(prog="dpojax.evaluate", description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True, help=".json to write")
  of_run = parser.add_argument_group("a run")
  of_run.add_argument("--workdir", default="", help="the run's folder")
  of_run.add_argument("--pairs", default="", help="held-out pairs; by default the run's")
  of_run.add_argument("--pair_scores", default="", help=".jsonl to write held-out pairs with their scores to")
  of_run.add_argument("--scorer", default="", help="a reward model's workdir, or module:function")
  of_run.add_argument("--num_prompts", type=int, default=256, help="prompts sampled to; 0: none")
  add_draw_arguments(of_run)
  of_files = parser.add_argument_group("two files of samples")
  of_files.add_argument("--ours", default="")
  of_files.add_argument("--theirs", default="", help="samples, or pairs whose chosen responses count")
  of_files.add_argument("--judge", default="", help="URL, module:function or reward model's workdir")
  of_files.add_argument("--judge_model", default="", help="its name at the URL")
  of_files.add_argument("--judge_options", default="", help="JSON: further keys of a request")
  of_files.add_argument(
    "--question",
    default="dialogue",
    help="dialogue, summary, concise_summary, news_summary, concise_news_summary, or a file with {prompt}, "
    "{a}, {b}",
  )
  of_files.add_argument("--api_key_env", default="OPENAI_API_KEY")
  of_files.add_argument("--answers", default="", help="file a URL's answers are kept in")
  of_files.add_argument("--workers", type=int, default=8, help="requests under way at once")
  of_files.add_argument("--form", default="", help="of pairs' records (docs/data.md); by default recognised")
  of_files.add_argument("--limit", type=int, default=0, help="prompts compared; 0 is all")
  options = parser.parse_args()
  with in_one_line():
    _check(options)
    draw = draw_of(options)
  from dpojax.evaluate import compare, measure, report  # here, for --help and an error above need no jax
  from dpojax.runtime.command import command, say
  from dpojax.training import resolve

  with command():
    resolve.use_compile_cache()
    if options.workdir:
      result = measure.evaluate_run(
        options.workdir,
        step=options.step,
        reference=options.reference,
        pairs=options.pairs,
        scorer=options.scorer,
        num_prompts=options.num_prompts,
        draw=draw,
        batch_size=options.batch_size,
        fsdp=options.fsdp,
        tensor=options.tensor,
        pair_scores=options.pair_scores,
      )
    else:
      result = compare.compare_files(
        options.ours,
        options.theirs,
        options.judge,
        question=options.question,
        seed=options.seed,
        limit=options.limit,
        judge_model=options.judge_model,
        judge_options=options.judge_options,
        api_key_env=options.api_key_env,
        answers=options.answers,
        workers=options.workers,
        form=options.form,
      )
    report.write(result, options.out)
  rows = report.show(result)
  width = max(len(name) for name, *_ in rows)
  for name, value, interval in rows:
    print(f"{name:{width}}  {value}{'   95 %: ' + interval if interval else ''}")
  say(f"written to {options.out}")


def _check(options: argparse.Namespace) -> None:
  """Refuses flags that say neither what is measured nor what is compared."""
  if bool(options.workdir) == bool(options.ours):
    raise ConfigError("give --workdir to measure a run, or --ours, --theirs and --judge to compare")
  for flag in ("theirs", "judge") if options.ours else ():
    if not getattr(options, flag):
      raise ConfigError(f"--{flag} is missing; give it beside --ours")


if __name__ == "__main__":
  main()
