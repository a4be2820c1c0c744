"""Hugging Face folders in and out: config.json and safetensors, tensor by tensor.

Files are mapped into memory, and a parameter is a view of the tensor that holds it, transposed,
split and cut as the parameter asks. So only what a caller places is ever read, a folder is written
a tensor at a time, and nobody holds the model twice. The files are mapped here and not by the
safetensors package because its slices are copies, without strides. Of a folder in a bucket the ranges that
a view lies in are fetched before it is read.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from dpojax.models import families, peft, ranges, tensors, transformer
from dpojax.models.config import ModelConfig
from dpojax.models.families import DTYPES, Family, HuggingFaceError, Tensor
from dpojax.models.sharding import path_of
from dpojax.models.tensors import read_json
from dpojax.runtime import paths
from dpojax.runtime.disk import disk_errors

SHARD_BYTES = 5 * 10**9
"""Largest file a folder is written in, but for a tensor that is larger."""

BLOCK_BYTES = 2**26
"""Of a file, what is in memory at once while it is read: 64 MiB of parameters."""

TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.jinja",
  "chat_template.json",
)

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
Place = Callable[[str, jax.ShapeDtypeStruct, Read], Any]
"""(path of a parameter, its shape and dtype, read) -> the parameter where it is to be kept, where
`read(index)` gives the part at an index as a new array."""


class Model(NamedTuple):
  """A model read from a folder: its config, and its params as `place` has returned them."""

  config: ModelConfig
  params: Any


def is_model_folder(path: str | os.PathLike) -> bool:
  """Returns whether a path is a Hugging Face model: a config.json there names a model type.

  So is an adapter of PEFT's, together with the base it names.
  """
  if peft.is_adapter_folder(path):
    return True
  try:
    return "model_type" in read_json(paths.of(path) / "config.json")
  except HuggingFaceError:
    return False


def is_model(name: str) -> bool:
  """Returns whether a name is a Hugging Face model: a folder that holds one, or a hub name."""
  looks_like_one = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
  return is_model_folder(name) or bool(looks_like_one) and not paths.of(name).exists()


def locate(name: str | os.PathLike) -> paths.Path:
  """Returns the folder itself, or that of a hub name, fetched unless it was fetched before.

  Raises:
    HuggingFaceError: there is no such folder and no such model can be fetched.
  """
  folder = paths.of(name)
  if folder.is_dir():
    return folder
  _check_may_be_on_the_hub(folder)
  with _fetching(name):
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        str(name),
        allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
        # Some repositories hold the weights once more, in their maker's form or in folders of other formats.
        ignore_patterns=["*/*", "consolidated*"],
      )
    )


def read_config(name: str | os.PathLike) -> ModelConfig:
  """Returns the dimensions of a model; of a folder or hub name only its config.json is read.

  Raises:
    HuggingFaceError: there is none, or its family is not supported.
  """
  folder = paths.of(name)
  if peft.is_adapter_folder(folder):
    return read_config(_base(folder))
  if not folder.is_dir():
    _check_may_be_on_the_hub(folder)
    with _fetching(name):
      folder = pathlib.Path(huggingface_hub.hf_hub_download(str(name), "config.json")).parent
  return families.read_config(read_json(folder / "config.json"))


def _check_may_be_on_the_hub(folder: paths.Path) -> None:
  if paths.is_remote(folder):
    raise HuggingFaceError(f"{folder} does not exist; give a folder with config.json and *.safetensors")


@contextlib.contextmanager
def _fetching(name: str | os.PathLike) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # huggingface_hub and what carries it raise many kinds
    reason = str(error).strip().partition("\n")[0]
    raise HuggingFaceError(
      f"model {str(name)!r} is no folder and cannot be fetched from the hub ({reason}); give a "
      "folder with config.json and *.safetensors, or a hub name while there is a network"
    ) from error


def _base(folder: paths.Path) -> str:
  """The base an adapter is on, which is a model itself."""
  base = peft.read_settings(folder)["base_model_name_or_path"]
  if peft.is_adapter_folder(base):
    raise HuggingFaceError(
      f"the adapter {folder} is on {base!r}, an adapter too; merge that one with PEFT and save the model"
    )
  return base


def load(name: str | os.PathLike, *, place: Place | None = None, dtype: str = "float32", **changes) -> Model:
  """Returns the model of a folder or hub name; that of an adapter of PEFT's is merged into its base.

  Args:
    name: the folder or hub name.
    place: where a parameter is kept, and so which parts of it are read; by default whole, as NumPy
      arrays. `parallel.Mesh.place_shard` reads for each device its own part.
    dtype: of the parameters, 'float32' or 'bfloat16'.
    **changes: what the weights leave open in the config: dtype, remat, attention, scan_layers.

  Raises:
    HuggingFaceError: the folder is not there or not supported, or its tensors are not those of
      the model.
  """
  folder, changes_of = locate(name), {}
  if peft.is_adapter_folder(folder):
    changes_of = peft.read(folder)[1]
    folder = locate(_base(folder))
  values = read_json(folder / "config.json")
  family = families.family_of(values)
  config = dataclasses.replace(families.read_config(values), **changes)
  files = _Files(folder)
  stacks = _stacks(config, family)
  names = _find(stacks, family, files, config)
  published = _published(folder, values, family, names, files)
  _check_changes(changes_of, names, family, files)

  def tensor(name):
    array = files.array(names[name])
    if name in changes_of:
      return changes_of[name].added_to(files.fetch(names[name], array), inputs_first=family.inputs_first)
    return array

  def placed(path, leaf):
    path = path_of(path)
    stack = stacks[path]

    def read(index: Index) -> np.ndarray:
      part = np.empty([len(range(*i.indices(n))) for i, n in zip(index, leaf.shape)], dtype)
      layers, index = (part, index) if stack.layered else (part[None], (slice(None), *index))
      for layer, piece in zip(layers, stack.pieces[index[0]], strict=True):
        source = piece.of(tensor(piece.name), config)[index[1:]]
        if piece.name not in changes_of:
          files.fetch(names[piece.name], source)
        # Part by part, each let go of once it is copied: of the file no more than that is in memory.
        rows = max(1, len(layer) * BLOCK_BYTES // max(1, layer.nbytes))
        for i in range(0, len(layer), rows):
          layer[i : i + rows] = source[i : i + rows]
          files.forget(names[piece.name])
      return part

    return (place or _whole)(path, jax.ShapeDtypeStruct(leaf.shape, dtype), read)

  params = jax.tree_util.tree_map_with_path(placed, _shapes(config))
  ranges.forget_all()
  return Model(dataclasses.replace(config, published=published), params)


def save(
  folder: str | os.PathLike,
  config: ModelConfig,
  params: Any,
  *,
  dtype: str = "",
  shard_bytes: int = SHARD_BYTES,
  **token_ids,
) -> None:
  """Writes a model as a folder that `transformers` reads.

  A model that was read from a folder gets that folder's config.json, generation_config.json, tensor
  names and dtypes.

  Args:
    folder: where to; made if missing.
    config: the model's.
    params: its params, NumPy or JAX arrays, whole or in parts over devices.
    dtype: of all tensors; '' keeps those of the folder the model was read from, or float32.
    shard_bytes: largest file, but for a tensor that is larger.
    **token_ids: bos_token_id, eos_token_id (one or several) and pad_token_id, for both files; None
      leaves what the model came with.

  Raises:
    HuggingFaceError: the folder holds something already, or the model has no form in one.
    DiskError: the disk is full or cannot be written.
  """
  folder = paths.of(folder)
  if not paths.is_empty(folder):
    raise HuggingFaceError(f"{folder} is not empty; give a folder that is, or a new one")
  if "reward_head" in params:
    raise HuggingFaceError(
      "the model has a reward head, for which causal language models of transformers have no "
      "place; write a policy, or take the head out of params"
    )
  published = (
    json.loads(config.published)
    if config.published
    else {"config": families.write_config(config) | dict.fromkeys(token_ids), "dtype": "float32"}
  )
  token_ids = {key: value for key, value in token_ids.items() if value is not None}
  values = published["config"] | token_ids
  if dtype:
    # Newer files say "dtype" and older ones "torch_dtype": with both they could contradict each other.
    values = {key: value for key, value in values.items() if key != "dtype"} | {"torch_dtype": dtype}
  family = families.family_of(values)
  arrays = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  stacks = _stacks(config, family)
  if arrays.keys() != stacks.keys():
    raise HuggingFaceError(
      f"params are not those of the config: {_some(arrays.keys() ^ stacks.keys())} are in one of them only"
    )

  holders = collections.defaultdict(list)  # of each tensor: its pieces, and where they are
  for path, stack in stacks.items():
    for i, piece in enumerate(stack.pieces):
      holders[piece.name].append((piece, path, (i,) if stack.layered else ()))
  plan, parts_of = {}, {}
  for name, parts in holders.items():
    actual, stored = _as_published(name, published, family)
    shape = families.dimensions(config, parts[0][0].tensor.shape)
    plan[actual] = _Entry(dtype or stored, shape)
    parts_of[actual] = parts

  def tensor(name):
    entry = plan[name]
    whole = np.empty(entry.shape, jnp.dtype(entry.dtype))
    # What is too large for float16 would be written as infinity.
    with np.errstate(over="raise"):
      for piece, path, index in parts_of[name]:
        try:
          piece.of(whole, config)[...] = np.asarray(arrays[path][index])
        except FloatingPointError as error:
          raise HuggingFaceError(f"{name} does not fit into {entry.dtype}; choose another dtype") from error
    return whole

  with disk_errors(folder):
    paths.make_folder(folder)
    _write_shards(folder, plan, tensor, shard_bytes)
    save_generation_config(folder, config, **token_ids)
    _write_json(folder / "config.json", values)  # last: a folder is a model once it is all there


def tensor_shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors of the model that a config.json describes, by their names.

  Raises:
    HuggingFaceError: its family, or a value, is not supported.
  """
  config, family = families.read_config(values), families.family_of(values)
  return {
    piece.name: families.dimensions(config, piece.tensor.shape)
    for stack in _stacks(config, family).values()
    for piece in stack.pieces
  }


