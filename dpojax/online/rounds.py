"""A round: the policy's samples, what is said of them, the comparisons of it, each kept as it comes.

WORKDIR/rounds/N/samples.jsonl   prompt, sample and log-probs, a line a sample
WORKDIR/rounds/N/labels.jsonl    what was said, a line a score or a judged pair; equal answers are asked once
WORKDIR/rounds/N/round.json      written last: counts, and digests of the two
WORKDIR/comparisons/round_N.jsonl   the comparisons in text, which `dpojax.train` reads as its data

A round that was killed goes on with the lines that are there. Steps are on the very ids that were sampled.
The text tells less of a sample that ran out of tokens, which `train` ends with EOS, and of an empty one,
whose comparison it leaves out.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from dpojax.data import loader, records, tokenization, tokenized
from dpojax.data.examples import Example
from dpojax.data.truncation import end_kept
from dpojax.evaluate import watching
from dpojax.models.config import ModelConfig
from dpojax.online import pairs
from dpojax.online.labels import Answer, Labeller
from dpojax.runtime import appending, digests, paths, processes
from dpojax.runtime.command import is_main, say
from dpojax.runtime.digests import DamageError
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import ConfigError
from dpojax.sample import files, rollouts
from dpojax.sample.current import Current
from dpojax.sample.prompts import encode, read_prompts
from dpojax.training import checkpoint, resolve
from dpojax.training.checkpoint import CheckpointError
from dpojax.training.metrics import read_lines

Line = dict[str, Any]


class Prompts(NamedTuple):
  """What is answered, in text or messages and in ids."""

  examples: list[Example]
  ids: list[list[int]]


class Made(NamedTuple):
  """A round that is complete: the samples of each of its prompts, the comparisons, and what was counted."""

  samples: list[list[Line]]
  paired: pairs.Paired
  metrics: dict[str, float]


class Stopped(Exception):
  """A signal asked to stop between two parts of a round; what was there is kept."""


class Rounds:
  """Makes the rounds of a run, or reads those that are there."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: paths.Path,
    prompts: Prompts,
    labeller: Labeller,
    current: Current,
  ):
    """Reads nothing yet.

    Args:
      config: all keys.
      workdir: the run's folder.
      prompts: what is answered.
      labeller: who is asked.
      current: samples from the policy.
    """
    self._config, self._workdir, self.prompts = config, workdir, prompts
    self._labeller, self._current = labeller, current
    self._tokenizer = tokenization.load_tokenizer(config.tokenizer)
    self._count = config.online.prompts_per_round

  def make(
    self, number: int, params: Any, reference: Any | None, stop_asked: Callable[[], bool] = lambda: False
  ) -> Made:
    """Returns a round, from what there is of it.

    Args:
      number: of the round, from 1.
      params: placed, of the policy that samples.
      reference: placed, or None where there is none.
      stop_asked: whether to stop; asked between batches.

    Raises:
      CheckpointError: the round was begun by other weights.
      Stopped: it was asked to stop.
    """
    folder = self._folder(number)
    with disk_errors(self._workdir):
      paths.make_folder(folder)
    self._check_weights(folder, checkpoint.fingerprint(params))
    # Written last of a round: where it is all is there.
    if not processes.from_first("round", (folder / "round.json").exists):
      began = time.perf_counter()
      lines, new = self._sample(folder, number, params, reference, stop_asked)
      seconds = time.perf_counter() - began
      self._label(folder, number, lines, stop_asked)
      self._finish(folder, number, lines, new / seconds)
    return self.read(number)

  def read(self, number: int) -> Made:
    """Returns a round that is complete.

    Raises:
      DamageError: its files are not as they were written.
    """
    folder, metrics = self._folder(number), self._metrics_of(number)
    samples = self._samples(folder)
    return Made(samples, pairs.paired(self._config.online.pairing, self._said(folder, samples)), metrics)

  def _folder(self, number: int) -> paths.Path:
    return self._workdir / "rounds" / str(number)

  def _metrics_of(self, number: int) -> dict[str, float]:
    """Returns what was counted of a round, whose files are held to their digests."""
    folder = self._folder(number)
    try:
      kept = json.loads((folder / "round.json").read_text())
      digests.check(folder, kept["digests"])
      return kept["metrics"]
    except (OSError, ValueError, KeyError, TypeError, DamageError) as error:
      raise DamageError(
        f"round {number} cannot be read ({error}); bring {folder} back, or take another workdir"
      ) from error

  def answer(self, line: Line) -> Answer:
    """Returns a sample as the labeller is shown it."""
    prompt = line["prompt"]
    return Answer(self.prompts.examples[prompt], self.prompts.ids[prompt], line["response"], line["ids"])

  # Sampling.

  def _which(self, number: int) -> list[int]:
    """The prompts of a round."""
    return rollouts.prompts_in_turn(
      len(self.prompts.ids), number - 1, size=self._count, seed=self._config.seed
    ).tolist()

  def _sample(self, folder, number: int, params, reference, stop_asked) -> tuple[list[list[Line]], int]:
    """Draws what is not there yet; returns all samples and how many are new."""
    which, size = self._which(number), self._config.online.num_samples
    ids = [self.prompts.ids[i] for i in which]
    generator, new = self._current.generator(params, reference), 0
    with _appending(folder / "samples.jsonl") as (known, add):
      for batch in generator.batches([len(each) for each in ids]):
        if all((i, k) in known for i in batch for k in range(size)):
          continue
        _stop_if(stop_asked)
        # A number of its own for each prompt of each round: else a prompt that comes again would be answered
        # with the same random numbers.
        numbers = [(number - 1) * self._count + i for i in batch]
        drawn = generator([ids[i] for i in batch], numbers)
        lines = [
          {"index": i, "sample": k, "prompt": which[i], "ids": each.ids}
          | files.told(self._tokenizer, ids[i], each)
          for i, samples in zip(batch, drawn)
          for k, each in enumerate(samples)
        ]
        # A batch that was half kept is drawn again whole, and gives the same samples.
        add([line for line in lines if (line["index"], line["sample"]) not in known])
        new += len(lines)
    generator.renew()
    return self._samples(folder), new

  def _samples(self, folder: paths.Path) -> list[list[Line]]:
    """The samples of each prompt of the round, in their order."""
    lines = sorted(read_lines(folder / "samples.jsonl"), key=lambda line: (line["index"], line["sample"]))
    size = self._config.online.num_samples
    return [lines[first : first + size] for first in range(0, len(lines), size)]

  # Labelling.

  def _label(self, folder, number: int, samples: list[list[Line]], stop_asked) -> None:
    """Asks what is not answered yet. Of equal answers to one prompt the first alone gets a score."""
    at_once = self._labeller.at_once
    with _appending(folder / "labels.jsonl") as (known, add):
      for first in range(0, len(samples), at_once):
        asked = [
          (i, k)
          for i in range(first, min(first + at_once, len(samples)))
          for k in self._to_ask(samples[i])
          if (i, k) not in known
        ]
        if not asked:
          continue
        _stop_if(stop_asked)
        add(
          [
            {"index": i, "sample": k, "said": value if self._labeller.compares else float(value)}
            for (i, k), value in zip(asked, self._ask(number, samples, asked), strict=True)
          ]
        )

  def _to_ask(self, of: list[Line]) -> list[int]:
    """The numbers of a prompt's samples that are asked about, of pairs those of the first."""
    texts = [line["response"] for line in of]
    if self._labeller.compares:
      return [k for k in range(0, len(of), 2) if texts[k] != texts[k + 1]]
    return [k for k, text in enumerate(texts) if text not in texts[:k]]

  def _ask(self, number: int, samples: list[list[Line]], asked: list[tuple[int, int]]) -> Sequence:
    answers = lambda places: [self.answer(samples[i][k]) for i, k in places]
    if not self._labeller.compares:
      scores = np.asarray(self._asked(answers(asked)), np.float64)
      if not np.isfinite(scores).all():
        i, k = asked[int(np.argmin(np.isfinite(scores)))]
        raise ConfigError(
          f"config.online.judge is {self._config.online.judge!r}, which gives no finite number to "
          f"{samples[i][k]['response'][:60]!r} (round {number}, prompt {i}); mend it"
        )
      return scores.tolist()
    # Of seed, round and place alone: asked again after a kill the order in which two answers are shown is the
    # same.
    seed = ((self._config.seed * 2**20 + number) * self._count + asked[0][0]) * len(samples[0]) + asked[0][1]
    return self._asked(list(zip(answers(asked), answers([(i, k + 1) for i, k in asked]))), seed)

  def _asked(self, *question: Any) -> Sequence:
    """What the labeller says, in every process."""
    ask = lambda: [each if isinstance(each, str) else float(each) for each in self._labeller.ask(*question)]
    return ask() if self._labeller.by_all else processes.from_first("labels", ask)

  def _said(self, folder: paths.Path, samples: list[list[Line]]) -> list[list]:
    """What was said of each prompt's samples, as `pairs.paired` takes it."""
    said = {(line["index"], line["sample"]): line["said"] for line in read_lines(folder / "labels.jsonl")}
    result = []
    for i, of in enumerate(samples):
      texts = [line["response"] for line in of]
      if self._labeller.compares:
        result.append([said.get((i, k), "tie") for k in range(0, len(of), 2)])
      else:
        # Equal answers have one score: that of the first.
        result.append([said[i, texts.index(text)] for text in texts])
    return result

  # What is kept.

  def _check_weights(self, folder: paths.Path, weights: str) -> None:
    """Keeps the digest of the weights that a round is sampled from, or holds them to it."""
    if processes.from_first("weights", lambda: _kept(folder / "weights.json", weights)) != weights:
      raise CheckpointError(
        f"{folder} holds samples of other weights than the run has now; bring back the checkpoints it was "
        "made with, or remove that folder, and those of later rounds, to sample again"
      )

  def _finish(self, folder: paths.Path, number: int, samples: list[list[Line]], rate: float) -> None:
    """Writes the comparisons in text, and then counts and digests, from the first process."""
    if is_main():
      self._write_round(folder, number, samples, rate)
    processes.meet("round")

  def _write_round(self, folder: paths.Path, number: int, samples: list[list[Line]], rate: float) -> None:
    said = self._said(folder, samples)
    paired = pairs.paired(self._config.online.pairing, said)
    texts = self._workdir / "comparisons"
    with disk_errors(self._workdir):
      paths.make_folder(texts)
    _write(
      texts / f"round_{number}.jsonl",
      "".join(
        json.dumps(self._record([samples[i][k] for k in order]), ensure_ascii=False) + "\n"
        for i, order in paired.comparisons
      ),
    )
    labels = len(read_lines(folder / "labels.jsonl"))
    metrics = self._metrics(samples, said, paired) | {
      "round": number,
      # Counted from the start of the run, as budgets are.
      "labels": labels + (self._metrics_of(number - 1)["labels"] if number > 1 else 0),
      "samples_per_second": rate,
    }
    names = ["samples.jsonl", "labels.jsonl"]
    _write(
      folder / "round.json",
      json.dumps({"metrics": metrics, "digests": digests.of_files(folder, names)}, indent=1) + "\n",
    )

  def _record(self, of: list[Line]) -> dict:
    """A comparison in the project's own form, of samples best first."""
    example = self.prompts.examples[of[0]["prompt"]]
    text = isinstance(example.prompt, str)
    responses = [
      line["response"] if text else [{"role": "assistant", "content": line["response"]}] for line in of
    ]
    record = records.prompt_record(example)
    if len(of) == 2:
      return record | {"chosen": responses[0], "rejected": responses[1]}
    return record | {"responses": responses}

  def _metrics(self, samples: list[list[Line]], said: list[list], paired: pairs.Paired) -> dict[str, float]:
    """Means over the round's samples, as `watching.means` has them, and what was counted."""
    lines = [dict(line) for of in samples for line in of]
    if not self._labeller.compares:
      for line in lines:
        line["score"] = said[line["index"]][line["sample"]]
    result = watching.means(lines) | {"pairs": len(paired.comparisons)} | paired.counts
    if not self._labeller.compares and paired.comparisons:
      for name, place in (("chosen", 0), ("rejected", -1)):
        result[f"score/{name}"] = float(np.mean([said[i][order[place]] for i, order in paired.comparisons]))
    return result

  def in_ids(self, made: Made, report: dict) -> tokenized.Tokenized:
    """Returns a round's comparisons as they were sampled, with a report of the data."""
    comparisons = [
      (self.prompts.ids[made.samples[i][0]["prompt"]], [made.samples[i][k]["ids"] for k in order])
      for i, order in made.paired.comparisons
    ]
    return tokenized.of_ids(comparisons, self._config.data.num_responses, report)


