"""Model folders that anybody may have written: as the safetensors package has them, or refused by name.

DPOJAX_EXAMPLES=1000 python -m pytest tests/test_hostile_folders.py  tries that many of each kind of file.
"""

import json
import os
import pathlib
import resource
import shutil
import struct
import time

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings, strategies

from dpojax.models import hf, tensors
from dpojax.models.families import INTEGERS, HuggingFaceError
from dpojax.training import checkpoint, weights
from tests.parity import models

TRIED = settings(
  max_examples=int(os.environ.get("DPOJAX_EXAMPLES", 40)),
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ABOUT, _ = models.load_vectors()

JSON = strategies.recursive(
  strategies.none()
  | strategies.booleans()
  | strategies.integers(-(2**70), 2**70)
  | strategies.floats()
  | strategies.text(max_size=8)
  | strategies.sampled_from([10**15, 10**9, -1, 0, 2**31, 1e308, "", "4"]),
  lambda inner: (
    strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3)
  ),
  max_leaves=6,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
  """A folder of a LLaMA in several files."""
  folder = tmp_path_factory.mktemp("sound")
  models.write_folder(folder / "in", "llama1", models.tensors_of(ABOUT["tensors"]["llama1"]))
  hf.save(folder / "llama", *hf.load(folder / "in"), shard_bytes=14000)
  assert len(list((folder / "llama").glob("*.safetensors"))) > 1
  return folder / "llama"


def copied(sound, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("folder") / "model"
  shutil.copytree(sound, folder)
  return folder


def refusal(folder: pathlib.Path, want=None) -> str:
  """Loads a folder and returns how it was refused, or '' after a check that it gave what is wanted."""
  try:
    loaded = hf.load(folder)
  except HuggingFaceError as error:
    assert str(error) and len(str(error)) < 3000
    return str(error)
  if want is not None:
    jax.tree.map(np.testing.assert_array_equal, loaded.params, want)
  return ""


def write_header(path: pathlib.Path, header: object, body: bytes, *, length: int | None = None) -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def entry(dtype, shape, start, stop):
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# Each as (header, bytes of tensors) and what the message says besides the file's name.
HEADERS = {
  "short": ({"a": entry("F32", [2], 0, 8)}, 4, "8 bytes of tensors were written and 4 are there"),
  "long": ({"a": entry("F32", [2], 0, 8)}, 12, "8 bytes of tensors were written and 12 are there"),
  "half": ({"a": entry("F16", [2], 0, 8)}, 8, r"tensor 'a' of 'F16' and shape \[2\], at 0 to 8"),
  "wide": ({"a": entry("F32", [2], 0, 4)}, 4, r"tensor 'a' of 'F32' and shape \[2\], at 0 to 4"),
  "negative": ({"a": entry("F32", [2], -8, 0)}, 8, r"tensor 'a' .*, at -8 to 0"),
  "turned": ({"a": entry("F32", [2], 8, 0)}, 8, r"tensor 'a' .*, at 8 to 0"),
  "negative shape": ({"a": entry("F32", [-2, -1], 0, 8)}, 8, "invalid JSON.*integer `-2`"),
  "overlap": (
    {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)},
    12,
    "tensor 'b' .* at 4 to 12, does not begin where the one before ends, at 8",
  ),
  "same place": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, 8, "tensor 'b' .* ends, at 8"),
  "hole": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 12, 16)}, 16, "tensor 'b' .* at 12 to 16"),
  "late": ({"a": entry("F32", [1], 4, 8)}, 8, "tensor 'a' .* at 4 to 8"),
  "huge": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, 8, r"tensor 'a' .* shape \[1099511627776, "),
  "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, 8, "F31"),
  "fraction": ({"a": entry("F32", [2.0], 0, 8)}, 8, "floating point `2.0`"),
  "twice": (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    8,
    "'a' stands there twice",
  ),
  "number": ({"a": 5}, 0, "integer `5`"),
  "list": ([], 0, "damaged"),
  "deep": (b"[" * 100_000, 0, "damaged"),
  "deep object": (b'{"a":' * 100_000, 0, "damaged"),
  "no text": (b"\xff\xfe", 0, "damaged"),
  "nothing": (b"", 0, "damaged"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_disagrees_with_itself_names_file_tensor_and_value(case, tmp_path):
  header, size, message = HEADERS[case]
  write_header(tmp_path / "model.safetensors", header, bytes(size))
  with pytest.raises(HuggingFaceError, match=rf"{tmp_path}/model.safetensors .*{message}"):
    tensors.open_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\0" * 7,
    b"\0" * 8,
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 10**8) + b"{}",
    struct.pack("<Q", 10**9) + b"{}",
  ],
)
def test_a_file_without_a_header_is_refused(content, tmp_path):
  (tmp_path / "model.safetensors").write_bytes(content)
  with pytest.raises(HuggingFaceError, match="safetensors (is damaged|cannot be read) .*fetch it again"):
    tensors.open_tensors(tmp_path / "model.safetensors")


