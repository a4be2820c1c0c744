"""How a model's weights are cut over the axes of a mesh, and how a step brings each together to use it.

The one file that decides it. In a training step every device computes its own rows, inside a `shard_map` over
the axes that rows are cut over, and what it needs of others is asked for here by name, not left to the
compiler's choice:

- a layer's weight is gathered in the compute dtype just before the layer, once in each pass, and let go;
  its gradient is summed over devices in float32 and each keeps its part (ZeRO-3; Rajbhandari et al. 2020);
- a token's embedding is put together from the columns that devices hold, and its gradient taken apart again:
  the table itself never travels;
- the output head is walked over in blocks of the vocabulary, see `kernels.cut_head`.

So do evaluations and all other passes that score rows. What decodes a few tokens at a time has its weights
brought together once for all of them, or leaves them where they are, see `sample.decoding` and `product`.

The `tensor` axis is left to the compiler: heads and inner widths stay where they are cut.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dpojax.kernels.cut_head import CutHead
from dpojax.kernels.gathering import MeshAxis, all_gather, summed_products
from dpojax.kernels.gathering import gather as gather_whole
from dpojax.kernels.head import Head
from dpojax.kernels.platform import ROWS
from dpojax.kernels.precision import wide_of

WEIGHTS = "fsdp"
"""The one of them that weights are cut over too."""

GATHERED = "gathered"
"""The name of weights that were brought together: what rematerialisation never keeps."""

PARTITION = {
  "embed/embedding": ("tensor", "fsdp"),
  "positions/embedding": (None, "fsdp"),
  "head": ("tensor", "fsdp"),
  "head_bias": ("tensor",),
  "query/kernel": ("fsdp", "tensor", None),
  "key/kernel": ("fsdp", "tensor", None),
  "value/kernel": ("fsdp", "tensor", None),
  "attention_out/kernel": ("tensor", None, "fsdp"),
  "gate/kernel": ("fsdp", "tensor"),
  "up/kernel": ("fsdp", "tensor"),
  "down/kernel": ("tensor", "fsdp"),
  **{f"{name}/a": ("fsdp", None) for name in ("query", "key", "value", "gate", "up")},
  **{f"{name}/b": (None, "tensor", None) for name in ("query", "key", "value")},
  "attention_out/a": ("tensor", None, None),
  "attention_out/b": (None, "fsdp"),
  "gate/b": (None, "tensor"),
  "up/b": (None, "tensor"),
  "down/a": ("tensor", None),
  "down/b": (None, "fsdp"),
}
"""Axes the trailing dimensions of a parameter are cut over, by the end of its path.

The `a` and `b` of an adapter are cut as the inputs and outputs of the kernel they belong to.
"""

_cuts = jax.make_user_context(None)
"""By the end of a weight's path the axis, counted from the last, that is cut, while a step is traced."""

_stays = jax.make_user_context(False)
"""Whether the weights of layers stay where they are and vectors travel to them, while a step is traced."""

_rings = jax.make_user_context(())
"""The rings of chips along which the `fsdp` axis goes, while a step is traced; see `MeshAxis`."""


def end_of(path: str) -> str:
  """Returns the key of `PARTITION` that a parameter's path ends in, or ''."""
  return next((end for end in PARTITION if path == end or path.endswith("/" + end)), "")


