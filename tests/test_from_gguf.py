"""GGUF files become the folders they were made of, to the rounding of their type, or are refused by name."""

import json
import math
import pathlib
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import safetensors.numpy

from dpojax.data import gguf as gguf_tokenizer
from dpojax.data import tokenization
from dpojax.data.examples import DataError
from dpojax.models import from_gguf, hf
from dpojax.models.families import HuggingFaceError
from tests import conftest, gguf_files, made_data

TEXTS = (
  "Which way?",
  " I am  here",
  "the 2nd train paid $3.50 in 2024",
  "na\u00efve \u2603\n\n  x = 12",
  "",
  "\u5317\u306f",
  "don't I'LL 'tis",
  "a\t b\r\n c",
)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TWOS = np.full(8, 2.0, np.float32)


def metadata_of(made, name="gpt2", **changes):
  """The metadata of a made tokenizer; llama.cpp's converter would write the same."""
  tokenizer = tokenization.load_tokenizer(str(made / "tokenizers" / name))
  model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
  tokens, types = gguf_files.tokens_of(tokenizer)
  given = {
    "tokens": tokens,
    "token_type": types,
    "eos_token_id": tokenizer.eos_token_id,
    "bos_token_id": tokenizer.bos_token_id,
    "model": "gpt2",
    "pre": "gpt-2",
    "add_bos_token": False,
    "merges": [" ".join(merge) for merge in model["merges"]],
  }
  if name == "llama2":  # a merge is worth more the earlier it was learned
    order = {"".join(merge): -float(i) for i, merge in enumerate(model["merges"])}
    given |= {
      "model": "llama",
      "scores": [order.get(token, -1e6) for token in tokens],
      "pre": None,
      "merges": None,
      "unknown_token_id": tokenizer.unk_token_id,
      "add_bos_token": None,
    }
  return {f"tokenizer.ggml.{key}": value for key, value in (given | changes).items() if value is not None}


