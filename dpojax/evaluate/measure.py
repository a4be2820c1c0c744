"""What a run is, beside its reference: on held-out pairs, and on samples to their prompts."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np

from dpojax.data import builders, loader, records, tokenization
from dpojax.data.examples import Example
from dpojax.evaluate import confidence, report, scorers, similarity
from dpojax.evaluate.confidence import Estimate
from dpojax.models import transformer
from dpojax.runtime.errors import ConfigError
from dpojax.sample.draws import Draw
from dpojax.sample.generator import Generator, make_mesh
from dpojax.sample.prompts import encode, prompt_room, reading_of
from dpojax.training import config as config_lib
from dpojax.training import objectives, parallel, resolve, weights
from dpojax.training import reference as reference_lib

SIDES = ("chosen", "rejected")


class HeldOut(NamedTuple):
  """Held-out comparisons: packed, and in text by their id."""

  batches: loader.Loader
  texts: Sequence[Example]


class Scores(NamedTuple):
  """What models say of held-out comparisons, float64.

  Attributes:
    log_probs: of every response [N, K], by model: "policy", and "reference" where there is one.
    similarity: [N, 2] CHES scores of pairs under the policy, as they are and length-normalised; None where
      a comparison has fewer than two responses.
  """

  log_probs: dict[str, np.ndarray]
  similarity: np.ndarray | None


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
  pair_scores: str = "",
) -> dict[str, Any]:
  """Returns what is measured of a run; see the module's text.

  Args:
    workdir: the run's folder; with `pairs` also a Hugging Face folder or a hub name.
    step: of its checkpoint; None is the last.
    reference: a model; '' is the run's own, 'none' none.
    pairs: held-out pairs in the form of the run's data; '' those the run held out.
    scorer: see `scorers.make_scorer`; '' is none.
    num_prompts: how many held-out prompts are sampled to; 0 is none.
    draw: how samples are drawn.
    batch_size: prompts of a batch.
    fsdp, tensor: how the params are cut over devices.
    pair_scores: a file to write the held-out pairs into, each with its scores, see `scored_records`; '' is
      none.

  Raises:
    ConfigError, DataError, CheckpointError, PackingError: something given cannot be used.
    DiskError: the disk is full or cannot be written.
  """
  devices = make_mesh(fsdp, tensor)
  policy = weights.load(workdir, step)
  if policy.settings is None:
    if not pairs:
      raise ConfigError(f"{workdir} is no run's workdir and has held nothing out; give --pairs=FILE")
    reference = reference or "none"
    # What follows asks the run's settings: of a plain model they are the defaults.
    policy = policy._replace(settings=_settings_of(workdir, pairs))
  score = scorers.make_scorer(scorer, devices) if scorer else None
  held_out = load_held_out(policy.settings, pairs, devices)
  result = {"model": policy.name, "pairs": len(held_out.batches.subset)}
  if policy.config.reward_head:
    if pair_scores:
      raise ConfigError(f"--pair_scores is of policies and {workdir} is a reward model; leave it out")
    return result | {"reference": None, "held_out": _of_reward_model(policy, held_out, devices)}

  other = (
    None
    if reference == "none"
    else (weights.load(reference, dtype=policy.config.dtype) if reference else weights.load_reference(policy))
  )
  scores = score_held_out(policy, other, held_out, devices)
  if pair_scores:
    report.write_lines(scored_records(scores, held_out, policy.settings.beta), pair_scores)
  result |= {
    "reference": other and other.name,
    "held_out": measure_held_out(scores, held_out, policy.settings.beta),
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
    columns=config_lib.columns_of(settings),
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


def score_held_out(
  policy: weights.Loaded, reference: weights.Loaded | None, held_out: HeldOut, devices: parallel.Mesh
) -> Scores:
  """Returns log-probs under both models, and the similarity of pairs under the policy."""
  batches, values, lifted = held_out.batches, {}, {}
  several = batches.lengths.shape[1] > 2
  for name, model in {"policy": policy, "reference": reference}.items():
    if model is None:
      continue
    # What changes no number must not make two programs of two models.
    config = dataclasses.replace(model.config, published="", remat="none")
    alike = several and name == "policy"
    if (config, alike) not in lifted:  # models of one config compile once
      score = _with_similarity if alike else reference_lib.make_score_step
      of_rows = score(
        transformer.make_apply(config), num_responses=batches.lengths.shape[1] - 1, chunk_size=None
      )
      lifted[config, alike] = devices.lift(devices.map_rows(of_rows), donate_state=False)
    columns = batches.lengths.shape[1] - 1 + 2 * alike
    values[name] = scorers.response_values(
      batches, lifted[config, alike], devices.place(model.params), devices, columns=columns
    )
  found = values["policy"][:, -2:] if several else None
  return Scores({name: each[:, : batches.lengths.shape[1] - 1] for name, each in values.items()}, found)


def _with_similarity(apply: objectives.Apply, *, num_responses: int, chunk_size: int | None):
  """Returns `score(params, rows)` with two more columns: the similarity of a comparison's first two."""

  def score(params, rows):
    outputs, knobs = apply(params, rows), dict(num_responses=num_responses)
    sums = objectives.response_log_probs(outputs, rows, chunk_size=chunk_size, **knobs).sums
    alike = jnp.stack(similarity.of_rows(outputs, rows, **knobs), axis=-1)
    return jnp.concatenate([sums, alike.astype(sums.dtype)], axis=-1), rows.example

  return score


