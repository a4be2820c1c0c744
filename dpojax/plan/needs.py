"""What a run will need of its devices, from its compiled step: before there are weights, or devices.

Weights are neither read nor made: of a Hugging Face model only the config.json has to be there.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dpojax.data import loader, packing
from dpojax.models import sharding
from dpojax.models.config import ModelConfig
from dpojax.runtime.errors import ConfigError
from dpojax.training import config as config_lib
from dpojax.training import parallel, resolve
from dpojax.training import step as step_lib
from dpojax.training.chips import CHIPS

SMALLER = (
  "lower rows_at_once (1 is least), set model.remat='full', parallel.strategy='mesh' with a larger "
  "parallel.fsdp, reference.mode='stored' or lora.rank"
)
"""What makes a step smaller."""


class Lengths(NamedTuple):
  """Comparisons of which only the lengths are known, [N, 1 + K], and the names of knobs that they bring.

  It is all that a loader's plan needs.
  """

  lengths: np.ndarray
  knobs: dict[str, np.ndarray] = {}

  def __len__(self) -> int:
    return len(self.lengths)


class Needs(NamedTuple):
  """What a step takes, in bytes of one device, and FLOPs of all of them.

  Attributes:
    trained, frozen: how many params there are of each, whole.
    params, optimizer, reference, rows: bytes of the step's arguments.
    temporaries: bytes of what lives within the step, activations and gradients.
    peak: bytes at once, arguments and results included.
    flops: multiplications and additions a step cannot do without, see `necessary_flops`.
    counted_flops: XLA's count for one device, in which the body of a loop counts once; NaN where it has none,
      as for GPUs.
    step_rows: rows of the largest step.
  """

  trained: int
  frozen: int
  params: int
  optimizer: int
  reference: int
  rows: int
  temporaries: int
  peak: int
  flops: float
  counted_flops: float
  step_rows: int


class Step(NamedTuple):
  """A run's step and the shapes of its arguments as placed: all that it takes to compile it."""

  config: ml_collections.ConfigDict
  devices: Any
  setup: resolve.Setup
  batches: loader.Loader
  train_step: parallel.CompiledStep
  state: step_lib.TrainState
  reference: Any
  rows: packing.Rows


