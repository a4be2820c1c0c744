"""The win rate of one file of responses against another, by any judge."""

import json
import os
from typing import Any

import numpy as np

from dpojax.data import examples, records
from dpojax.data.examples import DataError, Example
from dpojax.evaluate import confidence, judging, scorers
from dpojax.evaluate.judging import Pair
from dpojax.runtime import paths
from dpojax.runtime.command import say
from dpojax.runtime.errors import ConfigError
from dpojax.sample.generator import make_mesh


def compare_files(
  ours: str,
  theirs: str,
  judge: str,
  *,
  question: str = "dialogue",
  seed: int = 0,
  limit: int = 0,
  judge_model: str = "",
  judge_options: str = "",
  api_key_env: str = "OPENAI_API_KEY",
  answers: str = "",
  workers: int = 8,
  form: str = "",
) -> dict[str, Any]:
  """Returns the win rate of one file's responses against another's; see the module's text.

  Args:
    ours: file of samples.
    theirs: file of samples to the same prompts, or of pairs in their order.
    judge: a workdir, module:function or URL.
    question: a name in `judging.QUESTIONS`, or a file with {prompt}, {a} and {b}.
    seed: of the order in which responses are shown.
    limit: prompts that are compared; 0 is all that both files have.
    judge_model: name of the model at a URL.
    judge_options: JSON object of further keys of a request, in place of temperature and max_tokens.
    api_key_env: environment variable with the key for a URL; it may be unset.
    answers: file the answers of a URL are kept in; by default `ours` with .answers.jsonl.
    workers: requests under way at once.
    form: of the records of a file that is not of samples; '' recognises it by their keys.

  Raises:
    ConfigError, DataError, CheckpointError, JudgeError: something given cannot be used.
  """
  prompts, pairs, groups = _pairs_of(ours, theirs, limit, form)
  kept = None
  if paths.is_url(judge):
    if not judge_model:
      raise ConfigError("--judge_model is missing; give the model's name at the server")
    endpoint = judging.Endpoint(
      judge,
      judge_model,
      question_of(question),
      api_key=os.environ.get(api_key_env, "").strip(),
      workers=workers,
      **({"options": options_of(judge_options)} if judge_options else {}),
    )
    kept = judging.Answers(answers or str(paths.of(ours).with_suffix(".answers.jsonl")))
    asked = judging.endpoint_judge(endpoint, kept)
  elif scorers.is_function(judge):
    function = scorers.load_function(judge, ("prompt", "response"), ("prompt", "A", "B"))
    asked = (
      judging.paired_judge(function)
      if scorers.arity(function) == 3
      else judging.scored_judge(scorers.make_scorer(judge, None))
    )
  else:
    asked = judging.scored_judge(scorers.make_scorer(judge, make_mesh(1, 1)))
  # A reward model reads the prompt as it was given; everyone else reads text.
  if kept is not None or scorers.is_function(judge):
    pairs = [
      Pair(
        as_text(pair.prompt, query=kept is not None), *map(examples.response_text, (pair.ours, pair.theirs))
      )
      for pair in pairs
    ]
  try:
    result = judging.compare(asked, pairs, groups, seed=seed)
  finally:
    if kept is not None:
      kept.close()
  words = lambda responses: confidence.mean(
    np.array([len(examples.response_text(response).split()) for response in responses])
  )
  return {
    "ours": ours,
    "theirs": theirs,
    "judge": judge,
    "judge_model": judge_model,
    "question": question if kept is not None else None,
    "seed": seed,
    "prompts": prompts,
    "pairs": len(pairs),
    "win_rate": result.win_rate,
    **{name: result.outcomes.count(name) for name in ("win", "tie", "loss", "refused", "unparseable")},
    "said_a": result.said_a,
    "words": {"ours": words([pair.ours for pair in pairs]), "theirs": words([pair.theirs for pair in pairs])},
    "outcomes": result.outcomes,
  }


