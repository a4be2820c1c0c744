"""Devices: how the pure step is lifted over them. The only file that knows them.

Two lifts with one interface. `Replicas` is `pmap`: every device holds all parameters. `Mesh` is
`jit` over a mesh of axes data, fsdp and tensor: parameters are cut over fsdp and tensor, rows over
data and fsdp. Both give the gradients of one device. With several processes each reads and places
the rows of its own devices only.
"""

import contextlib
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dpojax.data.packing import Rows
from dpojax.kernels.platform import ROWS
from dpojax.models import sharding

STRATEGIES = ("pmap", "mesh")
AXIS = "replica"


class Replicas:
  """Every local device holds everything; gradients are summed by `pmap` over all devices."""

  axis_name = AXIS
  over_rows = sum_rows = None  # `pmap` sums
  global_shards = 1  # a device sees its own rows only

  def __init__(self):
    self.devices = jax.local_devices()
    self.row_multiple = jax.device_count()
    self.compiles_ahead = jax.process_count() == 1  # else pmap converts arguments outside of its program
    # As `pmap` cuts its arguments: what is placed so goes in without a copy.
    mesh = jax.sharding.Mesh(np.array(self.devices), (AXIS,))
    self._sharding = NamedSharding(mesh, PartitionSpec(AXIS))

  def map_rows(self, function: Callable, *, trees: int = 1) -> Callable:
    """Returns the function itself: `pmap` gives each device its rows."""
    del trees
    return function

  def place(self, tree: Any, *, donated: bool = True) -> Any:
    """Returns the tree with a leading axis of devices."""
    del donated
    count = len(self.devices)
    return jax.tree.map(
      lambda x: jax.device_put(np.broadcast_to(x, (count, *np.shape(x))), self._sharding), tree
    )

  def place_shard(self, path: str, leaf: jax.ShapeDtypeStruct, read: Callable) -> np.ndarray:
    """Returns a parameter that is being read: whole, to be copied to the devices by `place`."""
    return read((slice(None),) * len(leaf.shape))

  def placed(self, tree: Any) -> Any:
    """Returns the shapes that `place` would give, of a tree of arrays or shapes."""
    return jax.tree.map(lambda x: self._shape(len(self.devices), *x.shape, dtype=x.dtype), tree)

  def placed_rows(self, rows: Rows) -> Rows:
    """Returns the shapes that `place_rows` would give, of all rows of a step."""
    count = jax.device_count()
    return jax.tree.map(
      lambda x: self._shape(len(self.devices), x.shape[0] // count, *x.shape[1:], dtype=x.dtype), rows
    )

  def _shape(self, *shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)

  def collect(self, tree: Any) -> Any:
    """Returns a placed tree as NumPy arrays, from the first local device."""
    return jax.tree.map(lambda x: np.asarray(np.asarray(x.addressable_shards[0].data)[0]), tree)

  def restore_target(self, placed: Any) -> Any:
    """Returns what to restore a collected tree into."""
    return self.collect(placed)

  def span(self, rows: int) -> tuple[int, int]:
    """Returns the first row and the number of rows this process fills, of `rows`."""
    count = rows // jax.process_count()
    return jax.process_index() * count, count

  def place_rows(self, rows: Rows, total: int) -> Rows:
    """Places this process's rows, [R, ...] -> [devices, R / devices, ...]."""
    del total
    count = len(self.devices)
    return jax.tree.map(lambda x: jax.device_put(x.reshape(count, -1, *x.shape[1:]), self._sharding), rows)

  def collect_rows(self, tree: Any) -> Any:
    """Returns values of each row, [devices, R / devices, ...], as NumPy arrays [R, ...] of all rows."""

    def whole(x):
      local = np.concatenate([np.asarray(shard.data)[0] for shard in x.addressable_shards])
      if jax.process_count() == 1:
        return local
      return np.concatenate(multihost_utils.process_allgather(local))

    return jax.tree.map(whole, tree)

  def lift(self, step: Callable, *, donate_state: bool) -> "CompiledStep":
    """Returns the step over placed arguments; it donates its first argument if asked."""
    return CompiledStep(jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate_state else ()))


