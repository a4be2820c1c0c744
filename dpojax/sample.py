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
import collections
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
import time
from typing import Any, Callable, NamedTuple, Sequence

import jax
import numpy as np
import tqdm

from dpojax import checkpoint, parallel, sampling, weights
from dpojax import reference as reference_lib
from dpojax.command import command, say
from dpojax.config import ConfigError
from dpojax.data import packing, records, tokenization
from dpojax.data.examples import DataError, Example, RecordError
from dpojax.data.truncation import end_kept
from dpojax.disk import disk_errors
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.ownership import owned

_NARROWEST = 16

_PADDING = 4096
"""Tokens of padding that a batch may read rather than be two, of two widths, each compiled by itself."""


@dataclasses.dataclass(frozen=True)
class Draw:
  """How samples are drawn; see `sampling.make_sampler`.

  `stop_ids` come to the tokenizer's EOS and to those of a published model's generation_config.json.
  """

  num_samples: int = 1
  max_new_tokens: int = 256
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  stop_ids: tuple[int, ...] = ()
  seed: int = 0

  def __post_init__(self):
    for name, fits, what in (
        ("num_samples", self.num_samples >= 1, "at least 1"),
        ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= self.temperature < float("inf"), "at least 0; 0 is greedy"),
        ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ("top_k", self.top_k >= 0, "at least 0; 0 is all ids"),
        ("seed", self.seed >= 0, "at least 0")):
      if not fits:
        raise ConfigError(f"--{name} is {getattr(self, name)}; it must be {what}")


class Sample(NamedTuple):
  """One response: its ids with the stop id, its log-probs, and whether a stop id ended it.

  `reference_log_prob` is None where there is no reference.
  """

  ids: list[int]
  log_prob: float
  reference_log_prob: float | None
  finished: bool


class _Placed(NamedTuple):
  """A model on the devices and what is compiled for it; models of one config share that."""

  config: ModelConfig
  params: Any
  sample: Callable
  score: Callable