NUMBERS = strategies.integers(-4, 40) | strategies.sampled_from([2**31, 2**40, 2**63, -(2**63), 2**64])
ENTRIES = strategies.builds(
  entry,
  strategies.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "U64", "F8_E4M3", "F31"]),
  strategies.lists(strategies.integers(-1, 4) | NUMBERS, max_size=3),
  NUMBERS,
  NUMBERS,
)


@TRIED
@given(
  header=strategies.dictionaries(strategies.sampled_from("abc"), ENTRIES | JSON, max_size=3) | JSON,
  size=strategies.integers(0, 48),
  cut=strategies.integers(0, 60),
  fill=strategies.booleans(),
)
def test_a_header_is_believed_where_the_package_believes_it_and_gives_its_tensors(
  tmp_path_factory, header, size, cut, fill
):
  path = tmp_path_factory.getbasetemp() / "model.safetensors"
  if fill and isinstance(header, dict):  # sound ones, but for what is cut off
    start = 0
    for name, each in header.items():
      if isinstance(each, dict) and each.get("dtype") in ("F32", "F16", "BF16", "I8"):
        shape = [abs(x) % 5 for x in each["shape"]]
        count = int(np.prod(shape, dtype=int)) * {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}[each["dtype"]]
        header[name], start = entry(each["dtype"], shape, start, start + count), start + count
    size = start - (cut == 0)
  try:
    text = json.dumps(header).encode()
  except UnicodeEncodeError:
    text = b"{}"
  write_header(path, text, np.random.default_rng(0).bytes(max(size, 0)))
  try:
    want = safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError, OSError):
    want = None
  try:
    found = tensors.open_tensors(path)
    got = {name: each.array(name) for name, each in found.items()}
  except HuggingFaceError as error:
    odd = want and any(each.dtype.name not in tensors.DTYPES for each in want.values())
    assert want is None or odd, (error, header)
    return
  assert want is not None and got.keys() == want.keys()
  for name, each in got.items():
    assert each.dtype == want[name].dtype and each.shape == want[name].shape
    assert each.tobytes() == want[name].tobytes()


@TRIED
@given(
  place=strategies.floats(0, 1, exclude_max=True),
  bit=strategies.integers(0, 7),
  which=strategies.sampled_from(["config.json", "model.safetensors.index.json", "0", "1"]),
  kind=strategies.sampled_from(["flip", "cut", "delete", "append"]),
)
def test_a_damaged_folder_is_refused_or_gives_tensors_of_the_shapes_it_names(
  sound, tmp_path_factory, place, bit, which, kind
):
  """A bit of a weight is not seen: published folders have no digests. All else is."""
  folder = copied(sound, tmp_path_factory)
  file = sorted(folder.glob("*.safetensors"))[int(which)] if which in "01" else folder / which
  content = bytearray(file.read_bytes())
  header = 8 + int.from_bytes(content[:8], "little") if which in "01" else len(content)
  at = int(place * header)
  if kind == "flip":
    content[at] ^= 1 << bit
  elif kind == "cut":
    del content[int(place * len(content)) :]
  else:
    content += b"\0"
  file.write_bytes(content)
  if kind == "delete":
    file.unlink()
  told = refusal(folder)
  assert told or kind == "flip" or which in ("config.json", "model.safetensors.index.json")


@pytest.mark.parametrize(
  "weight_map",
  [
    [],
    ["model.safetensors"],
    "model.safetensors",
    5,
    None,
    {},
    {"a": 5},
    {"a": None},
    {"a": ["b.safetensors"]},
  ],
)
def test_an_index_of_another_form_is_refused(weight_map, sound, tmp_path_factory):
  folder = copied(sound, tmp_path_factory)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  assert "model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize(
  "name",
  [
    "../../../../etc/passwd",
    "/etc/passwd",
    "../secret.safetensors",
    "/tmp/secret.safetensors",
    "sub/../../secret.safetensors",
    "sub/secret.safetensors",
    "..",
    ".",
    "",
    "a\0.safetensors",
    "..\\secret.safetensors",
    "config.json",
    "x" * 100_000,
  ],
)
def test_an_index_names_no_file_outside_its_folder(name, sound, tmp_path_factory):
  folder = copied(sound, tmp_path_factory)
  one = sorted(folder.glob("*.safetensors"))[0]
  shutil.copy(one, folder.parent / "secret.safetensors")  # were it opened, it would load
  index = folder / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  values["weight_map"] = {
    key: name if value == one.name else value for key, value in values["weight_map"].items()
  }
  index.write_text(json.dumps(values))
  told = refusal(folder)
  assert "which is no safetensors file of that folder" in told and "says that tensor" in told


