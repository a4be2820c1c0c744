"""A run that starts from a Hugging Face folder and ends as one."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from dpojax import checkpoint, export, train
from dpojax.errors import UserError
from dpojax.metrics import read_metrics
from dpojax.models import hf
from tests import conftest, worlds
from tests.parity import models

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def given(words, tmp_path_factory):
  """A GPT-J in bfloat16 with a tokenizer beside it, pairs and a cache."""
  root = tmp_path_factory.mktemp("given")
  tensors = models.tensors_of(models.load_vectors()[0]["tensors"]["gptj"])
  models.write_folder(
      root / "gptj", "gptj", {name: x.astype("bfloat16") for name, x in tensors.items()})
  hf.copy_tokenizer(words, root / "gptj")
  path = worlds.write_jsonl(root / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 80))
  return dict(folder=root / "gptj", path=path, cache_dir=str(root / "cache"))


def run_config(given, kind="dpo", **changes):
  return worlds.run_config(
      kind, "", given["path"], given["cache_dir"],
      **{"model.checkpoint": str(given["folder"]), "steps": 2, "eval_every": 0} | changes)


def test_dpo_of_a_hugging_face_folder_is_exported_as_one(given, tmp_path):
  """In parts over a mesh; the second run starts where the first one ended."""
  train.run(run_config(given, **{
      "parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2}), tmp_path / "run")
  first = next(line for line in read_metrics(tmp_path / "run") if line["split"] == "train")
  assert abs(first["loss"] - np.log(2)) < 1e-5
  policy = checkpoint.load_policy(tmp_path / "run")
  assert policy.settings.tokenizer == str(given["folder"])

  result = subprocess.run(
      [sys.executable, "-m", "dpojax.export", f"--workdir={tmp_path / 'run'}",
       f"--out={tmp_path / 'out'}"], cwd=conftest.ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"the policy of step 2 of {tmp_path / 'run'} is in {tmp_path / 'out'}\n"
  assert (tmp_path / "out" / "tokenizer.json").is_file()
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == models.CASES["gptj"]
  before, after = (safetensors.numpy.load_file(folder / "model.safetensors")
                   for folder in (given["folder"], tmp_path / "out"))
  assert before.keys() == after.keys() and {x.dtype for x in after.values()} == {np.dtype("bfloat16")}
  assert all(np.any(before[name] != after[name]) for name in before)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype("bfloat16"), y),
               policy.params, hf.load(tmp_path / "out", dtype="bfloat16").params)
  with pytest.raises(hf.HuggingFaceError, match="is not empty"):
    export.export(tmp_path / "run", tmp_path / "out")

  train.run(run_config(given, "sft", steps=1, **{"model.checkpoint": str(tmp_path / "run")}),
            tmp_path / "next")
  again = checkpoint.load_policy(tmp_path / "next")
  assert again.settings.tokenizer == str(given["folder"])
  hf.save(tmp_path / "out2", again.config, again.params, dtype="float32")
  assert "lm_head.bias" in safetensors.numpy.load_file(tmp_path / "out2" / "model.safetensors")


@pytest.mark.parametrize("changes, message", [
    ({"model.checkpoint": "org/name"}, "org/name' cannot be loaded"),
    ({"model.checkpoint": "org/name", "tokenizer": "given"},
     "config.model.checkpoint is 'org/name': model 'org/name' is no folder and cannot be fetched"),
    ({"reference.checkpoint": "org/name", "reference.may_differ": True},
     "config.reference.checkpoint is 'org/name'"),
    ({"data.max_length": 33}, "data.max_length is 33 but the model has dynamic rotary positions for 32"),
])
def test_what_cannot_start_is_refused_by_name(changes, message, given, words, tmp_path):
  changes = changes | ({"tokenizer": words} if "tokenizer" in changes else {})
  if "data.max_length" in changes:
    folder = tmp_path / "dynamic"
    shapes = models.load_vectors()[0]["tensors"]["llama2_dynamic"]
    models.write_folder(
        folder, "llama2_dynamic", models.tensors_of(shapes), max_position_embeddings=32)
    hf.copy_tokenizer(words, folder)
    changes["model.checkpoint"] = str(folder)
  settings = run_config(given)
  settings.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    train.run(settings, tmp_path / "run")