def write_tensors(
  folder: str | os.PathLike, values: dict[str, Any], tensor: Callable[[str], np.ndarray], dtype: str
) -> None:
  """Writes a model that is at hand tensor by tensor: its safetensors files and its config.json.

  Args:
    folder: where to; made if missing.
    values: the config.json.
    tensor: name -> the tensor, in `dtype`; asked for once each, one after another.
    dtype: of all of them.

  Raises:
    HuggingFaceError: the family is not supported.
    DiskError: the disk is full or cannot be written.
  """
  plan = {name: _Entry(dtype, shape) for name, shape in tensor_shapes(values).items()}
  with disk_errors(folder):
    folder = paths.of(folder)
    paths.make_folder(folder)
    _write_shards(folder, plan, tensor, SHARD_BYTES)
    _write_json(folder / "config.json", values)


def save_generation_config(
  folder: str | os.PathLike, config: ModelConfig, **token_ids: int | list[int] | None
) -> None:
  """Writes a folder's generation_config.json, if there is anything to say in it; see `save`.

  Raises:
    DiskError: the disk is full or cannot be written.
  """
  values = json.loads(config.published or "{}").get("generation_config", {})
  values |= {key: value for key, value in token_ids.items() if value is not None}
  if values:
    with disk_errors(folder):
      _write_json(paths.of(folder) / "generation_config.json", values)


