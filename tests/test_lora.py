"""Adapters: their arithmetic, a run that trains one, and their form in PEFT. No torch here.

`tests/parity/check_peft.py` holds what is written to PEFT itself.
"""

import functools
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

from dpojax import train
from dpojax.data import tokenization
from dpojax.export import writer
from dpojax.models import hf, lora, peft, transformer
from dpojax.training import checkpoint, objectives, parallel, preference, resolve, step, weights
from dpojax.training import config as config_lib
from dpojax.training.metrics import read_metrics
from tests import conftest, worlds
from tests.parity import models

pytestmark = pytest.mark.usefixtures("compiled")

LORA = lora.Lora(rank=3, alpha=5.0)
MODELS = {
  "llama": worlds.llama(remat="full"),
  "gpt2": worlds.gpt2(),
  "gemma": worlds.gemma(),
  "gemma_unrolled": worlds.gemma(scan_layers=False),
}


def rows_of(count=6):
  return worlds.packed(worlds.comparisons(np.random.default_rng(0), count, 2), 64, rows=8)


def adapter_of(config, spec=LORA, seed=3):
  """A random adapter, of which nothing is 0."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: lora.init_adapter(config, spec, jax.random.key(0)))
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), shapes)


def objective_of(config, spec=LORA, axis_name=None):
  return objectives.of_adapter(
    preference.preference_objective(
      lora.make_apply(config, spec), preference.make_terms(["dpo"]), beta=0.3, axis_name=axis_name
    )
  )


@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_changes_no_bit_and_a_trained_one_is_the_merged_model(name):
  config, rows = MODELS[name], rows_of()
  base = worlds.params_of(config)
  apply = jax.jit(lambda params: lora.make_apply(config, LORA)(params, rows).hidden)
  new = lora.init_adapter(config, LORA, jax.random.key(0))
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(new))
  want = apply(base)
  np.testing.assert_array_equal(apply(lora.Adapted(base, new)), want)
  adapter = adapter_of(config)
  got = apply(lora.Adapted(base, adapter))
  np.testing.assert_allclose(got, apply(lora.merge(base, adapter, LORA)), atol=2e-4)
  assert np.abs(got - want).max() > 0.1


def test_a_of_a_new_adapter_has_the_variance_of_pefts_draw_and_b_is_zero():
  config = worlds.llama(width=512, layers=1, heads=4, mlp_width=768)
  new = lora.init_adapter(config, lora.Lora(64, 1.0), jax.random.key(0))["layers"]
  for name, inputs in (("query", 512), ("attention_out", 512), ("down", 768)):
    np.testing.assert_allclose(np.std(new[name]["a"]), (3 * inputs) ** -0.5, rtol=0.02)
    assert not np.any(new[name]["b"])


def test_gradient_of_an_adapter_is_that_of_the_kernels_through_the_product():
  """dL/dA = scale dL/dW B^T and dL/dB = scale A^T dL/dW, each layer by itself."""
  config, rows = worlds.llama(), rows_of()
  base, adapter = worlds.params_of(config), adapter_of(config)
  loss = lambda adapter: objective_of(config).evaluate(adapter, base, rows)[0].total
  grads = jax.jit(jax.grad(loss))(adapter)
  plain = preference.preference_objective(
    transformer.make_apply(config), preference.make_terms(["dpo"]), beta=0.3
  )
  of_kernels = jax.jit(jax.grad(lambda params: plain.evaluate(params, base, rows)[0].total))(
    lora.merge(base, adapter, LORA)
  )["layers"]
  for name, inputs in (("query", 1), ("attention_out", 2), ("down", 1)):
    pair, got = adapter["layers"][name], grads["layers"][name]
    for layer in range(config.layers):
      w = of_kernels[name]["kernel"][layer]
      w = w.reshape(math.prod(w.shape[:inputs]), -1)
      a, b = pair["a"][layer].reshape(len(w), -1), pair["b"][layer].reshape(LORA.rank, -1)
      want_a, want_b = LORA.scale * w @ b.T, LORA.scale * a.T @ w
      np.testing.assert_allclose(got["a"][layer].reshape(a.shape), want_a, rtol=1e-3, atol=1e-4)
      np.testing.assert_allclose(got["b"][layer].reshape(b.shape), want_b, rtol=1e-3, atol=1e-4)


def sgd_step(devices, config, base, adapter, rows):
  tx = optax.sgd(1.0)
  lifted = devices.lift(
    step.make_train_step(
      objective_of(config, axis_name=devices.axis_name),
      tx,
      axis_name=devices.axis_name,
      over_rows=devices.over_rows,
    ),
    donate_state=True,
  )
  state, _ = lifted(
    devices.place(step.init_state(adapter, tx)),
    devices.place(base, donated=False),
    devices.place_rows(rows, len(rows.tokens)),
  )
  return state


def test_pmap_and_mesh_train_the_adapter_of_one_device_and_cut_it_as_its_kernel():
  config, rows = worlds.llama(width=64, vocab_size=64, mlp_width=64, layers=1), rows_of()
  base, adapter = worlds.params_of(config), adapter_of(config)
  loss = lambda adapter: objective_of(config).evaluate(adapter, base, rows)[0].value()
  want = jax.tree.map(lambda x, g: x - g, adapter, jax.jit(jax.grad(loss))(adapter))
  for devices in (parallel.Replicas(), parallel.Mesh(data=2, fsdp=2, tensor=2)):
    state = sgd_step(devices, config, base, adapter, rows)
    got = jax.device_get(devices.collect(state.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), got, want)
  for name, axes in (("query", "fsdp"), ("attention_out", "tensor"), ("down", "tensor")):
    assert axes in state.params["layers"][name]["a"].sharding.spec
    assert {"fsdp", "tensor"} - {axes} <= set(state.params["layers"][name]["b"].sharding.spec)


def test_a_base_that_is_in_place_is_not_copied():
  devices = parallel.Mesh(data=2, fsdp=2, tensor=2)
  placed = devices.place(worlds.params_of(worlds.llama()))
  pointers = lambda tree: [
    shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
  ]
  assert pointers(devices.place(placed, donated=False)) == pointers(placed)
  assert not set(pointers(devices.place(placed))) & set(pointers(placed))


def test_bfloat16_weights_are_computed_with_as_their_float32_values():
  config, rows = MODELS["gemma"], rows_of()
  base = jax.tree.map(lambda x: x.astype("bfloat16"), worlds.params_of(config))
  apply = jax.jit(lambda params: transformer.make_apply(config)(params, rows).hidden)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float32), base)
  np.testing.assert_array_equal(apply(base), apply(wide))


@pytest.fixture(scope="module")
def given(words, tmp_path_factory):
  """Tokenizer, pairs and cache that runs share."""
  folder = tmp_path_factory.mktemp("given")
  path = worlds.write_jsonl(folder / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 100))
  return dict(tokenizer=words, path=path, cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def sft(given, tmp_path_factory):
  """A Hugging Face folder: what a short SFT of all params has come to."""
  root = tmp_path_factory.mktemp("sft")
  train.run(worlds.run_config("sft", **given, steps=20, eval_every=0, checkpoint_every=20), root / "run")
  writer.export(root / "run", root / "out")
  return str(root / "out")


def config_of(given, base, kind="dpo", **changes):
  return worlds.run_config(
    kind,
    **given
    | {"tokenizer": ""}
    | {
      "model.checkpoint": str(base),
      "lora.rank": 4,
      "optimizer.learning_rate": 1e-2,
      "eval_every": 8,
      "model.param_dtype": "bfloat16",
    }
    | changes,
  )


@pytest.fixture(scope="module")
def trained(given, sft, tmp_path_factory):
  """The workdir of DPO of an adapter."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  train.run(config_of(given, sft, steps=8, checkpoint_keep=0), workdir)
  return workdir


