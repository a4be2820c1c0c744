"""Samples while training: answers to a few prompts, what they cost in KL and what a scorer gives them.

Every `sample_every` steps the same prompts are answered with the same random numbers, so that what
changes is the policy. `samples.jsonl` holds the answers, a line each; means go where a run's other
numbers go, under the split `samples`: the reward-KL curve of a run needs no second command.
"""

import contextlib
import json
from typing import Any

import ml_collections
import numpy as np

from dpojax.data import loader, records, tokenization
from dpojax.data.examples import Example
from dpojax.data.truncation import end_kept
from dpojax.evaluate import scorers
from dpojax.models.config import ModelConfig
from dpojax.runtime import appending, paths
from dpojax.runtime.command import is_main, say
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import ConfigError
from dpojax.sample import files
from dpojax.sample.current import Current
from dpojax.sample.draws import Draw
from dpojax.sample.generator import Sample
from dpojax.sample.prompts import encode, read_prompts
from dpojax.training import parallel
from dpojax.training.metrics import read_lines


class Watcher:
  """Draws and scores a run's samples; it keeps what is compiled, and no params between two draws."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    model: ModelConfig,
    subset: loader.Subset,
    workdir: paths.Path,
    devices: parallel.Replicas | parallel.Mesh,
    *,
    after_step: int,
  ):
    """Reads the prompts and loads the scorer. Lines of steps after `after_step` are dropped first.

    Args:
      config: of the run.
      model: that is trained.
      subset: comparisons whose prompts are answered where the config names no file.
      workdir: the run's folder.
      devices: what the run's params are placed on.
      after_step: the step that the run continues from; -1 at its start.

    Raises:
      DataError, ConfigError, CheckpointError: prompts or scorer cannot be used.
    """
    self._config, self._model = config, model
    self._tokenizer = tokenization.load_tokenizer(config.tokenizer)
    self._draw = Draw(
      num_samples=config.sample_count, max_new_tokens=config.sample_max_new_tokens, seed=config.seed
    )
    self._prompts, self._ids = self._read(subset)
    self._current = Current(
      config,
      model,
      tuple(loader.without_mismatched(subset).data.report.get("stop_ids", ())),
      self._draw,
      eos=self._tokenizer.eos_token_id,
      batch_size=min(len(self._ids), config.batch_size),
      devices=devices,
    )
    self._score = config.sample_scorer and scorers.make_scorer(config.sample_scorer, self._current.mesh)
    self._path = workdir / "samples.jsonl"
    if is_main():
      with disk_errors(workdir):
        # What comes after the checkpoint is drawn again, and would stand there twice.
        kept = [line for line in read_lines(self._path) if line["step"] <= after_step]
        appending.Appended(self._path, "".join(f"{_json(line)}\n" for line in kept)).close()

  def __call__(self, step: int, params: Any, reference: Any | None) -> dict[str, float]:
    """Answers the prompts, writes the answers, and returns their means.

    Args:
      step: the run's.
      params: placed, those to evaluate; an adapter's with `reference` for its base.
      reference: placed, or None where there is none at hand: then there is no KL.

    Raises:
      DiskError: the disk is full or cannot be written.
    """
    generator, lines = self._current.generator(params, reference), []
    for batch in generator.batches([len(ids) for ids in self._ids]):
      drawn = generator([self._ids[i] for i in batch], batch)
      lines += [
        self._record(step, i, k, each) for i, samples in zip(batch, drawn) for k, each in enumerate(samples)
      ]
    # Without params: a second copy of the model must not stay through the steps.
    generator.renew()
    lines.sort(key=lambda line: (line["index"], line["sample"]))
    if self._score:
      scores = self._score(
        [self._prompts[line["index"]] for line in lines], [line["response"] for line in lines]
      )
      for line, score in zip(lines, scores):
        line["score"] = float(score)
    if is_main():
      with disk_errors(self._path.parent), contextlib.closing(appending.Appended(self._path)) as file:
        file.write("".join(f"{_json(line)}\n" for line in lines))
    return means(lines)

  def _read(self, subset: loader.Subset) -> tuple[list[Example], list[list[int]]]:
    """Returns the prompts, texts or conversations, and their ids."""
    config, limit = self._config, self._config.sample_limit
    room = config.data.max_prompt_length
    if self._model.longest is not None:
      room = min(room, self._model.longest - self._draw.max_new_tokens)
    if room < 1:
      raise ConfigError(
        f"config.sample_max_new_tokens is {self._draw.max_new_tokens} and the model has "
        f"{self._model.longest} positions, which leaves none for a prompt; lower it"
      )
    if config.sample_prompts:
      prompts = list(read_prompts(config.sample_prompts, limit).values())
      keep = end_kept(config.data)
      ids, cut = encode(
        prompts,
        self._tokenizer,
        longest=room,
        keep=keep,
        path=config.sample_prompts,
        reading=tokenization.Reading.of(config.data),
        vocab_size=self._model.vocab_size,
      )
    else:
      # Dicts keep their order: the first prompts of the data, each once.
      distinct = {tuple(subset.comparison(i)[0].tolist()): None for i in range(len(subset))}
      fitting = [list(ids) for ids in distinct if 0 < len(ids) <= room]
      ids, cut = fitting[:limit], 0
      prompts = [
        Example(
          self._tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False), ()
        )
        for each in ids
      ]
    if not ids:
      raise ConfigError(
        f"config.sample_every is {config.sample_every} but the data hold no prompt of at most {room} "
        "tokens; set sample_prompts"
      )
    say(
      f"{len(ids)} prompts are answered every {config.sample_every} steps, {cut} of them cut to {room} tokens"
    )
    return prompts, ids

  def _record(self, step: int, index: int, number: int, drawn: Sample) -> dict[str, Any]:
    return {
      "step": step,
      "index": index,
      "sample": number,
      **records.prompt_record(self._prompts[index]),
      **files.told(self._tokenizer, self._ids[index], drawn),
    }


def means(lines: list[dict]) -> dict[str, float]:
  """Returns the means of `sample.summary`, that of scores, and standard errors over prompts."""
  result = files.summary(lines)
  values = {}
  if "kl" in result:
    values["kl"] = [line["log_prob"] - line["reference_log_prob"] for line in lines]
  if "score" in lines[0]:
    values["score"] = [line["score"] for line in lines]
    result["score"] = float(np.mean(values["score"]))
  prompts = np.array([line["index"] for line in lines])
  for name, each in values.items():
    # Samples of one prompt are alike: prompts are what is drawn independently.
    by_prompt = [np.mean(np.array(each)[prompts == i]) for i in np.unique(prompts)]
    result[f"{name}_error"] = (
      float(np.std(by_prompt, ddof=1) / len(by_prompt) ** 0.5) if len(by_prompt) > 1 else float("nan")
    )
  return result


def make_watcher(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  subset: loader.Subset,
  workdir: paths.Path,
  devices: parallel.Replicas | parallel.Mesh,
  *,
  after_step: int,
) -> Watcher | None:
  """Returns the watcher of a run, or None where it draws no samples."""
  if not config.sample_every:
    return None
  if config.reference.mode == "stored" and not config.lora.rank:
    say("samples will have no KL: of a stored reference no model is kept")
  return Watcher(config, model, subset, workdir, devices, after_step=after_step)


def _json(record: dict) -> str:
  return json.dumps(record, ensure_ascii=False)
