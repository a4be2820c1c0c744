"""What a config stands for: its comparisons, its model and reference, and the objective over them."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from dpojax.data import loader, tokenization
from dpojax.data import report as data_report
from dpojax.data.examples import DataError, Example
from dpojax.data.truncation import end_kept
from dpojax.kernels import backends
from dpojax.kernels.platform import platform
from dpojax.models import config as model_config
from dpojax.models import hf, lora, transformer
from dpojax.models.config import ModelConfig
from dpojax.runtime import paths, xla
from dpojax.runtime.command import say
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import ConfigError
from dpojax.runtime.memory import compile_folder, keep_compiled
from dpojax.training import config as config_lib
from dpojax.training import objectives, preference, step, weights
from dpojax.training import reference as reference_lib
from dpojax.training.micro_batches import MicroBatches
from dpojax.training.parallel import Mesh, Replicas, make_parallel


class Data(NamedTuple):
  """Training and held-out comparisons, either tokenized.

  `fingerprint` is of the ids that they are taken from, `report` what was read, cut and left out, and why;
  `examples` are the training comparisons in text, by `Subset.example`, where they were read as such.
  """

  train: loader.Subset | loader.Mismatched
  held_out: loader.Subset | loader.Mismatched | None
  fingerprint: str
  report: dict | None = None
  examples: Sequence[Example] | None = None

  @property
  def stop_ids(self) -> list[int]:
    """The ids that end whole training responses, the most frequent first."""
    return loader.without_mismatched(self.train).data.report.get("stop_ids", [])

  def fingerprints(self) -> dict[str, str | None]:
    """Returns what tells the data of one process from those of another."""
    held_out = None if self.held_out is None else loader.without_mismatched(self.held_out).data.fingerprint
    return {"training data with digest": self.fingerprint, "held-out data with digest": held_out}


class Setup(NamedTuple):
  """What a run trains: the model, its first params, the objective, and the reference, or None.

  With an adapter `params` are its own, and `reference` is the base it is on.
  """

  model: ModelConfig
  params: Any
  reference: Any
  objective: objectives.Objective


def load_data(config: ml_collections.ConfigDict) -> Data:
  """Prepares, tokenizes and splits the comparisons; says what was used, cut and dropped."""
  from dpojax.data import builders  # TFDS: what trains nothing need not wait for it

  settings = config.data
  cache = cache_dir(config)
  tokenizer = tokenization.load_tokenizer(config.tokenizer)
  truncation = tokenization.Truncation(settings.max_length, settings.max_prompt_length, end_kept(settings))
  report: dict[str, Any] = {}

  def tokenized(path, name, split):
    comparisons = builders.prepare(
      settings.source,
      path=path,
      config=settings.config,
      data_dir=cache / "prepared",
      on_error=settings.on_error,
      split=split,
      form=settings.get("form", ""),
      columns=config_lib.columns_of(config),
    )
    result = tokenization.tokenize(
      comparisons,
      tokenizer,
      truncation=truncation,
      reading=tokenization.Reading.of(settings),
      cache_dir=cache / "tokenized",
      **_responses(config),
    )
    config_lib.check_brought(config, result.knobs, result.example)
    report[name] = {"records": comparisons.report, "problems": comparisons.problems, "tokens": result.report}
    if result.knobs:
      report[name]["columns"] = {
        f"{knob} of {column!r}": _spread(result.knobs[knob])
        for knob, column in config_lib.columns_of(config).items()
      }
    return result, comparisons

  if jax.process_count() > 1 and jax.process_index() > 0:
    # The others wait, and then find it in the cache: twice the same work would also be twice the same files.
    multihost_utils.sync_global_devices("process 0 has prepared the data")
  every, examples = tokenized(settings.path, "training", "train")
  held_out_data = tokenized(settings.eval_path, "held-out", "test")[0] if settings.eval_path else None
  if jax.process_count() > 1 and jax.process_index() == 0:
    multihost_utils.sync_global_devices("process 0 has prepared the data")

  train, held_out = loader.all_of(every), None
  if held_out_data is not None:
    held_out = loader.all_of(held_out_data)
  if settings.unique_prompts:
    train = loader.last_of_each_prompt(train)
    report["left out by data.unique_prompts"] = len(every) - len(train)
  if held_out is None and config.eval_every:
    train, held_out = _held_out(train, settings.eval_size)
    report["held out by data.eval_size"] = len(held_out)
  if settings.shuffle_labels:
    train = loader.shuffle_labels(train, config.seed)
  read, held_out_read = as_the_loss_reads(config, train), held_out and as_the_loss_reads(config, held_out)
  report |= {"training comparisons": len(read), "held-out comparisons": len(held_out_read or ())}
  say(data_report.table(report))
  return Data(read, held_out_read, every.fingerprint, report, examples)


def as_the_loss_reads(
  config: ml_collections.ConfigDict, subset: loader.Subset
) -> loader.Subset | loader.Mismatched:
  """Returns the comparisons with what the loss reads besides: for KTO a response to another prompt."""
  if config.objective == "dpo" and "kto" in config_lib.losses_of(config):
    return loader.mismatched(subset, config.seed, config.data.max_length)
  return subset


def _spread(values: np.ndarray) -> dict[str, float]:
  """Returns the least, the middle and the largest of values, as data_report.json has them."""
  points: dict[str, Callable[..., Any]] = {"least": np.min, "median": np.median, "largest": np.max}
  return {name: float(f"{float(of(values)):.6g}") for name, of in points.items()}


def _held_out(train: loader.Subset, count: int) -> tuple[loader.Subset, loader.Subset]:
  """Returns the rest and what is held out.

  Raises:
    DataError: nothing is left to train on.
  """
  rest, held_out = loader.hold_out(train, count)
  if not len(rest):
    raise DataError(
      f"config.data.eval_size is {count} and all of {len(train)} comparisons would be held out"
      + (", because a prompt is on one side only" if len(train) > count else "")
      + "; lower data.eval_size, name data.eval_path, or set eval_every=0"
    )
  return rest, held_out


def cache_dir(config: ml_collections.ConfigDict) -> paths.Path:
  """Returns the folder that prepared data and stored references are kept in."""
  return paths.of(config.data.cache_dir) if config.data.cache_dir else default_cache_dir()


def default_cache_dir() -> paths.Path:
  """Returns the folder of everything that is kept between runs, where a config names none."""
  return paths.of(os.environ.get("DPOJAX_CACHE", "~/.cache/dpojax"))


def use_compile_cache(config: ml_collections.ConfigDict | None = None) -> None:
  """Keeps compiled programs where the config says, or by default; before anything is compiled."""
  folder = "auto" if config is None else config.compile_cache
  if folder == "auto":
    folder = compile_folder(default_cache_dir() if config is None else cache_dir(config))
  if folder:
    with disk_errors(folder):
      keep_compiled(paths.absolute(folder))


def make_devices(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Replicas | Mesh:
  """Returns the lift over all devices that the config names.

  Args:
    config: all keys.
    devices: those it is over; by default all that jax sees.

  Raises:
    ConfigError: its axes do not fit the devices, or its form of attention does not run on them.
  """
  settings = config.parallel
  if devices is None and not xla.sums_are_right():
    say(f"warning: {xla.WRONG_SUMS}")
  try:
    backends.attention_backend(config.model.attention, platform=platform())
    return make_parallel(
      settings.strategy, data=settings.data, fsdp=settings.fsdp, tensor=settings.tensor, devices=devices
    )
  except ValueError as error:
    raise ConfigError(f"config.{error}") from error


def make_loader(
  config: ml_collections.ConfigDict,
  subset: loader.Subset | loader.Mismatched,
  devices: Replicas | Mesh,
  *,
  coarse: bool = False,
) -> loader.Loader:
  """Returns the loader of the rows that the devices are given; `coarse` as of `packing.plan`.

  Raises:
    PackingError: a comparison does not fit a row, or they are fewer than a step takes.
  """
  return loader.Loader(
    subset,
    seed=config.seed,
    batch_size=config.batch_size,
    row_length=config.row_length,
    shards=devices.row_multiple,
    rows_at_once=config.rows_at_once,
    span=devices.span,
    coarse=coarse,
  )


def micro_batches_of(config: ml_collections.ConfigDict, devices: Replicas | Mesh) -> MicroBatches:
  """Returns how many rows of a step are computed at once."""
  return MicroBatches(config.rows_at_once, devices.global_shards)


def make_optimizer(config: ml_collections.ConfigDict) -> tuple[Callable, Any]:
  """Returns the learning rate by step, and the optimizer."""
  settings = config.optimizer
  schedule = step.make_schedule(
    settings.schedule,
    learning_rate=settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    steps=config.steps,
  )
  return schedule, step.make_optimizer(
    settings.name,
    schedule,
    max_grad_norm=settings.max_grad_norm,
    weight_decay=settings.weight_decay,
    ema=settings.ema,
  )


def make_evaluated(
  config: ml_collections.ConfigDict, devices: Replicas | Mesh
) -> Callable[[step.TrainState], Any]:
  """Returns state -> the placed params that are to be evaluated."""
  if not config_lib.averages(config):
    return lambda state: state.params
  average = devices.lift(step.average_of, donate_state=False)
  return lambda state: average(state.params, state.opt_state)


def make_train_step(
  config: ml_collections.ConfigDict, objective: objectives.Objective, devices: Replicas | Mesh
) -> tuple[Any, Callable]:
  """Returns the optimizer, and the train step over the devices; it donates the state."""
  schedule, tx = make_optimizer(config)
  tx = step.with_memory(tx, objective)
  return tx, devices.lift(
    step.make_train_step(
      objective,
      tx,
      schedule=schedule,
      micro_batches=micro_batches_of(config, devices),
      axis_name=devices.axis_name,
      over_rows=devices.over_rows,
    ),
    donate_state=True,
  )


def use_stored_reference(
  config: ml_collections.ConfigDict,
  setup: "Setup",
  reference: Any,
  fingerprint: str,
  loaders: list[loader.Loader | None],
  devices: Replicas | Mesh,
) -> None:
  """Gives the loaders the reference's log-probs, from the store or computed into it.

  Args:
    config: all keys.
    setup: what the run trains.
    reference: the reference's params, placed.
    fingerprint: theirs.
    loaders: those whose rows are to carry the log-probs.
    devices: what everything is placed on.
  """
  score = reference_lib.make_score_step(
    transformer.make_apply(setup.model),
    num_responses=setup.objective.num_responses,
    chunk_size=config.chunk_size or None,
    micro_batches=micro_batches_of(config, devices),
  )
  score = devices.lift(devices.map_rows(score), donate_state=False)
  of_batch = lambda batch: devices.collect_rows(
    score(reference, devices.place_rows(batch.rows, batch.total_rows))
  )
  # What changes no log-prob must not part two stores.
  without = ("remat", "scan_layers", "published", "reward_head")
  model = {key: value for key, value in setup.model.as_dict().items() if key not in without}
  tables = {}
  for each in filter(None, loaders):
    subset = loader.without_mismatched(each.subset)  # KTO, which adds to it, is refused with a store
    data = subset.data
    if data.fingerprint not in tables:
      tables[data.fingerprint] = reference_lib.stored_log_probs(
        subset,
        {"weights": fingerprint, "model": model},
        cache_dir(config) / "reference",
        of_batch,
        lambda subset: make_loader(config, subset, devices),
      )
    each.reference = subset.in_order(tables[data.fingerprint])


def make_setup(
  config: ml_collections.ConfigDict, *, axis_name: str | None = None, place: hf.Place | None = None
) -> Setup:
  """Makes or loads the model and its reference, and the objective over them.

  Args:
    config: all keys.
    axis_name: the mapped axis that rows are spread over, under `pmap`.
    place: where the parameters of a Hugging Face folder are kept as they are read.
  """
  if config.model.checkpoint:
    policy = weights.read(config, "model.checkpoint", place=place)
    model = dataclasses.replace(policy.config, **_left_open(config))
    params = policy.params
    if model.reward_head and "reward_head" not in params:
      # At 0 all rewards are equal and the first loss is log 2.
      params = params | {"reward_head": np.zeros(model.width, np.float32)}
  else:
    model = _model_of(config)
    params = transformer.init_params(model, jax.random.key(config.seed))
  _check_model(model, config)
  setup = setup_of(model, params, config, axis_name=axis_name)
  if setup.reference is not None and config.reference.checkpoint:
    reference = weights.read(config, "reference.checkpoint", place=place, like=model).params
    _check_same_shapes(params, reference, config)
    setup = setup._replace(reference=reference)
  return setup


def make_setup_of_shapes(config: ml_collections.ConfigDict, *, axis_name: str | None = None) -> Setup:
  """Returns `make_setup` with shapes in the place of arrays: no weights are read.

  Of a Hugging Face model only the config.json has to be there.

  Raises:
    ConfigError, CheckpointError: there is no such model, or its family is not supported.
  """
  if not config.model.checkpoint:
    model = _model_of(config)
  else:
    model = dataclasses.replace(weights.read_model_config(config, "model.checkpoint"), **_left_open(config))
  whole = jax.eval_shape(lambda: transformer.init_params(model, jax.random.key(0)))
  # eval_shape returns arrays' shapes only: what else a setup holds is taken out by the side.
  setups = []

  def trained_and_frozen(params):
    setups.append(setup_of(model, params, config, axis_name=axis_name))
    return setups[0].params, setups[0].reference

  params, reference = jax.eval_shape(trained_and_frozen, whole)
  reference = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.model.param_dtype), reference)
  return setups[0]._replace(params=params, reference=reference)


def setup_of(
  model: ModelConfig, params: Any, config: ml_collections.ConfigDict, *, axis_name: str | None = None
) -> Setup:
  """Returns what a run of the config trains of a model that starts from these params.

  Raises:
    ConfigError: the adapter is on a projection that the model has not.
  """
  adapter = config_lib.lora_of(config)
  if adapter is None:
    objective = _objective_of(transformer.make_apply(model), config, axis_name)
    # The same arrays: placed as the reference they are a copy of their own, before the first step donates
    # them.
    return Setup(model, params, params if objective.needs_reference else None, objective)
  objective = objectives.of_adapter(_objective_of(lora.make_apply(model, adapter), config, axis_name))
  try:
    trained = lora.init_adapter(model, adapter, jax.random.key(config.seed))
  except ValueError as error:
    raise ConfigError(f"config.lora.targets is {config.lora.targets!r}: {error}") from error
  # A reward head is new and small: it is trained whole, beside the adapter.
  trained |= {name: part for name, part in params.items() if name == lora.WHOLE}
  base = {name: part for name, part in params.items() if name != lora.WHOLE}
  return Setup(model, trained, base, objective)


def _objective_of(apply: objectives.Apply, config, axis_name: str | None) -> objectives.Objective:
  chunk_size = config.chunk_size or None
  if config.objective == "sft":
    make = {"sequence_sum": objectives.sft_objective, "token_mean": objectives.token_mean_sft_objective}[
      config.loss
    ]
    return make(apply, chunk_size=chunk_size)
  if config.objective == "reward":
    return objectives.reward_objective(apply)
  return preference.preference_objective(
    apply,
    preference.make_terms(config_lib.losses_of(config), config.loss_weights, config_lib.knobs_of(config)),
    beta=config.beta,
    beta_factor=config_lib.beta_factor_of(config),
    num_responses=config.data.num_responses,
    seed=config.seed,
    with_reference=config.reference.mode != "none",
    chunk_size=chunk_size,
    axis_name=axis_name,
    **config_lib.combined_with(config),
  )


def _responses(config: ml_collections.ConfigDict) -> dict[str, int]:
  """How many responses of a comparison are kept, and how many it must have."""
  if config.objective == "sft":
    return dict(num_responses=1, fewest=1)
  if config.objective == "dpo":
    names = config_lib.losses_of(config)
    if all(preference.LOSSES[name].single for name in names):
      return dict(num_responses=2, fewest=1)
    if names == ["dpo_plackett_luce"]:
      return dict(num_responses=config.data.num_responses, fewest=2)
  return dict(num_responses=2, fewest=2)


def _left_open(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What weights leave open in a model's config."""
  settings = config.model
  return dict(
    dtype=settings.dtype,
    remat=settings.remat,
    attention=settings.attention,
    reward_head=config.objective == "reward",
  )


