"""Published families against vectors of transformers, and their folders in and out. No torch here.

`tests/parity/make_model_vectors.py` makes the vectors, and checks with transformers what is written.
"""

import dataclasses
import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpojax.data import packing
from dpojax.kernels.head import logits_of
from dpojax.log_probs import token_log_probs
from dpojax.models import hf, transformer
from dpojax.training import parallel
from tests import conftest, worlds
from tests.parity import models

ABOUT, VECTORS = models.load_vectors()
SEQUENCES = models.sequences()
SHAPE = packing.RowShape(length=32, scored=24, comparisons=2)


def tensors_of(case):
  return models.tensors_of(ABOUT["tensors"][case])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Returns `folder_of(case)`: the case as a Hugging Face folder."""
  root = tmp_path_factory.mktemp("models")

  @functools.cache
  def folder_of(case):
    models.write_folder(root / case, case, tensors_of(case))
    return root / case

  return folder_of


def rows_of(num_responses):
  """The sequences as branches of their prompts in one row (2), or each alone in its own (1)."""
  array = functools.partial(np.array, dtype=np.int32)
  if num_responses == 2:
    examples = [(array(p), list(map(array, rs))) for p, rs in zip(models.PROMPTS, models.RESPONSES)]
    row = array([0, 0])
  else:
    examples = [(array(ids[:prompt]), [array(ids[prompt:])]) for ids, prompt in SEQUENCES]
    row = np.arange(4)
  return packing.fill(examples, row, 4, SHAPE, num_responses=num_responses, example=range(len(examples)))


def tokens_of(rows, num_responses):
  """Where the tokens of the sequences stand in the rows, sequence after sequence, as two indices."""
  places = []
  for sequence in range(len(SEQUENCES)):
    example, branch = divmod(sequence, num_responses)
    ((r, number),) = np.argwhere(rows.example == example)
    here = (rows.comparison[r] == number + 1) & np.isin(rows.branch[r], (0, branch + 1))
    (at,) = np.nonzero(here)
    places += [(r, i) for i in at[np.argsort(rows.positions[r, at])]]
  return tuple(np.transpose(places))


def weights_of(rows, num_responses):
  """[R, S] weights of the scored tokens in the loss; 0 is padding."""
  number, response = np.divmod(rows.slot, num_responses)
  there = number < SHAPE.comparisons
  example = np.take_along_axis(rows.example, np.where(there, number, 0), axis=1)
  position = np.take_along_axis(rows.positions, rows.source, axis=1) + 1
  return np.where(there, models.weight(example * num_responses + response, position), 0.0).astype(np.float32)


def make_score(config):
  """Returns the loss of the vectors with its gradient, the hidden states and the logits."""
  apply = transformer.make_apply(config)

  def score(params, rows, weights):
    outputs = apply(params, rows)
    predicting = jnp.take_along_axis(outputs.hidden, rows.source[..., None], axis=1)
    loss = jnp.sum(weights * token_log_probs(predicting, outputs.head, rows.target))
    return loss, (outputs.hidden, logits_of(outputs.hidden, outputs.head))

  return jax.jit(jax.value_and_grad(score, has_aux=True))


def written(folder, config, params, **options):
  """Saves params, or gradients of them, and returns the tensors of the folder."""
  hf.save(folder, config, params, **options)
  return {
    name: tensor
    for file in folder.glob("*.safetensors")
    for name, tensor in safetensors.numpy.load_file(file).items()
  }


@pytest.mark.parametrize("case", models.CASES)
def test_packed_rows_give_the_hidden_states_logits_and_gradients_of_transformers(case, folder_of, tmp_path):
  """And so does each sequence alone."""
  config, params = hf.load(folder_of(case))
  score = make_score(config)
  for num_responses in (2, 1):
    rows = rows_of(num_responses)
    (_, (hidden, logits)), grads = score(params, rows, weights_of(rows, num_responses))
    at = tokens_of(rows, num_responses)
    np.testing.assert_allclose(hidden[at], VECTORS[case]["hidden"], atol=1e-4)
    np.testing.assert_allclose(logits[at], VECTORS[case]["logits"], atol=1e-4)
    got = written(tmp_path / str(num_responses), config, jax.device_get(grads))
    flat = np.concatenate([got[name].ravel() for name in ABOUT["tensors"][case]])
    largest = np.abs(VECTORS[case]["grads"]).max()
    np.testing.assert_allclose(flat, VECTORS[case]["grads"], atol=1e-5 * largest, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", models.CASES)
def test_export_of_an_import_is_the_folder_bit_for_bit(case, dtype, tmp_path):
  """In shards, with config.json as it was; norms in float16 where the rest is bfloat16."""
  stored = {
    name: tensor.astype("float16" if dtype == "bfloat16" and "norm" in name else jnp.dtype(dtype))
    for name, tensor in tensors_of(case).items()
  }
  models.write_folder(tmp_path / "in", case, stored, someone="else's key")
  (tmp_path / "in" / "generation_config.json").write_text('{"do_sample": true}')
  config, params = hf.load(tmp_path / "in", scan_layers=case != "gemma2")
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
  got = written(tmp_path / "out", config, params, shard_bytes=3000)
  assert got.keys() == stored.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  for name, tensor in stored.items():
    assert got[name].dtype == tensor.dtype
    np.testing.assert_array_equal(got[name], tensor)
  for file in ("config.json", "generation_config.json"):
    assert json.loads((tmp_path / "out" / file).read_text()) == json.loads(
      (tmp_path / "in" / file).read_text()
    )
  again = jax.tree.leaves(hf.load(tmp_path / "out", scan_layers=case != "gemma2").params)
  jax.tree.map(np.testing.assert_array_equal, again, jax.tree.leaves(params))


@pytest.mark.parametrize(
  "case, rename, others",
  [
    (
      "gpt2",
      lambda name: name.removeprefix("transformer."),
      {"h.0.attn.bias": (1, 1, 4, 4), "h.1.attn.masked_bias": ()},
    ),
    (
      "neox",
      lambda name: name.replace("lm_head", "embed_out"),
      {
        "gpt_neox.layers.0.attention.bias": (1, 1, 4, 4),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,),
      },
    ),
    ("llama3", str, {"lm_head.weight": (29, 16)}),
  ],
)
def test_names_of_older_folders_are_read_and_written_again(case, rename, others, folder_of, tmp_path):
  stored = {rename(name): tensor for name, tensor in tensors_of(case).items()}
  extra = {name: np.zeros(shape, np.float32) for name, shape in others.items()}
  if case == "llama3":  # a copy of the tied embedding
    extra["lm_head.weight"] = stored["model.embed_tokens.weight"]
  models.write_folder(tmp_path / "in", case, stored | extra)
  config, params = hf.load(tmp_path / "in")
  want = hf.load(folder_of(case)).params
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert written(tmp_path / "out", config, params).keys() == stored.keys()


def test_layers_one_by_one_compute_what_scanned_periods_do(folder_of):
  """Of 5 layers with a pattern of 2: two periods and one layer more."""
  rows = rows_of(2)

  def hidden(**changes):
    config, params = hf.load(folder_of("gemma3"), **changes)
    return jax.jit(transformer.make_apply(config))(params, rows).hidden, params

  scanned, params = hidden()
  assert set(params["layers"]) == {"block_0", "block_1"} and "layer_4" in params
  unrolled, params = hidden(scan_layers=False, remat="full")
  assert [f"layer_{i}" in params for i in range(6)] == [True] * 5 + [False]
  np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_params_are_read_where_they_are_placed(folder_of):
  """Every device reads its part only, and the parts are the parameters."""
  devices = parallel.Mesh(data=2, fsdp=2, tensor=2)
  shares = []

  def place(path, leaf, read):
    def counted(index):
      part = read(index)
      shares.append(part.size / np.prod(leaf.shape))
      return part

    return devices.place_shard(path, leaf, counted)

  for case in ("neox", "gptj"):
    want = hf.load(folder_of(case)).params
    params = hf.load(folder_of(case), place=place).params
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert sum(shares) == len(jax.tree.leaves(params))  # each number once, whatever holds it
    assert {1 / 4} < set(shares)
    shares.clear()
    shardings = devices.shardings(params)
    assert jax.tree.all(jax.tree.map(lambda leaf, s: leaf.sharding == s, params, shardings))
  placed = devices.place(params)  # a step donates it; what was placed must live on
  assert jax.tree.leaves(placed)[0].sharding == jax.tree.leaves(params)[0].sharding
  jax.tree.map(lambda leaf: leaf.delete(), placed)
  jax.tree.map(np.testing.assert_array_equal, params, want)


def test_reading_and_writing_hold_one_tensor_at_a_time(tmp_path):
  config = worlds.llama(vocab_size=2048, width=256, layers=4)
  params = worlds.params_of(config)
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  assert sum(sizes) > 4 * max(sizes)

  def peak_of(work):
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak

  whole = lambda read, leaf: read((slice(None),) * len(leaf.shape))
  assert peak_of(lambda: hf.save(tmp_path, config, params)) < 1.2 * max(sizes)
  assert peak_of(
    lambda: hf.load(tmp_path, place=lambda path, leaf, read: whole(read, leaf).sum())
  ) < 1.2 * max(sizes)


def test_params_can_be_bfloat16(folder_of):
  params = hf.load(folder_of("qwen2"), dtype="bfloat16").params
  want = hf.load(folder_of("qwen2")).params
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  jax.tree.map(np.testing.assert_array_equal, params, want)  # the values are exact in bfloat16


def test_a_model_of_our_own_is_a_llama_or_a_gpt2(tmp_path):
  for make in (worlds.llama, worlds.gpt2):
    config = make(reward_head=False)
    params = worlds.params_of(config)
    folder = tmp_path / make.__name__
    hf.save(folder, config, params, eos_token_id=0)
    read = hf.load(folder)
    assert dataclasses.replace(read.config, published="") == config
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0
  odd = worlds.llama(norm="layer")
  with pytest.raises(hf.HuggingFaceError, match="neither a LLaMA nor a GPT-2"):
    hf.save(tmp_path / "odd", odd, worlds.params_of(odd))


def test_another_dtype_is_written_and_named(folder_of, tmp_path):
  config, params = hf.load(folder_of("mistral"))
  got = written(tmp_path / "out", config, params, dtype="float16")
  assert {tensor.dtype for tensor in got.values()} == {np.dtype("float16")}
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
  params["final_norm"]["scale"][0] = 1e6
  with pytest.raises(hf.HuggingFaceError, match="model.norm.weight does not fit into float16"):
    hf.save(tmp_path / "large", config, params, dtype="float16")


PUBLISHED = json.loads((conftest.ROOT / "tests" / "published_models.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name):
  config = hf.families.read_config(PUBLISHED[name]["config"])
  shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize(
  "case, changes, message",
  [
    (
      "gpt2",
      {"architectures": ["GPT2DoubleHeadsModel"]},
      "a GPT2DoubleHeadsModel of type 'gpt2', "
      "which is not supported; supported are GPT2LMHeadModel, GPTJForCausalLM",
    ),
    ("gpt2", {"model_type": "opt", "architectures": None}, "a model of type 'opt'"),
    (
      "gpt2",
      {"activation_function": "relu"},
      "\"activation_function\": 'relu', which is not supported; supported are 'gelu_new'",
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, '"scale_attn_by_inverse_layer_idx": True'),
    ("gptj", {"n_head": "2"}, '"n_head": .2.; it must be an integer from 0 to 4096'),
    ("llama1", {"rope_scaling": {"type": "llama3"}}, "makes no model: KeyError.'low_freq_factor'"),
    ("llama1", {"rope_scaling": {"type": "longrope"}}, "rotary positions of type 'longrope'"),
    (
      "llama1",
      {"rope_scaling": None, "partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5}},
      '"partial_rotary_factor": 0.5, which this family',
    ),
    ("llama1", {"quantization_config": {"bits": 4}}, "\"quantization_config\": {'bits': 4}"),
    ("llama1", {"num_key_value_heads": 3}, "model.heads is 4 and model.kv_heads 3"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 4}, '"layer_types"'),
    ("gemma3", {"use_bidirectional_attention": True}, '"use_bidirectional_attention": True'),
    ("gemma3", {"attn_logit_softcapping": 50.0}, '"attn_logit_softcapping": 50.0'),
    (
      "mistral",
      {"intermediate_size": 32},
      r"tensor model.layers.0.mlp.down_proj.weight is "
      r"\[16, 24\] but config.json makes it \[16, 32\]",
    ),
    ("mistral", {"num_hidden_layers": 3}, "missing are model.layers.2.input_layernorm.weight.*4 more"),
    ("mistral", {"num_hidden_layers": 1}, "unknown are model.layers.1.input_layernorm.weight"),
    ("mistral", {"tie_word_embeddings": True}, "lm_head.weight is not the input embedding"),
  ],
)
def test_what_is_not_supported_is_named(case, changes, message, tmp_path):
  models.write_folder(tmp_path / "in", case, tensors_of(case), **changes)
  with pytest.raises(hf.HuggingFaceError, match=message):
    hf.load(tmp_path / "in")


def test_missing_and_damaged_files_are_named(folder_of, tmp_path):
  def refused(message):
    return pytest.raises(hf.HuggingFaceError, match=message)

  with refused("model 'org/name' is no folder and cannot be fetched from the hub .* while there is"):
    hf.load("org/name")
  with refused("config.json does not exist"):
    hf.load(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(models.CASES["llama1"]))
  with refused("model.safetensors does not exist; weights are read from safetensors"):
    hf.load(tmp_path)
  whole = (folder_of("llama1") / "model.safetensors").read_bytes()
  (tmp_path / "model.safetensors").write_bytes(whole[:-1])
  with refused("model.safetensors is damaged .*fetch it again"):
    hf.load(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with refused("config.json is not JSON"):
    hf.load(tmp_path)
  odd = {name: tensor.astype(np.int8) for name, tensor in tensors_of("llama1").items()}
  models.write_folder(tmp_path / "odd", "llama1", odd)
  with refused("is of dtype I8, which is not supported; supported are float64, float32"):
    hf.load(tmp_path / "odd")
  config, params = hf.load(folder_of("llama1"))
  with refused("is not empty; give a folder that is, or a new one"):
    hf.save(tmp_path, config, params)
  with refused("the model has a reward head"):
    hf.save(tmp_path / "new", config, params | {"reward_head": np.zeros(16)})
