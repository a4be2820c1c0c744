"""Adapters in the form of PEFT: adapter_config.json and adapter_model.safetensors, in and out.

Where a family keeps several projections in one tensor (GPT-2's c_attn, NeoX's query_key_value) PEFT
has one adapter for it and we have one a projection. Ours stand there side by side: the A of all of
them, and a B that is 0 outside the block of each. Its rank is then theirs together, and its alpha
grows with it, so that the scale stays.
"""

import collections
import json
import os
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from dpojax.models import families, transformer
from dpojax.models.config import ModelConfig
from dpojax.models.families import Family, HuggingFaceError
from dpojax.models.lora import TARGETS, WHOLE, Lora
from dpojax.models.tensors import open_tensors, read_json, shown
from dpojax.runtime import paths
from dpojax.runtime.disk import disk_errors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Change(NamedTuple):
  """What an adapter adds to a matrix: scale B A, of `a` [rank, inputs] and `b` [outputs, rank]."""

  a: np.ndarray
  b: np.ndarray
  scale: float

  def added_to(self, tensor: np.ndarray, *, inputs_first: bool) -> np.ndarray:
    """Returns tensor [outputs, inputs] + scale B A in float32, or the same of transposed ones."""
    change = np.float32(self.scale) * (self.b.astype(np.float32) @ self.a.astype(np.float32))
    return np.asarray(tensor, np.float32) + (change.T if inputs_first else change)


def is_adapter_folder(path: str | os.PathLike) -> bool:
  """Returns whether a path is a folder of PEFT's."""
  return (paths.of(path) / CONFIG).is_file()


def read(folder: str | os.PathLike) -> tuple[str, dict[str, Change]]:
  """Returns the name of the base an adapter is on, and its changes by the name of their tensor.

  Raises:
    HuggingFaceError: a file is missing or damaged, or the adapter is no plain LoRA.
  """
  folder = paths.of(folder)
  settings = read_settings(folder)
  try:
    entries = open_tensors(folder / TENSORS)
    tensors = {name: entry.fetch(entry.array(name)) for name, entry in entries.items()}
  except HuggingFaceError as error:
    raise HuggingFaceError(
      f"the adapter {folder} cannot be read ({error}); it needs {CONFIG} and {TENSORS}"
    ) from error
  for key, harmless in (
    ("peft_type", ("LORA",)),
    ("use_dora", (None, False)),
    ("bias", (None, "none")),
    ("lora_bias", (None, False)),
    ("modules_to_save", (None, [])),
    ("trainable_token_indices", (None, [])),
  ):
    if settings.get(key) not in harmless:
      raise HuggingFaceError(
        f'{folder / CONFIG} has "{key}": {shown(settings.get(key))}, which is not supported; merge the '
        "adapter with PEFT and save the model"
      )
  pairs = collections.defaultdict(dict)
  for name, tensor in tensors.items():
    found = re.fullmatch(re.escape(PREFIX) + r"(.*)\.lora_([AB])\.weight", name)
    if not found:
      raise HuggingFaceError(
        f"the adapter {folder} has a tensor {name[:200]}, which is not supported; supported are "
        "lora_A.weight and lora_B.weight of projections"
      )
    if tensor.ndim != 2 or not tensor.size:
      raise HuggingFaceError(
        f"the adapter {folder} has a tensor {name[:200]} of shape {list(tensor.shape)}; it must be a matrix"
      )
    pairs[found[1]][found[2]] = tensor
  changes = {}
  for module, pair in pairs.items():
    if len(pair) < 2:
      raise HuggingFaceError(f"the adapter {folder} has half of an adapter of {module}")
    rank = len(pair["A"])
    alpha = _of_pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
    # rsLoRA divides by the root (Kalajdzievski 2023).
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    changes[f"{module}.weight"] = Change(pair["A"], pair["B"], scale)
  return settings["base_model_name_or_path"], changes


def read_settings(folder: paths.Path) -> dict[str, Any]:
  """Returns an adapter_config.json, with what is read of it checked.

  Raises:
    HuggingFaceError: it is missing, is no JSON, or has a value that means nothing.
  """
  settings = {"base_model_name_or_path": "", "alpha_pattern": {}} | {
    key: value for key, value in read_json(folder / CONFIG).items() if value is not None
  }

  def check(key, fine, what):
    if not fine:
      raise HuggingFaceError(f'{folder / CONFIG} has "{key}": {shown(settings.get(key))}; it must be {what}')

  check("base_model_name_or_path", isinstance(settings["base_model_name_or_path"], str), "a name")
  check("lora_alpha", _is_scale(settings.get("lora_alpha")), "a finite number")
  patterns = settings["alpha_pattern"]
  check(
    "alpha_pattern",
    isinstance(patterns, dict) and all(map(_is_scale, patterns.values())) and all(map(_is_pattern, patterns)),
    "numbers by names of modules, with a wildcard or two at most",
  )
  return settings


