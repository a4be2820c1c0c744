"""The house rules that a machine can hold: who imports whom, what an import loads, what a text says."""

import ast
import functools
import subprocess
import sys

import pytest

from tests import conftest, fast, long

PACKAGE = conftest.ROOT / "dpojax"

ROOMS = [
  "losses",
  "runtime",
  "kernels",
  "log_probs",
  "data",
  "models",
  "training",
  "sample",
  "evaluate",
  "plan",
  "train",
  "export",
  "ppo",
  "online",
]
"""What stands at the top of the package, in the way of the data: a room imports only from rooms before it."""

ORDER = {
  "runtime": [
    "errors",
    "paths",
    "appending",
    "disk",
    "digests",
    "mirror",
    "ownership",
    "stderr_filter",
    "processes",
    "memory",
    "xla",
    "command",
    "command_line",
    "commands",
    "stopping",
  ],
  "kernels": [
    "platform",
    "precision",
    "few_tokens",
    "gathering",
    "attention",
    "blockwise",
    "fused",
    "backends",
    "head",
    "cut_head",
    "head_on_cpu",
    "distributions",
  ],
  "data": [
    "examples",
    "hub",
    "files",
    "fields",
    "messages",
    "knobs",
    "formats",
    "records",
    "sandbox",
    "templates",
    "conversations",
    "ids",
    "shortening",
    "encoder",
    "truncation",
    "tokenized",
    "tokenizing",
    "pool",
    "comparisons",
    "builders",
    "tokenization",
    "gguf",
    "packing",
    "loader",
    "report",
  ],
  "models": [
    "config",
    "rotary",
    "sharding",
    "transformer",
    "lora",
    "families",
    "ranges",
    "tensors",
    "peft",
    "hf",
    "gguf",
    "from_gguf",
  ],
  "training": [
    "micro_batches",
    "objectives",
    "preference",
    "reference",
    "step",
    "parallel",
    "config",
    "checkpoint_files",
    "checkpoint",
    "weights",
    "metrics",
    "log",
    "chips",
    "throughput",
    "resolve",
    "programs",
    "workdir",
  ],
  "sample": [
    "sampler",
    "by_layers",
    "decoding",
    "rollouts",
    "best_of_n",
    "draws",
    "generator",
    "current",
    "prompts",
    "files",
  ],
  "evaluate": ["confidence", "judging", "scorers", "similarity", "report", "measure", "compare", "watching"],
  "plan": ["needs", "topology", "program", "compiling", "roofline", "report"],
  "train": ["loop"],
  "export": ["verify", "writer"],
  "ppo": ["losses", "config", "step", "loop"],
  "online": ["config", "pairs", "labels", "rounds", "loop"],
}
"""Of each room its modules: one imports only modules before it; its command, `__main__`, comes last."""

HOMES = {
  "flax": ("models",),
  "tensorflow_datasets": ("data.builders",),
  "transformers": ("data.tokenization", "data.templates"),
  "huggingface_hub": ("models.hf", "data.hub"),
  "gguf": ("models.gguf",),
  "grain": ("data.loader",),
  "orbax": ("training.checkpoint",),
  "etils": ("runtime.paths", "training.checkpoint_files"),
  "tensorboard": ("training.metrics",),
  "optax": ("training.step",),
  "requests": ("evaluate.judging", "data.builders"),
  "xxhash": ("runtime.digests",),
}
"""The modules a library may be imported in."""


def modules():
  for path in sorted(PACKAGE.rglob("*.py")):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if name != "__init__":
      yield name, path


@functools.cache
def imported(path):
  """Returns the names a file imports, those of `from package import module` with the module."""
  names = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def rank(name):
  """Place of a module among all, or of what a module holds."""
  room, *rest = name.split(".")
  assert room in ROOMS, f"dpojax.{name} is in no room"
  if room not in ORDER or not rest:
    return ROOMS.index(room), -1
  order = [*ORDER[room], "__main__"]
  assert rest[0] in order, f"dpojax.{name} has no place in ORDER"
  return ROOMS.index(room), order.index(rest[0])


