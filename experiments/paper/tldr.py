"""Summaries with GPT-J on TL;DR: the paper's Section 6.2, Figure 2 (right), and Table 1.

python -m experiments.paper.tldr --workdir=runs/paper/tldr --test=FILE --judge_model=MODEL
    [--news=FILE] [--judge=URL] [--also=PPO=MODEL] [--dry_run]

DPO, Preferred-FT and a reward model start from the published SFT. 256 test posts are summarised at five
temperatures by all of them, GPT-J without training, and the best of 128 samples of the SFT; a judge
says how often a summary is better than the reference. Then the same policies on news articles. Writes
win_rate.jsonl and .png, news.jsonl and .png, and prints both tables.

FILE of --test has {"prompt", "label"} a line, or Parquet, as the test split of
CarperAI/openai_summarize_tldr; that of --news {"article", "highlights"}, as the test split of
CNN/DailyMail. Comparisons are downloaded; --config.data.path names files of them. --also names policies that
were trained elsewhere. Kinds of runs whose configs can be changed: dpo, preferred_ft, reward.

What the paper leaves open and is chosen here: summaries have at most 128 tokens; of equal temperatures the
seeds are equal; a news article stands whole before "TL;DR:", or its first tokens as far as
`news_prompt_length` goes; best-of-N is not judged on news.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dpojax.data import tokenization
from dpojax.data.examples import Example
from dpojax.runtime.errors import ConfigError
from dpojax.sample.draws import Draw
from experiments.paper import methods, stages
from experiments.paper.methods import Line
from experiments.paper.stages import Given, Policy

KINDS = ("dpo", "preferred_ft", "reward")
FILES = {
  "test": "posts and their reference summaries",
  "news": "news articles and their highlights",
  "also": "further policies, NAME=MODEL with commas",
}


class Plan(NamedTuple):
  """The experiment's numbers; `zero_shot` and `sft` are models."""

  beta: float = 0.5
  prompts: int = 256
  temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  news_temperatures: tuple[float, ...] = (0.0, 0.25)
  best_of: int = 128
  max_new_tokens: int = 128
  news_prompt_length: int = 1920
  prompts_at_once: int = 64
  question: str = "concise_summary"
  news_question: str = "concise_news_summary"
  zero_shot: str = "EleutherAI/gpt-j-6b"
  sft: str = "CarperAI/openai_summarize_tldr_sft"


def policies_of(plan: Plan, given: Given, also: str) -> list[Policy]:
  """Trains what is trained, and returns whose summaries are judged."""
  start = {"model.checkpoint": plan.sft}
  dpo = stages.trained(given, "dpo", "tldr:dpo", start | given.of("dpo") | {"beta": plan.beta})
  preferred_ft = stages.trained(given, "preferred_ft", "tldr:preferred_ft", start | given.of("preferred_ft"))
  policies = [
    Policy("DPO", dpo),
    Policy("SFT", plan.sft),
    Policy("Preferred-FT", preferred_ft),
    Policy("GPT-J", plan.zero_shot),
  ]
  for each in filter(None, also.split(",")):
    name, equals, model = each.partition("=")
    if not equals:
      raise ConfigError(f"--also is {also!r}; give NAME=MODEL, several with commas")
    policies.append(Policy(name, model))
  return policies


def shortened(article: Example, tokenizer: Any, longest: int) -> Example:
  """Returns an article of which as much is kept as fits in front of what stands last in the prompt."""
  if not isinstance(article.prompt, str):
    return article
  text, mark, _ = article.prompt.rpartition("\n\nTL;DR:")
  ids, end = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, mark))
  room = longest - len(end)
  return article if len(ids) <= room else article._replace(prompt=tokenizer.decode(ids[:room]) + mark)


def win_rates(
  plan: Plan,
  given: Given,
  policies: Sequence[Policy],
  prompts: str,
  name: str,
  question: str,
  temperatures: Sequence[float],
  fsdp: int,
  max_prompt_length: int = 0,
) -> Iterator[Line]:
  """Yields the win rate of every policy at every temperature against the references."""
  for temperature in temperatures:
    for policy in policies:
      place = stages.place_of(name, policy, temperature)
      draw = Draw(max_new_tokens=plan.max_new_tokens, temperature=temperature)
      ours = stages.sampled(
        given,
        f"samples/{place}",
        policy,
        prompts,
        draw,
        fsdp=fsdp,
        batch_size=plan.prompts_at_once,
        max_prompt_length=max_prompt_length,
      )
      yield from stages.judged(
        given, place, {"method": policy.name, "temperature": temperature}, ours, prompts, question
      )


def best_of_rates(plan: Plan, given: Given, prompts: str, reward_model: str, fsdp: int) -> Iterator[Line]:
  """Yields the win rate of the best of N samples of the SFT at every temperature."""
  policy = Policy(f"Best of {plan.best_of}", plan.sft)
  for temperature in plan.temperatures:
    place = stages.place_of("posts", policy, temperature)
    draw = Draw(num_samples=plan.best_of, max_new_tokens=plan.max_new_tokens, temperature=temperature)
    samples = stages.sampled(
      given,
      f"samples/{place}",
      policy,
      prompts,
      draw,
      fsdp=fsdp,
      batch_size=max(1, plan.prompts_at_once // plan.best_of),
    )
    files = stages.best_of(given, f"best/{place}", samples, reward_model, (plan.best_of,), fsdp=fsdp)
    yield from stages.judged(
      given,
      place,
      {"method": policy.name, "temperature": temperature},
      files[plan.best_of],
      prompts,
      plan.question,
    )


def run(plan: Plan, given: Given, files: argparse.Namespace) -> tuple[list[Line], list[Line]]:
  """Runs the experiment, or what is left of it; returns the win rates on posts and on news."""
  if not (files.test or given.dry_run):
    raise ConfigError("--test is missing; give a file of posts and their reference summaries")
  config = stages.config_of("tldr:dpo", given.of("dpo"))
  fsdp = config.parallel.fsdp
  posts = stages.references(
    given, "posts", f"test posts of {files.test}", lambda: stages.read_examples(files.test), plan.prompts
  )
  policies = policies_of(plan, given, files.also)
  reward_model = stages.trained(
    given, "reward_model", "tldr:reward", {"model.checkpoint": plan.sft} | given.of("reward")
  )
  lines = [
    *win_rates(
      plan,
      given,
      policies,
      posts,
      "posts",
      plan.question,
      plan.temperatures,
      fsdp,
      config.data.max_prompt_length,
    ),
    *best_of_rates(plan, given, posts, reward_model, fsdp),
  ]
  stages.report(given, "win_rate", lines, against="the reference summary")
  methods.show_configurations(lines)
  if not (files.news or given.dry_run):
    print("\nno --news: Table 1 is left out")
    return lines, []

  tokenizer = tokenization.load_tokenizer(config.tokenizer) if not given.dry_run else None
  articles = stages.references(
    given,
    "articles",
    f"news articles of {files.news}",
    lambda: (
      shortened(each, tokenizer, plan.news_prompt_length) for each in stages.read_examples(files.news)
    ),
    plan.prompts,
  )
  news = list(
    win_rates(
      plan,
      given,
      policies,
      articles,
      "news",
      plan.news_question,
      plan.news_temperatures,
      fsdp,
      plan.news_prompt_length,
    )
  )
  stages.report(given, "news", news, against="the highlights")
  return lines, news


def main(argv: Sequence[str] | None = None):
  stages.main(run, __doc__, Plan(), KINDS, FILES, judge=True, argv=argv)


if __name__ == "__main__":
  main()