class Mesh:
  """Rows cut over data and fsdp, parameters over fsdp and tensor, as `sharding.PARTITION` says.

  What is computed of rows is computed by each device for its own: gradients by `over_rows`, sums by
  `sum_rows`, values of each row by `map_rows`.
  """

  axis_name = None
  compiles_ahead = True

  def __init__(
    self, *, data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | int | None = None
  ):
    """Makes the mesh of all devices, or of those given; data = 0 takes what fsdp and tensor leave.

    Args:
      data, fsdp, tensor: sizes of its axes.
      devices: those it is of. A number stands for as many that need not be: steps can be traced, no more.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    if isinstance(devices, int):
      count = devices
    else:
      count = len(devices) if devices else jax.device_count()
    # At least 1, so that axes which are too large are told below with their product.
    data = data or max(1, count // (fsdp * tensor))
    if data * fsdp * tensor != count:
      raise ValueError(
        f"parallel.data x fsdp x tensor is {data} x {fsdp} x {tensor} = {data * fsdp * tensor} "
        f"but there are {count} devices; change the axes to multiply to {count}"
      )
    axes = (data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    self.mesh = AbstractMesh(*axes) if isinstance(devices, int) else _mesh_of(*axes, devices)
    self.row_multiple = self.global_shards = data * fsdp
    self._rows = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

  def shardings(self, tree: Any) -> Any:
    """Returns the sharding of each leaf, from the end of its path and its shape."""
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: self._sharding(sharding.path_of(path), leaf), tree
    )

  def _sharding(self, name: str, leaf: Any) -> NamedSharding:
    return NamedSharding(self.mesh, sharding.spec_of(name, leaf.shape, self.mesh.shape))

  def bytes_together(self, weights: Any, itemsize: int) -> int:
    """Returns the bytes a device takes for weights that are brought together over fsdp in a dtype."""
    total = 0
    for path, leaf in sharding.leaves_by_path(weights):
      spec = sharding.spec_of(path, leaf.shape, self.mesh.shape)
      if sharding.WEIGHTS in spec:
        parts = math.prod(self.mesh.shape[axis] for axis in spec if axis and axis != sharding.WEIGHTS)
        total += math.prod(leaf.shape) // parts * itemsize
    return total

  def over_rows(self, sums: Callable) -> Callable:
    """Returns a function that gives sums over the rows of all devices of one that gives those of its rows.

    Args:
      sums: (params, reference, rows, at) -> (gradients of params, then trees of sums).
    """

    def over_all(params, *others):
      whole, sizes = _shapes_of(params), dict(self.mesh.shape)

      def of_device(*args):
        gradients, *rest = sums(*args)
        return sharding.summed_over_rows(gradients, whole, sizes), jax.lax.psum(rest, ROWS)

      gradients, rest = self._by_device(of_device, 2, (self._specs(params), PartitionSpec()))(params, *others)
      return gradients, *rest

    return over_all

  def sum_rows(self, sums: Callable) -> Callable:
    """`over_rows` without gradients: sums is (params, reference, rows, at) -> trees of sums."""
    return self._by_device(lambda *args: jax.lax.psum(sums(*args), ROWS), 2, PartitionSpec())

  def map_rows(self, function: Callable, *, trees: int = 1) -> Callable:
    """Returns a function that gives values of all rows of one that gives those of a device's.

    Args:
      function: (trees of weights, rows, what all devices have) -> values [R, ...] of its rows.
      trees: how many of its arguments, the first ones, are weights.
    """
    return self._by_device(function, trees, PartitionSpec(ROWS))

  def _by_device(self, function: Callable, trees: int, out_specs: Any) -> Callable:
    """Returns a function that every device computes for its own rows.

    What devices exchange is said in `models.sharding`, but over the tensor axis, where the compiler decides.
    """
    sizes, rings = dict(self.mesh.shape), _rings(self.mesh)

    def over_all(*args):
      weights, rows, others = args[:trees], args[trees], args[trees + 1 :]
      whole = _shapes_of(weights)

      def of_device(*args):
        with sharding.cut(*whole, sizes=sizes, rings=rings):
          return function(*args)

      everywhere = jax.tree.map(lambda _: PartitionSpec(), others)
      # check_vma would have every function say over which axes it varies; custom VJPs do not.
      return jax.shard_map(
        of_device,
        in_specs=(*map(self._specs, weights), jax.tree.map(lambda _: PartitionSpec(ROWS), rows), *everywhere),
        out_specs=out_specs,
        axis_names=self._inside(),
        check_vma=False,
      )(*args)

    return over_all

  def _inside(self) -> set[str]:
    """The axes that functions of one device's rows are mapped over."""
    # An axis of one device has nothing for the compiler to decide, and inside the map kernels run as on one
    # device.
    return set(ROWS) | ({"tensor"} if self.mesh.shape["tensor"] == 1 else set())

  def _specs(self, tree: Any) -> Any:
    """Returns what weights are cut over, of the axes that functions are mapped over."""
    inside = self._inside()

    def of(path, leaf):
      axes = sharding.spec_of(sharding.path_of(path), leaf.shape, self.mesh.shape)
      return PartitionSpec(*(axis if axis in inside else None for axis in axes))

    return jax.tree_util.tree_map_with_path(of, tree)

  def place_shard(self, path: str, leaf: jax.ShapeDtypeStruct, read: Callable) -> jax.Array:
    """Returns a parameter as a global array, of which each local device's part is read in turn.

    Args:
      path: of the parameter in its tree, separated by /.
      leaf: its shape and dtype.
      read: index -> that part of it, as a new NumPy array. The host holds one part at a time.
    """
    cut, parts = self._sharding(path, leaf), []
    places = cut.addressable_devices_indices_map(leaf.shape).items()
    for _, alike in itertools.groupby(sorted(places, key=_span), _span):
      same = list(alike)
      # Devices that hold the same part get copies of one read: the host never holds two parts.
      part = read(same[0][1])
      parts += [jax.device_put(part, device) for device, _ in same]
      # The copy to the devices must be done before the next part is read over its memory.
      jax.block_until_ready(parts)
    return jax.make_array_from_single_device_arrays(leaf.shape, cut, parts)

  def place(self, tree: Any, *, donated: bool = True) -> Any:
    """Returns the tree as global arrays, each device with its part.

    Args:
      tree: arrays of any kind.
      donated: whether a step will be given the arrays for good. Those that are in place already are
        then copied; else they are what is returned.
    """

    def place(leaf, cut):
      if isinstance(leaf, jax.Array) and (leaf.sharding == cut or not leaf.is_fully_addressable):
        # Donated arrays are given away by the first step: an alias of the caller's would go with them.
        return jax.device_put(leaf, cut, may_alias=not donated)
      # By a callback: each device takes its own part, and a process only those of its devices.
      array = np.asarray(leaf)
      return jax.make_array_from_callback(array.shape, cut, lambda index: array[index])

    return jax.tree.map(place, tree, self.shardings(tree))

  def placed(self, tree: Any) -> Any:
    """Returns the shapes, with shardings, that `place` would give, of a tree of arrays or shapes."""
    return jax.tree.map(
      lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), tree, self.shardings(tree)
    )

  def placed_rows(self, rows: Rows) -> Rows:
    """Returns the shapes, with shardings, that `place_rows` would give, of all rows of a step."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._rows), rows)

  def collect(self, tree: Any) -> Any:
    """Returns the tree itself: global arrays are saved as they are."""
    return tree

  def restore_target(self, placed: Any) -> Any:
    """Returns shapes with shardings, to restore into without a copy on one device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)

  def span(self, rows: int) -> tuple[int, int]:
    """Returns the first row and the number of rows this process fills, of `rows`."""
    indices = self._rows.addressable_devices_indices_map((rows,)).values()
    bounds = [index[0].indices(rows)[:2] for index in indices if index]
    first = min(start for start, _ in bounds)
    return first, max(stop for _, stop in bounds) - first

  def place_rows(self, rows: Rows, total: int) -> Rows:
    """Places this process's rows as parts of global arrays of `total` rows."""
    first, _ = self.span(total)

    def place(x):
      def local(index):
        start, stop, _ = index[0].indices(total)
        return x[start - first : stop - first]

      return jax.make_array_from_callback((total, *x.shape[1:]), self._rows, local)

    return jax.tree.map(place, rows)

  def place_all_rows(self, rows: Any) -> Any:
    """Places rows [R, ...] that every process holds all of, as global arrays."""
    total = len(jax.tree.leaves(rows)[0])
    first, count = self.span(total)
    return self.place_rows(jax.tree.map(lambda x: x[first : first + count], rows), total)

  def collect_rows(self, tree: Any) -> Any:
    """Returns values of each row, [R, ...], as NumPy arrays of all rows."""
    if jax.process_count() == 1:
      return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)

  def lift(self, step: Callable, *, donate_state: bool) -> "CompiledStep":
    """Returns the step under `jit`; a donated first argument keeps its shardings in the output.

    While it is traced the mesh is set, for code that depends on how rows are cut.
    """
    if not donate_state:
      return CompiledStep(jax.jit(step), self._context)

    def pinned(state, *args):
      state, metrics = step(state, *args)
      # Without it XLA may choose other shardings for the output, and the second step would compile again.
      return jax.lax.with_sharding_constraint(state, self.shardings(state)), metrics

    return CompiledStep(jax.jit(pinned, donate_argnums=(0,)), self._context)

  def _context(self) -> contextlib.AbstractContextManager:
    if isinstance(self.mesh, AbstractMesh):
      return jax.sharding.use_abstract_mesh(self.mesh)
    return jax.set_mesh(self.mesh)


