"""A file of prompts in, a file of samples out, which a killed run goes on with."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm

from dpojax.data import records, tokenization
from dpojax.data.examples import Example
from dpojax.runtime import appending, paths
from dpojax.runtime.command import say
from dpojax.runtime.disk import disk_errors, reached
from dpojax.runtime.errors import ConfigError
from dpojax.runtime.ownership import owned
from dpojax.sample.draws import Draw
from dpojax.sample.generator import Generator, Sample, make_mesh, power_of_two
from dpojax.sample.prompts import encode, prompt_room, read_prompts, reading_of
from dpojax.training import checkpoint, weights


def run(
  model: str,
  prompts: str,
  out: str,
  draw: Draw = Draw(),
  *,
  step: int | None = None,
  reference: str = "",
  batch_size: int = 16,
  max_prompt_length: int = 0,
  limit: int = 0,
  fsdp: int = 1,
  tensor: int = 1,
  form: str = "",
  on_error: str = "raise",
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
    return _run(
      model,
      prompts,
      paths.of(out),
      draw,
      step,
      reference,
      batch_size,
      max_prompt_length,
      limit,
      make_mesh(fsdp, tensor),
      form,
      on_error,
    )


def _run(
  model, prompts, out, draw, step, reference, batch_size, max_prompt_length, limit, devices, form, on_error
) -> dict[str, float]:
  # What tokenizers are made of takes as long to import as a small model to be read.
  beside = futures.ThreadPoolExecutor(2)
  loading = beside.submit(tokenization.load_tokenizer, weights.tokenizer_of(model))
  policy, other = _load(model, step, reference)
  digests = [beside.submit(checkpoint.fingerprint, each.params) if each else None for each in (policy, other)]
  beside.shutdown(wait=False)
  tokenizer = loading.result()
  texts = read_prompts(prompts, limit, form, on_error)
  generator = Generator(
    policy,
    other,
    draw,
    eos=tokenizer.eos_token_id,
    devices=devices,
    batch_size=min(batch_size, power_of_two(len(texts))),
  )
  longest, keep = prompt_room(policy, generator, max_prompt_length)
  left_out, reading = [] if on_error == "skip" else None, reading_of(policy, out)
  ids, cut = encode(
    list(texts.values()),
    tokenizer,
    longest=longest,
    keep=keep,
    path=prompts,
    reading=reading,
    vocab_size=policy.config.vocab_size,
    left_out=left_out,
  )
  if left_out:
    say(records.counted(left_out))
  texts = {i: text for (i, text), each in zip(texts.items(), ids) if each is not None}
  ids = [each for each in ids if each is not None]
  say(
    f"{len(ids)} prompts, {cut} cut to {longest} tokens; {draw.num_samples} samples each of "
    f"{policy.name}" + (f", reference {other.name}" if other else ", no reference")
  )
  settings = dataclasses.asdict(draw) | {
    "model": policy.name,
    **{name: each and each.result() for name, each in zip(("weights", "reference"), digests)},
    "batch_size": generator.batch_size,
    "max_prompt_length": longest,
    "keep": keep,
    "reading": dataclasses.asdict(reading),
    "prompts": hashlib.sha256(json.dumps([_identity(each) for each in texts.values()]).encode()).hexdigest(),
  }
  policy = other = None  # the placed copies are the only ones now
  return _fill(out, settings, generator, texts, ids, tokenizer)


def _load(model: str, step: int | None, reference: str) -> tuple[weights.Loaded, weights.Loaded | None]:
  policy = weights.load(model, step)
  if reference == "none":
    return policy, None
  if reference:
    return policy, weights.load(reference, dtype=policy.config.dtype)
  return policy, weights.load_reference(policy)


def _identity(example: Example) -> str | list[dict] | dict:
  """What tells a prompt from another: itself, or where it has tools and the like the record of it all."""
  record = records.prompt_record(example)
  return record if len(record) > 1 else example.prompt


def _fill(out, settings, generator, texts, ids, tokenizer) -> dict[str, float]:
  """Draws what is not in the file yet; in the end its lines stand in the order of the prompts."""
  start = time.perf_counter()
  lines = _reopen(out, settings)
  count, numbers = generator.draw.num_samples, list(texts)
  batches = [
    batch
    for batch in generator.batches([len(prompt) for prompt in ids])
    if any((numbers[i], k) not in lines for i in batch for k in range(count))
  ]
  again = {numbers[i] for batch in batches for i in batch}
  # A prompt of which one sample is missing is drawn whole, for batches are of prompts; its lines come again.
  lines = {place: line for place, line in lines.items() if place[0] not in again}
  kept = len(lines)
  with disk_errors(out.parent):
    file = appending.Appended(out, _text(lines.values()))
    bar = tqdm.tqdm(
      total=len(ids) * count, initial=kept, unit="sample", file=sys.stderr, disable=not sys.stderr.isatty()
    )
    with bar, contextlib.closing(file):
      for batch in batches:
        new = []
        for i, samples in zip(batch, generator([ids[i] for i in batch], batch)):
          for k, sample in enumerate(samples):
            place = numbers[i], k
            lines[place] = json.dumps(
              {"index": numbers[i], "sample": k, **records.prompt_record(texts[numbers[i]])}
              | told(tokenizer, ids[i], sample),
              ensure_ascii=False,
            )
            new.append(lines[place])
        file.write(_text(new))
        bar.update(len(batch) * count)
    # While it is made the file holds lines as they come, sorted by width; in the end in the prompts' order.
    paths.write_whole(out, _text(lines[place] for place in sorted(lines)))
  seconds = time.perf_counter() - start
  samples = [json.loads(line) for line in lines.values()]
  new = sum(record["tokens"] for record in samples[kept:])
  say(
    f"{len(samples) - kept} samples drawn ({kept} were there) in {seconds:.1f} s, "
    f"{new / seconds:.0f} tokens a second, compiling included; written to {out}"
  )
  return summary(samples)


def told(tokenizer: Any, prompt: Sequence[int], sample: Sample) -> dict[str, Any]:
  """Returns what a line of the output says of a sample."""
  return {
    "response": tokenization.decode_response(
      tokenizer, prompt, sample.ids[:-1] if sample.finished else sample.ids
    ),
    "log_prob": sample.log_prob,
    "reference_log_prob": sample.reference_log_prob,
    "tokens": len(sample.ids),
    "finished": sample.finished,
  }


def summary(samples: Sequence[dict]) -> dict[str, float]:
  """Returns means over samples; `kl` is of log-prob minus reference log-prob, where there is one."""
  mean = lambda values: float(np.mean(np.array(list(values), np.float64)))
  result = {
    "samples": float(len(samples)),
    "tokens": mean(r["tokens"] for r in samples),
    "finished": mean(r["finished"] for r in samples),
    "log_prob": mean(r["log_prob"] for r in samples),
  }
  if samples[0]["reference_log_prob"] is not None:
    result["kl"] = mean(r["log_prob"] - r["reference_log_prob"] for r in samples)
  return result


def _reopen(out: paths.Path, settings: dict) -> dict[tuple[int, int], str]:
  """Returns the whole lines of a file by (index, sample), after a check that it is of these settings.

  Raises:
    ConfigError: it is of others, or no file of samples.
  """
  about = out.with_suffix(".config.json")
  with reached(out):
    is_there = appending.exists(out)
  if not is_there:
    with disk_errors(out.parent):
      paths.make_folder(out.parent)
      about.write_text(json.dumps(settings, indent=2) + "\n")
    return {}
  try:
    was = json.loads(about.read_text())
    lines = appending.read(out).split("\n")[:-1]  # texts hold other ends of lines
    found = {(record["index"], record["sample"]): line for line in lines for record in [json.loads(line)]}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f"{out} exists and was not written by this command ({error}); give another --out"
    ) from error
  for key, value in json.loads(json.dumps(settings)).items():
    if was.get(key) != value and key != "model":  # it may have moved; the weights tell
      raise ConfigError(
        f"{out} holds samples of {key} {was.get(key)!r}, not {value!r}; give another --out, or delete it"
      )
  return found


def _text(lines: Iterable[str]) -> str:
  return "".join(f"{line}\n" for line in lines)