def copy_tokenizer(source: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Copies the tokenizer files of one folder into another.

  Raises:
    DiskError: the disk is full or cannot be written.
  """
  with disk_errors(folder):
    for name in TOKENIZER_FILES:
      if (paths.of(source) / name).is_file():
        (paths.of(folder) / name).write_bytes((paths.of(source) / name).read_bytes())


class _Piece(NamedTuple):
  """What a tensor holds of a parameter, all of it or one layer, and the shape it has there."""

  name: str
  tensor: Tensor
  shape: tuple[int, ...]

  def of(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Returns the piece as a view of the tensor."""
    return self.tensor.part(array, config).reshape(self.shape, copy=False)


class _Stack(NamedTuple):
  """The pieces of a parameter: one a layer along its first axis if `layered`, else the only one."""

  pieces: list[_Piece]
  layered: bool


class _Entry(NamedTuple):
  """A tensor to be written."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class _Files:
  """The tensors of a folder's safetensors files, mapped into memory."""

  def __init__(self, folder: paths.Path):
    """Reads the files' headers.

    Raises:
      HuggingFaceError: a file is missing or damaged, or is none of the folder's.
    """
    index = folder / "model.safetensors.index.json"
    files = tensors.shards(index) if index.is_file() else {"model.safetensors": []}
    self.entries: dict[str, tensors.Entry] = {}
    for name, promised in sorted(files.items()):
      found = tensors.open_tensors(folder / name)
      absent, twice = set(promised) - found.keys(), self.entries.keys() & found.keys()
      if absent:
        raise HuggingFaceError(
          f"{index} says that {name} has {_some(absent)}, but it has not; fetch both again"
        )
      if twice:
        raise HuggingFaceError(
          f"{folder / name} has {_some(twice)}, and so has another of the folder's files; fetch them again"
        )
      self.entries |= found

  def array(self, name: str) -> np.ndarray:
    """Returns a tensor, of which only what is looked at is read.

    Raises:
      HuggingFaceError: its dtype is not supported.
    """
    return self.entries[name].array(name)

  def fetch(self, name: str, view: np.ndarray) -> np.ndarray:
    """Returns a view of a tensor, with what it needs of a bucket's file in memory."""
    return self.entries[name].fetch(view)

  def forget(self, name: str) -> None:
    """Lets the system take back the memory a tensor was read into."""
    self.entries[name].forget()


def _shapes(config: ModelConfig) -> Any:
  """The shapes of the params a folder holds, as a tree."""
  # What does not change a shape is made alike, for the cache to find it.
  return _shapes_of(dataclasses.replace(config, reward_head=False, published="", dtype="float32"))


@functools.cache
def _shapes_of(config: ModelConfig) -> Any:
  return jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))