def as_text(prompt: str | list[dict] | Example, *, query: bool) -> str:
  """Returns a prompt as a judge reads it.

  Messages become lines with their roles. As a query, an HH dialogue of one turn is what the human
  said, and a forum post loses the "TL;DR:" behind it.
  """
  if isinstance(prompt, Example):
    prompt = prompt.prompt
  if not isinstance(prompt, str):
    return prompt[0]["content"] if len(prompt) == 1 and query else examples.messages_text(prompt)
  if not query:
    return prompt
  # The paper's judge was asked about a query, not about a transcript of one turn.
  body = prompt.removesuffix(examples.ASSISTANT)
  if body != prompt and body.startswith(examples.HUMAN) and examples.ASSISTANT not in body:
    body = body.removeprefix(examples.HUMAN)
  return body.strip().removesuffix("TL;DR:").strip()


def _pairs_of(ours: str, theirs: str, limit: int, form: str) -> tuple[int, list[Pair], list[int]]:
  """Returns the number of prompts, the pairs and of each the prompt's number.

  Raises:
    DataError: the files are not of the same prompts.
  """
  first, second = _responses_of(ours, form), _responses_of(theirs, form)
  numbers = sorted(first.keys() & second.keys())[: limit or None]
  if not numbers:
    raise DataError(f"{ours} and {theirs} have no prompt in common; sample both from one file")
  pairs, groups = [], []
  for number in numbers:
    (prompt, responses), (other, against) = first[number], second[number]
    if prompt != other:
      raise DataError(
        f"prompt {number} of {ours} is not that of {theirs} ({str(prompt.prompt)[:60]!r}, "
        f"{str(other.prompt)[:60]!r}); sample both from one file"
      )
    # Where the other file has fewer samples they come again, in turn.
    for k, response in enumerate(responses):
      pairs.append(Pair(prompt, response, against[k % len(against)]))
      groups.append(number)
  return len(numbers), pairs, groups


def _responses_of(path: str, form: str) -> dict[int, tuple[Example, list[str | list[dict]]]]:
  """Returns prompt and responses of a file by the prompt's number: samples, or what was chosen."""
  found, left_out = {}, []

  def parse(record):
    if isinstance(record, dict) and "response" in record and "index" in record:
      return (
        examples.get(record, "index", int),
        records.parse_prompt(record),
        examples.get(record, "response", str),
      )
    example = records.parse_record(record, form)
    return None, example._replace(responses=()), example.responses[0]

  every = records.read_file(path, parse, given="--ours or --theirs", left_out=left_out)
  for i, (index, prompt, response) in every:
    found.setdefault(i if index is None else index, (prompt, []))[1].append(response)
  if left_out:
    say(f"{path}: {records.counted(left_out)}")
  return found


def question_of(name: str) -> str:
  """Returns a question of `judging.QUESTIONS`, or that of a file.

  Raises:
    ConfigError: there is no such file, or it lacks a place for a text.
  """
  if name in judging.QUESTIONS:
    return judging.QUESTIONS[name]
  try:
    text = paths.of(name).read_bytes().decode()
  except OSError as error:
    raise ConfigError(
      f"--question is {name!r}; it must be one of {', '.join(judging.QUESTIONS)}, or a file"
    ) from error
  for place in ("{prompt}", "{a}", "{b}"):
    if place not in text:
      raise ConfigError(f"--question {name} has no {place}; put it where that text is to stand")
  return text


def options_of(text: str) -> dict[str, Any]:
  """Returns the object of a JSON text.

  Raises:
    ConfigError: it is none.
  """
  try:
    options = json.loads(text)
    if not isinstance(options, dict):
      raise ValueError("it is no object")
  except ValueError as error:
    raise ConfigError(
      f"--judge_options is no JSON object ({error}); give one such as '{{\"temperature\": 0}}'"
    ) from error
  return options
