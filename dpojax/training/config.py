"""What a run can be told: every key with its default, and the checks made before any work.

Importing it, and `check_values`, need no jax: a command line refuses what it can before the seconds that jax
takes. What asks tables of functions, such as the losses', imports them where it does.
"""

import difflib
import importlib.util
import json
import math
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from dpojax.data import knobs, records, templates
from dpojax.data.examples import DataError
from dpojax.models import config as model_config
from dpojax.runtime.errors import ConfigError

if TYPE_CHECKING:
  from dpojax.models import lora
  from dpojax.training import preference, step

OBJECTIVES = ("sft", "dpo", "reward")

COMBINED = ("length_normalize", "ld_alpha", "sampo", "wpo", "dr_dpo")
"""Keys of `loss_options` that change what a loss is given. The others are keywords of losses."""

_KNOBS = {name: knob for name, knob in knobs.KNOBS.items() if name not in ("beta", *knobs.OF_DATA)}
"""Keywords of losses that `config.loss_options` takes, and the values that make sense."""

_NARROWER = {
  "exo_pair": ("label_smoothing", 1.0, "between 0 and 1"),
  "f_dpo_alpha_divergence": ("alpha", 1.0, "between 0 and 1"),
  "alphapo": ("alpha", 100.0, "above 0"),
  "h_dpo": ("alpha", 100.0, "above 0"),
}
"""Losses that take less of a knob than others: its name, its bound above (0 is below), in words."""

MAY_CHANGE = (
  "steps",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "checkpoint_keep",
  "checkpoint_best",
  "profile_steps",
  "parallel",
  "model.attention",
  "wandb_project",
  "sample_",
  "data.cache_dir",
  "check_memory",
  "compile_cache",
  "online.max_labels",
  "online.judge_workers",
)
"""Keys, or their beginnings, that may differ when a run is continued: they leave every number as it is, to
rounding."""