def spec_of(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
  """Returns what a parameter's dimensions are cut over, on a mesh of axes of such sizes."""
  axes = PARTITION.get(end_of(path), ())
  # Optimizers keep scalars and factored moments under their parameter's path: those are whole everywhere.
  if len(axes) > len(shape):
    axes = ()
  # Stacked layers have an axis in front: it is never cut, a scan takes one layer at a time.
  axes = (None,) * (len(shape) - len(axes)) + axes
  # jax places parts of equal size only: what does not divide is held whole.
  return PartitionSpec(
    *(axis if axis and size % sizes[axis] == 0 else None for axis, size in zip(axes, shape))
  )


def path_of(keys: tuple) -> str:
  """Returns the path of a leaf, as jax tells its keys, separated by /."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def leaves_by_path(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields the leaves of a tree with their paths, separated by /."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield path_of(path), leaf


@contextlib.contextmanager
def cut(*trees: Any, sizes: dict[str, int], rings: tuple[int, ...] = ()) -> Iterator[None]:
  """The context in which a step on cut weights is traced, inside a `shard_map` over `ROWS`.

  Args:
    trees: the weights, or their shapes, whole.
    sizes: of the mesh's axes.
    rings: of the `fsdp` axis, see `MeshAxis`.
  """
  found = {}
  for path, leaf in leaves_by_path(trees):
    spec = spec_of(path, leaf.shape, sizes)
    if sizes[WEIGHTS] > 1 and WEIGHTS in spec:
      found[end_of(path)] = spec.index(WEIGHTS) - len(leaf.shape)
  with _cuts(tuple(sorted(found.items()))), _rings(rings):
    yield


def over_weights() -> MeshAxis:
  """Returns the axis that weights are cut over, where the caller is."""
  return MeshAxis(WEIGHTS, _rings.value)


def uncut() -> contextlib.AbstractContextManager:
  """Returns the context of what is computed with weights that `whole` has brought together."""
  return _cuts(())


def in_place() -> contextlib.AbstractContextManager:
  """Returns the context in which layers leave their weights where they are, see `product`."""
  return _stays(True)


def is_cut() -> bool:
  """Whether weights are cut where the caller is: its rows are those of one device."""
  return bool(_cuts.value)


def gathers() -> bool:
  """Whether a layer brings its weights together, where the caller is."""
  return is_cut() and not _stays.value


def held(end: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns what a device holds of a parameter of such a shape."""
  axis = dict(_cuts.value or ()).get(end)
  if axis is None:
    return shape
  parts = list(shape)
  parts[axis] //= jax.lax.axis_size(WEIGHTS)
  return tuple(parts)


def held_in_layer(end: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """`held` of a layer's weight: the whole where layers bring theirs together before they begin."""
  return held(end, shape) if _stays.value else shape


def product(x: jax.Array, kernel: jax.Array, end: str, inputs: int) -> jax.Array:
  """Returns x [T, I] times a kernel of `inputs` axes of together I, in the dtype of x, [T, O].

  Of a kernel that is cut and stays where it is, each device multiplies its part with the tokens of all:
  what travels are vectors, columns of x and sums of products, the latter in float32 (Pope et al. 2022,
  Sec. 3.2). Where tokens are few, as in a step of decoding, those are less than the kernel.
  """
  matrix = kernel.astype(x.dtype).reshape(math.prod(kernel.shape[:inputs]), -1)
  axis = dict(_cuts.value or ()).get(end) if _stays.value else None
  if axis is None:
    return x @ matrix
  if kernel.ndim + axis < inputs:
    return summed_products(x, matrix, over_weights()).astype(x.dtype)
  outputs = all_gather(x, over_weights(), 0) @ matrix
  return jax.lax.all_to_all(outputs, WEIGHTS, split_axis=0, concat_axis=1, tiled=True)


def whole(tree: Any, dtype: Any) -> Any:
  """Returns weights, a layer's or all, those that are cut brought together in the compute dtype."""
  cuts = dict(_cuts.value or ())

  def one(path, leaf):
    end = end_of(path_of(path))
    return gather(leaf, cuts[end], dtype) if end in cuts else leaf

  return jax.tree_util.tree_map_with_path(one, tree)


def gather(weight: jax.Array, axis: int, dtype: Any) -> jax.Array:
  """Returns a weight of which each device holds a part along `axis`, from the last, in a dtype.

  Its gradient is summed in float32 at least, each device its part of it.
  """
  return checkpoint_name(gather_whole(weight, over_weights(), weight.ndim + axis, dtype), GATHERED)


def keep_but_gathered(primitive: Any, *args: Any, **params: Any) -> bool:
  """The policy of rematerialisation that keeps everything but weights that were brought together.

  jax's own `save_anything_except_these_names` keeps what has a name too.
  """
  if primitive.name == "custom_vjp_call":
    return not any(each.primitive.name == "all_gather" for each in params["call_jaxpr"].jaxpr.eqns)
  # As large as the weight, and would be kept in its place; of activations they cost nothing to make again.
  if primitive.name in ("reshape", "convert_element_type"):
    return False
  return params.get("name") != GATHERED


def embedded(table: jax.Array, ids: jax.Array, end: str, dtype: Any) -> jax.Array:
  """Returns the rows of a table at ids, [R, L] -> [R, L, D], in a dtype.

  Of a table whose columns are cut, each device looks up its columns for the tokens of all: what travels are
  vectors of tokens, once here and once for the gradient.
  """
  if end not in dict(_cuts.value or ()):
    return jnp.asarray(table)[ids].astype(dtype)
  return _embedded(table, ids, jnp.dtype(dtype), table.shape, table.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _embedded(table, ids, dtype, shape, given):
  return _lookup(table, ids, dtype)[0]


def _lookup(table, ids, dtype):
  # Ids are four bytes a token, their vectors thousands: ids go to all, then columns back to whose token it
  # is.
  everyone = jax.lax.all_gather(ids, WEIGHTS, axis=0, tiled=True)
  columns = table[everyone].astype(dtype)
  return jax.lax.all_to_all(columns, WEIGHTS, split_axis=0, concat_axis=2, tiled=True), everyone


def _lookup_backward(dtype, shape, given, everyone, cotangent):
  columns = jax.lax.all_to_all(cotangent, WEIGHTS, split_axis=2, concat_axis=0, tiled=True)
  wide = wide_of(given)
  return jnp.zeros(shape, wide).at[everyone].add(columns.astype(wide)).astype(given), None


_embedded.defvjp(lambda table, ids, dtype, shape, given: _lookup(table, ids, dtype), _lookup_backward)


def head_of(
  end: str, weights: jax.Array, bias: jax.Array | None, soft_cap: float | None
) -> jax.Array | Head | CutHead:
  """Returns what turns hidden states into logits: the output embedding, a `Head` of it, or a `CutHead`.

  Args:
    end: of its path.
    weights: [V, D], or the columns that a device holds.
    bias, soft_cap: see `Head`.
  """
  if end in dict(_cuts.value or ()):
    return CutHead(weights, bias, soft_cap, over_weights())
  return weights if bias is None and soft_cap is None else Head(weights, bias, soft_cap)


def summed_over_rows(gradients: Any, whole_shapes: Any, sizes: dict[str, int]) -> Any:
  """Returns gradients of one device's rows summed over those of all; of cut weights each keeps its part."""

  def one(path, gradient, like):
    spec = spec_of(path_of(path), like.shape, sizes)
    # What is cut over `fsdp` was summed over it where it was gathered, see `gathering`: once more would be
    # twice.
    axes = ("data",) if sizes[WEIGHTS] > 1 and WEIGHTS in spec else ROWS
    return jax.lax.psum(gradient, axes)

  return jax.tree_util.tree_map_with_path(one, gradients, whole_shapes)
