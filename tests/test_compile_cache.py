"""Where compiled programs are kept: by default in the cache folder, each kind of CPU by itself."""

import jax
import pytest

from dpojax.runtime import memory
from dpojax.training import config as config_lib
from dpojax.training import resolve

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R)
stepping\t: 8
cpu MHz\t\t: 2699.998
flags\t\t: fpu sse4_2 avx2 avx512f amx_tile

processor\t: 1
flags\t\t: fpu
"""
ARM = (
  "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
)


SHORTEST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def no_folder():
  """As where nobody has named a folder of compiled programs."""
  names = ("jax_compilation_cache_dir", SHORTEST)
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update(SHORTEST, 1.0)  # as jax has it
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def kind_of(tmp_path, text):
  (tmp_path / "cpuinfo").write_text(text)
  return memory.cpu_kind(tmp_path / "cpuinfo")


def test_a_kind_of_cpu_is_its_model_and_its_instructions_and_not_its_clock(tmp_path):
  kind = kind_of(tmp_path, XEON)
  assert all(word in kind.split() for word in ("GenuineIntel", "143", "avx512f", "amx_tile"))
  assert kind_of(tmp_path, XEON.replace("2699.998", "1200.000")) == kind
  for other in (XEON.replace(" amx_tile", ""), XEON.replace(": 143", ": 106")):
    assert kind_of(tmp_path, other) != kind
  assert "sve" in kind_of(tmp_path, ARM).split()


def test_without_instructions_there_is_no_kind_and_no_folder(tmp_path, no_folder, monkeypatch):
  assert kind_of(tmp_path, "processor\t: 0\n") == memory.cpu_kind(tmp_path / "absent") == ""
  monkeypatch.setattr(memory, "cpu_kind", lambda: "")
  assert memory.compile_folder(tmp_path) is None


def test_programs_are_kept_in_the_cache_folder_unless_another_is_named(tmp_path, no_folder, monkeypatch):
  monkeypatch.setattr(memory, "cpu_kind", lambda: "one kind")
  config = config_lib.defaults()
  config.data.cache_dir = str(tmp_path)
  resolve.use_compile_cache(config)
  found = jax.config.jax_compilation_cache_dir
  assert found.startswith(f"{tmp_path}/compiled/cpu-") and list((tmp_path / "compiled").iterdir())
  config.data.cache_dir = str(tmp_path / "other")
  resolve.use_compile_cache(config)  # one is set already, as by JAX_COMPILATION_CACHE_DIR
  assert jax.config.jax_compilation_cache_dir == found and not (tmp_path / "other").exists()
  config.compile_cache = str(tmp_path / "named")
  resolve.use_compile_cache(config)
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")


def test_a_config_may_keep_none(tmp_path, no_folder):
  config = config_lib.defaults()
  config.data.cache_dir, config.compile_cache = str(tmp_path), ""
  resolve.use_compile_cache(config)
  assert jax.config.jax_compilation_cache_dir is None and not (tmp_path / "compiled").exists()


@pytest.mark.parametrize(
  "asked, folder, kept",
  [(1.0, "here", 0.1), (5.0, "here", 5.0), (0.0, "here", 0.0), (1.0, "gs://there", 1.0)],
)
def test_short_programs_are_kept_too_in_a_local_folder(asked, folder, kept, no_folder, tmp_path, monkeypatch):
  """Unless somebody asked for something else; a bucket's every file is a request."""
  monkeypatch.setattr(memory.paths, "make_folder", lambda path: None)
  jax.config.update(SHORTEST, asked)
  before = jax.config.jax_persistent_cache_enable_xla_caches
  memory.keep_compiled(folder if "://" in folder else str(tmp_path / folder))
  jax.config.update("jax_persistent_cache_enable_xla_caches", before)
  assert getattr(jax.config, SHORTEST) == kept