def defaults() -> ml_collections.ConfigDict:
  """Returns every key there is. Config files change what they need; no other key is taken."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.objective = "dpo"  # sft, dpo, reward
  config.loss = "dpo"  # a name that the objective has; several, such as dpo,nll_mean, add
  config.loss_weights = ()  # of each of several losses; empty: 1
  config.loss_options = ml_collections.ConfigDict()  # keywords of losses; unset: the loss's default
  for name in _KNOBS:
    config.loss_options[name] = config_dict.placeholder(float)
  config.loss_options.length_normalize = False  # mean log-probs over tokens where sums are read
  config.loss_options.ld_alpha = config_dict.placeholder(float)  # LD-DPO; 1 is plain sums
  config.loss_options.sampo = False  # SamPO: as many tokens, drawn each step, as the shorter response has
  config.loss_options.wpo = False  # weigh pairs by how likely the policy is to sample them
  config.loss_options.dr_dpo = config_dict.placeholder(float)  # Dr. DPO's tau: less weight for large losses
  config.beta = 0.1
  config.beta_schedule = ml_collections.ConfigDict()
  config.beta_schedule.steps = ()  # where the factors stand, ascending, such as (0, 500); empty: beta stays
  config.beta_schedule.factors = ()  # what beta is multiplied by there; outside of them, as at the nearest
  config.beta_schedule.between = "linear"  # linear, geometric; hold: as at the step before
  config.steps = 1000
  config.batch_size = 64  # comparisons a step, over all devices
  config.rows_at_once = 0  # rows a device computes at once; 0: all of a step
  config.row_length = 1024  # tokens of a packed row
  config.chunk_size = 0  # scored tokens a row, in one chunk of the output head; 0: by memory

  config.model = ml_collections.ConfigDict()
  config.model.checkpoint = ""  # a run's workdir, a Hugging Face folder or hub name; empty: random
  config.model.family = "llama"  # llama, gpt2
  config.model.vocab_size = 0  # 0: the tokenizer's
  config.model.width = 256
  config.model.layers = 4
  config.model.heads = 4
  config.model.kv_heads = 0  # 0: as many as heads
  config.model.max_positions = 0  # 0: data.max_length
  config.model.tie_embeddings = True
  config.model.dtype = "float32"  # of what is computed: float32, bfloat16
  config.model.param_dtype = "float32"  # of params; bfloat16 under an adapter only
  config.model.remat = "none"  # what the backward pass recomputes: none, full, attention, dots
  config.model.attention = "auto"  # blockwise; fused, on GPUs and TPUs; auto: by the machine
  config.model.scan_layers = (
    True  # one compiled block for all layers; False: slower to compile, faster on CPUs
  )

  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 0  # of a low-rank adapter on model.checkpoint, alone trained; 0: no adapter
  config.lora.alpha = 16.0  # the adapter counts alpha / rank times
  config.lora.targets = ""  # of query,key,value,attention_out,gate,up,down; empty: all

  config.reference = ml_collections.ConfigDict()
  config.reference.mode = "inline"  # inline; stored: computed once; none: log-probs of 0
  config.reference.checkpoint = ""  # empty: the weights the policy starts from
  config.reference.may_differ = False  # true: start although policy and reference disagree
  config.reference.sync_every = 0  # TR-DPO: steps between updates of the reference; 0: frozen
  config.reference.sync_alpha = 0.6  # share of the policy in an update; 1: a copy of it

  config.tokenizer = ""  # folder or hub name; empty: that of model.checkpoint
  config.data = ml_collections.ConfigDict()
  config.data.source = "jsonl"
  config.data.path = ""  # local files, comma-separated, or hub:ORG/NAME[:SPLIT]; empty: the builder downloads
  config.data.form = ""  # of local records, a name of docs/data.md; empty: recognised by their keys
  config.data.columns = ml_collections.ConfigDict()  # keys of local records with a knob of their pair's own
  for name in knobs.KNOBS:
    config.data.columns[name] = ""  # empty: the config's, for all pairs
  config.data.config = ""  # the builder's config, such as hh's harmless-base
  config.data.eval_path = ""  # held-out local files; empty: eval_size are held out of the data
  config.data.eval_size = 256
  config.data.num_responses = 2  # of a ranking that are kept, the best; for dpo_plackett_luce
  config.data.max_length = 512
  config.data.max_prompt_length = 256
  config.data.keep = ""  # end or start of an over-long prompt; empty: the data set's policy
  config.data.on_error = "skip"  # skip, raise
  config.data.score = "all"  # which of the assistant's messages in a response are scored: all, last
  config.data.special_tokens = "text"  # what the name of one in a text is: text; parse: that token; raise
  config.data.template_arguments = ml_collections.ConfigDict()  # such as {'enable_thinking': False}
  config.data.template_date = ""  # the day a chat template's clock says, YYYY-MM-DD; empty: the run's first
  config.data.unique_prompts = False  # only the last comparison of each prompt, as the paper's SFT
  config.data.shuffle_labels = False  # control: swap chosen and rejected at random in training
  config.data.cache_dir = ""  # prepared data; empty: ~/.cache/dpojax

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "rmsprop"  # one of step.OPTIMIZERS
  config.optimizer.learning_rate = 1e-6
  config.optimizer.warmup_steps = 150
  config.optimizer.schedule = "constant"
  config.optimizer.max_grad_norm = 10.0  # 0: no clipping
  config.optimizer.weight_decay = 0.0
  config.optimizer.ema = 0.0  # decay of a running mean of params, which is then evaluated and loaded; 0: none

  config.log_every = 10
  config.eval_every = 100  # 0: never
  config.checkpoint_every = 500  # 0: never; else also at the end
  config.checkpoint_keep = 2  # last n kept; 0: all. With 1, none stands in for a damaged one
  config.checkpoint_best = ""  # also keep the best by this evaluation metric, such as loss
  config.profile_steps = ""  # such as 10:15: an xprof trace of steps 10 to 15, beside TensorBoard's files
  config.sample_every = 0  # steps between samples of the policy, also at the start and the end; 0: never
  config.sample_prompts = ""  # .jsonl of prompts, as of dpojax.sample; empty: of the held-out data
  config.sample_limit = 16  # prompts that are answered
  config.sample_count = 1  # samples of each
  config.sample_max_new_tokens = 128
  config.sample_scorer = ""  # workdir of a reward model, or module:function(prompt, response)
  config.wandb_project = ""
  config.check_memory = True  # compile before the first step and refuse what does not fit a device
  config.compile_cache = "auto"  # folder of compiled programs, found by later runs; empty: none; auto: in
  # data.cache_dir, for each kind of CPU by itself, unless JAX_COMPILATION_CACHE_DIR names one

  config.parallel = ml_collections.ConfigDict()
  config.parallel.strategy = "pmap"
  config.parallel.data = 0  # 0: the devices fsdp and tensor leave
  config.parallel.fsdp = 1
  config.parallel.tensor = 1
  config.parallel.coordinator = ""  # host:port of process 0, or auto on a cluster; empty: one process
  config.parallel.num_processes = 1
  config.parallel.process_id = 0
  config.parallel.lost_after = 20.0  # s without a sign of a process, after which the others end; 0: jax's 100
  return config


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuses what cannot run: unknown keys, wrong types, impossible values and combinations.

  Raises:
    ConfigError: naming the key, the value and the fix.
  """
  check_values(config)
  from dpojax.training import parallel, step

  _one_of(config, "optimizer.name", step.OPTIMIZERS)
  _check_optimizer(config)
  _one_of(config, "optimizer.schedule", step.SCHEDULES)
  _one_of(config, "beta_schedule.between", step.BETWEEN)
  _one_of(config, "parallel.strategy", parallel.STRATEGIES)
  _check_losses(config)
  _check_lora(config)