class Generator:
  """Draws samples of prompts in batches of few shapes; beside a reference scores them by the training
  primitive, which both models' log-probs are then of."""

  def __init__(
      self, policy: weights.Loaded, reference: weights.Loaded | None, draw: Draw, *, eos: int,
      batch_size: int, devices: parallel.Mesh):
    """Places the params.

    Args:
      policy: the model samples are of.
      reference: the model they are also scored under, or None.
      draw: how they are drawn.
      eos: the tokenizer's EOS.
      batch_size: prompts of a batch, rounded up to what the devices share evenly.
      devices: the mesh.
    """
    self.draw, self._devices = draw, devices
    self.batch_size = -(-batch_size // devices.row_multiple) * devices.row_multiple
    self._longest = min(
        (m.config.longest for m in (policy, reference) if m and m.config.longest), default=None)
    self._stops = tuple(dict.fromkeys((eos, *policy.stop_ids, *draw.stop_ids)))
    self._models, self._laid_out = [], []
    for model in (policy, reference) if reference is not None else (policy,):
      self._laid_out.append(model.config)
      config, params = transformer.unrolled(model.config, model.params)
      config = dataclasses.replace(config, published="")
      same = [other for other in self._models if other.config == config]
      self._models.append(same[0]._replace(params=devices.place(params)) if same
                          else self._placed(config, params))

  def _placed(self, config: ModelConfig, params: Any) -> "_Placed":
    lift, draw = self._devices.lift, self.draw
    return _Placed(
        config, self._devices.place(params),
        lift(sampling.make_sampler(
            config, max_new_tokens=draw.max_new_tokens, num_samples=draw.num_samples,
            stop_id=self._stops), donate_state=False),
        lift(reference_lib.make_score_step(
            transformer.make_apply(config), num_responses=draw.num_samples, chunk_size=None),
            donate_state=False))

  def of_reference(self) -> "Generator":
    """Returns the generator of the reference's samples, scored under it and then the policy."""
    other = copy.copy(self)
    other._models = self._models[::-1]
    return other

  def renew(self, *params: Any) -> None:
    """Takes other params of its models, in their order; those that are not given are let go."""
    params = [*params, *[None] * (len(self._models) - len(params))]
    self._models = [
        model._replace(params=None if each is None else self._devices.place(
            transformer.unrolled(config, each)[1]))
        for model, config, each in zip(self._models, self._laid_out, params)]

  @property
  def longest_prompt(self) -> int | None:
    """Tokens a prompt may have, None without a bound."""
    return self._longest and self._longest - self.draw.max_new_tokens

  def batches(self, lengths: Sequence[int]) -> list[list[int]]:
    """Returns which prompts are drawn together, given their lengths: those of nearly one width."""
    order = sorted(range(len(lengths)), key=lambda i: (self._width(lengths[i]), i))
    batches = []
    for i in order:
      wider = self._width(lengths[i]) - self._width(lengths[batches[-1][0]]) if batches else 0
      if not batches or len(batches[-1]) == self.batch_size or wider * len(batches[-1]) > _PADDING:
        batches.append([])
      batches[-1].append(i)
    return batches

  def __call__(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> list[list[Sample]]:
    """Returns the samples of each prompt of a batch.

    Args:
      prompts: ids, as `batches` puts them together.
      numbers: with the seed they decide the draws, whatever the batch.
    """
    count, size = len(prompts), self.batch_size
    full = lambda values: [*values, *[values[-1]] * (size - count)]
    lengths = np.array(full([len(prompt) for prompt in prompts]), np.int32)
    padded = np.zeros((size, self._width(int(lengths.max()))), np.int32)
    for row, prompt in zip(padded, full(prompts)):
      row[:len(prompt)] = prompt
    seeds = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(self.draw.seed), np.array(full(numbers), np.int32))
    policy = self._models[0]
    drawn = self._devices.collect_rows(policy.sample(
        policy.params, *self._devices.place_rows((padded, lengths), size), seeds,
        self.draw.temperature, self.draw.top_p, self.draw.top_k))
    ids = [[tokens[:n].tolist() for tokens, n in zip(*each)]
           for each in zip(drawn.tokens[:count], drawn.lengths[:count])]
    if len(self._models) == 1:  # nothing to compare with: a second program would only tell the same
      scores = [np.asarray(drawn.log_probs[:count])]
    else:
      scores = self._scores(prompts, ids, padded.shape[1])
    scored = lambda b, k: [float(of[b, k]) for of in scores] + [None] * (2 - len(scores))
    return [[Sample(each, *scored(b, k), each[-1] in self._stops) for k, each in enumerate(of)]
            for b, of in enumerate(ids)]

  def _scores(self, prompts, ids, width: int) -> list[np.ndarray]:
    """Returns log-probs [prompts, K] under each model; a row holds a prompt and its samples."""
    room = min(self.draw.max_new_tokens, _rounded(max(len(each) for of in ids for each in of)))
    scored = self.draw.num_samples * room
    rows = packing.fill(
        [(np.array(prompt), [np.array(each) for each in of]) for prompt, of in zip(prompts, ids)],
        np.arange(len(prompts)), self.batch_size, packing.RowShape(width + scored, scored, 1),
        num_responses=self.draw.num_samples, example=range(len(prompts)))
    rows = self._devices.place_rows(rows, self.batch_size)
    return [self._devices.collect_rows(model.score(model.params, rows)[0])[:len(prompts), 0]
            for model in self._models]

  def _width(self, length: int) -> int:
    width = _rounded(length)
    return width if self.longest_prompt is None else min(width, self.longest_prompt)


def read_prompts(
    path: str | os.PathLike, limit: int = 0, form: str = "", on_error: str = "raise"
) -> dict[int, Example]:
  """Returns the prompts of a file, without responses, by the number of their record, from 0.

  Args:
    path: in any form that can be trained on.
    limit: how many are read, the first; 0 is all.
    form: a name in `records.FORMS`; '' recognises it by the records' keys.
    on_error: "skip" leaves records without a prompt out, counts them and says so; "raise" stops at
      the first.

  Raises:
    DataError: the file is not there or has no prompt, or a record has none; it says which.
  """
  if on_error not in ("skip", "raise"):
    raise DataError(f"--on_error is {on_error!r}; it is 'skip' or 'raise'")
  left_out = [] if on_error == "skip" else None
  every = records.read_file(
      path, lambda record: records.parse_prompt(record, form), given="--prompts", left_out=left_out)
  prompts = dict(itertools.islice(every, limit or None))
  if left_out:
    say(records.counted(left_out))
  if not prompts:
    raise DataError(f"{path} has no records with a prompt; give one object with \"prompt\" a line")
  return prompts


def encode(
    prompts: Sequence[str | list[dict] | Example], tokenizer: Any, *, longest: int, keep: str, path: Any,
    reading: tokenization.Reading = tokenization.Reading(), vocab_size: int | None = None,
    left_out: list | None = None,
) -> tuple[list[list[int] | None], int]:
  """Returns the ids of prompts and how many were cut; None of one that is left out.

  `left_out` gets what is wrong with prompts that cannot be tokenized; None raises the first.

  Raises:
    DataError: one cannot be tokenized, or none can, or one has an id that the model has no embedding
      of; it says which.
  """
  ids, cuts, counts = [], 0, collections.Counter()
  encoded = tokenization.encode_prompts(
      prompts, tokenizer, longest=longest, keep=keep, reading=reading, counts=counts)
  if named := counts["with_special_tokens_in_text"]:
    say(f"{named} of {len(prompts)} prompts of {path} have a special token's name in their text, which is read "
        f"as data.special_tokens={reading.special_tokens!r} says")
  for i, each in enumerate(encoded):
    if isinstance(each, RecordError):
      problem = f"{path} prompt {i + 1}: {each}"
      if left_out is None:
        raise DataError(problem) from each
      left_out.append(RecordError(each.reason, problem))
      ids.append(None)
      continue
    largest = max(each[0], default=0)
    if vocab_size is not None and largest >= vocab_size:
      raise DataError(
          f"{path} prompt {i + 1} has id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the "
          f"model has embeddings of {vocab_size} ids; take its own tokenizer, or leave out that token")
    ids.append(each[0])
    cuts += each[1]
  if all(each is None for each in ids):
    raise DataError(f"none of {len(ids)} prompts can be tokenized; {records.counted(left_out)}")
  return ids, cuts


def run(
    model: str, prompts: str, out: str, draw: Draw = Draw(), *, step: int | None = None,
    reference: str = "", batch_size: int = 16, max_prompt_length: int = 0, limit: int = 0,
    fsdp: int = 1, tensor: int = 1, form: str = "", on_error: str = "raise",
) -> dict[str, float]:
  """Samples as the command does and returns the means over the samples in the file.

  Args:
    model: a run's workdir, a Hugging Face folder or a hub name.
    prompts: file to read.
    out: file to write, or to go on with.
    draw: how samples are drawn.
    step: of the run's checkpoint; None is the last.
    reference: a model like `model`; '' is the run's own, 'none' none.
    batch_size: prompts of a batch.
    max_prompt_length: tokens kept of a prompt; 0 is what the run was trained with.
    limit: how many prompts are read; 0 is all.
    fsdp, tensor: how the params are cut over devices.
    form: of the prompts' records, a name in `records.FORMS`; '' recognises it by their keys.
    on_error: "skip" leaves records without a prompt out and says so; "raise" stops at the first.

  Raises:
    ConfigError, DataError, CheckpointError: something given cannot be used.
    InUseError: another process writes `out`.
    DiskError: the disk is full or cannot be written.
  """
  with owned(out, f"the samples file {out}"):
    return _run(model, prompts, pathlib.Path(out), draw, step, reference, batch_size,
                max_prompt_length, limit, make_mesh(fsdp, tensor), form, on_error)


def _run(
    model, prompts, out, draw, step, reference, batch_size, max_prompt_length, limit, devices, form,
    on_error,
) -> dict[str, float]:
  policy = weights.load(model, step)
  other = None if reference == "none" else (
      weights.load(reference, dtype=policy.config.dtype) if reference
      else weights.load_reference(policy))
  tokenizer = tokenization.load_tokenizer(policy.tokenizer)
  texts = read_prompts(prompts, limit, form, on_error)
  generator = Generator(
      policy, other, draw, eos=tokenizer.eos_token_id, devices=devices,
      batch_size=min(batch_size, power_of_two(len(texts))))
  longest, keep = prompt_room(policy, generator, max_prompt_length)
  left_out, reading = [] if on_error == "skip" else None, reading_of(policy, out)
  ids, cut = encode(
      list(texts.values()), tokenizer, longest=longest, keep=keep, path=prompts, reading=reading,
      vocab_size=policy.config.vocab_size, left_out=left_out)
  if left_out:
    say(records.counted(left_out))
  texts = {i: text for (i, text), each in zip(texts.items(), ids) if each is not None}
  ids = [each for each in ids if each is not None]
  say(f"{len(ids)} prompts, {cut} cut to {longest} tokens; {draw.num_samples} samples each of "
      f"{policy.name}" + (f", reference {other.name}" if other else ", no reference"))
  settings = dataclasses.asdict(draw) | {
      "model": policy.name, "weights": checkpoint.fingerprint(policy.params),
      "reference": other and checkpoint.fingerprint(other.params), "batch_size": generator.batch_size,
      "max_prompt_length": longest, "keep": keep, "reading": dataclasses.asdict(reading),
      "prompts": hashlib.sha256(json.dumps([_identity(each) for each in texts.values()]).encode()).hexdigest()}
  policy = other = None  # the placed copies are the only ones now
  return _fill(out, settings, generator, texts, ids, tokenizer)


def _identity(example: Example) -> str | list[dict] | dict:
  """What tells a prompt from another: itself, or where it has tools and the like the record of it all."""
  record = records.prompt_record(example)
  return record if len(record) > 1 else example.prompt


def reading_of(policy: weights.Loaded, out: str | os.PathLike = "") -> tokenization.Reading:
  """Returns how prompts are read: as the run's data were; of another model on the day its file was begun."""
  if policy.settings is not None:
    return tokenization.Reading.of(policy.settings.data)
  about = pathlib.Path(out).with_suffix(".config.json") if out else None
  try:
    kept = json.loads(about.read_text())["reading"]["date"] if about else ""
  except (OSError, ValueError, KeyError, TypeError):
    kept = ""
  return tokenization.Reading(date=kept or str(tokenization.Reading().day()))


def make_mesh(fsdp: int, tensor: int) -> parallel.Mesh:
  """Returns the mesh over all devices.

  Raises:
    ConfigError: the axes do not fit the devices.
  """
  if jax.process_count() > 1:
    raise ConfigError("sampling runs in one process; give each a file of prompts of its own")
  try:
    return parallel.Mesh(fsdp=fsdp, tensor=tensor)
  except ValueError as error:
    raise ConfigError(str(error).replace("parallel.data x fsdp x tensor", "data x --fsdp x --tensor")
                      ) from error


def prompt_room(
    policy: weights.Loaded, generator: Generator, max_prompt_length: int = 0
) -> tuple[int, str]:
  """Returns how many tokens of a prompt are kept, and of which end.

  Raises:
    ConfigError: the model has no positions left for a prompt.
  """
  keep, longest = "end", max_prompt_length
  if policy.settings is not None:
    data = policy.settings.data
    keep = end_kept(data)
    longest = longest or data.max_prompt_length
  room = generator.longest_prompt
  if room is not None and room < max(1, max_prompt_length):
    raise ConfigError(
        f"the model has {room + generator.draw.max_new_tokens} positions, of which "
        f"--max_new_tokens={generator.draw.max_new_tokens} leaves {max(room, 0)} for a prompt; lower "
        "it, or --max_prompt_length")
  return min(each for each in (longest or 2**20, room or 2**20)), keep


def _fill(out, settings, generator, texts, ids, tokenizer) -> dict[str, float]:
  """Draws what is not in the file yet; in the end its lines stand in the order of the prompts."""
  start = time.perf_counter()
  lines = _reopen(out, settings)
  count, numbers = generator.draw.num_samples, list(texts)
  batches = [batch for batch in generator.batches([len(prompt) for prompt in ids])
             if any((numbers[i], k) not in lines for i in batch for k in range(count))]
  again = {numbers[i] for batch in batches for i in batch}
  lines = {place: line for place, line in lines.items() if place[0] not in again}
  kept = len(lines)
  with disk_errors(out.parent):
    _rewrite(out, lines.values())
    bar = tqdm.tqdm(total=len(ids) * count, initial=kept, unit="sample", file=sys.stderr,
                    disable=not sys.stderr.isatty())
    with bar, open(out, "a", encoding="utf-8") as file:
      for batch in batches:
        for i, samples in zip(batch, generator([ids[i] for i in batch], batch)):
          for k, sample in enumerate(samples):
            place = numbers[i], k
            lines[place] = json.dumps(
                {"index": numbers[i], "sample": k, **records.prompt_record(texts[numbers[i]])}
                | told(tokenizer, ids[i], sample), ensure_ascii=False)
            file.write(lines[place] + "\n")
        file.flush()
        bar.update(len(batch) * count)
    _rewrite(out, [lines[place] for place in sorted(lines)])
  seconds = time.perf_counter() - start
  samples = [json.loads(line) for line in lines.values()]
  new = sum(record["tokens"] for record in samples[kept:])
  say(f"{len(samples) - kept} samples drawn ({kept} were there) in {seconds:.1f} s, "
      f"{new / seconds:.0f} tokens a second, compiling included; written to {out}")
  return summary(samples)


def told(tokenizer: Any, prompt: Sequence[int], sample: Sample) -> dict[str, Any]:
  """Returns what a line of the output says of a sample."""
  return {
      "response": tokenization.decode_response(
          tokenizer, prompt, sample.ids[:-1] if sample.finished else sample.ids),
      "log_prob": sample.log_prob, "reference_log_prob": sample.reference_log_prob,
      "tokens": len(sample.ids), "finished": sample.finished}


def summary(samples: Sequence[dict]) -> dict[str, float]:
  """Returns means over samples; `kl` is of log-prob minus reference log-prob, where there is one."""
  mean = lambda values: float(np.mean(np.array(list(values), np.float64)))
  result = {"samples": float(len(samples)), "tokens": mean(r["tokens"] for r in samples),
            "finished": mean(r["finished"] for r in samples),
            "log_prob": mean(r["log_prob"] for r in samples)}
  if samples[0]["reference_log_prob"] is not None:
    result["kl"] = mean(r["log_prob"] - r["reference_log_prob"] for r in samples)
  return result


def _reopen(out: pathlib.Path, settings: dict) -> dict[tuple[int, int], str]:
  """Returns the whole lines of a file by (index, sample), after a check that it is of these settings.

  Raises:
    ConfigError: it is of others, or no file of samples.
  """
  about = out.with_suffix(".config.json")
  if not out.exists():
    with disk_errors(out.parent):
      out.parent.mkdir(parents=True, exist_ok=True)
      about.write_text(json.dumps(settings, indent=2) + "\n")
    return {}
  try:
    was = json.loads(about.read_text())
    lines = out.read_text(encoding="utf-8").split("\n")[:-1]  # texts hold other ends of lines
    found = {(record["index"], record["sample"]): line for line in lines for record in [json.loads(line)]}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
        f"{out} exists and was not written by this command ({error}); give another --out") from error
  for key, value in json.loads(json.dumps(settings)).items():
    if was.get(key) != value and key != "model":  # it may have moved; the weights tell
      raise ConfigError(
          f"{out} holds samples of {key} {was.get(key)!r}, not {value!r}; give another --out, or "
          "delete it")
  return found