@pytest.fixture(scope="module")
def second(given, trained, tmp_path_factory):
  """The workdir of a run that starts from another's adapter."""
  workdir = tmp_path_factory.mktemp("second") / "run"
  train.run(config_of(given, trained, steps=1, eval_every=1, **{"model.param_dtype": "float32"}), workdir)
  return workdir


def lines(workdir, split):
  return [line for line in read_metrics(workdir) if line["split"] == split]


def test_a_run_of_an_adapter_starts_at_log_2_learns_and_checkpoints_nothing_else(trained, sft):
  losses = [line["loss"] for line in lines(trained, "train")]
  assert abs(losses[0] - math.log(2)) < 1e-6
  last = lines(trained, "eval")[-1]
  assert last["rewards/accuracies"] > 0.75 and last["loss"] < 0.66
  state, about = checkpoint.Checkpoints(trained, keep=0).restore_arrays(8)
  assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state["params"])} == {"a", "b"}
  base = hf.load(sft, dtype="bfloat16").params
  assert about["reference"] == checkpoint.fingerprint(base)
  trained_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
  assert trained_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(base)) / 1.5


def test_a_policy_is_its_base_with_the_adapter_and_the_next_run_starts_from_it(trained, second, sft):
  policy = checkpoint.load_policy(trained).params
  jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), policy, hf.load(sft).params)
  last, first = lines(trained, "eval")[-1], lines(second, "eval")[0]
  assert abs(first["loss"] - math.log(2)) < 1e-6
  np.testing.assert_allclose(first["logps/chosen"], last["logps/chosen"], rtol=1e-4)