def check_values(config: ml_collections.ConfigDict) -> None:
  """Refuses what needs no jax to be refused: the part of `validate` that a command line does first.

  Raises:
    ConfigError: naming the key, the value and the fix.
  """
  known = flatten(defaults())
  given = flatten(config)
  for key, value in given.items():
    if key.startswith("data.template_arguments."):  # the template's to read
      continue
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1)
      raise ConfigError(f"config.{key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
    default = known[key]
    if default is None:  # unset, else a number
      if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"config.{key} is {value!r}; it must be a number")
      continue
    if isinstance(default, tuple):
      value, default = list(value) if isinstance(value, (list, tuple)) else value, []
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
      raise ConfigError(f"config.{key} is {value!r}; it must be of type {type(default).__name__}")
  missing = [key for key in known if key not in given]
  if missing:
    raise ConfigError(
      f"config.{missing[0]} is missing; start a config from dpojax.training.config.defaults()"
    )

  _one_of(config, "objective", OBJECTIVES)
  _one_of(config, "model.family", ("llama", "gpt2"))
  _one_of(config, "model.dtype", model_config.DTYPES)
  _one_of(config, "model.param_dtype", model_config.DTYPES)
  _one_of(config, "model.remat", model_config.REMATS)
  _one_of(config, "model.attention", model_config.ATTENTIONS)
  _one_of(config, "reference.mode", ("inline", "stored", "none"))
  _one_of(config, "data.keep", ("", "end", "start"))
  _one_of(config, "data.on_error", ("skip", "raise"))
  _one_of(config, "data.form", ("", *records.FORMS))
  _check_reading(config)
  for key in (
    "steps",
    "batch_size",
    "row_length",
    "data.max_length",
    "data.max_prompt_length",
    "log_every",
    "sample_limit",
    "sample_count",
    "sample_max_new_tokens",
    "model.width",
    "model.layers",
    "model.heads",
    "parallel.fsdp",
    "parallel.tensor",
    "parallel.num_processes",
  ):
    _at_least(config, key, 1)
  for key in (
    "seed",
    "chunk_size",
    "rows_at_once",
    "sample_every",
    "eval_every",
    "checkpoint_every",
    "checkpoint_keep",
    "data.eval_size",
    "model.vocab_size",
    "model.kv_heads",
    "model.max_positions",
    "reference.sync_every",
    "optimizer.warmup_steps",
    "optimizer.max_grad_norm",
    "optimizer.weight_decay",
    "lora.rank",
    "parallel.data",
    "parallel.process_id",
    "parallel.lost_after",
  ):
    _at_least(config, key, 0)
  for key in ("beta", "optimizer.learning_rate", "lora.alpha"):
    if not (math.isfinite(given[key]) and given[key] > 0):
      raise ConfigError(f"config.{key} is {given[key]}; it must be positive")
  profiled_steps(config)
  _check_combinations(config)


def _check_reading(config) -> None:
  if not isinstance(config.data.template_arguments, (ml_collections.ConfigDict, dict)):
    raise ConfigError(
      f"config.data.template_arguments is {config.data.template_arguments!r}; give a mapping, such as "
      "{'enable_thinking': False}"
    )
  try:
    templates.Reading.of(config.data)
  except DataError as error:
    raise ConfigError(f"config.{error}") from error