def test_links_of_the_hubs_cache_are_followed(sound, tmp_path):
  """There a snapshot's files are links to blobs outside of its folder."""
  (tmp_path / "blobs").mkdir()
  (tmp_path / "snapshots/main").mkdir(parents=True)
  for i, file in enumerate(sound.iterdir()):
    shutil.copy(file, tmp_path / f"blobs/{i}")
    (tmp_path / "snapshots/main" / file.name).symlink_to(f"../../blobs/{i}")
  assert refusal(tmp_path / "snapshots/main", hf.load(sound).params) == ""


def test_a_tensor_that_two_files_hold_or_the_index_puts_elsewhere_is_refused(sound, tmp_path_factory):
  folder = copied(sound, tmp_path_factory)
  index = folder / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  names = sorted(set(values["weight_map"].values()))
  turned = {key: names[value == names[0]] for key, value in values["weight_map"].items()}
  index.write_text(json.dumps(values | {"weight_map": turned}))
  assert "but it has not; fetch both again" in refusal(folder)
  shutil.copy(folder / names[0], folder / "more.safetensors")
  again = next(iter(safetensors.numpy.load_file(folder / names[0])))
  index.write_text(json.dumps({"weight_map": values["weight_map"] | {again: "more.safetensors"}}))
  assert "and so has another of the folder's files" in refusal(folder)


KEYS = sorted(
  {key for case in models.CASES.values() for key in case}
  | INTEGERS.keys()
  | {"rope_scaling", "rope_parameters", "layer_types", "architectures", "quantization_config", "torch_dtype"}
)


def bounded(work):
  """Runs what must end within seconds and without much memory; the peak only rises, so once is enough."""
  before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
  result = work()
  assert time.monotonic() - started < 20
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: 1 GiB
  return result


@TRIED
@given(
  case=strategies.sampled_from(sorted(models.CASES)),
  changes=strategies.dictionaries(strategies.sampled_from(KEYS), JSON, min_size=1, max_size=3),
)
def test_a_config_is_read_or_refused_in_bounded_time_and_memory(tmp_path_factory, case, changes):
  folder = tmp_path_factory.mktemp("folder")
  (folder / "config.json").write_text(json.dumps(models.CASES[case] | changes))

  def work():
    try:
      hf.read_config(folder)
    except HuggingFaceError as error:
      assert str(error)

  bounded(work)


@pytest.mark.parametrize(
  "key, value",
  [
    ("vocab_size", 10**15),
    ("num_hidden_layers", 10**9),
    ("hidden_size", 2**40),
    ("num_attention_heads", 10**12),
    ("intermediate_size", 2**50),
    ("max_position_embeddings", 2**60),
    ("num_key_value_heads", 10**15),
    ("num_hidden_layers", True),
    ("vocab_size", 32.0),
    ("vocab_size", "32"),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1.0),
    ("rope_theta", float("inf")),
    ("rope_theta", 1e300),
    ("tie_word_embeddings", "false"),
    ("attention_bias", "no"),
    ("model_type", ["llama"]),
    ("architectures", 5),
    ("rope_scaling", [1]),
  ],
)
def test_a_number_beyond_any_model_is_told_by_key_and_value(key, value, sound, tmp_path_factory):
  folder = copied(sound, tmp_path_factory)
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(values | {key: value}))
  told = bounded(lambda: refusal(folder))
  assert f'config.json has "{key}": {value!r}' in told or key in ("architectures",) and key in told


@pytest.mark.parametrize("layers", [4096, 3000])
def test_the_deepest_model_allowed_is_refused_by_its_tensors_in_seconds(layers, sound, tmp_path_factory):
  folder = copied(sound, tmp_path_factory)
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": layers}))
  assert "missing are model.layers.1" in bounded(lambda: refusal(folder))


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"a":' * 100_000, "is not JSON"),
    (b"[]", "not an object"),
    (b"5", "not an object"),
    (b"null", "not an object"),
    (b"\xff\xfe\x00", "is not JSON"),
    (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "is not JSON"),
    (b" " * (2**24 + 1), "is larger than 16777216 bytes"),
  ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_a_file_that_is_no_object_is_refused_by_its_name(content, message, name, sound, tmp_path_factory):
  folder = copied(sound, tmp_path_factory)
  (folder / name).write_bytes(content)
  told = refusal(folder)
  assert f"{folder / name}" in told and message in told
  if name == "config.json":
    with pytest.raises((HuggingFaceError, checkpoint.CheckpointError), match=f"{folder / name}.*{message}"):
      weights.load(str(folder))