def find_prompts(config: ml_collections.ConfigDict, data: resolve.Data, model: ModelConfig) -> Prompts:
  """Returns what is answered: the prompts of a file, or those of the training data, each once.

  Raises:
    DataError, ConfigError: there is none that can be used.
  """
  settings, tokenizer = config.online, tokenization.load_tokenizer(config.tokenizer)
  room = config.data.max_prompt_length
  if model.longest is not None:
    room = min(room, model.longest - settings.max_new_tokens)
  if room < 1:
    raise ConfigError(
      f"config.online.max_new_tokens is {settings.max_new_tokens} and the model has {model.longest} "
      "positions, which leaves none for a prompt; lower it"
    )
  if settings.prompts:
    examples = list(read_prompts(settings.prompts).values())
    ids, cut = encode(
      examples,
      tokenizer,
      longest=room,
      keep=end_kept(config.data),
      path=settings.prompts,
      reading=tokenization.Reading.of(config.data),
      vocab_size=model.vocab_size,
    )
    say(f"{len(ids)} prompts of {settings.prompts}, {cut} of them cut to {room} tokens")
    return Prompts(examples, ids)
  subset = loader.without_mismatched(data.train)
  _, first = np.unique(loader.prompt_numbers(subset), return_index=True)
  lengths, first = subset.lengths[:, 0], np.sort(first)
  kept = first[(lengths[first] >= 1) & (lengths[first] <= room)].tolist()
  say(
    f"{len(kept)} prompts of the training data; left out: {len(first) - len(kept)} that are empty or longer "
    f"than {room} tokens"
  )
  if not kept:
    raise ConfigError("the training data hold no prompt that can be answered; set online.prompts")
  decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
  ids = [subset.comparison(i)[0].tolist() for i in kept]
  if data.examples is None:
    return Prompts([Example(decode(each), ()) for each in ids], ids)
  return Prompts([data.examples[subset.example(i)]._replace(responses=()) for i in kept], ids)


@contextlib.contextmanager
def _appending(path: paths.Path) -> Iterator[tuple[set[tuple[int, int]], Callable[[list[Line]], None]]]:
  """Yields which (index, sample) a file has a whole line of, and a function that adds lines to it.

  The first process reads and writes; behind it the others may read what was added.
  """
  with contextlib.ExitStack() as held:
    lines, add = [], lambda more: None
    if is_main():
      lines = read_lines(path)
      held.enter_context(disk_errors(path.parent))
      # One that was cut off by a kill goes.
      file = held.enter_context(contextlib.closing(appending.Appended(path, "".join(map(_line, lines)))))
      add = lambda more: file.write("".join(map(_line, more)))
    known = processes.from_first(path.name, lambda: [[line["index"], line["sample"]] for line in lines])
    yield {(index, sample) for index, sample in known}, add
  processes.meet(path.name)


def _kept(path: paths.Path, weights: str) -> str:
  """Returns the digest of weights that a file keeps, of these if there is none yet."""
  if not path.exists():
    _write(path, json.dumps({"weights": weights}) + "\n")
  return json.loads(path.read_text())["weights"]


def _write(path: paths.Path, text: str) -> None:
  """Writes a file: what stands there is complete."""
  with disk_errors(path.parent):
    paths.write_whole(path, text)


def _line(record: dict) -> str:
  return json.dumps(record) + "\n"  # in ASCII: a text may hold what else ends a line


def _stop_if(stop_asked: Callable[[], bool]) -> None:
  if stop_asked():
    raise Stopped
