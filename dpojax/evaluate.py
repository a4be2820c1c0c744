"""Measures a run's policy against its reference, or two files of samples against each other.

python -m dpojax.evaluate --workdir=RUN --out=FILE.json [--pairs=FILE.jsonl] [--scorer=...] [...]
python -m dpojax.evaluate --ours=SAMPLES.jsonl --theirs=FILE.jsonl --judge=... --out=FILE.json [...]

The first measures on held-out pairs (those the run held out, or `--pairs`): preference accuracy,
margin and perplexity; and on samples to their prompts: KL to the reference, lengths, and the mean of
a scorer, the workdir of a reward model's run or module:function of (prompt, response).

The second gives the win rate of the first file's responses. The other file is of samples to the
same prompts too, or of pairs, whose chosen responses count. The judge is a reward model's workdir,
module:function of (prompt, response) -> number or of (prompt, A, B) -> 'A', 'B' or 'tie', or the URL
of an OpenAI-compatible server, whose answers are kept: started again, nothing is asked twice.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple, Sequence

import ml_collections
import numpy as np

from dpojax import intervals, judging, objectives, parallel, resolve, sample, scorers, weights
from dpojax import reference as reference_lib
from dpojax.command import command, say
from dpojax.config import ConfigError
from dpojax.data import builders, examples, loader, records, tokenization
from dpojax.data.examples import DataError, Example
from dpojax.disk import disk_errors
from dpojax.intervals import Estimate
from dpojax.judging import Pair
from dpojax.models import transformer


class HeldOut(NamedTuple):
  """Held-out comparisons: packed, and in text by their id."""

  batches: loader.Loader
  texts: Sequence[Example]


def evaluate_run(
    workdir: str, *, step: int | None = None, reference: str = "", pairs: str = "",
    scorer: str = "", num_prompts: int = 256, draw: sample.Draw = sample.Draw(),
    batch_size: int = 16, fsdp: int = 1, tensor: int = 1,
) -> dict[str, Any]:
  """Returns what is measured of a run; see the module's text.

  Args:
    workdir: the run's folder.
    step: of its checkpoint; None is the last.
    reference: a model; '' is the run's own, 'none' none.
    pairs: held-out pairs in the form of the run's data; '' those the run held out.
    scorer: see `scorers.make_scorer`; '' is none.
    num_prompts: how many held-out prompts are sampled to; 0 is none.
    draw: how samples are drawn.
    batch_size: prompts of a batch.
    fsdp, tensor: how the params are cut over devices.

  Raises:
    ConfigError, DataError, CheckpointError, PackingError: something given cannot be used.
  """
  devices = sample.make_mesh(fsdp, tensor)
  policy = weights.load(workdir, step)
  if policy.settings is None:
    raise ConfigError(f"{workdir} is no run's workdir; sample from it with dpojax.sample instead")
  score = scorers.make_scorer(scorer, devices) if scorer else None
  held_out = load_held_out(policy.settings, pairs, devices)
  result = {"model": policy.name, "pairs": len(held_out.batches.subset)}
  if policy.config.reward_head:
    return result | {"reference": None, "held_out": _of_reward_model(policy, held_out, devices)}

  other = None if reference == "none" else (
      weights.load(reference, dtype=policy.config.dtype) if reference
      else weights.load_reference(policy))
  result |= {"reference": other and other.name,
             "held_out": measure_held_out(policy, other, held_out, devices)}
  if num_prompts:
    tokenizer = tokenization.load_tokenizer(policy.tokenizer)
    generator = sample.Generator(
        policy, other, draw, eos=tokenizer.eos_token_id, batch_size=batch_size, devices=devices)
    room = sample.prompt_room(policy, generator)
    prompts = _prompts(held_out, num_prompts)
    reading = sample.reading_of(policy)
    measured = lambda generator: measure_samples(generator, tokenizer, prompts, room, score, reading)
    result |= {"draw": dataclasses.asdict(draw), "samples": {"policy": measured(generator)}}
    if other is not None:
      result["samples"]["reference"] = measured(generator.of_reference())
  return result


def load_held_out(
    settings: ml_collections.ConfigDict, pairs: str, devices: parallel.Mesh
) -> HeldOut:
  """Returns the pairs a run held out, or those of a file in the form of its data.

  Raises:
    ConfigError: the run held nothing out and no file is given.
    DataError: the data are no longer there, or cannot be used.
  """
  settings = settings.copy_and_resolve_references()
  with settings.unlocked():
    if pairs:
      settings.data.eval_path = pairs
  if not (settings.data.eval_path or settings.eval_every):
    raise ConfigError(
        "the run held nothing out (eval_every is 0); give --pairs=FILE, in the form of its data")
  data = resolve.load_data(settings)
  subset = loader.without_borrowed(data.held_out)
  source = settings.data
  texts = builders.prepare(
      source.source, path=source.eval_path or source.path, config=source.config,
      data_dir=resolve.cache_dir(settings) / "prepared", on_error=source.on_error,
      split="test" if source.eval_path else "train", form=source.get("form", ""))
  return HeldOut(loader.Loader(
      subset, seed=0, batch_size=settings.batch_size, row_length=settings.row_length,
      shards=devices.row_multiple), texts)


def measure_held_out(
    policy: weights.Loaded, reference: weights.Loaded | None, held_out: HeldOut,
    devices: parallel.Mesh,
) -> dict[str, Any]:
  """Returns accuracy, margin and perplexities on held-out comparisons.

  With a reference, margins are of implicit rewards at the run's beta (Rafailov et al. 2023, Sec. 4),
  before any beta_schedule; without one, of log-probs. A margin of 0 counts half in the accuracy.
  """
  batches = held_out.batches
  lengths = batches.lengths[:, 1:].astype(np.float64)
  scored = batches.subset.scored_lengths.astype(np.float64)
  log_probs = _log_probs(
      {"policy": policy} | ({"reference": reference} if reference else {}), batches, devices)
  result = {"perplexity": {
      name: {which: perplexity(values[:, k], scored[:, k])
             for k, which in enumerate(("chosen", "rejected")) if k < values.shape[1]}
      for name, values in log_probs.items()}}
  both = np.all(lengths[:, :2] > 0, axis=1) & (lengths.shape[1] > 1)
  if both.any():
    values = log_probs["policy"]
    if reference is not None:
      values = policy.settings.beta * (values - log_probs["reference"])
    result |= _preferences(values[both])
  return result


def perplexity(log_probs: np.ndarray, tokens: np.ndarray) -> Estimate:
  """Returns exp of minus the mean log-prob a token, with a bootstrap over responses [N]."""
  there = tokens > 0
  return intervals.bootstrap(
      lambda sums, counts: np.exp(-sums.sum(axis=-1) / counts.sum(axis=-1)),
      log_probs[there], tokens[there])


def measure_samples(
    generator: sample.Generator, tokenizer: Any, prompts: Sequence[str | list[dict] | Example],
    room: tuple[int, str], score: scorers.Scorer | None,
    reading: tokenization.Reading = tokenization.Reading(),
) -> dict[str, Any]:
  """Returns means over samples to prompts; their errors are over prompts.

  `kl` is the mean of log pi - log pi_ref of whole samples, an unbiased estimate of KL(pi || pi_ref)
  where temperature, top_p and top_k are 1, 1 and 0.

  Args:
    generator: of the samples.
    tokenizer: from `load_tokenizer`.
    prompts: what is answered.
    room: see `sample.prompt_room`.
    score: rates prompts and responses in text, or None.
    reading: how prompts are read.
  """
  longest, keep = room
  ids, _ = sample.encode(prompts, tokenizer, longest=longest, keep=keep, path="held-out", reading=reading)
  samples = [None] * len(ids)
  for batch in generator.batches([len(prompt) for prompt in ids]):
    for i, drawn in zip(batch, generator([ids[i] for i in batch], batch)):
      samples[i] = drawn
  of_prompts = lambda value: intervals.mean(
      np.array([[value(each) for each in of] for of in samples], np.float64).mean(axis=1))
  result = {
      "samples": sum(map(len, samples)),
      "tokens": of_prompts(lambda each: len(each.ids)),
      "finished": of_prompts(lambda each: each.finished),
      "log_prob": of_prompts(lambda each: each.log_prob)}
  if samples[0][0].reference_log_prob is not None:
    result["kl"] = of_prompts(lambda each: each.log_prob - each.reference_log_prob)
    result["kl_error"] = intervals.standard_error(result["kl"])
  if score is not None:
    text = lambda i, each: tokenization.decode_response(
        tokenizer, ids[i], each.ids[:-1] if each.finished else each.ids)
    values = score([prompts[i] for i, of in enumerate(samples) for _ in of],
                   [text(i, each) for i, of in enumerate(samples) for each in of])
    result["score"] = intervals.mean(np.reshape(values, (len(samples), -1)).mean(axis=1))
  return result


def compare_files(
    ours: str, theirs: str, judge: str, *, question: str = "dialogue", seed: int = 0,
    limit: int = 0, judge_model: str = "", judge_options: str = "", api_key_env: str = "OPENAI_API_KEY",
    answers: str = "", workers: int = 8, form: str = "",
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
  if re.match(r"(?i)[a-z]+://", judge):
    endpoint = judging.Endpoint(
        judge, judge_model or _missing("--judge_model", "the model's name at the server"),
        _question(question), api_key=os.environ.get(api_key_env, "").strip(), workers=workers,
        **({"options": _options(judge_options)} if judge_options else {}))
    kept = judging.Answers(answers or str(pathlib.Path(ours).with_suffix(".answers.jsonl")))
    asked = judging.endpoint_judge(endpoint, kept)
  elif scorers.is_function(judge):
    function = scorers.load_function(judge, ("prompt", "response"), ("prompt", "A", "B"))
    asked = judging.paired_judge(function) if scorers.arity(function) == 3 else judging.scored_judge(
        scorers.make_scorer(judge, None))
  else:
    asked = judging.scored_judge(scorers.make_scorer(judge, sample.make_mesh(1, 1)))
  # A reward model reads the prompt as it was given; everyone else reads text.
  if kept is not None or scorers.is_function(judge):
    pairs = [Pair(as_text(pair.prompt, query=kept is not None),
                  *map(examples.response_text, (pair.ours, pair.theirs))) for pair in pairs]
  try:
    result = judging.compare(asked, pairs, groups, seed=seed)
  finally:
    if kept is not None:
      kept.close()
  words = lambda responses: intervals.mean(np.array(
      [len(examples.response_text(response).split()) for response in responses]))
  return {
      "ours": ours, "theirs": theirs, "judge": judge, "judge_model": judge_model,
      "question": question if kept is not None else None, "seed": seed,
      "prompts": prompts, "pairs": len(pairs), "win_rate": result.win_rate,
      **{name: result.outcomes.count(name)
         for name in ("win", "tie", "loss", "refused", "unparseable")},
      "said_a": result.said_a, "words": {
          "ours": words([pair.ours for pair in pairs]), "theirs": words([pair.theirs for pair in pairs])},
      "outcomes": result.outcomes}


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
  body = prompt.removesuffix(examples.ASSISTANT)
  if body != prompt and body.startswith(examples.HUMAN) and examples.ASSISTANT not in body:
    body = body.removeprefix(examples.HUMAN)
  return body.strip().removesuffix("TL;DR:").strip()


def show(result: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
  """Returns the rows of the table: name, value, 95 % interval."""
  rows = []
  for name, value in result.items():
    if isinstance(value, Estimate):
      rows.append((prefix + name, f"{value.value:.4g}", f"{value.low:.4g} .. {value.high:.4g}"))
    elif isinstance(value, dict):
      rows += show(value, f"{prefix}{name}/")
    elif value is not None and not isinstance(value, (list, tuple)):
      rows.append((prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value), ""))
  return rows


def write(result: dict[str, Any], out: str | os.PathLike) -> None:
  """Writes a result as JSON, estimates as objects, and numbers that are none as null.

  Raises:
    DiskError: the disk is full or cannot be written.
  """
  def plain(value):
    if isinstance(value, Estimate):
      return plain(value._asdict())
    if isinstance(value, dict):
      return {key: plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

  out = pathlib.Path(out)
  with disk_errors(out.parent):
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(plain(result), indent=2) + "\n")
    os.replace(temporary, out)


def _of_reward_model(policy, held_out, devices) -> dict[str, Any]:
  apply = transformer.make_apply(policy.config)
  score = lambda params, rows: (
      objectives.response_rewards(apply(params, rows), rows, num_responses=2), rows.example)
  return _preferences(scorers.response_values(
      held_out.batches, devices.lift(score, donate_state=False), devices.place(policy.params),
      devices))


def _preferences(rewards: np.ndarray) -> dict[str, Any]:
  margins = rewards[:, 0] - rewards[:, 1]
  right = np.sum(margins > 0) + np.sum(margins == 0) / 2
  return {"accuracy": intervals.share(float(right), len(margins)), "margin": intervals.mean(margins),
          "rewards": {"chosen": intervals.mean(rewards[:, 0]),
                      "rejected": intervals.mean(rewards[:, 1])}}


def _log_probs(
    models: dict[str, weights.Loaded], batches: loader.Loader, devices: parallel.Mesh
) -> dict[str, np.ndarray]:
  """Returns the log-prob of every response under each model; models of one config compile once."""
  lifted, values = {}, {}
  for name, model in models.items():
    config = dataclasses.replace(model.config, published="", remat="none")
    if config not in lifted:
      lifted[config] = devices.lift(reference_lib.make_score_step(
          transformer.make_apply(config), num_responses=batches.lengths.shape[1] - 1,
          chunk_size=None), donate_state=False)
    values[name] = scorers.response_values(
        batches, lifted[config], devices.place(model.params), devices)
  return values


def _prompts(held_out: HeldOut, count: int) -> list[Example]:
  """Returns the first different prompts of held-out comparisons."""
  subset, prompts = held_out.batches.subset, {}
  for i in range(len(subset)):
    prompt = held_out.texts[subset.example(i)]._replace(responses=())
    prompts.setdefault(json.dumps(prompt), prompt)
    if len(prompts) == count:
      break
  return list(prompts.values())


def _pairs_of(ours: str, theirs: str, limit: int, form: str) -> tuple[int, list[Pair], list[int]]:
  """Returns the number of prompts, the pairs and of each the prompt's number.

  Raises:
    DataError: the files are not of the same prompts.
  """
  first, second = _responses_of(ours, form), _responses_of(theirs, form)
  numbers = sorted(first.keys() & second.keys())[:limit or None]
  if not numbers:
    raise DataError(f"{ours} and {theirs} have no prompt in common; sample both from one file")
  pairs, groups = [], []
  for number in numbers:
    (prompt, responses), (other, against) = first[number], second[number]
    if prompt != other:
      raise DataError(
          f"prompt {number} of {ours} is not that of {theirs} ({str(prompt.prompt)[:60]!r}, "
          f"{str(other.prompt)[:60]!r}); sample both from one file")
    for k, response in enumerate(responses):
      pairs.append(Pair(prompt, response, against[k % len(against)]))
      groups.append(number)
  return len(numbers), pairs, groups


def _responses_of(path: str, form: str) -> dict[int, tuple[Example, list[str | list[dict]]]]:
  """Returns prompt and responses of a file by the prompt's number: samples, or what was chosen."""
  found, left_out = {}, []

  def parse(record):
    if isinstance(record, dict) and "response" in record and "index" in record:
      return (examples.get(record, "index", int), records.parse_prompt(record),
              examples.get(record, "response", str))
    example = records.parse_record(record, form)
    return None, example._replace(responses=()), example.responses[0]

  every = records.read_file(path, parse, given="--ours or --theirs", left_out=left_out)
  for i, (index, prompt, response) in every:
    found.setdefault(i if index is None else index, (prompt, []))[1].append(response)
  if left_out:
    say(f"{path}: {records.counted(left_out)}")
  return found


def _question(name: str) -> str:
  if name in judging.QUESTIONS:
    return judging.QUESTIONS[name]
  try:
    text = pathlib.Path(name).read_text(encoding="utf-8")
  except OSError as error:
    raise ConfigError(
        f"--question is {name!r}; it must be one of {', '.join(judging.QUESTIONS)}, or a file"
    ) from error
  for place in ("{prompt}", "{a}", "{b}"):
    if place not in text:
      raise ConfigError(f"--question {name} has no {place}; put it where that text is to stand")
  return text


def _options(text: str) -> dict[str, Any]:
  try:
    options = json.loads(text)
    if not isinstance(options, dict):
      raise ValueError("it is no object")
  except ValueError as error:
    raise ConfigError(
        f"--judge_options is no JSON object ({error}); give one such as '{{\"temperature\": 0}}'"
    ) from error
  return options


def _missing(flag: str, what: str) -> None:
  raise ConfigError(f"{flag} is missing; give {what}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True, help=".json to write")
  of_run = parser.add_argument_group("a run")
  of_run.add_argument("--workdir", default="", help="the run's folder")
  of_run.add_argument("--pairs", default="", help="held-out pairs; by default the run's")
  of_run.add_argument("--scorer", default="", help="a reward model's workdir, or module:function")
  of_run.add_argument("--num_prompts", type=int, default=256, help="prompts sampled to; 0: none")
  sample.add_draw_arguments(of_run)
  of_files = parser.add_argument_group("two files of samples")
  of_files.add_argument("--ours", default="")
  of_files.add_argument("--theirs", default="", help="samples, or pairs whose chosen responses count")
  of_files.add_argument("--judge", default="", help="URL, module:function or reward model's workdir")
  of_files.add_argument("--judge_model", default="", help="its name at the URL")
  of_files.add_argument("--judge_options", default="", help="JSON: further keys of a request")
  of_files.add_argument("--question", default="dialogue",
                        help=f"{', '.join(judging.QUESTIONS)}, or a file with {{prompt}}, {{a}}, {{b}}")
  of_files.add_argument("--api_key_env", default="OPENAI_API_KEY")
  of_files.add_argument("--answers", default="", help="file a URL's answers are kept in")
  of_files.add_argument("--workers", type=int, default=8, help="requests under way at once")
  of_files.add_argument("--form", default="", help="of pairs' records (docs/data.md); by default recognised")
  of_files.add_argument("--limit", type=int, default=0, help="prompts compared; 0 is all")
  options = parser.parse_args()
  with command():
    if bool(options.workdir) == bool(options.ours):
      raise ConfigError("give --workdir to measure a run, or --ours, --theirs and --judge to compare")
    if options.workdir:
      result = evaluate_run(
          options.workdir, step=options.step, reference=options.reference, pairs=options.pairs,
          scorer=options.scorer, num_prompts=options.num_prompts, draw=sample.draw_of(options),
          batch_size=options.batch_size, fsdp=options.fsdp, tensor=options.tensor)
    else:
      for flag in ("theirs", "judge"):
        if not getattr(options, flag):
          _missing(f"--{flag}", "it beside --ours")
      result = compare_files(
          options.ours, options.theirs, options.judge, question=options.question,
          seed=options.seed, limit=options.limit, judge_model=options.judge_model,
          judge_options=options.judge_options, api_key_env=options.api_key_env,
          answers=options.answers, workers=options.workers, form=options.form)
    write(result, options.out)
  rows = show(result)
  width = max(len(name) for name, *_ in rows)
  for name, value, interval in rows:
    print(f"{name:{width}}  {value}{'   95 %: ' + interval if interval else ''}")
  say(f"written to {options.out}")


if __name__ == "__main__":
  main()
