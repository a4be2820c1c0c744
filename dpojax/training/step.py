"""The train step, one pure function, and the optimizer it applies."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from dpojax.losses import mix_reference
from dpojax.training.micro_batches import MicroBatches
from dpojax.training.objectives import Mean, Objective

SCHEDULES = ("constant", "linear", "cosine")
BETWEEN = ("linear", "geometric", "hold")

BetaFactor = Callable[[jax.Array | int], jax.Array]
"""Step -> what beta is multiplied by there."""


class TrainState(NamedTuple):
  """All that training changes. The reference is not in it: it is an argument of the step.

  `finite` turns false at the first update that is not finite; that update is not applied and
  nothing changes any more, so `step` is the last good one whenever the caller looks.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  finite: jax.Array


def make_schedule(name: str, *, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
  """Returns the learning rate of a step: linear warm-up, then constant, or decay to 0 at `steps`.

  The warm-up is the reference implementation's, min(1, (step + 1) / (warmup_steps + 1)): the first
  step already moves.
  """

  def schedule(step):
    warm = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
    done = jnp.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    decays: dict[str, jax.Array | float]
    decays = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done))}
    return learning_rate * warm * decays[name]

  return schedule


def make_beta_factor(steps: Sequence[float], factors: Sequence[float], between: str = "linear") -> BetaFactor:
  """Returns the factor of beta by step, given at some steps: as data, not code.

  Args:
    steps: ascending.
    factors: at those steps, positive; before the first and behind the last it is as there.
    between: 'linear', 'geometric' (linear in the logarithm), or 'hold', as at the step before.
  """
  at, values = jnp.asarray(steps, jnp.float32), jnp.asarray(factors, jnp.float32)

  def factor(step):
    step = jnp.asarray(step, jnp.float32)
    if between == "hold":
      return values[jnp.maximum(jnp.searchsorted(at, step, side="right") - 1, 0)]
    if between == "geometric":
      return jnp.exp(jnp.interp(step, at, jnp.log(values)))
    return jnp.interp(step, at, values)

  return factor


def make_optimizer(
  name: str, schedule: optax.Schedule, *, max_grad_norm: float, weight_decay: float = 0.0, ema: float = 0.0
) -> optax.GradientTransformation:
  """Returns clipping by global norm (0: none) followed by the optimizer.

  Args:
    name: one of `OPTIMIZERS`.
    schedule: the learning rate by step.
    max_grad_norm: of all gradients together; 0 leaves them as they are.
    weight_decay: of matrices and embeddings, in the optimizers of `DECAYS`.
    ema: decay of a running mean of the params beside them, see `with_average`; 0 is none.
  """
  tx = OPTIMIZERS[name](schedule, weight_decay)
  if max_grad_norm > 0:
    tx = optax.chain(optax.clip_by_global_norm(max_grad_norm), tx)
  return with_average(tx, ema) if ema else tx


def _rmsprop(schedule, weight_decay):
  """With the arguments that make it PyTorch's, as the paper used it: epsilon outside the root."""
  return optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False)


def _adamw(schedule, weight_decay, **more):
  return optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=weight_decay, mask=_decayed, **more)


def _adafactor(schedule, weight_decay):
  """Steps of the learning rate itself, as Adam's, not relative to the size of the params."""
  return optax.adafactor(
    schedule,
    multiply_by_parameter_scale=False,
    weight_decay_mask=_decayed,
    weight_decay_rate=lambda step: weight_decay * schedule(step),
  )


def _muon(schedule, weight_decay):
  """Muon for the matrices of layers, Nesterov's AdamW without decay for the rest; steps of Adam's size."""
  return optax.contrib.muon(
    schedule, weight_decay=weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=_matrices
  )


def _schedule_free(schedule, weight_decay):
  """Schedule-free AdamW (Defazio et al. 2024): params are where gradients are taken."""
  decayed = optax.add_decayed_weights(weight_decay, mask=_decayed)
  adamw = optax.chain(
    optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
    decayed,
    optax.scale_by_learning_rate(schedule),
  )
  return optax.contrib.schedule_free(adamw, schedule, b1=0.9)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "rmsprop": _rmsprop,
  "adamw": _adamw,
  "adamw_bfloat16": partial(_adamw, mu_dtype=jnp.bfloat16),
  "sgd": lambda schedule, weight_decay: optax.sgd(schedule),
  "adafactor": _adafactor,
  "lion": lambda schedule, weight_decay: optax.lion(schedule, weight_decay=weight_decay, mask=_decayed),
  "muon": _muon,
  "schedule_free": _schedule_free,
}
"""Names `config.optimizer.name` takes: (schedule, weight decay) -> transformation. Of 'adamw_bfloat16' the
first moment is bfloat16; the second would stand still, as it moves by a thousandth of itself."""

DECAYS = ("adamw", "adamw_bfloat16", "adafactor", "lion", "muon", "schedule_free")
"""Optimizers with weight decay; norms and biases have none."""

AVERAGES = ("schedule_free",)
"""Optimizers whose params are not those to evaluate: see `average_of`."""


def _decayed(params):
  names = ("scale", "bias", "head_bias", "reward_head")
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in names, params)


def _matrices(params):
  """The input and output axes of each matrix of a layer, or of an adapter to one; None of the rest."""

  def axes(path, leaf):
    projection, name = (["", *(key.key for key in path)])[-2:]
    if name not in ("kernel", "a", "b"):
      return None
    # Heads are two axes of one matrix: Muon orthogonalises what multiplies a vector, not each head.
    inputs = 2 if projection == "attention_out" and name != "b" else 1
    outputs = 2 if projection in ("query", "key", "value") and name != "a" else 1
    return optax.contrib.MuonDimensionNumbers(
      tuple(range(-inputs - outputs, -outputs)), tuple(range(-outputs, 0))
    )

  return jax.tree_util.tree_map_with_path(axes, params)


class Averaged(NamedTuple):
  """The state of an optimizer and a running mean of the params beside it."""

  inner: Any
  average: Any
  count: jax.Array  # type: ignore[assignment]  # its name in checkpoints; hides tuple.count


def with_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
  """Returns the optimizer with a running mean of the params in its state: see `average_of`.

  At step t, from 0, the mean keeps min(decay, (1 + t) / (10 + t)) of itself, so that the start is soon
  forgotten.
  """

  def init(params):
    # A copy: the params are donated with the first step, and one buffer cannot be given away twice.
    return Averaged(tx.init(params), jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))

  def update(updates, state, params):
    updates, inner = tx.update(updates, state.inner, params)
    # Without the ramp a decay of 0.999 would still hold a third of the start after a thousand steps.
    kept = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
    average = jax.tree.map(
      lambda mean, new: (kept * mean + (1 - kept) * new).astype(mean.dtype),
      state.average,
      optax.apply_updates(params, updates),
    )
    return updates, Averaged(inner, average, state.count + 1)

  return optax.GradientTransformation(init, update)


class Remembering(NamedTuple):
  """The state of an optimizer, and beside it what an objective remembers from step to step."""

  inner: Any
  memory: Any


def with_memory(tx: optax.GradientTransformation, objective: Objective) -> optax.GradientTransformation:
  """Returns the optimizer with the objective's memory in its state, where the objective has one.

  It stands there, and not in a field of `TrainState`, so that checkpoints of runs that remember nothing
  have the same tree with and without it. `make_train_step` reads and writes it.
  """
  if objective.memory is None:
    return tx

  def init(params):
    return Remembering(tx.init(params), jax.tree.map(jnp.asarray, objective.memory))

  def update(updates, state, params):
    updates, inner = tx.update(updates, state.inner, params)
    return updates, Remembering(inner, state.memory)

  return optax.GradientTransformation(init, update)


def average_of(params: Any, opt_state: Any) -> Any:
  """Returns the params to evaluate, sample and hand on: a mean that the optimizer keeps, or params.

  Args:
    params: of a `TrainState`.
    opt_state: of the same; also with dicts in the place of its tuples, as a checkpoint is read.
  """
  if (found := _find(opt_state, Averaged._fields)) is not None:
    return found["average"]
  if (found := _find(opt_state, ("b1", "z"))) is not None:
    # From the state and not from a constant: it is a number of the checkpoint.
    b1 = found["b1"]
    # Schedule-free keeps y, where gradients are taken, and z; the average x is what y interpolates to.
    return jax.tree.map(lambda y, z: ((y - (1 - b1) * z) / b1).astype(y.dtype), params, found["z"])
  return params


