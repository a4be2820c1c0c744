"""Eight CPU devices, no silent rank promotion, and the fixtures that several files use."""

import gc
import importlib.util
import os
import pathlib
import threading
from typing import NamedTuple

import jaxlib.version

os.environ["JAX_PLATFORMS"] = "cpu"
# A third of the compile time; the programs are small.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jaxlib.version.__version_info__ < (0, 11):  # XLA stops at a flag it does not know
  QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK_COMPILES} --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dpojax import train
from dpojax.models import hf
from dpojax.runtime import xla
from dpojax.training import programs as programs_lib
from tests import chats, fast, long, made_data, servers, worlds

xla.keep_sums_right()  # as every command does
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)
# What tracing leaves is looked through for cycles less often, and what was imported never: 6 % of the suite.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

ROOT = pathlib.Path(__file__).parents[1]


LONGEST = (
  "test_chaos",
  "test_preference",
  "test_train",
  "test_losses",
  "test_parallel",
  "test_online",
  "test_watching",
  "test_lora",
  "test_sampling",
  "test_plan",
  "test_log_probs",
  "test_reference",
  "test_models_hf",
  "test_paper",
  "test_sentiment",
  "test_enumerable",
  "test_quickstart",
  "test_smollm2",
)
"""Files that take minutes: they start first, so that no worker is left with one."""


def pytest_collection_modifyitems(config, items):
  for item in items:
    file, case = item.path.stem, item.callspec.id if hasattr(item, "callspec") else ""
    if file in fast.FILES or item.originalname in fast.TESTS.get(file, ()):
      item.add_marker(pytest.mark.fast)
    if long.is_long(file, item.originalname, case):
      item.add_marker(pytest.mark.long)
  left_out = set()
  if not config.option.keyword and not any("::" in argument for argument in config.args):  # none is named
    left_out |= {name for name in ("long", "buckets") if name not in config.getoption("markexpr")}
  if importlib.util.find_spec("libtpu") is None:  # its wheel is 137 MB: `.ci/run topology` has it
    left_out.add("topology")
  without = {item for item in items if any(item.get_closest_marker(name) for name in left_out)}
  config.hook.pytest_deselected(items=list(without))
  items[:] = [item for item in items if item not in without]
  items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def published_data() -> pathlib.Path | None:
  """The folder $DPOJAX_DATA names, or shared/data beside this checkout; None where there is neither.

  Raises:
    pytest.UsageError: the variable names a folder without the files.
  """
  folder = pathlib.Path(os.environ.get("DPOJAX_DATA", ROOT.parent / "shared" / "data"))
  if (folder / "hh_harmless_base_test.jsonl.gz").is_file():
    return folder
  if "DPOJAX_DATA" in os.environ:
    raise pytest.UsageError(
      f"DPOJAX_DATA is {folder}, which has no hh_harmless_base_test.jsonl.gz; unset it to test with made data"
    )
  return None


def pytest_generate_tests(metafunc):
  """Tests that read preference pairs or tokenizers run on made ones, and on published ones where they are."""
  if "data_folder" in metafunc.fixturenames:
    published = [pytest.param("published", marks=pytest.mark.published)] if published_data() else []
    metafunc.parametrize("data_folder", [made_data.NAME, *published], indirect=True, scope="session")


@pytest.fixture(scope="session")
def data_folder(request, tmp_path_factory) -> pathlib.Path:
  """A folder of preference pairs, sentences and tokenizers."""
  if request.param == "published":
    return published_data()
  folder = tmp_path_factory.mktemp("data") / made_data.NAME
  folder.mkdir()
  made_data.write(folder)
  return folder


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
  """Shares a file's compiled programs, and lets go of them: thousands of them run out of memory mappings."""
  with programs_lib.shared():
    yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> pathlib.Path:
  """A folder of the programs of files that ask for `compiled`."""
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(programs):
  """Programs are compiled once, whichever test, file or process they are started from."""
  kept = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_compilation_cache_dir": str(programs),
  }
  before = {name: jax.config._read(name) for name in kept}
  for name, value in kept.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  with pytest.MonkeyPatch.context() as environment:
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    yield programs
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> str:
  """A folder with a word-level tokenizer of the words that `tests.worlds.pairs` uses."""
  folder = tmp_path_factory.mktemp("words")
  worlds.save_tokenizer(folder)
  return str(folder)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> str:
  """A Hugging Face folder of a small random model with a chat template."""
  folder = tmp_path_factory.mktemp("chat_model")
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["trim"])
  config = worlds.llama(vocab_size=len(tokenizer), max_positions=512)
  hf.save(folder, config, worlds.params_of(config))
  tokenizer.save_pretrained(folder)
  return str(folder)


class Runs(NamedTuple):
  """Workdirs of a short SFT, of DPO and of a reward model that start from it, and their pairs."""

  sft: str
  dpo: str
  reward: str
  pairs: str


@pytest.fixture(scope="session")
def runs(words, tmp_path_factory) -> Runs:
  """Runs that learn to end a sentence in kind words; see `tests.worlds.pairs`."""
  folder = tmp_path_factory.mktemp("runs")
  path = worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 150))
  given = dict(tokenizer=words, path=path, cache_dir=str(folder / "cache"))
  runs = Runs(*(str(folder / name) for name in ("sft", "dpo", "reward")), path)
  small = {"eval_every": 0, "log_every": 50, "checkpoint_every": 50}
  train.run(worlds.run_config("sft", **given, steps=30, **small), runs.sft)
  for kind, workdir in (("dpo", runs.dpo), ("reward", runs.reward)):
    config = worlds.run_config(
      kind, **given, steps=12, **small | {"model.checkpoint": runs.sft, "checkpoint_best": ""}
    )
    train.run(config, workdir)
  return runs


@pytest.fixture
def serve():
  """Starts a server that answers as a function says."""
  started = []

  def start(answer):
    started.append(servers.Server(answer))
    threading.Thread(target=started[-1].serve_forever, args=(0.02,), daemon=True).start()
    return started[-1]

  yield start
  for server in started:
    server.shutdown()
    server.server_close()