@pytest.mark.parametrize("ids", ["2", [2, "3"], {"a": 1}, 2.5, True, [[2]]])
def test_an_end_that_is_no_id_is_refused(ids, sound, tmp_path_factory):
  folder = copied(sound, tmp_path_factory)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
  assert 'generation_config.json has "eos_token_id"' in refusal(folder)


@pytest.fixture(scope="module")
def adapter(sound, tmp_path_factory) -> pathlib.Path:
  """A folder of PEFT's with an adapter of one projection."""
  folder = tmp_path_factory.mktemp("adapter")
  name = "base_model.model.model.layers.0.self_attn.q_proj"
  width = hf.read_config(sound).width
  safetensors.numpy.save_file(
    {
      f"{name}.lora_A.weight": np.ones((2, width), np.float32),
      f"{name}.lora_B.weight": np.ones((width, 2), np.float32),
    },
    folder / "adapter_model.safetensors",
  )
  (folder / "adapter_config.json").write_text(
    json.dumps(
      {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": str(sound),
        "alpha_pattern": {"model.layers.1": 2, ".*k_proj": 8},
      }
    )
  )
  return folder


def test_a_sound_adapter_is_read(adapter, sound):
  changed = np.abs(np.subtract(*(jax.tree.leaves(hf.load(folder).params)[-1] for folder in (adapter, sound))))
  assert refusal(adapter) == "" and np.isfinite(changed).all()


@TRIED
@given(
  key=strategies.sampled_from(
    [
      "peft_type",
      "lora_alpha",
      "base_model_name_or_path",
      "alpha_pattern",
      "use_rslora",
      "bias",
      "modules_to_save",
    ]
  ),
  value=JSON,
)
def test_an_adapter_is_read_or_refused_whatever_its_config_says(adapter, tmp_path_factory, key, value):
  folder = copied(adapter, tmp_path_factory)
  values = json.loads((folder / "adapter_config.json").read_text())
  if key == "base_model_name_or_path" and isinstance(value, str):
    value = str(folder) + value  # no name of the hub
  (folder / "adapter_config.json").write_text(json.dumps(values | {key: value}))
  bounded(lambda: refusal(folder))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"lora_alpha": "4"}, '"lora_alpha": .4.; it must be a finite number'),
    ({"lora_alpha": 1e300}, '"lora_alpha": 1e.300; it must be'),
    ({"lora_alpha": None}, '"lora_alpha": None'),
    ({"alpha_pattern": ["q_proj"]}, '"alpha_pattern"'),
    ({"alpha_pattern": {"(a+)+$": 1}}, '"alpha_pattern"'),
    ({"alpha_pattern": {"(": 1}}, '"alpha_pattern"'),
    ({"alpha_pattern": {"a{65535}{65535}": 1}}, '"alpha_pattern"'),
    ({"alpha_pattern": {".*.*.*.*.*x": 1}}, '"alpha_pattern"'),
    ({"base_model_name_or_path": 5}, "must be a name"),
    ({"peft_type": "X" * 10**6}, '"peft_type": .X'),
  ],
)
def test_a_value_of_an_adapter_config_is_told(changes, message, adapter, tmp_path_factory):
  folder = copied(adapter, tmp_path_factory)
  values = json.loads((folder / "adapter_config.json").read_text())
  (folder / "adapter_config.json").write_text(json.dumps(values | changes))
  with pytest.raises(HuggingFaceError, match=f"{folder}/adapter_config.json.*{message}"):
    hf.load(folder)


def test_an_adapter_on_itself_is_refused(adapter, tmp_path_factory):
  folder = copied(adapter, tmp_path_factory)
  values = json.loads((folder / "adapter_config.json").read_text())
  (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": str(folder)}))
  for read in (hf.load, hf.read_config):
    with pytest.raises(HuggingFaceError, match="an adapter too; merge that one"):
      read(folder)


@pytest.mark.parametrize("shape", [(), (2,), (2, 16, 1), (0, 16)])
def test_an_adapter_that_is_no_matrix_is_refused(shape, adapter, tmp_path_factory):
  folder = copied(adapter, tmp_path_factory)
  held = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  name = next(name for name in held if "lora_A" in name)
  safetensors.numpy.save_file(held | {name: np.ones(shape, np.float32)}, folder / "adapter_model.safetensors")
  assert "it must be a matrix" in refusal(folder)