def test_a_stored_reference_on_a_mesh_gives_the_losses_of_an_inline_one_under_pmap(
  trained, given, sft, tmp_path
):
  train.run(
    config_of(
      given,
      sft,
      steps=3,
      checkpoint_every=0,
      **{"reference.mode": "stored", "parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2},
    ),
    tmp_path,
  )
  got, want = ([line["loss"] for line in lines(workdir, "train")][:3] for workdir in (tmp_path, trained))
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_a_run_of_an_adapter_continues_bit_for_bit_and_on_the_same_base_only(trained, given, sft, tmp_path):
  run, base = tmp_path / "run", tmp_path / "base"
  shutil.copytree(trained, run)
  for step_ in (6, 8):
    shutil.rmtree(run / "checkpoints" / str(step_))
  train.run(config_of(given, sft, steps=8, checkpoint_keep=0), run)
  want, got = (checkpoint.Checkpoints(workdir, keep=0).restore_arrays(8)[0] for workdir in (trained, run))
  jax.tree.map(np.testing.assert_array_equal, got, want)

  settings = json.loads((run / "config.json").read_text())
  settings["model"]["checkpoint"] = str(base)
  (run / "config.json").write_text(json.dumps(settings))
  with pytest.raises(checkpoint.CheckpointError, match="base', which cannot be read .*put it back, or"):
    checkpoint.load_policy(run)
  shutil.copytree(sft, base)
  jax.tree.map(
    np.testing.assert_array_equal, *(checkpoint.load_policy(workdir).params for workdir in (run, trained))
  )
  tensors = safetensors.numpy.load_file(base / "model.safetensors")
  tensors["model.norm.weight"][0] += 1
  safetensors.numpy.save_file(tensors, base / "model.safetensors")
  with pytest.raises(checkpoint.CheckpointError, match="on other weights than .*bring those back"):
    checkpoint.load_policy(run)
  changed = config_of(given, base, steps=9)
  changed.tokenizer = settings["tokenizer"]
  with pytest.raises(checkpoint.CheckpointError, match="started with another reference weights"):
    train.run(changed, run)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_other_objectives_train_adapters_too(kind, given, sft, tmp_path):
  config = config_of(given, sft, kind, steps=8, checkpoint_every=8, checkpoint_best="")
  train.run(config, tmp_path)
  first, last = lines(tmp_path, "eval")
  assert last["loss"] < first["loss"] - 0.01
  policy = checkpoint.load_policy(tmp_path)
  assert ("reward_head" in policy.params) == (kind == "reward")
  if kind == "reward":  # another adapter goes on from the head the first one has trained
    config.model.checkpoint = str(tmp_path)
    setup = resolve.make_setup(weights.with_tokenizer(config))
    head = policy.params["reward_head"]
    np.testing.assert_array_equal(setup.params["reward_head"], head)
    assert np.any(head) and "reward_head" not in setup.reference


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"lora.targets": "query,valeu"}, "lora.targets is 'query,valeu'.*down; did you mean value"),
    ({"lora.targets": "query,gate", "base": "gpt2"}, "'gate' is no projection of the model; it has query"),
    (
      {"lora.rank": 0, "lora.targets": "query", "model.param_dtype": "float32"},
      "lora.targets is 'query' but lora.rank is 0",
    ),
    ({"lora.rank": -1}, "config.lora.rank is -1; it must be at least 0"),
    ({"lora.alpha": 0.0}, "config.lora.alpha is 0.0; it must be positive"),
    ({"lora.rank": 0, "model.param_dtype": "bfloat16"}, "most updates would be rounded away"),
    (
      {"model.checkpoint": "", "tokenizer": "words"},
      "lora.rank is 4 but model.checkpoint is empty; an adapter needs",
    ),
    ({"reference.sync_every": 2}, "sync_every 2; the reference is the base below the adapter"),
    (
      {"reference.checkpoint": "/elsewhere", "reference.may_differ": True},
      "leave reference.checkpoint unset",
    ),
  ],
)
def test_what_an_adapter_cannot_do_is_refused_by_name(changes, message, given, sft, folder_of, tmp_path):
  changes = dict(changes)
  base = folder_of(changes.pop("base")) if "base" in changes else sft
  if "tokenizer" in changes:
    changes["tokenizer"] = given["tokenizer"]
  with pytest.raises(config_lib.ConfigError, match=message):
    train.run(config_of(given, base, **changes), tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def folder_of(words, tmp_path_factory):
  """Returns `folder_of(case)`: the case of the model vectors as a Hugging Face folder."""
  root = tmp_path_factory.mktemp("models")

  @functools.cache
  def folder_of(case):
    tensors = models.tensors_of(models.load_vectors()[0]["tensors"][case])
    models.write_folder(root / case, case, tensors)
    hf.copy_tokenizer(words, root / case)
    return root / case

  return folder_of


@pytest.mark.parametrize("targets", [(), ("query", "value", "down")])
@pytest.mark.parametrize("case", ["gpt2", "gptj", "neox", "mistral", "qwen3_yarn", "gemma3"])
def test_an_adapter_written_for_peft_is_read_as_the_merged_model(case, targets, folder_of, tmp_path):
  spec = lora.Lora(3, 5.0, targets)
  config, base = hf.load(folder_of(case))
  adapter = adapter_of(config, spec)
  peft.save(tmp_path / "out", config, adapter, spec, base=str(folder_of(case)))
  read = hf.load(tmp_path / "out")
  assert read.config == config
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6), read.params, lora.merge(base, adapter, spec)
  )
  settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  count = len(targets) if targets else 3
  if case in ("gpt2", "neox"):  # one tensor for query, key and value: their ranks add up
    fused = "c_attn" if case == "gpt2" else "query_key_value"
    assert settings["rank_pattern"] == {fused: 3 * min(count, 2 if targets else 3)}
    assert settings["alpha_pattern"] == {fused: 5 * min(count, 2 if targets else 3)}
  else:
    assert settings["rank_pattern"] == {} and "q_proj" in settings["target_modules"]
  assert settings["fan_in_fan_out"] == (case == "gpt2")


