"""A run that starts from a Hugging Face folder and ends as one."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from dpojax import train
from dpojax.data import tokenization
from dpojax.export import writer
from dpojax.models import hf
from dpojax.runtime.errors import UserError
from dpojax.training import checkpoint, resolve, weights
from dpojax.training.metrics import read_metrics
from tests import conftest, worlds
from tests.parity import models

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def given(words, tmp_path_factory):
  """A GPT-J in bfloat16 with a tokenizer beside it, pairs and a cache."""
  root = tmp_path_factory.mktemp("given")
  tensors = models.tensors_of(models.load_vectors()[0]["tensors"]["gptj"])
  models.write_folder(root / "gptj", "gptj", {name: x.astype("bfloat16") for name, x in tensors.items()})
  hf.copy_tokenizer(words, root / "gptj")
  path = worlds.write_jsonl(root / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 80))
  return dict(folder=root / "gptj", path=path, cache_dir=str(root / "cache"))


def run_config(given, kind="dpo", **changes):
  return worlds.run_config(
    kind,
    "",
    given["path"],
    given["cache_dir"],
    **{"model.checkpoint": str(given["folder"]), "steps": 2, "eval_every": 0} | changes,
  )


def read_json(path):
  return json.loads(path.read_text())


def test_dpo_of_a_hugging_face_folder_is_exported_as_one(given, tmp_path):
  """In parts over a mesh; the second run starts where the first one ended."""
  train.run(
    run_config(given, **{"parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2}),
    tmp_path / "run",
  )
  first = next(line for line in read_metrics(tmp_path / "run") if line["split"] == "train")
  assert abs(first["loss"] - np.log(2)) < 1e-5
  policy = checkpoint.load_policy(tmp_path / "run")
  assert policy.settings.tokenizer == str(given["folder"])

  result = subprocess.run(
    [sys.executable, "-m", "dpojax.export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  said, read_back = result.stdout.splitlines()
  assert said == f"the policy of step 2 of {tmp_path / 'run'} is in {tmp_path / 'out'}; texts end at 0"
  assert read_back.startswith("read back: the policy's params in bfloat16; log-prob of 14 tokens -")
  assert (tmp_path / "out" / "tokenizer.json").is_file()
  assert read_json(tmp_path / "out" / "config.json") == models.CASES["gptj"] | {"eos_token_id": 0}
  assert read_json(tmp_path / "out" / "generation_config.json") == {"eos_token_id": 0}
  before, after = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (given["folder"], tmp_path / "out")
  )
  assert before.keys() == after.keys() and {x.dtype for x in after.values()} == {np.dtype("bfloat16")}
  assert all(np.any(before[name] != after[name]) for name in before)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x.astype("bfloat16"), y),
    policy.params,
    hf.load(tmp_path / "out", dtype="bfloat16").params,
  )
  with pytest.raises(hf.HuggingFaceError, match="is not empty"):
    writer.export(tmp_path / "run", tmp_path / "out")

  train.run(
    run_config(given, "sft", steps=1, **{"model.checkpoint": str(tmp_path / "run")}), tmp_path / "next"
  )
  again = checkpoint.load_policy(tmp_path / "next")
  assert again.settings.tokenizer == str(given["folder"])
  hf.save(tmp_path / "out2", again.config, again.params, dtype="float32")
  assert "lm_head.bias" in safetensors.numpy.load_file(tmp_path / "out2" / "model.safetensors")


@pytest.fixture(scope="module")
def other_eos(given, tmp_path_factory):
  """A base that ends at 5 and 6, trained with a tokenizer whose EOS is 0: all params, and an adapter."""
  root = tmp_path_factory.mktemp("other_eos")
  shapes = models.load_vectors()[0]["tensors"]["llama3"]
  models.write_folder(
    root / "base", "llama3", models.tensors_of(shapes), eos_token_id=5, bos_token_id=1, pad_token_id=None
  )
  (root / "base" / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [5, 6], "temperature": 0.6})
  )
  hf.copy_tokenizer(given["folder"], root / "base")
  settings = {"model.checkpoint": str(root / "base"), "steps": 1}
  adapter = {"lora.rank": 2, "optimizer.learning_rate": 0.1, "model.param_dtype": "bfloat16"}
  train.run(run_config(given, "sft", **settings), root / "sft")
  train.run(run_config(given, **settings | adapter), root / "lora")
  return root


@pytest.mark.parametrize("run", ["sft", "lora"])
def test_the_export_ends_where_training_and_the_base_ended(run, other_eos, tmp_path):
  assert writer.export(other_eos / run, tmp_path / "out").stop_ids == (0, 5, 6)
  assert read_json(tmp_path / "out" / "generation_config.json") == {
    "eos_token_id": [0, 5, 6],
    "temperature": 0.6,
  }
  config = read_json(tmp_path / "out" / "config.json")
  assert config == models.CASES["llama3"] | {
    "eos_token_id": [0, 5, 6],
    "bos_token_id": 1,
    "pad_token_id": None,
  }
  assert tokenization.load_tokenizer(str(tmp_path / "out")).eos_token_id == 0
  for model in (other_eos / run, tmp_path / "out"):
    assert weights.load(str(model)).stop_ids == (0, 5, 6)


def test_an_adapters_folder_says_where_its_base_would_not_end(other_eos, tmp_path):
  done = writer.export_adapter(other_eos / "lora", tmp_path / "out")
  assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [0, 5, 6]
  read_back, note = done.notes
  assert "which does not end at (0, 5, 6)" in note
  policy, written = re.search("log-prob of 14 tokens (.*), the policy's (.*)", read_back).groups()
  np.testing.assert_allclose(float(policy), float(written), rtol=0.01)
  notes = writer.export_adapter(other_eos / "lora", tmp_path / "elsewhere", base="org/name").notes
  assert notes == ("not read back: the base 'org/name' is no folder here", note.replace("out", "elsewhere"))


def test_whatever_ended_a_response_ends_the_export(given, tmp_path):
  """The ids are those of the data, not the tokenizer's EOS."""
  settings = weights.with_tokenizer(run_config(given, "sft", steps=1))
  data = resolve.load_data(settings)
  assert data.stop_ids == [0]
  tokens = data.train.data
  tokens = dataclasses.replace(tokens, report=tokens.report | {"stop_ids": [4, 0, 9]})
  data = data._replace(train=dataclasses.replace(data.train, data=tokens))
  train.run(settings, tmp_path / "run", data=data)
  assert writer.export(tmp_path / "run", tmp_path / "out").stop_ids == (4, 0, 9)
  assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [4, 0, 9]