def _whole(path: str, leaf: jax.ShapeDtypeStruct, read: Read) -> np.ndarray:
  return read((slice(None),) * len(leaf.shape))


def _stacks(config: ModelConfig, family: Family) -> dict[str, _Stack]:
  stacks, period = {}, len(config.layer_windows)
  for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(config)):
    path = path_of(path)
    head, _, name = path.partition("/")
    layers, layered = [0], head == "layers"
    if layered:
      first = 0
      if period > 1:
        block, _, name = name.partition("/")
        first = int(block.removeprefix("block_"))
      layers = range(first, config.scanned_layers, period)
    elif head.startswith("layer_"):
      layers = [int(head.removeprefix("layer_"))]
    else:
      name = path
    tensor = family.tensors[name]
    shape = leaf.shape[1:] if layered else leaf.shape
    stacks[path] = _Stack([_Piece(tensor.name.format(layer), tensor, shape) for layer in layers], layered)
  return stacks


def _find(stacks: dict[str, _Stack], family: Family, files: _Files, config: ModelConfig) -> dict[str, str]:
  """What each tensor is called in the files, after a check that they hold these and no others."""
  # Folders of a model saved without its output head have names without its prefix.
  bare = not any(name.startswith(family.prefix) for name in files.entries)
  wanted = {piece.name: piece for stack in stacks.values() for piece in stack.pieces}
  names = {}
  for name in wanted:
    plain = name.removeprefix(family.prefix) if bare else name
    names[name] = family.aliases[plain] if (plain not in files.entries and plain in family.aliases) else plain
  missing = set(names.values()) - files.entries.keys()
  extra = {name for name in files.entries.keys() - set(names.values()) if not name.endswith(family.ignored)}
  head = family.tensors["head"].name
  if config.tie_embeddings and extra & {head, family.aliases.get(head)}:
    (copy,) = extra & {head, family.aliases.get(head)}
    # A head that is said to be tied and is another one would be lost without a word.
    if not _same(files, copy, names[family.tensors["embed/embedding"].name]):
      raise HuggingFaceError(
        f'config.json has "tie_word_embeddings": true but {copy} is not the input embedding; '
        "set it to false to keep both"
      )
    extra.remove(copy)
  if missing or extra:
    raise HuggingFaceError(
      "the tensors are not those of the model config.json describes: "
      + "; ".join(
        f"{what} {_some(which)}"
        for what, which in (("missing are", missing), ("unknown are", extra))
        if which
      )
    )
  for name, piece in wanted.items():
    shape = families.dimensions(config, piece.tensor.shape)
    if files.entries[names[name]].shape != shape:
      raise HuggingFaceError(
        f"tensor {names[name]} is {list(files.entries[names[name]].shape)} but config.json makes it "
        f"{list(shape)}"
      )
  return names