def test_a_trained_adapter_is_exported_alone_and_merged(trained, given, sft, tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "dpojax.export",
      f"--workdir={trained}",
      f"--out={tmp_path / 'adapter'}",
      "--lora",
    ],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("the adapter of step 8")
  assert writer.export(trained, tmp_path / "whole").step == 8
  settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert settings["base_model_name_or_path"] == sft
  policy = checkpoint.load_policy(trained).params
  for folder, atol in (("whole", 0), ("adapter", 0.01)):  # this one is on the base in float32
    start = weights.with_tokenizer(config_of(given, tmp_path / folder, **{"model.param_dtype": "float32"}))
    assert start.tokenizer == str(tmp_path / folder)
    tokenization.load_tokenizer(start.tokenizer)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=atol),
      weights.read(start, "model.checkpoint").params,
      policy,
    )


def test_an_adapter_that_peft_could_not_load_is_not_written(second, sft, tmp_path):
  def refused(error, message):
    return pytest.raises(error, match=re.compile(message, re.DOTALL))

  with refused(hf.HuggingFaceError, "which is no Hugging Face model that PEFT could load.*--base"):
    writer.export_adapter(second, tmp_path / "out")
  writer.export_adapter(second, tmp_path / "out", base="org/name")
  assert '"base_model_name_or_path": "org/name"' in (tmp_path / "out/adapter_config.json").read_text()
  with refused(hf.HuggingFaceError, "is not empty"):
    writer.export_adapter(second, tmp_path / "out", base="org/name")
  sft = pathlib.Path(sft).parent / "run"
  with refused(checkpoint.CheckpointError, "holds no adapter: it was run with lora.rank=0"):
    writer.export_adapter(sft, tmp_path / "none", base="org/name")
  config = worlds.llama(reward_head=True)
  with refused(hf.HuggingFaceError, "the adapter has a reward head"):
    peft.save(tmp_path / "reward", config, adapter_of(config), LORA, base="org/name")