def test_only_whole_responses_end_somewhere(given):
  load = lambda **changes: resolve.load_data(weights.with_tokenizer(run_config(given, **changes)))
  whole = load().train.data.report
  ((end, count),) = whole["ended_by"].items()
  assert count == 160 and whole["stop_ids"] == [0] and whole["responses_cut"] == 0
  report = load(**{"data.max_length": 6, "data.max_prompt_length": 3}).train.data.report
  assert report["responses_cut"] > 20
  assert report["ended_by"] == {end: 2 * report["used"] - report["responses_cut"]}


@pytest.mark.parametrize(
  "what, message",
  [
    ("weights", r"parameter layers/up/kernel, largest difference was 0.0 and is 0.5"),
    ("rope", "config.json, read back, .*: rope_theta was 500.0 and is 600.0"),
    ("stop", r"generation_config.json, .*: eos_token_id was \[0, 5, 6\] and is \[5, 6\]"),
    ("tokenizer", "ids of 'Which way is north.* was .* and is "),
    ("no tokenizer", "cannot be read back: tokenizer .* cannot be loaded"),
    ("template", "the chat template was .*add_generation_prompt.* and is missing there"),
  ],
)
def test_a_folder_that_is_not_the_policy_is_refused(what, message, other_eos, tmp_path, monkeypatch):
  def spoiled(source, folder):
    if what == "weights":
      tensors = safetensors.numpy.load_file(folder / "model.safetensors")
      tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
      safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    elif what in ("rope", "stop"):
      path = folder / ("config.json" if what == "rope" else "generation_config.json")
      path.write_text(
        json.dumps(read_json(path) | ({"rope_theta": 600.0} if what == "rope" else {"eos_token_id": [5, 6]}))
      )
    if what != "no tokenizer":
      copy(source, folder)
    if what == "template":
      (folder / "chat_template.jinja").unlink()
    if what == "tokenizer":
      path = folder / "tokenizer.json"
      path.write_text(path.read_text().replace("WhitespaceSplit", "Whitespace"))

  run, copy = other_eos / "sft", hf.copy_tokenizer
  if what == "template":
    shutil.copytree(run, tmp_path / "run")
    tokenizer = tokenization.load_tokenizer(str(other_eos / "base"))
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %} is {% endif %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(read_json(path) | {"tokenizer": str(tmp_path / "chat")}))
    run = tmp_path / "run"
  monkeypatch.setattr(hf, "copy_tokenizer", spoiled)
  with pytest.raises(hf.HuggingFaceError, match=message):
    writer.export(run, tmp_path / "out")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model.checkpoint": "org/name"}, "org/name' cannot be loaded"),
    (
      {"model.checkpoint": "org/name", "tokenizer": "given"},
      "config.model.checkpoint is 'org/name': model 'org/name' is no folder and cannot be fetched",
    ),
    (
      {"reference.checkpoint": "org/name", "reference.may_differ": True},
      "config.reference.checkpoint is 'org/name'",
    ),
    ({"data.max_length": 33}, "data.max_length is 33 but the model has dynamic rotary positions for 32"),
  ],
)
def test_what_cannot_start_is_refused_by_name(changes, message, given, words, tmp_path):
  changes = changes | ({"tokenizer": words} if "tokenizer" in changes else {})
  if "data.max_length" in changes:
    folder = tmp_path / "dynamic"
    shapes = models.load_vectors()[0]["tensors"]["llama2_dynamic"]
    models.write_folder(folder, "llama2_dynamic", models.tensors_of(shapes), max_position_embeddings=32)
    hf.copy_tokenizer(words, folder)
    changes["model.checkpoint"] = str(folder)
  settings = run_config(given)
  settings.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    train.run(settings, tmp_path / "run")