def step_of(
  config: ml_collections.ConfigDict,
  lengths: np.ndarray | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Step:
  """Returns the step of a run of the config, with its largest rows.

  Args:
    config: all keys.
    lengths: [N, 1 + K] tokens of prompts and responses; None reads the run's data.
    devices: what it is placed on; by default all that jax sees.

  Raises:
    ConfigError, DataError, CheckpointError, PackingError: something given cannot be used.
  """
  config_lib.validate(config)
  lift = resolve.make_devices(config, devices)
  if lengths is None:
    subset = resolve.load_data(config).train
  else:
    # Only lengths are looked at; columns have to be there, since rows with them have more arrays.
    subset = Lengths(lengths, {name: np.ones(len(lengths)) for name in config_lib.columns_of(config)})
  batches = resolve.make_loader(config, subset, lift)
  setup = resolve.make_setup_of_shapes(config, axis_name=lift.axis_name)
  tx, train_step = resolve.make_train_step(config, setup.objective, lift)
  state = lift.placed(jax.eval_shape(lambda x: step_lib.init_state(x, tx), setup.params))
  stored = config.reference.mode == "stored" and setup.objective.needs_reference
  reference = None
  if setup.reference is not None and (config.lora.rank or not stored):
    reference = lift.placed(setup.reference)
  rows = largest_rows(batches, setup.objective.num_responses, lift, stored=stored)
  return Step(config, lift, setup, batches, train_step, state, reference, rows)


def plan(config: ml_collections.ConfigDict, lengths: np.ndarray | None = None) -> Needs:
  """Returns what a run of the config needs of the devices that jax sees: see `step_of`."""
  step = step_of(config, lengths)
  compiled = step.train_step.compile(step.state, step.reference, step.rows)
  counted = (compiled.cost_analysis() or {}).get("flops", float("nan"))
  return needs_of(step, compiled.memory_analysis().temp_size_in_bytes, peak_bytes(compiled), counted)


def needs_of(step: Step, temporaries: int, peak: int, counted_flops: float) -> Needs:
  """Returns what a step needs, of which its compiler has told the last three."""
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  size = parallel.bytes_on_one
  return Needs(
    count(step.setup.params),
    count(step.setup.reference),
    size(step.state.params),
    size(step.state.opt_state),
    size(step.reference),
    size(step.rows),
    temporaries,
    peak,
    step.config.batch_size * flops_per_comparison(step.config, step.setup, step.batches.lengths),
    counted_flops,
    int(max(step.batches.plan().rows)),
  )


def largest_rows(batches, num_responses: int, devices, *, stored: bool) -> packing.Rows:
  """Returns the shapes of the rows of the largest step, as placed."""
  steps = batches.plan()
  return devices.placed_rows(
    packing.empty(
      int(max(steps.rows)),
      steps.shape,
      num_responses=num_responses,
      with_reference=stored,
      knobs=list(batches.knobs),
    )
  )


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes a device holds at most while the program runs, its arguments included."""
  memory = compiled.memory_analysis()
  return (
    # Donated arguments are counted twice, as what comes in and what goes out.
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def parts_of(step: Step) -> int:
  """Returns how many parts the rows of the largest step are taken in, one after another."""
  at_once = step.config.rows_at_once * step.devices.row_multiple
  return step.rows.tokens.shape[0] // at_once if at_once else 1


def fsdp_bytes(step: Step) -> float:
  """Returns the bytes that a device must receive in a step whose weights are cut over fsdp, on paper.

  In each part of the step every weight is gathered once in the forward and once in the backward pass, in
  the compute dtype, and once more for a reference that is computed beside the policy; gradients are summed
  and cut once a part in float32. Of n devices each receives (n - 1) / n of the whole. Gradients that are
  cut are then summed over the data axis, once.
  """
  mesh = step.devices.mesh.shape
  share, copies = 1 - 1 / mesh["fsdp"], 1 - 1 / mesh["data"]
  weights = lambda tree: sum(
    leaf.size / mesh["tensor"] for _, leaf in sharding.leaves_by_path(tree) if "fsdp" in leaf.sharding.spec
  )
  compute = np.dtype(step.setup.model.dtype).itemsize
  trained, frozen = weights(step.state.params), weights(step.reference)
  inline = step.setup.objective.needs_reference and step.config.reference.mode == "inline"
  # Below an adapter the frozen weights are gathered for both passes too: gradients flow through them.
  passes = 2 * trained + (2 * frozen if step.config.lora.rank else 0) + (frozen if inline else 0)
  a_part = share * (passes * compute + 4 * trained)
  # Every part gathers again: no device has room to keep the weights from one to the next.
  return parts_of(step) * a_part + 2 * copies * 4 * trained / mesh["fsdp"]


def check_fits(compiled: jax.stages.Compiled) -> None:
  """Refuses a step that needs more than the device has.

  Raises:
    ConfigError: saying what it needs, what there is, and what would make it smaller.
  """
  needed, limit = peak_bytes(compiled), parallel.memory_limit()
  if needed > limit:
    raise ConfigError(
      f"a step needs {needed / 2**30:.2f} GiB on each device, which has {limit / 2**30:.2f}: {SMALLER}; or "
      "check_memory=False to try it"
    )


def flops_per_comparison(
  config: ml_collections.ConfigDict, setup: resolve.Setup, lengths: np.ndarray
) -> float:
  """Returns `necessary_flops` of what a run of the config trains, for comparisons of such lengths."""
  inline = setup.objective.needs_reference and config.reference.mode == "inline"
  return necessary_flops(setup.model, lengths, (2 if config.lora.rank else 3) + inline)


def necessary_flops(model: ModelConfig, lengths: np.ndarray, passes: float) -> float:
  """Returns the multiplications and additions that a comparison cannot do without, on average.

  Prompts once, keys that are seen (sliding windows left aside), the head on responses only. A
  backward pass counts as two, or as one below an adapter.

  Args:
    model: its dimensions.
    lengths: [N, 1 + K] tokens of prompts and responses.
    passes: forward passes that all of it is worth.
  """
  responses = lengths[:, 1:].astype(float)
  matrices = 2 * model.width * model.head_size * (model.heads + model.kv_heads)
  # A gated MLP has three matrices, a plain one two.
  gated = model.mlp not in ("gelu", "gelu_exact")
  matrices += (3 if gated else 2) * model.width * model.mlp_width
  seen = len(lengths) * seen_keys(lengths)
  forward = model.layers * (2 * matrices * lengths.sum() + 4 * model.heads * model.head_size * seen)
  if not model.reward_head:
    forward += 2 * model.width * model.vocab_size * responses.sum()
  return float(passes * forward / len(lengths))


def seen_keys(lengths: np.ndarray) -> float:
  """Returns how many pairs of a token and one that it sees a comparison has, on average."""
  prompt, responses = lengths[:, :1].astype(float), lengths[:, 1:].astype(float)
  seen = np.sum(prompt * (prompt + 1) / 2)
  seen += np.sum(responses * (responses + 1) / 2 + responses * prompt)
  return float(seen / len(lengths))


def report(
  needs: Needs, *, devices: int, compiled_for: str = "", chip: str = "", utilisation: float = 0.4
) -> str:
  """Returns the table that the command prints."""
  gib = lambda value: f"{value / 2**30:10.2f} GiB"
  counted = ""
  if not math.isnan(needs.counted_flops):
    counted = f" (XLA counts {needs.counted_flops / 1e12:.3f} a device, bodies of loops once)"
  lines = [
    f"params          {needs.trained:>14,} trained, {needs.frozen:,} frozen or of the reference",
    f"compiled for    {devices} {compiled_for or jax.default_backend()} device(s), "
    f"{needs.step_rows} rows a step",
    "on each device",
    f"  params        {gib(needs.params)}",
    f"  optimizer     {gib(needs.optimizer)}",
    f"  reference     {gib(needs.reference)}",
    f"  rows          {gib(needs.rows)}",
    f"  temporaries   {gib(needs.temporaries)}  activations, gradients",
    f"  peak          {gib(needs.peak)}",
    f"a step takes    {needs.flops / 1e12:10.3f} TFLOP that are necessary{counted}",
  ]
  if chip:
    flops, memory, *_ = CHIPS[chip]
    seconds = needs.flops / (flops * devices * utilisation)
    fits = "fits" if needs.peak < memory else "does not fit"
    lines += [
      f"on {chip:<12} {fits:>10} its {memory / 2**30:.1f} GiB; {seconds:.3g} s a step at "
      f"{utilisation:.0%} of {flops / 1e12:.0f} TFLOP/s"
    ]
  return "\n".join(lines)


def drawn_lengths(means: str, config: ml_collections.ConfigDict) -> np.ndarray:
  """Returns lengths of 10,000 comparisons, log-normal with the means in a text such as 110,70,70.

  Raises:
    ConfigError: the text is no list of numbers of at least 1, the prompt's first.
  """
  try:
    means = np.array([float(each) for each in means.split(",")])
  except ValueError:
    means = np.zeros(1)
  if len(means) < 2 or np.any(means < 1):
    raise ConfigError("--lengths must be mean tokens of the prompt and of each response, such as 110,70,70")
  # A log-normal of mean 1: exp(mu + sigma^2 / 2) is 1 for mu = -sigma^2 / 2. A deviation of 0.8 is a long
  # tail, as responses have.
  spread = np.random.default_rng(0).lognormal(-0.5 * 0.8**2, 0.8, (10_000, len(means)))
  lengths = np.maximum(1, np.round(means * spread)).astype(int)
  lengths[:, 0] = np.minimum(lengths[:, 0], config.data.max_prompt_length)
  room = config.data.max_length - config.data.max_prompt_length
  lengths[:, 1:] = np.minimum(lengths[:, 1:], room)
  return lengths[lengths.sum(1) <= config.row_length]