def _check_combinations(config) -> None:
  data = config.data
  if 0 < config.parallel.lost_after < 5:
    raise ConfigError(
      f"config.parallel.lost_after is {config.parallel.lost_after}; processes show every second that "
      "they live, and a second may be late: give at least 5, or 0"
    )
  if not (config.tokenizer or config.model.checkpoint):  # else that of the checkpoint
    raise ConfigError("config.tokenizer is empty; set it to a tokenizer folder or hub name")
  if data.source == "jsonl" and not data.path:
    raise ConfigError("config.data.path is empty; data.source='jsonl' needs local .jsonl files")
  if data.form and data.source != "jsonl":
    raise ConfigError(
      f"config.data.form is {data.form!r}, but data.source={data.source!r} has a form of "
      "its own; leave it empty"
    )
  if data.max_prompt_length >= data.max_length:
    raise ConfigError(
      f"config.data.max_prompt_length is {data.max_prompt_length} and data.max_length "
      f"{data.max_length}; leave room for responses: lower max_prompt_length"
    )
  if config.row_length < data.max_length:
    raise ConfigError(
      f"config.row_length is {config.row_length}, shorter than data.max_length "
      f"{data.max_length}; raise row_length"
    )
  if not config.model.checkpoint and config.model.width % config.model.heads:
    raise ConfigError(
      f"config.model.width is {config.model.width} and model.heads {config.model.heads}; "
      "heads must divide width"
    )
  if config.eval_every and not data.eval_path and not data.eval_size:
    raise ConfigError(
      f"config.eval_every is {config.eval_every} but there is nothing to evaluate on; set "
      "data.eval_path or data.eval_size, or eval_every=0"
    )
  if config.sample_every and config.objective == "reward":
    raise ConfigError(
      f"config.sample_every is {config.sample_every} but a reward model writes nothing; set it to 0"
    )
  if config.checkpoint_best and not (
    config.eval_every and config.checkpoint_every and config.checkpoint_every % config.eval_every == 0
  ):
    raise ConfigError(
      f"config.checkpoint_best is {config.checkpoint_best!r} but checkpoint_every="
      f"{config.checkpoint_every} is not a multiple of eval_every={config.eval_every}; "
      "a checkpoint is ranked by the evaluation made at its step"
    )
  if config.wandb_project and importlib.util.find_spec("wandb") is None:
    raise ConfigError(
      f"config.wandb_project is {config.wandb_project!r} but wandb is not installed; "
      "pip install 'dpojax[wandb]', or leave it empty"
    )


def _check_optimizer(config) -> None:
  """Refuses what an optimizer has not, or would do twice."""
  from dpojax.training import step

  settings = config.optimizer
  if settings.weight_decay and settings.name not in step.DECAYS:
    raise ConfigError(
      f"config.optimizer.weight_decay is {settings.weight_decay} but {settings.name} has none; set it "
      f"to 0, or name one of {', '.join(step.DECAYS)}"
    )
  if not 0 <= settings.ema < 1:
    raise ConfigError(f"config.optimizer.ema is {settings.ema}; it must be in [0, 1)")
  if settings.name in step.AVERAGES:
    for key, none in (("ema", 0.0), ("schedule", "constant")):
      if settings[key] != none:
        raise ConfigError(
          f"config.optimizer.{key} is {settings[key]!r} but {settings.name} averages params in its "
          f"place; set optimizer.{key}={none!r}"
        )


def averages(config: ml_collections.ConfigDict) -> bool:
  """Returns whether the params to evaluate are a mean that the optimizer keeps."""
  from dpojax.training import step

  settings = config.optimizer
  return settings.name in step.AVERAGES or bool(settings.get("ema"))  # older runs have no such key


def _check_lora(config) -> None:
  from dpojax.models import lora

  settings, reference = config.lora, config.reference
  for name in _lora_targets(config):
    if name not in lora.TARGETS:
      near = difflib.get_close_matches(name, lora.TARGETS, n=1)
      raise ConfigError(
        f"config.lora.targets is {settings.targets!r}; it must hold names of "
        f"{', '.join(lora.TARGETS)}" + (f"; did you mean {near[0]}?" if near else "")
      )
  if not settings.rank:
    if settings.targets:
      raise ConfigError(
        f"config.lora.targets is {settings.targets!r} but lora.rank is 0; set lora.rank, such as 16"
      )
    if config.model.param_dtype != "float32":
      raise ConfigError(
        f"config.model.param_dtype is {config.model.param_dtype!r} but all params are trained, and "
        "most updates would be rounded away; set lora.rank, or param_dtype='float32'"
      )
    return
  if not config.model.checkpoint:
    raise ConfigError(
      f"config.lora.rank is {settings.rank} but model.checkpoint is empty; an adapter needs "
      "trained weights below it: name a run's workdir or a Hugging Face folder"
    )
  if reference.checkpoint:
    raise ConfigError(
      f"config.lora.rank is {settings.rank} and reference.checkpoint {reference.checkpoint!r}; the "
      "reference of an adapter is the base it is on: leave reference.checkpoint unset"
    )
  if reference.sync_every:
    raise ConfigError(
      f"config.lora.rank is {settings.rank} and reference.sync_every {reference.sync_every}; the "
      "reference is the base below the adapter, which never moves: set sync_every=0 or rank=0"
    )


def profiled_steps(config: ml_collections.ConfigDict) -> range:
  """Returns the steps, from 1, that `config.profile_steps` asks a trace of.

  Raises:
    ConfigError: it is not FIRST:LAST.
  """
  text = config.profile_steps
  if not text:
    return range(0)
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise ConfigError(
      f"config.profile_steps is {text!r}; give the first and the last step, such as 10:15, or ''"
    )
  return range(int(first), int(last) + 1)


def lora_of(config: ml_collections.ConfigDict) -> "lora.Lora | None":
  """Returns the adapter a run trains, or None where it trains all params."""
  from dpojax.models import lora

  settings = config.get("lora")  # not there in the settings of older runs
  if not (settings and settings.rank):
    return None
  return lora.Lora(settings.rank, settings.alpha, tuple(_lora_targets(config)))


def _lora_targets(config) -> list[str]:
  return [name.strip() for name in config.lora.targets.split(",") if name.strip()]


