"""What a run is, beside its reference: on held-out pairs, and on samples to their prompts."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from dpojax.data import builders, loader, tokenization
from dpojax.data.examples import Example
from dpojax.evaluate import confidence, scorers
from dpojax.evaluate.confidence import Estimate
from dpojax.models import transformer
from dpojax.runtime.errors import ConfigError
from dpojax.sample.draws import Draw
from dpojax.sample.generator import Generator, make_mesh
from dpojax.sample.prompts import encode, prompt_room, reading_of
from dpojax.training import objectives, parallel, resolve, weights
from dpojax.training import reference as reference_lib


class HeldOut(NamedTuple):
  """Held-out comparisons: packed, and in text by their id."""

  batches: loader.Loader
  texts: Sequence[Example]


def evaluate_run(
  workdir: str,
  *,
  step: int | None = None,
  reference: str = "",
  pairs: str = "",
  scorer: str = "",
  num_prompts: int = 256,
  draw: Draw = Draw(),
  batch_size: int = 16,
  fsdp: int = 1,
  tensor: int = 1,
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
  devices = make_mesh(fsdp, tensor)
  policy = weights.load(workdir, step)
  if policy.settings is None:
    raise ConfigError(f"{workdir} is no run's workdir; sample from it with dpojax.sample instead")
  score = scorers.make_scorer(scorer, devices) if scorer else None
  held_out = load_held_out(policy.settings, pairs, devices)
  result = {"model": policy.name, "pairs": len(held_out.batches.subset)}
  if policy.config.reward_head:
    return result | {"reference": None, "held_out": _of_reward_model(policy, held_out, devices)}

  other = (
    None
    if reference == "none"
    else (weights.load(reference, dtype=policy.config.dtype) if reference else weights.load_reference(policy))
  )
  result |= {
    "reference": other and other.name,
    "held_out": measure_held_out(policy, other, held_out, devices),
  }
  if num_prompts:
    tokenizer = tokenization.load_tokenizer(policy.tokenizer)
    generator = Generator(
      policy, other, draw, eos=tokenizer.eos_token_id, batch_size=batch_size, devices=devices
    )
    room = prompt_room(policy, generator)
    prompts = _prompts(held_out, num_prompts)
    reading = reading_of(policy)
    measured = lambda generator: measure_samples(generator, tokenizer, prompts, room, score, reading)
    result |= {"draw": dataclasses.asdict(draw), "samples": {"policy": measured(generator)}}
    if other is not None:
      result["samples"]["reference"] = measured(generator.of_reference())
  return result


def load_held_out(settings: ml_collections.ConfigDict, pairs: str, devices: parallel.Mesh) -> HeldOut:
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
      "the run held nothing out (eval_every is 0); give --pairs=FILE, in the form of its data"
    )
  data = resolve.load_data(settings)
  subset = loader.without_mismatched(data.held_out)
  source = settings.data
  texts = builders.prepare(
    source.source,
    path=source.eval_path or source.path,
    config=source.config,
    data_dir=resolve.cache_dir(settings) / "prepared",
    on_error=source.on_error,
    split="test" if source.eval_path else "train",
    form=source.get("form", ""),
  )
  return HeldOut(
    loader.Loader(
      subset,
      seed=0,
      batch_size=settings.batch_size,
      row_length=settings.row_length,
      shards=devices.row_multiple,
    ),
    texts,
  )


def measure_held_out(
  policy: weights.Loaded, reference: weights.Loaded | None, held_out: HeldOut, devices: parallel.Mesh
) -> dict[str, Any]:
  """Returns accuracy, margin and perplexities on held-out comparisons.

  With a reference, margins are of implicit rewards at the run's beta (Rafailov et al. 2023, Sec. 4),
  before any beta_schedule; without one, of log-probs. A margin of 0 counts half in the accuracy.
  """
  batches = held_out.batches
  lengths = batches.lengths[:, 1:].astype(np.float64)
  scored = batches.subset.scored_lengths.astype(np.float64)
  log_probs = _log_probs(
    {"policy": policy} | ({"reference": reference} if reference else {}), batches, devices
  )
  result = {
    "perplexity": {
      name: {
        which: perplexity(values[:, k], scored[:, k])
        for k, which in enumerate(("chosen", "rejected"))
        if k < values.shape[1]
      }
      for name, values in log_probs.items()
    }
  }
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
  return confidence.bootstrap(
    lambda sums, counts: np.exp(-sums.sum(axis=-1) / counts.sum(axis=-1)), log_probs[there], tokens[there]
  )


def measure_samples(
  generator: Generator,
  tokenizer: Any,
  prompts: Sequence[str | list[dict] | Example],
  room: tuple[int, str],
  score: scorers.Scorer | None,
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
  ids, _ = encode(prompts, tokenizer, longest=longest, keep=keep, path="held-out", reading=reading)
  samples = [None] * len(ids)
  for batch in generator.batches([len(prompt) for prompt in ids]):
    for i, drawn in zip(batch, generator([ids[i] for i in batch], batch)):
      samples[i] = drawn
  of_prompts = lambda value: confidence.mean(
    np.array([[value(each) for each in of] for of in samples], np.float64).mean(axis=1)
  )
  result = {
    "samples": sum(map(len, samples)),
    "tokens": of_prompts(lambda each: len(each.ids)),
    "finished": of_prompts(lambda each: each.finished),
    "log_prob": of_prompts(lambda each: each.log_prob),
  }
  if samples[0][0].reference_log_prob is not None:
    result["kl"] = of_prompts(lambda each: each.log_prob - each.reference_log_prob)
    result["kl_error"] = confidence.standard_error(result["kl"])
  if score is not None:
    text = lambda i, each: tokenization.decode_response(
      tokenizer, ids[i], each.ids[:-1] if each.finished else each.ids
    )
    values = score(
      [prompts[i] for i, of in enumerate(samples) for _ in of],
      [text(i, each) for i, of in enumerate(samples) for each in of],
    )
    result["score"] = confidence.mean(np.reshape(values, (len(samples), -1)).mean(axis=1))
  return result


def _of_reward_model(policy, held_out, devices) -> dict[str, Any]:
  apply = transformer.make_apply(policy.config)
  score = lambda params, rows: (
    objectives.response_rewards(apply(params, rows), rows, num_responses=2),
    rows.example,
  )
  return _preferences(
    scorers.response_values(
      held_out.batches, devices.lift(score, donate_state=False), devices.place(policy.params), devices
    )
  )


def _preferences(rewards: np.ndarray) -> dict[str, Any]:
  margins = rewards[:, 0] - rewards[:, 1]
  right = np.sum(margins > 0) + np.sum(margins == 0) / 2
  return {
    "accuracy": confidence.share(float(right), len(margins)),
    "margin": confidence.mean(margins),
    "rewards": {"chosen": confidence.mean(rewards[:, 0]), "rejected": confidence.mean(rewards[:, 1])},
  }


def _log_probs(
  models: dict[str, weights.Loaded], batches: loader.Loader, devices: parallel.Mesh
) -> dict[str, np.ndarray]:
  """Returns the log-prob of every response under each model; models of one config compile once."""
  lifted, values = {}, {}
  for name, model in models.items():
    config = dataclasses.replace(model.config, published="", remat="none")
    if config not in lifted:
      lifted[config] = devices.lift(
        reference_lib.make_score_step(
          transformer.make_apply(config), num_responses=batches.lengths.shape[1] - 1, chunk_size=None
        ),
        donate_state=False,
      )
    values[name] = scorers.response_values(batches, lifted[config], devices.place(model.params), devices)
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
