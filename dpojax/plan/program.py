"""What a compiled program costs a device, read in its optimized HLO: collectives, products, memory's traffic.

XLA's own cost analysis counts the body of a loop once, and knows no collectives. Here every instruction
counts as often as it runs: loops by the trip count that XLA found, or by `platform.at_most` where only the
running program knows it. Text is all that a compiler for chips that are not there gives.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dpojax.kernels.platform import AT_MOST

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^\s*(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_NAMES = re.compile(r"%([\w.\-]+)")
_FREE = (
  "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier "
  "while conditional call iota rng-get-and-update-state add-dependency domain"
).split()


class Array(NamedTuple):
  """A part of a result: its dtype, its dimensions, and whether it lies in the chip itself, not in HBM."""

  dtype: str
  dims: tuple[int, ...]
  near: bool

  @property
  def bytes(self) -> float:
    size = _BYTES.get(self.dtype)
    if size is None:
      size = int(re.search(r"\d+", self.dtype)[0]) / 8
    return size * math.prod(self.dims)


class Instruction(NamedTuple):
  """A line of a computation; `attributes` is all that stands behind the operands, of a constant its value."""

  name: str
  opcode: str
  result: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str

  def called(self, *keys: str) -> list[str]:
    """Returns the computations that attributes of such names call."""
    found = []
    for key in keys:
      for one, many in re.findall(rf"\b{key}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes):
        found += [one] if one else [name.strip().lstrip("%") for name in many.split(",")]
    return found


class Collective(NamedTuple):
  """What devices exchange at one place of the program.

  Attributes:
    kind: of `KINDS`.
    dtype, dims: of the array that is whole: what is gathered, or what is cut or summed.
    devices: how many take part in one exchange.
    times: how often it runs in a step.
    bytes: what a device receives in all of them, as of the algorithms that send least: of g devices
      (g - 1) / g of the whole, in an all-reduce twice that.
    name: the operation of the model it belongs to, as JAX names it.
  """

  kind: str
  dtype: str
  dims: tuple[int, ...]
  devices: int
  times: float
  bytes: float
  name: str


class Costs(NamedTuple):
  """What a step costs a device.

  Attributes:
    collectives: all of them.
    flops: of matrix products, kernels of our own left out.
    memory_bytes: what is read from and written to its main memory, if nothing is read twice at one place.
    kernels: how often kernels of our own run, by name.
    unbounded: loops of which neither XLA nor a name says how often they run, counted once.
  """

  collectives: tuple[Collective, ...]
  flops: float
  memory_bytes: float
  kernels: dict[str, float]
  unbounded: int

  def bytes_by_kind(self) -> dict[str, float]:
    """Returns the bytes of collectives by kind, of those kinds that there are."""
    kinds = {kind: sum(each.bytes for each in self.collectives if each.kind == kind) for kind in KINDS}
    return {kind: total for kind, total in kinds.items() if total}


def costs(text: str) -> Costs:
  """Returns what a program costs, from its optimized HLO."""
  program = _Program(text)
  collectives, kernels, flops, traffic = [], {}, 0.0, 0.0
  for computation, times in program.times.items():
    for instruction in program.computations[computation].values():
      flops += times * program.flops(computation, instruction)
      # Inside a fusion nothing goes to memory: its ends are counted where it stands.
      if computation not in program.fused:
        traffic += times * program.traffic(computation, instruction)
      if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
        name = re.search(r'op_name="([^"]*)"', instruction.attributes)
        name = name[1].rsplit("/", 1)[-1] if name else "kernel"
        kernels[name] = kernels.get(name, 0.0) + times
      collectives += program.collectives(computation, instruction, times)
  return Costs(tuple(collectives), flops, traffic, kernels, program.unbounded)


class _Program:
  """Computations by name, how often each runs, and which are bodies of fusions."""

  def __init__(self, text: str):
    self.computations, entry = _parse(text)
    self.times: dict[str, float] = {}
    self.fused: set[str] = set()
    self.owner: dict[str, str] = {}
    self.unbounded = 0
    self._chains: set[tuple[str, str]] = set()
    self._visit(entry, 1.0, False, entry)

  def _visit(self, name: str, times: float, fused: bool, owner: str) -> None:
    self.times[name] = self.times.get(name, 0.0) + times
    self.owner[name] = owner
    if fused:
      self.fused.add(name)
    for instruction in self.computations[name].values():
      if instruction.opcode == "while":
        rounds = self._rounds(instruction)
        for called in instruction.called("body", "condition"):
          self._visit(called, times * rounds, fused, called)
      elif instruction.opcode in ("fusion", "call", "async-start", "conditional"):
        inner = fused or instruction.opcode in ("fusion", "async-start")
        for called in instruction.called(
          "calls", "to_apply", "branch_computations", "true_computation", "false_computation"
        ):
          self._visit(called, times, inner, owner if inner else called)

  def _rounds(self, loop: Instruction) -> int:
    """Returns how often a loop runs: known, told by its name, or the constant that its counter is held to."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    named = re.search(rf'op_name="[^"]*{AT_MOST}(\d+)\)*/while"', loop.attributes)
    if known or named:
      return int((known or named)[1])
    # A counter that starts at 0 and is held to a constant runs as often as the constant says.
    condition = self.computations[loop.called("condition")[0]]
    for each in condition.values():
      if each.opcode == "compare" and "direction=LT" in each.attributes:
        limit = condition.get(each.operands[1])
        if limit is not None and limit.opcode == "constant" and limit.operands:
          return int(limit.operands[0])
    self.unbounded += 1
    return 1

  def _operands(self, computation: str, instruction: Instruction) -> list[tuple[Array, ...]]:
    here = self.computations[computation]
    return [here[name].result for name in instruction.operands if name in here]

  def flops(self, computation: str, instruction: Instruction) -> float:
    """Returns the multiplications and additions of a product of matrices, 0 of anything else."""
    if instruction.opcode not in ("dot", "convolution"):
      return 0.0
    left, right = (result[0].dims for result in self._operands(computation, instruction)[:2])
    out = math.prod(instruction.result[0].dims)
    if instruction.opcode == "dot":
      axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
      return 2.0 * out * math.prod(left[int(i)] for i in axes[1].split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([-\dx_]+)", window[1])) if window else {}
    summed = float(right[labels[2].index("i")])
    for axis in range(len(window["size"].split("x")) if "size" in window else 0):
      dims = (left[labels[1].index(str(axis))], instruction.result[0].dims[labels[3].index(str(axis))])
      summed *= _taps(*dims, *_window_of(window, axis)) / dims[1]
    return 2.0 * out * summed

  def traffic(self, computation: str, instruction: Instruction) -> float:
    """Returns the bytes that an instruction moves to and from main memory."""
    opcode, result = instruction.opcode, instruction.result
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
      return 0.0
    operands = self._operands(computation, instruction)
    far = lambda arrays: sum(array.bytes for array in arrays if not array.near)
    if opcode == "fusion":
      body = self.computations[instruction.called("calls")[0]]
      return _fusion_traffic(body, result)
    # What is cut out is read and written; the rest of the operand is not touched.
    if opcode in ("dynamic-slice", "slice", "gather", "copy-start"):
      return 2 * far(result[:1])
    # Written in place: of the whole only the part moves.
    if opcode == "dynamic-update-slice":
      return 2 * far(operands[1])
    # Of what runs beside other work the start is counted, its end is free: see above.
    if opcode.endswith("-start"):
      return far(array for operand in operands for array in operand) * 2
    return far(result) + sum(far(operand) for operand in operands)

  def collectives(self, computation: str, instruction: Instruction, times: float) -> Iterator[Collective]:
    """Yields what an instruction exchanges; a sum that is cut at once is a reduce-scatter."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      return
    # One that runs beside products is written once for each of them, as links of a chain.
    if chain := re.search(r'chain_id="(\w+)"', instruction.attributes):
      key = self.owner[computation], chain[1]
      if key in self._chains:
        return
      self._chains.add(key)
    operands = [array for operand in self._operands(computation, instruction) for array in operand]
    results = list(instruction.result)
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
      results = results[len(operands) : 2 * len(operands)] or results  # (operands, results, contexts)
    devices = _group_size(instruction.attributes)
    whole = results if kind == "all-gather" else operands
    here = self.computations[computation]
    if kind == "all-reduce" and computation in self.fused and _is_cut(instruction.name, here):
      kind = "reduce-scatter"
    # A device has its own part already.
    share = (devices - 1) / devices if devices else 1.0
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    for array in whole:
      if array.dims or kind == "all-reduce":
        yield Collective(
          kind, array.dtype, array.dims, devices, times, times * factor * array.bytes, name[1] if name else ""
        )


def _window_of(window: dict[str, str], axis: int) -> tuple[int, ...]:
  """Returns size, stride, padding before, and dilations of left and right of an axis of a window."""
  of = lambda key, default: window[key].split("x")[axis] if key in window else default
  return (
    int(of("size", "1")),
    int(of("stride", "1")),
    int(of("pad", "0_0").split("_")[0]),
    int(of("lhs_dilate", "1")),
    int(of("rhs_dilate", "1")),
  )


def _taps(length, out, size, stride, before, left_dilation, right_dilation) -> int:
  """Returns how many elements, not padding, a window meets at all its places along an axis.

  XLA writes the further axes of a product of matrices as windows that slide over little else than padding.
  """
  count = 0
  for tap in range(size):
    places = np.arange(out) * stride - before + tap * right_dilation
    count += np.sum((places >= 0) & (places <= (length - 1) * left_dilation) & (places % left_dilation == 0))
  return int(count)


def _is_cut(name: str, computation: dict[str, Instruction]) -> bool:
  """Whether what a computation of a fusion does with a value is to cut it."""
  users = [each for each in computation.values() if name in each.operands]
  through = ("bitcast", "reshape", "copy", "transpose", "convert", "get-tuple-element")
  return bool(users) and all(
    each.opcode == "dynamic-slice" or (each.opcode in through and _is_cut(each.name, computation))
    for each in users
  )


def _fusion_traffic(body: dict[str, Instruction], result: tuple[Array, ...]) -> float:
  """Returns what a fusion reads and writes: of operands that it cuts, and results it writes into, a part."""
  total, written_into = 0.0, set()
  for each in body.values():
    if each.opcode == "dynamic-update-slice":
      written_into.add(each.operands[0])
  users: dict[str, list[Instruction]] = {}
  for each in body.values():
    for name in each.operands:
      users.setdefault(name, []).append(each)
  in_place = 0.0
  for each in body.values():
    if each.opcode == "dynamic-update-slice" and each.operands[1] in body:
      in_place += sum(array.bytes for array in body[each.operands[1]].result)
    if each.opcode != "parameter" or each.result[0].near:
      continue
    readers = users.get(each.name, [])
    if readers and all(reader.opcode in ("dynamic-slice", "gather") for reader in readers):
      total += sum(reader.result[0].bytes for reader in readers)
    elif each.name not in written_into:
      total += sum(array.bytes for array in each.result)
  whole = sum(array.bytes for array in result if not array.near)
  return total + (min(whole, in_place) if in_place else whole)


def _group_size(attributes: str) -> int:
  """Returns how many devices exchange, from the groups; 0 where they are not told."""
  # Three ways in which XLA writes the same: by axes of a mesh, as a matrix of devices, or all listed.
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
    return int(found[2])
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(found[1].split(","))
  return 0


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if found := _LINE.match(line):
      if current is not None:
        instruction = _instruction(found[1], line[found.end() :])
        current[instruction.name] = instruction
    elif line.endswith("{") and (found := _HEAD.match(line)):
      current = computations.setdefault(found[1], {})
      if line.lstrip().startswith("ENTRY"):
        entry = found[1]
    elif line.strip() == "}":
      current = None
  return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
  kind, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
  opcode, rest = rest.strip().split("(", 1)
  operands, attributes = _balanced("(" + rest)
  names = (operands[1:-1],) if opcode == "constant" else tuple(_NAMES.findall(operands))
  return Instruction(name, opcode, _arrays(kind), names, attributes)


def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(dtype, tuple(int(x) for x in dims.split(",") if x), "S(1)" in (layout or ""))
    for dtype, dims, layout in _ARRAY.findall(text)
  )


def _balanced(text: str) -> tuple[str, str]:
  """Cuts a text that starts with ( behind the ) that closes it."""
  depth = 0
  for at, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[: at + 1], text[at + 1 :]
  return text, ""


def to_json(found: Costs) -> str:
  """Returns costs as text."""
  return json.dumps(found._replace(collectives=[each._asdict() for each in found.collectives])._asdict())


def from_json(text: str) -> Costs:
  """The inverse of `to_json`."""
  fields = json.loads(text)
  collectives = tuple(Collective(**each | {"dims": tuple(each["dims"])}) for each in fields["collectives"])
  return Costs(**fields | {"collectives": collectives})