@pytest.mark.parametrize(
  "change, message",
  [
    ({"peft_type": "IA3"}, "\"peft_type\": 'IA3', which is not supported; merge the adapter"),
    ({"use_dora": True}, '"use_dora": True'),
    ({"modules_to_save": ["lm_head"]}, '"modules_to_save"'),
    ("embedding", "has a tensor base_model.model.model.embed_tokens.lora_embedding_A"),
    ("half", "has half of an adapter of model.layers.0.mlp.down_proj"),
    ("layer", "changes model.layers.7.mlp.down_proj.weight, of which the base has none"),
    ("shape", r"is \[16, 25\] outputs and inputs, of rank 3 and 3, but the tensor is \[16, 24\]"),
    ("file", "adapter_model.safetensors"),
  ],
)
def test_an_adapter_that_is_not_supported_is_named(change, message, folder_of, tmp_path):
  config, _ = hf.load(folder_of("mistral"))
  folder = tmp_path / "adapter"
  peft.save(folder, config, adapter_of(config), LORA, base=str(folder_of("mistral")))
  about, stored = folder / "adapter_config.json", folder / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(stored)
  name = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"
  if isinstance(change, dict):
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
  elif change == "embedding":
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((3, 29), np.float32)
  elif change == "half":
    del tensors[name.format(0, "B")]
  elif change == "layer":
    for letter in "AB":
      tensors[name.format(7, letter)] = tensors.pop(name.format(0, letter))
  elif change == "shape":
    tensors[name.format(0, "A")] = np.zeros((3, 25), np.float32)
  if change == "file":
    stored.unlink()
  else:
    safetensors.numpy.save_file(tensors, stored)
  with pytest.raises(hf.HuggingFaceError, match=message):
    hf.load(folder)


def test_a_rank_stabilised_adapter_and_patterns_of_alpha_are_read_as_peft_means_them(folder_of, tmp_path):
  config, base = hf.load(folder_of("mistral"))
  adapter, folder = adapter_of(config), tmp_path / "adapter"
  peft.save(folder, config, adapter, LORA, base=str(folder_of("mistral")))
  about = folder / "adapter_config.json"
  settings = json.loads(about.read_text())
  about.write_text(json.dumps(settings | {"use_rslora": True, "alpha_pattern": {"down_proj": 7}}))
  got = hf.load(folder).params["layers"]
  for name, alpha in (("up", 5.0), ("down", 7.0)):
    spec = lora.Lora(3, alpha * 3**0.5)  # alpha / sqrt(rank) is (alpha sqrt(rank)) / rank
    want = lora.merge(base, adapter, spec)["layers"][name]["kernel"]
    np.testing.assert_allclose(got[name]["kernel"], want, atol=1e-6)