def _find(tree: Any, fields: Sequence[str]) -> dict | None:
  """Returns the first node that has these fields, as a dict, or None."""
  node = tree._asdict() if hasattr(tree, "_asdict") else tree
  if isinstance(node, dict) and all(name in node for name in fields):
    return node
  children = node.values() if isinstance(node, dict) else node if isinstance(node, (tuple, list)) else ()
  return next((found for child in children if (found := _find(child, fields)) is not None), None)


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.ones((), bool))


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  schedule: optax.Schedule | None = None,
  micro_batches: MicroBatches = MicroBatches(),
  axis_name: str | None = None,
  over_rows: Callable[[Callable], Callable] | None = None,
) -> Callable:
  """Returns `train_step(state, reference, rows) -> (state, metrics)`, a pure function.

  Gradients are of the loss summed over all rows, divided once by the number it is a mean over:
  neither the packing, nor its micro-batches, nor the spread over devices changes them. An update that is
  not finite is not applied, nor is any after it: see `TrainState`.

  Args:
    objective: what to minimise.
    tx: the optimizer; of an objective that remembers, by `with_memory`.
    schedule: the learning rate by step, for the metrics.
    micro_batches: how many of the rows are computed at once.
    axis_name: the mapped axis gradients and metrics are summed over, under `pmap`.
    over_rows: how gradients and metrics of the rows of each device become those of all on a mesh, see
      `parallel.Mesh.over_rows`; None leaves it to the compiler.
  """

  def loss_total(params, reference, rows, at):
    loss, metrics = objective.at(*at)(params, reference, rows)
    return loss.total, (loss.count, metrics)

  def one_part(params, reference, rows, at):
    (_, (count, metrics)), grads = jax.value_and_grad(loss_total, has_aux=True)(params, reference, rows, at)
    return grads, count, metrics

  def of_rows(params, reference, rows, at):
    return micro_batches.sum(lambda part: one_part(params, reference, part, at), rows)

  def train_step(state, reference, rows):
    at = state.step, None if objective.memory is None else state.opt_state.memory
    sums = (over_rows or (lambda f: f))(of_rows)(state.params, reference, rows, at)
    if axis_name is not None:
      sums = jax.lax.psum(sums, axis_name)
    grads, count, metrics = sums
    # From sums over the whole step, so that every device remembers the same.
    memory = None
    if objective.memory is not None and objective.remember is not None:
      memory = objective.remember(at[1], metrics)
    # The one division: before it everything is a sum, so devices with fewer comparisons weigh less.
    grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1).astype(g.dtype), grads)
    # Before clipping, which is inside the optimizer: what is told is what the loss gave.
    metrics = _values(metrics)
    metrics["grad_norm"] = optax.tree.norm(grads)
    if schedule is not None:
      metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    if memory is not None:
      opt_state = opt_state._replace(memory=memory)
    params = optax.apply_updates(state.params, updates)
    # Sticky: the host looks only now and then, and has to find the last good state when it does.
    finite = state.finite & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    updated = TrainState(state.step + 1, params, opt_state, finite)
    # A select and no cond: both sides exist anyway, and donated buffers are reused in place.
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return kept._replace(finite=finite), metrics

  return train_step


def make_reference_step(*, alpha: float) -> Callable:
  """Returns `reference_step(reference, state) -> (reference, ())`: TR-DPO's update of the reference.

  After an update that is not finite, when the state stands still, the reference does too.
  """

  def reference_step(reference, state):
    mixed = mix_reference(state.params, reference, alpha=alpha)
    return jax.tree.map(lambda new, old: jnp.where(state.finite, new, old), mixed, reference), ()

  return reference_step


def make_eval_step(
  objective: Objective,
  *,
  micro_batches: MicroBatches = MicroBatches(),
  axis_name: str | None = None,
  sum_rows: Callable[[Callable], Callable] | None = None,
) -> Callable:
  """Returns `eval_step(params, reference, rows, step=0) -> metrics`, a dict of `Mean`s to be added up.

  The step matters to an objective that moves with it. `sum_rows` is to metrics what `over_rows` is to
  gradients, see `make_train_step`.
  """

  def of_rows(params, reference, rows, step):
    return micro_batches.sum(lambda part: objective.at(step)(params, reference, part)[1], rows)

  def eval_step(params, reference, rows, step=0):
    metrics = (sum_rows or (lambda f: f))(of_rows)(params, reference, rows, step)
    return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)

  return eval_step


def _values(metrics: dict[str, Mean]) -> dict[str, jax.Array]:
  return {name: mean.value() for name, mean in metrics.items()}
