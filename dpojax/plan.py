"""What a run will need of its devices, from its compiled step: before there are weights, or devices.

python -m dpojax.plan --config=FILE[:arg] [--config.key=value ...] [--devices=8] [--chip=h100]
    [--lengths=110,70,70]

Compiles the train step that the run would use, over as many simulated CPU devices as asked, and
prints the memory of each and the arithmetic of a step. Weights are neither read nor made: of a
Hugging Face model only the config.json has to be there. With --lengths, the mean tokens of a prompt
and of its responses, no data are read either.
"""

from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

from dpojax.data import packing
from dpojax.models.config import ModelConfig
from dpojax.runtime import command_line
from dpojax.runtime.command import command
from dpojax.runtime.errors import ConfigError
from dpojax.training import config as config_lib
from dpojax.training import parallel, resolve, weights
from dpojax.training import step as step_lib
from dpojax.training.throughput import CHIPS


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
    counted_flops: XLA's count for one device, in which the body of a loop counts once.
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


def plan(config: ml_collections.ConfigDict, lengths: np.ndarray | None = None) -> Needs:
  """Returns what a run of the config needs.

  Args:
    config: all keys.
    lengths: [N, 1 + K] tokens of prompts and responses; None reads the run's data.

  Raises:
    ConfigError, DataError, CheckpointError, PackingError: something given cannot be used.
  """
  config_lib.validate(config)
  devices = resolve.make_devices(config)
  if lengths is None:
    subset = resolve.load_data(config).train
  else:
    subset = Lengths(lengths, {name: np.ones(len(lengths)) for name in config_lib.columns_of(config)})
  batches = resolve.make_loader(config, subset, devices)
  setup = resolve.make_setup_of_shapes(config, axis_name=devices.axis_name)
  tx, train_step = resolve.make_train_step(config, setup.objective, devices)
  state = devices.placed(jax.eval_shape(lambda x: step_lib.init_state(x, tx), setup.params))
  stored = config.reference.mode == "stored" and setup.objective.needs_reference
  reference = None
  if setup.reference is not None and (config.lora.rank or not stored):
    reference = devices.placed(setup.reference)
  rows = largest_rows(batches, setup.objective.num_responses, devices, stored=stored)
  compiled = train_step.compile(state, reference, rows)
  memory = compiled.memory_analysis()
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  size = parallel.bytes_on_one
  return Needs(
    count(setup.params),
    count(setup.reference),
    size(state.params),
    size(state.opt_state),
    size(reference),
    size(rows),
    memory.temp_size_in_bytes,
    peak_bytes(compiled),
    config.batch_size * flops_per_comparison(config, setup, batches.lengths),
    (compiled.cost_analysis() or {}).get("flops", float("nan")),
    int(max(batches.plan().rows)),
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
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def check_fits(compiled: jax.stages.Compiled) -> None:
  """Refuses a step that needs more than the device has.

  Raises:
    ConfigError: saying what it needs, what there is, and what would make it smaller.
  """
  needed, limit = peak_bytes(compiled), parallel.memory_limit()
  if needed > limit:
    raise ConfigError(
      f"a step needs {needed / 2**30:.2f} GiB on each device, which has {limit / 2**30:.2f}: "
      "lower rows_at_once (1 is least), set model.remat='full', parallel.strategy='mesh' with a "
      "larger parallel.fsdp, reference.mode='stored' or lora.rank; or check_memory=False to try it"
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
  prompt, responses = lengths[:, :1].astype(float), lengths[:, 1:].astype(float)
  matrices = 2 * model.width * model.head_size * (model.heads + model.kv_heads)
  gated = model.mlp not in ("gelu", "gelu_exact")
  matrices += (3 if gated else 2) * model.width * model.mlp_width
  seen = np.sum(prompt * (prompt + 1) / 2)
  seen += np.sum(responses * (responses + 1) / 2 + responses * prompt)
  forward = model.layers * (2 * matrices * lengths.sum() + 4 * model.heads * model.head_size * seen)
  if not model.reward_head:
    forward += 2 * model.width * model.vocab_size * responses.sum()
  return float(passes * forward / len(lengths))


def report(needs: Needs, *, devices: int, chip: str = "", utilisation: float = 0.4) -> str:
  """Returns the table that the command prints."""
  gib = lambda value: f"{value / 2**30:10.2f} GiB"
  lines = [
    f"params          {needs.trained:>14,} trained, {needs.frozen:,} frozen or of the reference",
    f"compiled for    {devices} {jax.default_backend()} device(s), {needs.step_rows} rows a step",
    "on each device",
    f"  params        {gib(needs.params)}",
    f"  optimizer     {gib(needs.optimizer)}",
    f"  reference     {gib(needs.reference)}",
    f"  rows          {gib(needs.rows)}",
    f"  temporaries   {gib(needs.temporaries)}  activations, gradients",
    f"  peak          {gib(needs.peak)}",
    f"a step takes    {needs.flops / 1e12:10.3f} TFLOP that are necessary (XLA counts "
    f"{needs.counted_flops / 1e12:.3f} a device, bodies of loops once)",
  ]
  if chip:
    flops, memory = CHIPS[chip]
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
  spread = np.random.default_rng(0).lognormal(-0.5 * 0.8**2, 0.8, (10_000, len(means)))
  lengths = np.maximum(1, np.round(means * spread)).astype(int)
  lengths[:, 0] = np.minimum(lengths[:, 0], config.data.max_prompt_length)
  room = config.data.max_length - config.data.max_prompt_length
  lengths[:, 1:] = np.minimum(lengths[:, 1:], room)
  return lengths[lengths.sum(1) <= config.row_length]


def main():
  given = flags.FLAGS
  if given.devices:
    parallel.simulate(given.devices)
  with command():
    config = weights.with_tokenizer(given.config)
    lengths = drawn_lengths(given.lengths, config) if given.lengths else None
    needs = plan(config, lengths)
  print(report(needs, devices=jax.device_count(), chip=given.chip, utilisation=given.utilisation))


def cli():
  """Plans as the command line says: `dpojax-plan`, and `python -m dpojax.plan`."""
  command_line.define_config()
  flags.DEFINE_integer("devices", 0, "Simulated CPU devices; 0: the devices there are.")
  flags.DEFINE_enum("chip", "", ["", *CHIPS], "A chip to hold it against.")
  flags.DEFINE_float("utilisation", 0.4, "Share of the chip's rate that is reached.")
  flags.DEFINE_string("lengths", "", "Mean tokens of prompt and responses, in place of data.")
  command_line.start(main, __doc__)


if __name__ == "__main__":
  cli()
