"""What the paper's experiments at their own scale are made of: stages, each an entry point in a folder.

    policies -> samples at temperatures -> a judge -> table -> figure

A stage that is finished is read from its folder, a killed one goes on where its entry point can; with
`dry_run` nothing is done, and what would be is printed. Every script takes

    --workdir=DIR            where everything is kept
    --config.KEY=VALUE       a key of every config; --dpo.KEY=VALUE of one kind of run
    --FIELD=VALUE            a number of the plan, such as --prompts=256; lists with commas
    --dry_run                the stages and the settings of each, and nothing else
"""

import argparse
import ast
import dataclasses
import importlib
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from dpojax import train
from dpojax.data import examples
from dpojax.data import records as records_lib
from dpojax.data.examples import DataError, Example
from dpojax.evaluate import compare, judging, scorers
from dpojax.evaluate import report as report_lib
from dpojax.ppo import loop as ppo
from dpojax.runtime.command import command
from dpojax.runtime.errors import ConfigError
from dpojax.sample import files
from dpojax.sample.draws import Draw
from dpojax.sample.generator import make_mesh
from dpojax.training import config as config_lib
from dpojax.training import resolve
from dpojax.training.metrics import read_metrics
from experiments import sweep
from experiments.command import folder_argument
from experiments.paper import methods, win_rate
from experiments.paper.methods import Line

OPENAI = "https://api.openai.com/v1"
WORTH = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclasses.dataclass(frozen=True)
class Given:
  """What a command was given.

  Attributes:
    workdir: where stages have their folders.
    changes: by kind of run, such as 'dpo', changes by dotted key; those of 'config' are for all.
    judge: who judges, keywords of `evaluate.compare_files`.
    dry_run: whether stages are only told of.
  """

  workdir: pathlib.Path
  changes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  judge: dict[str, Any] = dataclasses.field(default_factory=dict)
  dry_run: bool = False

  def of(self, kind: str) -> dict[str, Any]:
    """Returns the changes to a config of a kind."""
    return self.changes.get("config", {}) | self.changes.get(kind, {})


class Policy(NamedTuple):
  """What is sampled from: its name in figures, a model, and the step of a run's checkpoint."""

  name: str
  model: str
  step: int | None = None


def stage(given: Given, name: str, what: str, settings: dict, make: Callable[[], list[Line]]) -> list[Line]:
  """Returns the lines of a stage, see `methods.stage`; none in a dry run, which prints `what`."""
  if given.dry_run:
    print(f"{name}: {what}")
    return []
  return methods.stage(given.workdir / name, settings, make)


def config_of(name: str, changes: dict[str, Any]) -> ml_collections.ConfigDict:
  """Returns a checked config, such as that of 'imdb:dpo', with changes by dotted key.

  Raises:
    ConfigError: a key is none, or a value impossible.
  """
  module, _, argument = name.partition(":")
  config = importlib.import_module(f"configs.{module}").get_config(argument)
  try:
    with config.unlocked():
      config.update_from_flattened_dict(changes)
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"configs/{module}.py does not take {changes}: {error}") from error
  config_lib.validate(config)
  return config


def described(config: ml_collections.ConfigDict) -> str:
  """Returns what a run of the config does, in words."""
  optimizer = config.optimizer
  return (
    f"{config.objective}, {config.steps} steps of {config.batch_size}, {optimizer.name} at "
    f"{optimizer.learning_rate:g} after {optimizer.warmup_steps} steps of warm-up"
    + (f", beta {config.beta:g}" if config.objective == "dpo" else "")
  )


def place_of(name: str, policy: Policy, temperature: float) -> str:
  """Returns the folder of a policy's samples at a temperature, or of what is said of them."""
  step = f" step {policy.step}" if policy.step is not None else ""
  words = f"{name} {policy.name}{step} temperature {temperature:g}".lower()
  return re.sub(r"[^\w.]+", "_", words)


def trained(given: Given, name: str, config_name: str, changes: dict[str, Any]) -> str:
  """Trains as a config says with changes to it; returns the workdir."""
  config, folder = config_of(config_name, changes), given.workdir / name
  module, _, argument = config_name.partition(":")
  flags = [f"--config.{key}={value}" for key, value in changes.items()]
  what = (
    f"python -m dpojax.train --config=configs/{module}.py:{argument} --workdir={folder} "
    f"{' '.join(flags)}\n    {described(config)}"
  )
  settings = {
    "config": config_name,
    "steps": config.steps,
    "changes": {key: value for key, value in changes.items() if not key.startswith(config_lib.MAY_CHANGE)},
  }

  def make():
    train.run(config, folder)
    return [line for line in read_metrics(folder) if line["split"] == "eval"]

  stage(given, name, what, settings, make)
  return str(folder)


def sampled(
  given: Given,
  name: str,
  policy: Policy,
  prompts: str,
  draw: Draw,
  *,
  batch_size: int,
  fsdp: int,
  max_prompt_length: int = 0,
) -> str:
  """Samples from a policy to the prompts of a file; returns the file of samples."""
  out = str(given.workdir / name / "samples.jsonl")
  drawn = {key: value for key, value in dataclasses.asdict(draw).items() if key != "stop_ids"}
  flags = [f"--{key}={value}" for key, value in drawn.items()]
  step = [f"--step={policy.step}"] if policy.step is not None else []
  what = (
    f"python -m dpojax.sample --workdir={policy.model} --prompts={prompts} --out={out} "
    f"--reference=none {' '.join([*step, *flags])}"
  )
  settings = {
    "model": policy.model,
    "step": policy.step,
    "prompts": prompts,
    "max_prompt_length": max_prompt_length,
  } | drawn
  stage(
    given,
    name,
    what,
    settings,
    lambda: [
      files.run(
        policy.model,
        prompts,
        out,
        draw,
        step=policy.step,
        reference="none",
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
        fsdp=fsdp,
      )
    ],
  )
  return out


def best_of(
  given: Given, name: str, samples: str, reward_model: str, sizes: Sequence[int], *, fsdp: int
) -> dict[int, str]:
  """Keeps of the first N samples of each prompt the one a reward model likes best.

  The model is that of the step with the best held-out accuracy.

  Returns:
    For each N the file of samples.
  """
  files = {n: str(given.workdir / name / f"best_of_{n}.jsonl") for n in sizes}

  def make():
    records = read_samples(samples)
    step = methods.best_evaluation(read_metrics(reward_model))["step"]
    score = scorers.make_scorer(reward_model, make_mesh(fsdp, 1), step)
    scores = score(list(map(records_lib.parse_prompt, records)), [each["response"] for each in records])
    for n, path in files.items():
      best = {}
      for record, value in zip(records, scores):
        if record["sample"] < n and value > best.get(record["index"], {"score": -np.inf})["score"]:
          best[record["index"]] = record | {"score": float(value)}
      sweep.write_lines(pathlib.Path(path), list(best.values()))
    return [{"step": step, "mean": float(np.mean(scores)), "samples": len(records)}]

  what = f"the best of {', '.join(map(str, sizes))} samples of {samples} by {reward_model}"
  stage(given, name, what, {"samples": samples, "reward_model": reward_model, "sizes": list(sizes)}, make)
  return files


def judged(given: Given, name: str, about: Line, ours: str, theirs: str, question: str) -> list[Line]:
  """Asks the judge which of two files' responses are better; returns one line, with `about` in it.

  `about` says what ours are, at least their `method` and `temperature`. The error is binomial. What the
  judge refused, or said in another form, is left out and counted. Each judge and question has folders of
  its own; a judge's answers are kept together, so that nothing is asked twice.
  """
  judge = given.judge
  who = re.sub(r"\W+", "_", judge.get("judge_model") or judge["judge"]).strip("_")
  answers = str(given.workdir / "judged" / who / "answers.jsonl")
  name = f"judged/{who}/{question}/{name}"

  def make():
    result = compare.compare_files(ours, theirs, question=question, answers=answers, **judge)
    report_lib.write(result, given.workdir / name / "result.json")
    won = np.array([WORTH[outcome] for outcome in result["outcomes"] if outcome in WORTH])
    if not len(won):
      raise judging.JudgeError(f"the judge of {ours} gave no verdict; see {answers}")
    return [
      win_rate.line(about["method"], 0.0, about["temperature"], won)
      | {"left_out": result["pairs"] - len(won)}
    ]

  flags = " ".join(f"--{key}={value}" for key, value in judge.items() if value)
  what = (
    f"python -m dpojax.evaluate --ours={ours} --theirs={theirs} --question={question} {flags} "
    f"--answers={answers} --out={given.workdir / name}/result.json"
  )
  settings = {"ours": ours, "theirs": theirs, "question": question} | {
    key: value for key, value in judge.items() if key not in ("api_key_env", "workers")
  }
  return [line | about for line in stage(given, name, what, settings, make)]


def example_of(record: Any) -> Example:
  """Returns a prompt and the response that stands in the data set.

  The forms are those of `dpojax.data.records`; {"prompt", "label"}, as summaries of posts are
  published; and {"article", "highlights"}, as CNN/DailyMail is, which gets "TL;DR:" behind it.

  Raises:
    RecordError: the record has none of them.
  """
  if isinstance(record, dict) and "highlights" in record:
    article, highlights = (examples.get(record, key, str).strip() for key in ("article", "highlights"))
    return Example(f"{article}\n\nTL;DR:", (f" {highlights}",))
  if isinstance(record, dict) and isinstance(record.get("label"), str):
    return Example(examples.get(record, "prompt", str), (f" {record['label'].strip()}",))
  return records_lib.parse_record(record)


def read_examples(path: str) -> Iterable[Example]:
  """Yields the examples of files; see `example_of`.

  Raises:
    DataError: a file is missing, or a record has no known form.
  """
  yield from (example for _, example in records_lib.read_file(path, example_of))