def losses_of(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the names in `config.loss`."""
  return [name.strip() for name in config.loss.split(",")]


def knobs_of(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Returns the keywords of losses that are set."""
  return {name: value for name, value in config.loss_options.items() if name in _KNOBS and value is not None}


def columns_of(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the knobs that the data bring, and the keys of their records that have them."""
  return {
    knob: column for knob, column in config.data.get("columns", {}).items() if column
  }  # none in older runs


def combined_with(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns what else changes the losses: the keys in `COMBINED` that are set."""
  return {
    name: config.loss_options[name]
    for name in COMBINED
    if config.loss_options[name] is not None and config.loss_options[name] is not False
  }


def _check_losses(config) -> None:
  from dpojax.training import preference

  names = losses_of(config)
  allowed = {
    "sft": ("sequence_sum", "token_mean"),
    "dpo": tuple(preference.LOSSES),
    "reward": ("bradley_terry",),
  }[config.objective]
  for name in names:
    if name not in allowed:
      near = difflib.get_close_matches(name, allowed, n=1)
      raise ConfigError(
        f"config.loss is {config.loss!r}; it must be one of {', '.join(map(repr, allowed))}"
        + (f"; did you mean {near[0]}?" if near else "")
      )
  chosen = [preference.LOSSES[name] for name in names if config.objective == "dpo"]
  _check_columns(config, names, chosen)
  if config.objective != "dpo":
    asked = [f"loss_options.{name}" for name in knobs_of(config) | combined_with(config)]
    asked += [
      key for key in ("loss_weights", "beta_schedule.steps", "beta_schedule.factors") if flatten(config)[key]
    ]
    if asked:
      raise ConfigError(f"config.{asked[0]} is set; objective={config.objective!r} takes none")
    return
  _check_schedule(config, chosen)
  _check_sum(config, names, chosen)
  _check_knobs(config, chosen)
  _check_reference(config, names, chosen)


def _check_schedule(config, chosen: "list[preference.Loss]") -> None:
  """Refuses a beta that moves as no step says, or that nothing reads."""
  steps, factors = config.beta_schedule.steps, config.beta_schedule.factors
  if len(steps) != len(factors):
    raise ConfigError(
      f"config.beta_schedule has {len(steps)} steps and {len(factors)} factors; give one factor for each step"
    )
  for key, values, sound, text in (
    ("steps", steps, lambda x: x >= 0, "a step, at least 0"),
    ("factors", factors, lambda x: 0 < x < math.inf, "a positive number"),
  ):
    for value in values:
      if isinstance(value, bool) or not isinstance(value, (int, float)) or not sound(value):
        raise ConfigError(f"config.beta_schedule.{key} has {value!r}; each must be {text}")
  if any(later <= earlier for earlier, later in zip(steps, steps[1:])):
    raise ConfigError(f"config.beta_schedule.steps is {tuple(steps)}; they must ascend")
  if steps and not any(loss.takes_beta() for loss in chosen):
    raise ConfigError(
      f"config.beta_schedule.steps is {tuple(steps)} but {config.loss} has no beta; leave it unset"
    )


def beta_factor_of(config: ml_collections.ConfigDict) -> "step.BetaFactor | None":
  """Returns what beta is multiplied by, by step, or None where it stays."""
  schedule = config.get("beta_schedule")  # not there in the settings of older runs
  if not (schedule and schedule.steps):
    return None
  from dpojax.training import step

  return step.make_beta_factor(schedule.steps, schedule.factors, schedule.between)


def _check_sum(config, names: list[str], chosen: "list[preference.Loss]") -> None:
  """Refuses losses that do not add."""
  if len(set(names)) < len(names):
    raise ConfigError(
      f"config.loss is {config.loss!r}, which names a loss twice; name it once and set its loss_weights"
    )
  weights = config.loss_weights
  if weights and len(weights) != len(names):
    raise ConfigError(
      f"config.loss_weights has {len(weights)} numbers for {len(names)} losses "
      f"({config.loss}); give one for each"
    )
  for weight in weights:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
      raise ConfigError(f"config.loss_weights has {weight!r}; every weight must be a positive number")
  for name, loss in zip(names, chosen):
    weighed = config.loss_options.dr_dpo is not None and "dr_dpo" in loss.options
    if (loss.whole_step or weighed) and config.rows_at_once:
      name = "dr_dpo" if weighed else name
      raise ConfigError(
        f"config.loss is {config.loss!r} and rows_at_once {config.rows_at_once}: {name} compares "
        "responses of all comparisons of a step, which are then computed apart; set rows_at_once=0"
      )
  if config.data.num_responses != 2:
    if config.data.num_responses < 2:
      raise ConfigError(f"config.data.num_responses is {config.data.num_responses}; it must be at least 2")
    if names != ["dpo_plackett_luce"]:
      raise ConfigError(
        f"config.data.num_responses is {config.data.num_responses} but {config.loss} compares 2 "
        "responses; set loss='dpo_plackett_luce' or num_responses=2"
      )


def _check_knobs(config, chosen: "list[preference.Loss]") -> None:
  """Refuses options that no loss takes, values out of range, and needed ones that are missing."""
  given, combined = knobs_of(config), combined_with(config)
  for name, value in given.items():
    takers = [loss for loss in chosen if name in loss.knobs()]
    if not takers:
      options = sorted({knob for loss in chosen for knob in (*loss.knobs(), *loss.options)})
      raise ConfigError(f"config.loss_options.{name} is not an option of {config.loss}; it takes {options}")
    sound, text = _KNOBS[name]
    if not sound(value):
      raise ConfigError(f"config.loss_options.{name} is {value}; it must be {text}")
  for name in combined:
    if not any(name in loss.options for loss in chosen):
      reason = (
        "it reads mean log-probs by definition"
        if any(loss.mean for loss in chosen) and name == "length_normalize"
        else "it has no form with it"
      )
      raise ConfigError(f"config.loss_options.{name} cannot be combined with {config.loss}: {reason}")
  answers = [name for name in ("length_normalize", "ld_alpha", "sampo") if name in combined]
  if len(answers) > 1:
    raise ConfigError(
      f"config.loss_options has {' and '.join(answers)}, {'two' if len(answers) == 2 else 'three'} "
      "answers to the same question; set one of them"
    )
  if not combined.get("dr_dpo", 1) > 0:
    raise ConfigError(f"config.loss_options.dr_dpo is {combined['dr_dpo']}; it must be positive")
  if not 0 <= combined.get("ld_alpha", 1) <= 1:
    raise ConfigError(f"config.loss_options.ld_alpha is {combined['ld_alpha']}; it must be in [0, 1]")
  for name, loss in zip(losses_of(config), chosen):
    for knob, parameter in loss.knobs().items():
      if parameter.default is parameter.empty and knob not in given and knob not in columns_of(config):
        raise ConfigError(
          f"config.loss is {config.loss!r}, which needs loss_options.{knob}; set it, such as "
          f"--config.loss_options.{knob}=0.1"
        )
    knob, most, text = _NARROWER.get(name, ("", 0, ""))
    if knob and not 0 < given.get(knob, most / 2) < most:
      raise ConfigError(f"config.loss_options.{knob} is {given[knob]}; {name} needs one {text}")


def _check_columns(config, names: list[str], chosen: "list[preference.Loss]") -> None:
  """Refuses columns of knobs that no loss reads of each pair, and two answers to one question."""
  columns = columns_of(config)
  readers = {"reward": {"margin"}}.get(config.objective, set())
  for loss in chosen:
    readers |= {*loss.knobs(), *loss.of_data} | ({"beta"} if loss.takes_beta() else set())
  for knob, column in columns.items():
    where = f"config.data.columns.{knob} is {column!r}"
    if knob not in readers:
      what = config.loss if config.objective == "dpo" else f"objective={config.objective!r}"
      raise ConfigError(f"{where} but {what} has no {knob}; leave it empty")
    for name, loss in zip(names, chosen):
      if knob in loss.of_all:
        raise ConfigError(f"{where} but {name} takes one {knob} for all pairs; set loss_options or beta")
    if knobs_of(config).get(knob) is not None:
      raise ConfigError(f"{where} and loss_options.{knob} {knobs_of(config)[knob]}; set one of them")
    if not config.data.path:
      raise ConfigError(f"{where} but data.path is empty; columns are read of local files")
    if knob in knobs.OF_DATA and config.data.shuffle_labels:
      raise ConfigError(f"{where}, which shuffled labels would make untrue; set data.shuffle_labels=False")
  for name, loss in zip(names, chosen):
    for knob in loss.of_data:
      if knob not in columns:
        raise ConfigError(
          f"config.loss is {config.loss!r}, and {name} has to be told of each pair whether the rejected "
          "response is the reference's sample: name the key of the records that says it, 0 or 1, in "
          f"data.columns.{knob}"
        )


def check_brought(config: ml_collections.ConfigDict, brought: dict, example: Any) -> None:
  """Refuses knobs of the data that a loss takes less of than others.

  Args:
    config: all keys.
    brought: by name [N] values.
    example: [N] which records they are of.

  Raises:
    ConfigError: naming the record, the value and the fix.
  """
  for name in losses_of(config) if brought else ():
    knob, most, text = _NARROWER.get(name, ("", 0, ""))
    if knob in brought:
      values = brought[knob]
      wrong = ~((values > 0) & (values < most))
      if wrong.any():
        i = int(wrong.argmax())
        raise ConfigError(
          f"config.data.columns.{knob}: record {int(example[i])} of those used has {values[i]:g}; {name} "
          f"needs one {text}: correct it"
        )


def _check_reference(config, names: list[str], chosen: "list[preference.Loss]") -> None:
  """Refuses a reference that is not read, one that cannot move, and two that should agree."""
  reference = config.reference
  reads = [name for name, loss in zip(names, chosen) if loss.reads_reference]
  if reference.mode == "none" and "kto" in names:
    raise ConfigError(
      "config.reference.mode is 'none' but kto measures its reference point against "
      "the reference; set reference.mode='inline', or loss='apo_zero'"
    )
  every = [name for name, loss in zip(names, chosen) if loss.reads_every_token]
  if every and reference.mode != "inline":
    raise ConfigError(
      f"config.reference.mode is {reference.mode!r} but {every[0]} reads the reference's "
      "next-token distributions; set reference.mode='inline'"
    )
  if not reads or reference.mode == "none":
    why = f"{config.loss} has no reference" if not reads else "reference.mode is 'none'"
    for key in ("checkpoint", "sync_every"):
      if reference[key]:
        raise ConfigError(f"config.reference.{key} is {reference[key]!r} but {why}; leave it unset")
  if reference.mode == "stored":
    combined = combined_with(config)
    for key, why in (
      ("sync_every", "the reference then moves away from what was stored"),
      ("ld_alpha", "log-probs are stored as sums over tokens"),
      ("sampo", "log-probs are stored as sums over tokens"),
      ("kto", "its responses to other prompts are drawn anew for each seed"),
    ):
      if key in combined or key in names or (key == "sync_every" and reference.sync_every):
        raise ConfigError(f"config.reference.mode is 'stored' with {key}: {why}; set reference.mode='inline'")
  if not 0 < reference.sync_alpha <= 1:
    raise ConfigError(f"config.reference.sync_alpha is {reference.sync_alpha}; it must be in (0, 1]")
  if reference.checkpoint and not reference.may_differ and (reference.checkpoint != config.model.checkpoint):
    raise ConfigError(
      f"config.reference.checkpoint is {reference.checkpoint!r}, not the policy's "
      f"{config.model.checkpoint!r}; set reference.may_differ=True if that is the purpose"
    )


def check_group(config: ml_collections.ConfigDict, name: str, defaults: ml_collections.ConfigDict) -> None:
  """Refuses keys of a command's own group that are unknown, missing or of another type.

  Raises:
    ConfigError: naming the key, the value and the fix.
  """
  known, given = defaults[name], config.get(name, {})
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, list(known), n=1)
      raise ConfigError(f"config.{name}.{key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
  for key, default in known.items():
    if key not in given:
      raise ConfigError(
        f"config.{name}.{key} is missing; start a config from dpojax.{name}.config.defaults()"
      )
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(given[key], kinds) or isinstance(given[key], bool) != isinstance(default, bool):
      raise ConfigError(f"config.{name}.{key} is {given[key]!r}; it must be of type {type(default).__name__}")


def to_json(config: ml_collections.ConfigDict) -> str:
  """Returns the config as JSON, the form of `config.json`."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
  """Returns the config of a `config.json`."""

  def with_tuples(value):
    if isinstance(value, dict):
      return {key: with_tuples(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value

  return ml_collections.ConfigDict(with_tuples(json.loads(text)))


OF_ONE_PROCESS = (
  "parallel.process_id",
  "data.path",
  "data.eval_path",
  "data.cache_dir",
  "compile_cache",
  "wandb_project",
)
"""Keys in which the processes of a run may differ: of data the contents are compared."""


def shared(config: ml_collections.ConfigDict) -> dict:
  """Returns what has to be the same in all processes of a run, as JSON values by their names."""
  return {
    f"config.{key}": list(value) if isinstance(value, tuple) else value
    for key, value in flatten(config).items()
    if key not in OF_ONE_PROCESS
  }


def check_continues(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> None:
  """Refuses to continue a run under a config that gives other numbers.

  A key that an older run had not is as by default.

  Raises:
    ConfigError: naming the first key that differs.
  """
  before, after = flatten(defaults()) | flatten(old), flatten(defaults()) | flatten(new)
  for key in sorted(before.keys() | after.keys()):
    if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE):
      raise ConfigError(
        f"the workdir holds a run with config.{key}={before.get(key)!r}, not "
        f"{after.get(key)!r}; take another workdir, or go back to its config"
      )
  if before["steps"] != after["steps"] and after["optimizer.schedule"] != "constant":
    raise ConfigError(
      f"the workdir holds a run of {before['steps']} steps, not {after['steps']}, and "
      f"optimizer.schedule={after['optimizer.schedule']!r} depends on it; take another workdir"
    )


def flatten(config: ml_collections.ConfigDict | dict) -> dict[str, Any]:
  """Returns {dotted key: value}; empty groups vanish."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, (ml_collections.ConfigDict, dict)):
      flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def _one_of(config, key: str, allowed) -> None:
  value = flatten(config)[key]
  if value not in allowed:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"config.{key} is {value!r}; it must be one of {', '.join(map(repr, allowed))}{hint}")


def _at_least(config, key: str, least: int) -> None:
  value = flatten(config)[key]
  if not (math.isfinite(value) and value >= least):
    raise ConfigError(f"config.{key} is {value}; it must be at least {least}")