def measure_held_out(scores: Scores, held_out: HeldOut, beta: float) -> dict[str, Any]:
  """Returns accuracy, margin, perplexities and similarity on held-out comparisons.

  With a reference, margins are of implicit rewards at the run's beta (Rafailov et al. 2023, Sec. 4),
  before any beta_schedule and whatever betas the data bring; without one, of log-probs. A margin of 0
  counts half in the accuracy.
  """
  batches = held_out.batches
  scored = batches.subset.scored_lengths.astype(np.float64)
  result = {
    "perplexity": {
      name: {
        which: perplexity(values[:, k], scored[:, k]) for k, which in enumerate(SIDES) if k < values.shape[1]
      }
      for name, values in scores.log_probs.items()
    }
  }
  both = _pairs_there(held_out)
  if both.any():
    result |= _preferences(_rewards(scores, beta)[both])
    plain, normalized = scores.similarity[both].T
    result["ches"] = confidence.mean(plain)
    result["ches_length_normalized"] = confidence.mean(normalized)
  return result


def scored_records(scores: Scores, held_out: HeldOut, beta: float) -> list[dict[str, Any]]:
  """Returns the held-out pairs as records that can be trained on, each with what was found of it.

  "margin" is of implicit rewards where there is a reference, else of log-probs; "ches" and
  "ches_length_normalized" are those of `evaluate.similarity`. To leave out the pairs that a score is
  highest of is to leave out their lines.
  """
  subset, rewards = held_out.batches.subset, _rewards(scores, beta)
  lines = []
  for i in np.flatnonzero(_pairs_there(held_out)):
    example = held_out.texts[subset.example(int(i))]
    lines.append(
      records.prompt_record(example)
      | dict(zip(SIDES, example.responses))
      | {f"log_prob_{side}": float(scores.log_probs["policy"][i, k]) for k, side in enumerate(SIDES)}
      | {
        "margin": float(rewards[i, 0] - rewards[i, 1]),
        "ches": float(scores.similarity[i, 0]),
        "ches_length_normalized": float(scores.similarity[i, 1]),
      }
    )
  return lines


def _pairs_there(held_out: HeldOut) -> np.ndarray:
  """Returns [N] bool: which comparisons have two responses."""
  lengths = held_out.batches.lengths[:, 1:]
  return np.all(lengths[:, :2] > 0, axis=1) & (lengths.shape[1] > 1)


def _rewards(scores: Scores, beta: float) -> np.ndarray:
  """Returns implicit rewards [N, K], or log-probs where there is no reference."""
  values = scores.log_probs["policy"]
  return beta * (values - scores.log_probs["reference"]) if "reference" in scores.log_probs else values


def _settings_of(folder: str, pairs: str) -> ml_collections.ConfigDict:
  """Returns the settings that a model which no run has made is measured with."""
  settings = config_lib.defaults()
  settings.model.checkpoint = settings.tokenizer = folder
  settings.data.path = pairs
  return settings


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
  # Batches go by width: answers are put back where their prompts stand.
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
  lifted = devices.lift(devices.map_rows(score), donate_state=False)
  return _preferences(
    scorers.response_values(held_out.batches, lifted, devices.place(policy.params), devices)
  )


def _preferences(rewards: np.ndarray) -> dict[str, Any]:
  margins = rewards[:, 0] - rewards[:, 1]
  # Or a reference that is the policy itself, all of whose margins are 0, would be wrong everywhere.
  right = np.sum(margins > 0) + np.sum(margins == 0) / 2
  return {
    "accuracy": confidence.share(float(right), len(margins)),
    "margin": confidence.mean(margins),
    "rewards": {"chosen": confidence.mean(rewards[:, 0]), "rejected": confidence.mean(rewards[:, 1])},
  }


def _prompts(held_out: HeldOut, count: int) -> list[Example]:
  """Returns the first different prompts of held-out comparisons."""
  subset, prompts = held_out.batches.subset, {}
  for i in range(len(subset)):
    # Without responses: prompts are the same where only the answers differ.
    prompt = held_out.texts[subset.example(i)]._replace(responses=())
    prompts.setdefault(json.dumps(prompt), prompt)
    if len(prompts) == count:
      break
  return list(prompts.values())