def _is_scale(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _is_pattern(text: str) -> bool:
  """Whether a regular expression is one, and can be matched in a time that does not explode."""
  try:
    re.compile(text)
  except (re.error, OverflowError, RecursionError):
    return False
  # Repeats of repeats take a time that doubles with each letter: such a file would hang whoever reads it.
  return len(text) <= 1000 and len(re.findall(r"[*+{]", text)) <= 2 and not re.search(r"\)[*+{?]", text)


def save(folder: str | os.PathLike, config: ModelConfig, adapter: dict, lora: Lora, *, base: str) -> None:
  """Writes an adapter as a folder that PEFT loads onto the base.

  Args:
    folder: where to; made if missing.
    config: the model's that the adapter is on.
    adapter: as of `lora.init_adapter`, NumPy arrays or alike.
    lora: what it is made of.
    base: name of the base's Hugging Face folder, for PEFT to find it.

  Raises:
    HuggingFaceError: the folder holds something already, or the adapter has no form in PEFT.
    DiskError: the disk is full or cannot be written.
  """
  folder = paths.of(folder)
  if not paths.is_empty(folder):
    raise HuggingFaceError(f"{folder} is not empty; give a folder that is, or a new one")
  if WHOLE in adapter:
    raise HuggingFaceError(
      "the adapter has a reward head, for which causal language models of transformers have no "
      "place; write the adapter of a policy"
    )
  values = json.loads(config.published)["config"] if config.published else (families.write_config(config))
  family = families.family_of(values)
  modules = collections.defaultdict(dict)  # module -> {projection: its a and b}
  _, by_layer = transformer.unrolled(config, adapter)
  for layer in range(config.layers):
    for name, pair in by_layer[f"layer_{layer}"].items():
      modules[_module(family, name).format(layer)][name] = pair

  tensors, ranks = {}, {}
  for module, parts in modules.items():
    a, b = _side_by_side(config, family, parts)
    tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
    tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    ranks[_short(family, module)] = len(a)
  others = {name: rank for name, rank in ranks.items() if rank != lora.rank}
  scaled = lambda rank: _plain(lora.alpha * rank / lora.rank)
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": _plain(lora.alpha),
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": sorted(ranks),
    "rank_pattern": others,
    "alpha_pattern": {name: scaled(rank) for name, rank in others.items()},
    "fan_in_fan_out": family.inputs_first,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "inference_mode": True,
  }
  with disk_errors(folder):
    paths.make_folder(folder)
    (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _side_by_side(
  config: ModelConfig, family: Family, parts: dict[str, dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
  """A [ranks, inputs] and B [outputs, ranks] of the projections that one tensor holds."""
  tensors = [family.tensors[f"{name}/bias"] for name in parts]
  pairs = [(np.asarray(pair["a"]), np.asarray(pair["b"])) for pair in parts.values()]
  a = np.concatenate([a.reshape(-1, a.shape[-1]).T for a, _ in pairs])
  # Outside of each projection's own block B is 0, so that the A of the others change nothing there.
  b = np.zeros((len(a), *families.dimensions(config, tensors[0].shape)), np.float32)
  rows = iter(b)  # each is one output of the tensor, and holds projections as its bias does
  for tensor, (_, ours) in zip(tensors, pairs):
    for values in ours:
      tensor.part(next(rows), config).reshape(values.shape, copy=False)[...] = values
  return a, b.T


def _module(family: Family, name: str) -> str:
  """The module of a projection, with {} for the layer."""
  return family.tensors[f"{name}/kernel"].name.removesuffix(".weight")


def _short(family: Family, module: str) -> str:
  """The end of a module's name that no other projection has."""
  *_, above, last = module.split(".")
  ends = {_module(family, name) for name in TARGETS if f"{name}/kernel" in family.tensors}
  unique = sum(end.endswith(f".{last}") for end in ends) == 1
  return last if unique else f"{above}.{last}"


def _of_pattern(pattern: dict | None, module: str, default: float) -> float:
  """The value of the first pattern that a module's name matches, as PEFT finds it."""
  return next(
    (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default
  )


def _plain(x: float) -> float | int:
  return int(x) if float(x).is_integer() else float(x)