def test_imports_point_one_way():
  for name, path in modules():
    for target in imported(path):
      # The door of a room, its __init__, may import the room's own modules.
      if target.startswith("dpojax.") and not target.startswith(f"dpojax.{name}."):
        assert rank(target.removeprefix("dpojax.")) <= rank(name), f"{name} imports {target}"


def test_a_path_that_a_user_gives_goes_through_one_door():
  of_this_machine = {
    "runtime.paths": "the door",
    "runtime.mirror": "copies on this machine",
    "runtime.command_line": "configs, which are code",
    "runtime.ownership": "/proc",
    "training.parallel": "/sys",
    "training.metrics": "TensorBoard's files before they are copied",
    "export.writer": "what is uploaded",
    "models.from_gguf": "GGUF files, fetched before",
    "models.gguf": "the same",
    "models.hf": "the hub's cache",
    "data.hub": "the same",
    "data.gguf": "a folder that is being made",
    "data.tokenized": "the same",
    "data.tokenization": "a tokenizer that was fetched",
    "data.builders.imdb": "TFDS's downloads",
    "data.builders.stack_exchange": "the same",
  }
  for name, path in modules():
    assert "pathlib.Path(" not in path.read_text() or name in of_this_machine, name


def test_every_room_says_what_lives_there_and_where_to_begin():
  entries = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
  assert entries == {*ROOMS, "__init__"}
  for room in ORDER:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert "egin with" in text, room


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_only(library):
  users = [
    name for name, path in modules() if any(target.split(".")[0] == library for target in imported(path))
  ]
  assert users and all(name.startswith(HOMES[library]) for name in users), users


def test_losses_and_log_probs_import_jax_only():
  for name, path in modules():
    if name in ("losses", "log_probs") or name.startswith("kernels"):
      others = {target for target in imported(path) if not target.startswith("dpojax.kernels")}
      libraries = {target.split(".")[0] for target in others} - set(sys.stdlib_module_names)
      assert libraries <= ({"jax", "numpy"} if name.startswith("kernels") else {"jax"}), name


def test_data_is_numpy_without_jax():
  for name, path in modules():
    if name.startswith("data"):
      assert not [target for target in imported(path) if target.split(".")[0] in ("jax", "flax")], name


@pytest.mark.parametrize(
  "module, absent",
  [
    ("dpojax.losses", "flax optax orbax tensorflow_datasets transformers grain ml_collections"),
    ("dpojax.log_probs", "flax optax orbax tensorflow_datasets transformers grain ml_collections"),
    ("dpojax.data.packing", "jax flax tensorflow torch transformers"),
    ("dpojax.train.loop", "tensorflow torch"),
    ("dpojax.sample.files", "tensorflow tensorflow_datasets torch transformers"),
    ("dpojax.training.config", "jax flax optax transformers"),
    ("dpojax.sample.__main__", "jax flax transformers numpy"),
    ("dpojax.evaluate.__main__", "jax flax transformers numpy"),
  ],
)
def test_an_import_loads_nothing_heavier_than_it_needs(module, absent):
  code = f"import sys, {module}; print(*[m for m in {absent.split()!r} if m in sys.modules])"
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=conftest.ROOT, capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr
  assert not result.stdout.split()


def test_no_device_function_outside_the_files_that_know_devices():
  for name, path in modules():
    if name.startswith(("training", "train", "models", "kernels", "runtime.xla", "sample.by_layers")):
      continue
    text = path.read_text()
    for word in ("jax.jit", "jax.pmap", "device_put", "NamedSharding"):
      assert word not in text, f"{name} uses {word}"


def test_what_is_listed_as_fast_or_long_is_there():
  """A name that is gone from its file would put its test where it does not belong, silently."""
  listed = [(file, name) for file, names in fast.TESTS.items() for name in names]
  listed += [(file, name) for file, names in long.LONG.items() for name in names]
  for file, name in listed:
    (path,) = (conftest.ROOT / "tests").rglob(f"{file}.py")
    assert f"def {name}(" in path.read_text(), (file, name)