def small_file(path, made, name="llama", kind="F32", *, tie_word_embeddings=True, **options):
  """Writes a model of random weights with the made byte-level tokenizer; rows of the embedding cover it."""
  vocabulary = len(tokenization.load_tokenizer(str(made / "tokenizers" / "gpt2")))
  values = gguf_files.CONFIGS[name] | {
    "vocab_size": vocabulary + 3,
    "tie_word_embeddings": tie_word_embeddings,
  }
  options.setdefault("tokenizer", metadata_of(made) | {"tokenizer.chat_template": TEMPLATE})
  return gguf_files.write(path, values, gguf_files.tensors_of(values), kind, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data") / made_data.NAME
  folder.mkdir()
  made_data.write(folder)
  return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", gguf_files.CONFIGS)
def test_a_file_comes_out_as_the_model_it_was_made_of(name, kind, tied, made, tmp_path):
  path = small_file(tmp_path / "a.gguf", made, name, kind, tie_word_embeddings=tied)
  file = from_gguf.convert(path, tmp_path / "out")
  got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  want = gguf_files.tensors_of(config)
  assert got.keys() == want.keys() and ("lm_head.weight" in got) != tied
  stored = getattr(gguf.GGMLQuantizationType, kind)
  for tensor, values in want.items():
    if values.ndim == 2:
      values = gguf.dequantize(gguf.quantize(values, stored), stored)
    np.testing.assert_array_equal(got[tensor], values, err_msg=tensor)
  assert sum(file.types().values()) == len(got) and file.types()[kind] > 0
  assert config.get("dequantized_from") == (file.types() if kind.startswith("Q") else None)
  for key, value in gguf_files.CONFIGS[name].items():
    assert config[key] == value or key == "vocab_size"
  assert hf.load(tmp_path / "out").config.tie_embeddings == tied
  assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_stretched_positions_of_llama_3_are_found_again(factor, made, tmp_path):
  """llama.cpp keeps what each frequency is divided by, which its converter finds by this rule."""
  theta, factors = 500000.0, []
  for i in range(8):
    length = 2 * math.pi * theta ** (2 * i / 16)
    if length < 8192 / 4:
      factors.append(1.0)
    elif length > 8192 / 1:
      factors.append(factor)
    else:
      smooth = (8192 / length - 1) / (4 - 1)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  assert len(set(factors)) > 2
  path = small_file(
    tmp_path / "a.gguf",
    made,
    metadata={"llama.rope.freq_base": theta},
    extra={"rope_freqs.weight": np.array(factors, np.float32)},
  )
  from_gguf.convert(path, tmp_path / "out")
  written = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
  assert written == {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_rounded_to(dtype, made, tmp_path):
  path = small_file(tmp_path / "a.gguf", made)
  from_gguf.convert(path, tmp_path / "out", dtype=dtype)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  for name, values in gguf_files.tensors_of(config).items():
    assert got[name].dtype == dtype == config["torch_dtype"]
    np.testing.assert_array_equal(got[name], values.astype(dtype))


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_the_tokenizer_gives_the_ids_of_the_one_it_was_made_of(name, made, tmp_path):
  values = metadata_of(made, name)
  ids = gguf_tokenizer.write(tmp_path / "out", values, "a.gguf")
  ours = tokenization.load_tokenizer(str(tmp_path / "out"))
  theirs = tokenization.load_tokenizer(str(made / "tokenizers" / name))
  for text in (*TEXTS, theirs.eos_token, f"a{theirs.eos_token}b"):
    assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
  assert ids.stop == (theirs.eos_token_id,) and ids.bos == theirs.bos_token_id == ours.bos_token_id
  assert ours.all_special_tokens and ours.get_vocab() == theirs.get_vocab()


def pieces(made, folder, split, text):
  gguf_tokenizer.write(folder, metadata_of(made, pre=split), "a.gguf")
  backend = tokenization.load_tokenizer(str(folder)).backend_tokenizer
  return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
  "split, want",
  [
    ("gpt-2", ["In", "  ", " 2024", ",", " I", "'ll", "  ", " go", ".", "\n\n"]),
    ("smollm", ["In", "   ", "2", "0", "2", "4", ",", " I", "'ll", "  ", " go", ".", "\n\n"]),
    ("llama-bpe", ["In", "  ", " ", "202", "4", ",", " I", "'ll", "  ", " go", ".\n\n"]),
    ("qwen2", ["In", "  ", " ", "2", "0", "2", "4", ",", " I", "'ll", "  ", " go", ".\n\n"]),
  ],
)
def test_text_is_split_as_the_file_says(split, want, made, tmp_path):
  assert pieces(made, tmp_path / "out", split, "In   2024, I'll   go.\n\n") == want


def test_stop_ids_and_bos_come_from_the_file(made, tmp_path):
  tokens = {"eot_token_id": 7, "eom_token_id": 9, "eot": None, "padding_token_id": 5, "add_bos_token": True}
  path = small_file(tmp_path / "a.gguf", made, tokenizer=metadata_of(made, bos_token_id=6, **tokens))
  from_gguf.convert(path, tmp_path / "out")
  eos = tokenization.load_tokenizer(str(made / "tokenizers" / "gpt2")).eos_token_id
  for name in ("config.json", "generation_config.json"):
    values = json.loads((tmp_path / "out" / name).read_text())
    assert (values["eos_token_id"], values["bos_token_id"], values["pad_token_id"]) == ([eos, 7, 9], 6, 5)
  assert tokenization.load_tokenizer(str(tmp_path / "out"))("a")["input_ids"][0] == 6


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(metadata={"general.architecture": "mamba"}), "is of architecture 'mamba', which is not"),
    (dict(metadata={"llama.expert_count": 8}), "says llama.expert_count = 8, which is not supported"),
    (dict(metadata={"llama.rope.dimension_count": 8}), "rope.dimension_count = 8 of heads of 16"),
    (dict(metadata={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type = 'yarn'"),
    (dict(metadata={"llama.block_count": None}), "has no 'llama.block_count' in its metadata"),
    (dict(metadata={"llama.attention.head_count_kv": [2, 2]}), r"num_key_value_heads \[2, 2\]"),
    (dict(metadata={"llama.vocab_size": 10**6}), "has 1000000 vocab_size but token_embd.weight"),
    (dict(metadata={"llama.embedding_length": 32}), r"tensor .* is \[.*64.*\] but the metadata make it"),
    (dict(drop=["model.layers.1.mlp.up_proj.weight"]), "lacks tensors that its metadata ask for: .*up_proj"),
    (dict(extra={"rope_freqs.weight": TWOS}), "rope_freqs.weight ends with 2.0 and is not what Llama 3.1"),
    (
      dict(extra={"blk.0.attn_sinks.weight": TWOS}),
      "has a tensor blk.0.attn_sinks.weight, which is not supp",
    ),
    (dict(extra={"blk.7.attn_norm.weight": TWOS}), "do not ask for: blk.7.attn_norm.weight"),
  ],
)
def test_what_is_not_understood_is_refused_by_name(options, message, made, tmp_path):
  path = small_file(tmp_path / "a.gguf", made, **options)
  with pytest.raises(HuggingFaceError, match=message) as caught:
    from_gguf.convert(path, tmp_path / "out")
  assert path in str(caught.value)
  assert {each.name for each in tmp_path.iterdir()} == {"a.gguf"}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"pre": "superbpe"}, "ggml.pre: text that is split as 'superbpe' is not supported; supported are gpt-2"),
    ({"model": "bert"}, "ggml.model: 'bert' is not supported"),
    ({"tokens": None}, "ggml.tokens: it is missing"),
    ({"eos_token_id": 10**5}, "eos_token_id: it is 100000 but there are"),
    ({"eos_token_id": None}, "eos_token_id: there is none"),
    ({"merges": ["a b c"]}, "merges: 'a b c' makes no token"),
    ({"add_eos_token": True}, "add_eos_token"),
    ({"add_bos_token": True, "bos_token_id": None}, "a BOS is asked for and there is none"),
    ({"tokens": ["a", "b", "a"]}, "token 'a' stands there twice"),
  ],
)
def test_a_tokenizer_that_is_not_understood_is_refused_by_name(changes, message, made, tmp_path):
  with pytest.raises(DataError, match=f"^a.gguf, tokenizer.*{message}"):
    gguf_tokenizer.write(tmp_path / "out", metadata_of(made, **changes), "a.gguf")
  assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_or_do_not_fit_are_named(made, tmp_path):
  values = gguf_files.CONFIGS["llama"] | {"vocab_size": 600}
  tensors = gguf_files.tensors_of(values)
  for number, dtype, message in (
    (np.nan, "float32", "attn_norm.weight holds nan, 1 of 64 values"),
    (1e6, "float16", "attn_norm.weight holds 1000000.0, .* not fit float16"),
  ):
    tensors["model.layers.0.input_layernorm.weight"][3] = number
    path = gguf_files.write(tmp_path / f"{number}.gguf", values, tensors, tokenizer=metadata_of(made))
    with pytest.raises(HuggingFaceError, match=f"{re.escape(path)}: tensor blk.0.{message}"):
      from_gguf.convert(path, tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.02, 0.5, 0.999])
def test_a_damaged_file_is_one_error(share, made, tmp_path):
  path = pathlib.Path(small_file(tmp_path / "a.gguf", made))
  path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
  with pytest.raises(HuggingFaceError, match=r"a.gguf (cannot be read as GGUF|.*has no|.*lacks)"):
    from_gguf.convert(path, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_command_says_what_the_weights_are(made, tmp_path):
  path = small_file(tmp_path / "a.gguf", made, kind="Q8_0")
  run = lambda *arguments: subprocess.run(
    [sys.executable, "-m", "dpojax.models.from_gguf", *arguments],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  done = run(path, f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[1].startswith("15 of them were quantised: whatever is measured")
  again = run(path, f"--out={tmp_path / 'out'}")
  assert again.returncode == 1 and again.stderr.startswith("error: ") and "is not empty" in again.stderr
  missing = run("no-such-package", f"--out={tmp_path / 'other'}")
  assert missing.returncode == 1 and "is no file and no installed package" in missing.stderr
  carries_none = run("numpy", f"--out={tmp_path / 'other'}")
  assert "the package numpy carries 0 files that end in .gguf" in carries_none.stderr