def _rewrite(out: pathlib.Path, lines) -> None:
  temporary = out.with_name(out.name + ".tmp")
  temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  os.replace(temporary, out)


def _rounded(length: int) -> int:
  """A length, rounded up so that few shapes are compiled."""
  return max(_NARROWEST, power_of_two(length))


def power_of_two(count: int) -> int:
  """Returns the least power of two that is not below a count of at least 1."""
  return 1 << (count - 1).bit_length()


def add_draw_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `Draw` and of `run` that are not files."""
  for field in dataclasses.fields(Draw):
    if field.name != "stop_ids":
      parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
  parser.add_argument("--stop_ids", default="", help="ids that end a sample besides EOS: 1,2")
  parser.add_argument("--step", type=int, help="of the run's checkpoint; by default the last")
  parser.add_argument("--reference", default="", help="by default the run's own; 'none' for none")
  parser.add_argument("--batch_size", type=int, default=16, help="prompts drawn together")
  parser.add_argument("--fsdp", type=int, default=1)
  parser.add_argument("--tensor", type=int, default=1)


def draw_of(options: argparse.Namespace) -> Draw:
  """Returns the `Draw` of parsed flags.

  Raises:
    ConfigError: a value is impossible.
  """
  names = [field.name for field in dataclasses.fields(Draw) if field.name != "stop_ids"]
  try:
    stop_ids = tuple(int(each) for each in options.stop_ids.split(",") if each)
  except ValueError as error:
    raise ConfigError(f"--stop_ids is {options.stop_ids!r}; give ids such as 1,2") from error
  return Draw(**{name: getattr(options, name) for name in names}, stop_ids=stop_ids)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", "--checkpoint", dest="model", required=True,
                      help="a run's workdir, a Hugging Face folder or a hub name")
  parser.add_argument("--prompts", required=True, help="a file that can be trained on, such as .jsonl")
  parser.add_argument("--form", default="", help="of its records (docs/data.md); by default recognised")
  parser.add_argument("--on_error", default="skip", choices=("skip", "raise"), help="records without a prompt")
  parser.add_argument("--out", required=True, help=".jsonl to write, or to go on with")
  parser.add_argument("--max_prompt_length", type=int, default=0, help="by default the run's")
  parser.add_argument("--limit", type=int, default=0, help="prompts read; 0 is all")
  add_draw_arguments(parser)
  options = parser.parse_args()
  with command():
    means = run(
        options.model, options.prompts, options.out, draw_of(options), step=options.step,
        reference=options.reference, batch_size=options.batch_size, limit=options.limit,
        max_prompt_length=options.max_prompt_length, fsdp=options.fsdp, tensor=options.tensor,
        form=options.form, on_error=options.on_error)
  print("  ".join(f"{name} {value:.4g}" for name, value in means.items()))


if __name__ == "__main__":
  main()
