"""Who says which answer is better: a reward model, a function, or a server whose answers are kept."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections

from dpojax.data.examples import Example
from dpojax.evaluate import compare, judging, scorers
from dpojax.online import config as online_config
from dpojax.runtime import paths
from dpojax.runtime.command import is_main
from dpojax.training import parallel

_AT_ONCE = 64


class Answer(NamedTuple):
  """A sample and what it answers, in text and in ids; the ids of the sample with what ended it."""

  prompt: Example
  prompt_ids: list[int]
  response: str
  ids: list[int]


class Labeller(NamedTuple):
  """Who is asked.

  Attributes:
    ask: answers -> a score of each; or where `compares`, (pairs of answers, seed of the order in which they
      are shown) -> of each what becomes of the first: an outcome of `judging.Result`.
    compares: whether two answers are shown at a time.
    at_once: prompts that are asked about at once: a killed run asks at most about so many again.
    close: to be called in the end.
    by_all: whether every process of a run asks, as where a reward model stands on their devices; else the
      first asks, and tells the others.
  """

  ask: Callable[..., Sequence[float] | Sequence[str]]
  compares: bool = False
  at_once: int = 1
  close: Callable[[], None] = lambda: None
  by_all: bool = False


def make_labeller(config: ml_collections.ConfigDict, workdir: paths.Path, devices: parallel.Mesh) -> Labeller:
  """Returns who `online.judge` names.

  Args:
    config: all keys.
    workdir: where the answers of a server are kept, in answers.jsonl.
    devices: where a reward model stands.

  Raises:
    ConfigError, CheckpointError, JudgeError: there is no such judge, or it cannot be asked.
  """
  settings = config.online
  if paths.is_url(settings.judge):
    if not is_main():  # the answers that are kept have one owner
      return Labeller(_nobody, True, _AT_ONCE)
    endpoint = judging.Endpoint(
      settings.judge,
      settings.judge_model,
      compare.question_of(settings.question),
      api_key=os.environ.get(settings.api_key_env, "").strip(),
      workers=settings.judge_workers,
      **({"options": compare.options_of(settings.judge_options)} if settings.judge_options else {}),
    )
    answers = judging.Answers(workdir / "answers.jsonl")
    judge = judging.endpoint_judge(endpoint, answers)
    return Labeller(_compared(judge, query=True), True, _AT_ONCE, answers.close)
  if online_config.compares(settings.judge):
    judge = judging.paired_judge(scorers.load_function(settings.judge, ("prompt", "A", "B")))
    return Labeller(_compared(judge, query=False), True)
  score = scorers.make_scorer(settings.judge, devices)
  asked = lambda answers: score([each.prompt for each in answers], [each.response for each in answers])
  # A function is asked prompt by prompt, so that a kill costs one; a reward model in batches it can fill.
  # Either of them minds the other processes itself.
  return Labeller(asked, at_once=1 if scorers.is_function(settings.judge) else _AT_ONCE, by_all=True)


def _nobody(*_):
  raise AssertionError("process 0 asks")


def _compared(judge: judging.Judge, *, query: bool) -> Callable[..., list[str]]:
  """Returns the question of a labeller who compares; `query` as of `compare.as_text`."""

  def ask(pairs: Sequence[tuple[Answer, Answer]], seed: int) -> list[str]:
    shown = [
      judging.Pair(compare.as_text(first.prompt, query=query), first.response, second.response)
      for first, second in pairs
    ]
    return judging.compare(judge, shown, range(len(shown)), seed=seed).outcomes

  return ask