def _model_of(config: ml_collections.ConfigDict) -> ModelConfig:
  settings = config.model
  make = {"llama": model_config.llama_style, "gpt2": model_config.gpt2_style}[settings.family]
  return make(
    vocab_size=settings.vocab_size or len(tokenization.load_tokenizer(config.tokenizer)),
    width=settings.width,
    layers=settings.layers,
    heads=settings.heads,
    kv_heads=settings.kv_heads or None,
    **_left_open(config),
    max_positions=settings.max_positions or config.data.max_length,
    tie_embeddings=settings.tie_embeddings,
    scan_layers=settings.scan_layers,
  )


def check_ids(model: ModelConfig, config: ml_collections.ConfigDict, data: Data) -> None:
  """Refuses ids that the model has no embedding of; a tokenizer may have more that do not occur.

  Raises:
    ConfigError: naming the id, its token and the first comparison that has it.
  """
  subsets = [loader.without_mismatched(each) for each in (data.train, data.held_out) if each is not None]
  for tokenized in {id(each.data): each.data for each in subsets}.values():
    beyond = np.flatnonzero(tokenized.ids >= model.vocab_size)
    if not len(beyond):
      continue
    found = int(tokenized.ids[beyond[0]])
    record = int(tokenized.example[np.searchsorted(tokenized.offsets, beyond[0], side="right") - 1])
    token = tokenization.load_tokenizer(config.tokenizer).convert_ids_to_tokens(found)
    raise ConfigError(
      f"comparison {record} has id {found} ({token!r}) of the tokenizer {config.tokenizer}, but the model "
      f"has embeddings of {model.vocab_size} ids; "
      + (
        "take the model's own tokenizer, or leave out what writes that token"
        if config.model.checkpoint
        else "set model.vocab_size=0, which is the tokenizer's"
      )
    )


def _check_model(model: ModelConfig, config: ml_collections.ConfigDict) -> None:
  if model.longest is not None and config.data.max_length > model.longest:
    kind = "learned positions" if model.positions == "learned" else "dynamic rotary positions"
    raise ConfigError(
      f"config.data.max_length is {config.data.max_length} but the model has {kind} "
      f"for {model.longest} tokens; lower data.max_length"
    )


def _check_same_shapes(params, reference, config) -> None:
  shapes = lambda tree: {
    jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  ours, theirs = shapes(params), shapes(reference)
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise ConfigError(
        f"config.reference.checkpoint {config.reference.checkpoint} does not fit the policy: "
        f"{name} is {theirs.get(name)} there and {ours.get(name)} in the policy"
      )