def read_samples(path: str) -> list[dict]:
  """Returns the samples of a file that `dpojax.sample` wrote."""
  return [record for _, record in records_lib.read_file(path, lambda record: record)]


def references(given: Given, name: str, what: str, read: Callable[[], Iterable[Example]], count: int) -> str:
  """Draws test examples, always the same; returns their file, read both for prompts and for references."""
  path = given.workdir / name / "references.jsonl"

  def make():
    every = list(read())
    if len(every) < count:
      raise DataError(f"{what}: there are {len(every)}, fewer than --prompts={count}; lower it")
    order = np.random.default_rng(0).permutation(len(every))[:count]
    sweep.write_lines(
      path, [records_lib.prompt_record(every[i]) | {"responses": [every[i].responses[0]]} for i in order]
    )
    return [{"prompts": count, "of": len(every)}]

  stage(given, name, f"{count} of {what}", {"what": what, "count": count}, make)
  return str(path)


def report(given: Given, name: str, lines: Sequence[Line], **axis: str) -> None:
  """Writes lines as NAME.jsonl and NAME.png and prints their table; `axis` as of `win_rate.plot`."""
  if lines:
    sweep.write_lines(given.workdir / f"{name}.jsonl", lines)
    win_rate.show(lines, axis.get("axis", "temperature"))
    win_rate.plot(lines, given.workdir / f"{name}.png", **axis)
    print(f"\nwritten: {given.workdir / name}.jsonl and .png")


def main(
  run: Callable[[Any, Given, argparse.Namespace], None],
  doc: str,
  plan: Any,
  kinds: Sequence[str],
  files: dict[str, str],
  *,
  judge: bool = False,
  argv: Sequence[str] | None = None,
) -> None:
  """Reads a command line and runs an experiment; errors are one line.

  Args:
    run: (plan, what was given, files).
    doc: the script's docstring.
    plan: a NamedTuple with the paper's numbers, each of which is a flag.
    kinds: of runs, whose configs can be changed.
    files: flags that name files or models, and what they are.
    judge: whether there is one, named as by `python -m dpojax.evaluate`.
    argv: arguments; None is the command line's.
  """
  parser = argparse.ArgumentParser(description=doc.split("\n", 1)[0], allow_abbrev=False)
  parser.add_argument("--workdir", type=folder_argument, required=True)
  parser.add_argument("--dry_run", action="store_true", help="print the stages, and do nothing")
  for name, help_text in files.items():
    parser.add_argument(f"--{name}", default="", help=help_text)
  for name, value in plan._asdict().items():
    parser.add_argument(f"--{name}", type=_reader(value), default=value, help=f"{value}")
  if judge:
    parser.add_argument("--judge", default=OPENAI, help="URL, module:function or reward model's workdir")
    parser.add_argument("--judge_model", default="", help="its name at the URL")
    parser.add_argument("--judge_options", default="", help="JSON: further keys of a request")
    parser.add_argument("--api_key_env", default="OPENAI_API_KEY")
    parser.add_argument("--workers", type=int, default=8, help="requests under way at once")
  options, rest = parser.parse_known_args(argv)
  judges = ("judge", "judge_model", "judge_options", "api_key_env", "workers") if judge else ()
  with command():
    given = Given(
      options.workdir.absolute(),
      changes_of(rest, ("config", *kinds)),
      {name: getattr(options, name) for name in judges},
      options.dry_run,
    )
    common = config_lib.defaults()
    common.update_from_flattened_dict(given.of("config"))
    resolve.use_compile_cache(common)  # for what runs before and between trainings too
    run(plan._replace(**{name: getattr(options, name) for name in plan._fields}), given, options)


def changes_of(flags: Sequence[str], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns the changes that flags such as --dpo.steps=100 ask for, by kind and dotted key.

  Those of 'ppo' are fields of `ppo.Settings`.

  Raises:
    ConfigError: a flag is none of them, or its key none of a config's.
  """
  keys = config_lib.flatten(config_lib.defaults())
  changes = {}
  for flag in flags:
    found = re.fullmatch(r"--(\w+)\.([\w.]+)=(.*)", flag)
    kind, key, value = found.groups() if found else ("", "", "")
    known = vars(ppo.Settings()) if kind == "ppo" else keys
    if kind not in kinds or key not in known:
      raise ConfigError(
        f"{flag} is no argument; keys of configs are set by --KIND.KEY=VALUE, and KIND is {', '.join(kinds)}"
      )
    changes.setdefault(kind, {})[key] = value if isinstance(known[key], str) else _literal(value)
  return changes


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _reader(value: Any) -> Callable[[str], Any]:
  """Returns what reads a flag whose default is `value`."""
  if isinstance(value, tuple):
    return lambda text: tuple(type(value[0])(each) for each in text.split(",") if each)
  return type(value)