def _check_changes(
  changes_of: dict[str, peft.Change], names: dict[str, str], family: Family, files: _Files
) -> None:
  """Refuses an adapter that is not one of these tensors."""
  unknown = changes_of.keys() - names.keys()
  if unknown:
    raise HuggingFaceError(
      f"the adapter changes {_some(unknown)}, of which the base has none; give the base it is of"
    )
  for name, change in changes_of.items():
    shape = (len(change.b), change.a.shape[-1])
    there = files.entries[names[name]].shape
    if shape[:: -1 if family.inputs_first else 1] != there or change.b.shape[-1] != len(change.a):
      raise HuggingFaceError(
        f"the adapter's change of {name} is {list(shape)} outputs and inputs, of rank "
        f"{len(change.a)} and {change.b.shape[-1]}, but the tensor is {list(there)}"
      )


def _same(files: _Files, name: str, other: str) -> bool:
  first, second = (files.fetch(each, files.array(each)) for each in (name, other))
  return (
    first.shape == second.shape
    and first.ndim > 0
    and all(np.array_equal(first[i : i + 4096], second[i : i + 4096]) for i in range(0, len(first), 4096))
  )


def _published(folder: paths.Path, values: dict, family: Family, names: dict[str, str], files: _Files) -> str:
  """What `save` needs to write the same folder again, as JSON."""
  dtypes = collections.Counter(files.entries[name].dtype for name in names.values())
  published = {
    "config": values,
    "dtype": dtypes.most_common(1)[0][0],
    "bare": not any(name.startswith(family.prefix) for name in names.values()),
  }
  if (folder / "generation_config.json").is_file():
    generation = published["generation_config"] = read_json(folder / "generation_config.json")
    ids = generation.get("eos_token_id")
    if not all(type(each) in (int, type(None)) for each in (ids if isinstance(ids, list) else [ids])):
      raise HuggingFaceError(
        f'{folder / "generation_config.json"} has "eos_token_id": {families.shown(ids)}; it must be an id, '
        "or a list of them"
      )
  # What differs from the rest is kept by name, so that a folder is written as it was read.
  others = {}
  for name, actual in names.items():
    found = (actual, files.entries[actual].dtype)
    if found != _as_published(name, published, family):
      others[name] = found
  return json.dumps(published | ({"others": others} if others else {}))


def _as_published(name: str, published: dict, family: Family) -> tuple[str, str]:
  """A tensor's name and dtype in the folder a model was read from."""
  if name in published.get("others", {}):
    return tuple(published["others"][name])
  plain = name.removeprefix(family.prefix) if published.get("bare") else name
  return plain, published["dtype"]


def _write_shards(
  folder: paths.Path, plan: dict[str, _Entry], tensor: Callable[[str], np.ndarray], shard_bytes: int
) -> None:
  shards, room = [], 0
  # Wide dtypes first, behind a header of a multiple of 8 bytes: then every tensor starts at a multiple of its
  # own size without a hole, and can be mapped.
  for name in sorted(plan, key=lambda name: -jnp.dtype(plan[name].dtype).itemsize):
    if not shards or plan[name].nbytes > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= plan[name].nbytes
  file_of = lambda i: (
    "model.safetensors" if len(shards) == 1 else (f"model-{i + 1:05}-of-{len(shards):05}.safetensors")
  )
  for i, names in enumerate(shards):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
      start, end = end, end + plan[name].nbytes
      header[name] = {
        "dtype": DTYPES[plan[name].dtype],
        "shape": plan[name].shape,
        "data_offsets": [start, end],
      }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / file_of(i)).open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for name in names:
        file.write(tensor(name).reshape(-1).view(np.uint8).data)
  if len(shards) > 1:
    _write_json(
      folder / "model.safetensors.index.json",
      {
        "metadata": {"total_size": sum(entry.nbytes for entry in plan.values())},
        "weight_map": {name: file_of(i) for i, names in enumerate(shards) for name in names},
      },
    )


def _write_json(path: paths.Path, values: dict) -> None:
  path.write_bytes((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _some(names) -> str:
  names = sorted(name[:200] for name in names)
  return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
