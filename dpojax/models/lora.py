"""Low-rank adapters (LoRA, Hu et al. 2021) as their own small tree beside a frozen base.

A projection x W of the base becomes x W + (alpha / rank) (x A) B, computed as written: the base is
never copied, and is the reference as it stands. An adapter has the paths of the kernels it belongs
to, with the leaves `a` and `b` in place of `kernel`; a part of the model that is trained whole, the
reward head, keeps its own path.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.kernels.cut_head import without_gradient
from dpojax.models import transformer
from dpojax.models.config import ModelConfig

TARGETS = ("query", "key", "value", "attention_out", "gate", "up", "down")
"""Projections of a block that can have an adapter."""

WHOLE = "reward_head"
"""The parameter that is trained whole where there is one."""


class Lora(NamedTuple):
  """What an adapter is made of.

  Attributes:
    rank: inner size of A and B.
    alpha: A B is multiplied by alpha / rank.
    targets: projections that have one, of `TARGETS`; empty: all that the model has.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = ()

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


class Adapted(NamedTuple):
  """A base's params and an adapter on them: what `make_apply` takes for params."""

  base: Any
  adapter: Any


def targets_of(config: ModelConfig, lora: Lora) -> tuple[str, ...]:
  """Returns the projections that have an adapter, in the order of `TARGETS`.

  Raises:
    ValueError: a target is no projection, or one that the model has not.
  """
  there = [name for name in TARGETS if name != "gate" or not config.mlp.startswith("gelu")]
  for name in lora.targets:
    if name not in there:
      raise ValueError(f"{name!r} is no projection of the model; it has {', '.join(there)}")
  return tuple(name for name in there if not lora.targets or name in lora.targets)


def init_adapter(config: ModelConfig, lora: Lora, key: jax.Array) -> dict:
  """Returns an adapter that changes nothing yet: A is drawn, B is 0; float32.

  A is normal with the variance 1 / (3 inputs) of PEFT's uniform draw.

  Args:
    config: the model's.
    lora: rank, alpha and targets.
    key: a `jax.random.key`.

  Returns:
    A nested dict; a kernel [*inputs, *outputs] has `a` [*inputs, rank] and `b` [rank, *outputs],
    both behind an axis of layers where kernels are stacked.

  Raises:
    ValueError: a target is no projection of the model.
  """
  targets, rank = targets_of(config, lora), lora.rank
  shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  adapter = {WHOLE: jnp.zeros(shapes[WHOLE].shape)} if WHOLE in shapes else {}
  for number, (path, kernel) in enumerate(jax.tree_util.tree_leaves_with_path(shapes)):
    *above, last = (part.key for part in path)
    if last != "kernel" or above[-1] not in targets:
      continue
    layers, inputs, outputs = _split(above, kernel.shape)
    node = adapter
    for name in above:
      node = node.setdefault(name, {})
    # A key by the kernel's place among all leaves: the draw of one does not hang on which others are targets.
    drawn = jax.random.normal(jax.random.fold_in(key, number), (*layers, *inputs, rank))
    node["a"] = drawn * (3 * np.prod(inputs)) ** -0.5
    # B is 0, so the first loss is that of the reference: log 2 for DPO.
    node["b"] = jnp.zeros((*layers, rank, *outputs))
  return adapter


def make_apply(config: ModelConfig, lora: Lora):
  """Returns `apply(params, rows) -> Outputs`: of `Adapted` params, or of the base alone."""
  plain = transformer.make_apply(config)

  def apply(params, rows) -> transformer.Outputs:
    # The reference pass: the base alone, the same function of the same arrays.
    if not isinstance(params, Adapted):
      return plain(params, rows)
    base, adapter = params
    whole = {name: leaf for name, leaf in adapter.items() if name == WHOLE}
    # On B once a step, not on what every projection puts out.
    scaled = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * lora.scale if path[-1].key == "b" else leaf,
      {name: part for name, part in adapter.items() if name != WHOLE},
    )
    outputs = plain(base | whole, rows, **{transformer.ADAPTER: scaled})
    # The head is the base's and frozen, which a head in parts over devices has to be told.
    return outputs._replace(head=without_gradient(outputs.head))

  return apply


def merge(base: dict, adapter: dict, lora: Lora, *, xp: Any = np) -> dict:
  """Returns the params of the model that base and adapter are together.

  Args:
    base: params.
    adapter: as of `init_adapter`.
    lora: what the adapter is made of.
    xp: numpy, or jax.numpy where it is traced.

  Returns:
    Arrays of `xp`: float32 where there is an adapter, and as they were elsewhere.
  """
  # An accelerator multiplies float32 at less than its precision unless it is asked to.
  product = np.matmul if xp is np else functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

  def merged(path, kernel):
    *above, last = (part.key for part in path)
    node = adapter
    for name in above:
      node = node.get(name, {})
    if last != "kernel" or not node:
      return xp.asarray(kernel)
    layers, inputs, outputs = _split(above, kernel.shape)
    a = xp.asarray(node["a"]).reshape(*layers, math.prod(inputs), lora.rank)
    b = xp.asarray(node["b"]).reshape(*layers, lora.rank, math.prod(outputs))
    # In float32 whatever the base is in: a change of a bfloat16 kernel is mostly below its last bit.
    change = product(a, b).reshape(kernel.shape) * np.float32(lora.scale)
    return xp.asarray(kernel, np.float32) + change

  whole = {WHOLE: xp.asarray(adapter[WHOLE])} if WHOLE in adapter else {}
  return jax.tree_util.tree_map_with_path(merged, base) | whole


def _split(above: list[str], shape: tuple[int, ...]) -> tuple[tuple, tuple, tuple]:
  """The axes of layers, inputs and outputs of a kernel."""
  stacked = above[0] == "layers"
  inputs = stacked + (2 if above[-1] == "attention_out" else 1)
  return shape[:stacked], shape[stacked:inputs], shape[inputs:]
