"""The house rules that a machine can hold: who imports whom, what an import loads, what a text says."""

import ast
import subprocess
import sys

import pytest

from tests import conftest

PACKAGE = conftest.ROOT / "dpojax"

ORDER = [
    "losses", "ppo_losses", "log_probs", "errors", "disk", "digests", "ownership", "models.config",
    "models.attention", "models.blockwise", "models.fused", "models.forms", "models.rotary",
    "models.transformer", "models.lora", "models.families", "models.tensors", "models.peft", "models.hf",
    "models.gguf", "models",
    "data.examples", "data.hub", "data.files", "data.fields", "data.messages", "data.forms", "data.records",
    "data.sandbox", "data.templates", "data.conversations", "data.ids", "data.shortening", "data.encoder",
    "data.truncation", "data.tokenizing", "data.pool", "data.builders", "data.tokenization", "data.gguf",
    "data.packing", "data.loader", "data.report", "data",
    "parts", "sampling", "objectives", "preference", "reference", "step", "parallel", "stderr_filter",
    "processes", "command", "rollouts", "ppo_step", "config", "checkpoint_files", "checkpoint", "weights",
    "metrics", "throughput", "resolve", "plan", "readback", "export", "from_gguf", "sample", "scorers",
    "watching", "train", "intervals", "judging", "evaluate", "best_of_n", "ppo_config", "ppo"]
"""A module imports only modules before it; a package stands for all its modules."""

HOMES = {
    "flax": ("models",), "tensorflow_datasets": ("data.builders",),
    "transformers": ("data.tokenization", "data.templates"),
    "huggingface_hub": ("models.hf", "data.hub"), "gguf": ("models.gguf",),
    "grain": ("data.loader",), "orbax": ("checkpoint",), "tensorboard": ("metrics",), "optax": ("step",),
    "requests": ("judging", "data.builders"), "xxhash": ("digests",)}
"""The modules a library may be imported in."""


def modules():
  for path in sorted(PACKAGE.rglob("*.py")):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if name != "__init__":
      yield name, path


def imported(path):
  """Names a file imports, those of `from package import module` with the module."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(name):
  """Place in ORDER of a module, by its longest prefix that stands there."""
  parts = name.split(".")
  for end in range(len(parts), 0, -1):
    if ".".join(parts[:end]) in ORDER:
      return ORDER.index(".".join(parts[:end]))
  raise AssertionError(f"dpojax.{name} has no place in ORDER")


def test_imports_point_one_way():
  for name, path in modules():
    for target in imported(path):
      if target.startswith("dpojax."):
        assert rank(target.removeprefix("dpojax.")) <= rank(name), f"{name} imports {target}"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_only(library):
  users = [name for name, path in modules()
           if any(target.split(".")[0] == library for target in imported(path))]
  assert users and all(name.startswith(HOMES[library]) for name in users), users


def test_losses_and_log_probs_import_jax_only():
  for name in ("losses", "log_probs"):
    libraries = {target.split(".")[0] for target in imported(PACKAGE / f"{name}.py")}
    assert libraries - set(sys.stdlib_module_names) == {"jax"}


def test_data_is_numpy_without_jax():
  for name, path in modules():
    if name.startswith("data"):
      assert not [target for target in imported(path) if target.split(".")[0] in ("jax", "flax")], name


@pytest.mark.parametrize("module, absent", [
    ("dpojax.losses", "flax optax orbax tensorflow_datasets transformers grain ml_collections"),
    ("dpojax.log_probs", "flax optax orbax tensorflow_datasets transformers grain ml_collections"),
    ("dpojax.data.packing", "jax flax tensorflow torch transformers"),
    ("dpojax.train", "tensorflow torch"),
])
def test_an_import_loads_nothing_heavier_than_it_needs(module, absent):
  code = f"import sys, {module}; print(*[m for m in {absent.split()!r} if m in sys.modules])"
  result = subprocess.run(
      [sys.executable, "-c", code], cwd=conftest.ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
  assert not result.stdout.split()


def test_no_device_function_outside_the_files_that_know_devices():
  for name, path in modules():
    if name.startswith(("parallel", "step", "checkpoint", "train", "models")):
      continue
    text = path.read_text()
    for word in ("jax.jit", "jax.pmap", "device_put", "NamedSharding"):
      assert word not in text, f"{name} uses {word}"