class EnsembleMesh(Mesh):
  """Runs side by side, each whole on one device: arrays [M, ...] of M runs are cut over the devices.

  What it lifts is a step mapped over runs by `jax.vmap`, in which no mesh is set: a run sees its own
  rows only.
  """

  def over_rows(self, sums: Callable) -> Callable:
    """Returns `sums` itself: a run is on one device, with all of its rows."""
    return sums

  sum_rows = over_rows

  def map_rows(self, function: Callable, *, trees: int = 1) -> Callable:
    """Returns the function itself."""
    del trees
    return function

  def __init__(self, count: int):
    """Takes as many devices as `count` runs need where all devices have one, or as few more, each."""
    devices = jax.devices()
    # Runs side by side must be as many on each device, or all would wait for the fullest.
    each = -(-count // len(devices))
    super().__init__(devices=devices[: -(-count // each)])

  def shardings(self, tree: Any) -> Any:
    """Returns the sharding of each leaf: by its leading axis."""
    return jax.tree.map(lambda _: self._rows, tree)

  def share(self, tree: Any) -> Any:
    """Returns what all runs read, whole on each of the devices."""
    return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

  def _context(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


class CompiledStep:
  """A step over placed arguments, which may be compiled before there are any."""

  def __init__(self, jitted: Any, context: Callable = contextlib.nullcontext):
    self._jitted, self._context = jitted, context
    self._compiled: dict[tuple, jax.stages.Compiled] = {}

  def __call__(self, *args):
    with self._context():
      # What `compile` made ahead is not found by jit's own cache: it is looked up by the shapes of the rows.
      return self._compiled.get(_shapes(args[-1]), self._jitted)(*args)

  def trace(self, *args: Any) -> jax.stages.Traced:
    """Returns the program for arguments, or their shapes as placed, as JAX has it."""
    with self._context():
      return self._jitted.trace(*args)

  def lower(self, *args: Any) -> jax.stages.Lowered:
    """Returns the program for arguments, or their shapes as placed, before its compiler has seen it."""
    with self._context():
      return self._jitted.lower(*args)

  def compile(self, *args: Any) -> jax.stages.Compiled:
    """Compiles for arguments, or their shapes as placed; calls with such a last one use it."""
    compiled = self.lower(*args).compile()
    self._compiled[_shapes(args[-1])] = compiled
    return compiled


def _mesh_of(
  sizes: tuple[int, ...],
  names: tuple[str, ...],
  kinds: tuple[AxisType, ...],
  devices: Sequence[jax.Device] | None,
) -> jax.sharding.Mesh:
  """Returns a mesh whose axes go along the directions of a torus where they can, else along parts of them."""
  try:
    mesh = jax.make_mesh(sizes, names, kinds, devices=devices)
  except NotImplementedError:  # such as a tensor axis of 2 on 4 x 4 x 4 chips
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    mesh = jax.sharding.Mesh(placed, names, axis_types=kinds)
  # jax threads 16 chips of a plane on one line, along which a TPU's compiler sums and does not scatter; on up
  # to 8 it scatters.
  if mesh.devices.size > 8 and hasattr(mesh.devices.flat[0], "coords") and not _rings(mesh):
    in_rows = sorted(mesh.devices.flat, key=_place)
    by_row = jax.sharding.Mesh(np.array(in_rows).reshape(sizes), names, axis_types=kinds)
    mesh = by_row if _rings(by_row) else mesh
  return mesh


def _rings(mesh: jax.sharding.Mesh | AbstractMesh) -> tuple[int, ...]:
  """Returns how many chips the `fsdp` axis has in each direction of their torus, see `gathering.MeshAxis`.

  () where it goes in one direction, or in another order than row by row, or chips have no places.
  """
  if isinstance(mesh, AbstractMesh) or not hasattr(mesh.devices.flat[0], "coords"):
    return ()
  axis = mesh.axis_names.index(sharding.WEIGHTS)
  lines = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis])
  found = {_rings_of(np.array([_place(device) for device in line])) for line in lines}
  return found.pop() if len(found) == 1 else ()


def _place(device: Any) -> tuple[int, ...]:
  # Slices of several pods are one more direction: between them is a slower network.
  return (getattr(device, "slice_index", None) or 0, *device.coords)


def _rings_of(places: np.ndarray) -> tuple[int, ...]:
  """Returns how many places [N, 4] stand in each direction in which they are walked row by row."""
  sizes: list[int] = []
  steps = places - places[0]
  stride, walked = 1, np.zeros_like(steps)
  while stride < len(places):
    direction = np.flatnonzero(steps[stride])
    if len(direction) != 1:
      return ()
    ahead = steps[::stride]
    others = np.delete(ahead, direction, axis=1).any(axis=1)
    size = int(np.argmax(others)) if others.any() else len(ahead)
    if len(ahead) % size:
      return ()
    walked = walked + np.tile(np.repeat(ahead[:size], stride, axis=0), (len(places) // (stride * size), 1))
    sizes.insert(0, size)
    stride *= size
  return tuple(sizes) if len(sizes) > 1 and np.array_equal(walked, steps) else ()


def _shapes_of(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _shapes(tree: Any) -> tuple:
  return tuple(np.shape(leaf) for leaf in jax.tree.leaves(tree))


def _span(place: tuple[Any, tuple[slice, ...] | None]) -> list[int]:
  """Where the part of a (device, index) starts: devices that start alike hold the same."""
  return [part.start or 0 for part in place[1] or ()]


def make_parallel(
  strategy: str, *, data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
):
  """Returns `Replicas` ('pmap') or `Mesh` ('mesh'), over all devices; the latter over those given, if any.

  Raises:
    ValueError: the strategy is unknown, or the axes do not fit it or the devices.
  """
  if strategy == "mesh":
    return Mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
  if strategy != "pmap":
    raise ValueError(f"parallel.strategy is {strategy!r}; it must be one of {STRATEGIES}")
  if (fsdp, tensor) != (1, 1) or data not in (0, jax.device_count()):
    raise ValueError(
      f"parallel.strategy is 'pmap' with data, fsdp, tensor = {data}, {fsdp}, {tensor}; pmap "
      "holds everything on every device: set parallel.strategy='mesh' or leave them 0, 1, 1"
    )
  return Replicas()


def simulate(devices: int) -> None:
  """Lets jax see that many CPU devices, to compile for as many; before any other use of jax."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)


def memory_limit() -> int:
  """Returns the bytes a local device can hold; on CPUs its share of what the process may use."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  # In a container the host's memory is not what the process may use: the least of all that is told.
  limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
    with contextlib.suppress(OSError, ValueError):
      limits.append(int(pathlib.Path(path).read_text()))
  return min(limits) // jax.local_device_count()


def free_memory() -> int:
  """Returns the bytes that a local device has left beside the arrays that live; of processes the least."""
  left = memory_limit() - device_bytes([array for array in jax.live_arrays() if not array.is_deleted()])
  if jax.process_count() > 1:  # all have to come to the same answer
    left = int(np.min(multihost_utils.process_allgather(np.float32(left))))
  return left


def bytes_on_one(tree: Any) -> int:
  """Returns the bytes one device holds of a tree of shapes with shardings, as `placed` gives them."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def device_bytes(tree: Any) -> int:
  """Returns the bytes of a placed tree on the first local device."""
  device = jax.local_devices()[0]
  return sum(
    math.prod(shard.data.shape) * shard.data.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )
