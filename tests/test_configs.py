"""Configs of published models: each is sound, builds the model it names, and fits what it is for."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import pytest

from dpojax.data.packing import Rows
from dpojax.models import families, lora, transformer
from dpojax.training import config as config_lib
from dpojax.training import resolve, step
from tests import conftest

PUBLISHED = json.loads((conftest.ROOT / "tests" / "published_models.json").read_text())
SAME_MODEL = {"CarperAI/openai_summarize_tldr_sft": "EleutherAI/gpt-j-6b"}
"""Published weights of an architecture published under another name."""

CONFIGS = {  # config and argument -> devices of 80 GB its docstring says it is for
  "imdb:sft": 1,
  "imdb:dpo": 1,
  "hh_pythia:sft": 4,
  "hh_pythia:dpo": 4,
  "hh_pythia:reward": 4,
  "tldr:dpo": 8,
  "tldr:preferred_ft": 8,
  "tldr:reward": 8,
  "llama3:full": 8,
  "llama3:lora": 1,
  "qwen3:full": 8,
  "qwen3:lora": 1,
}


def config_of(name):
  module, _, arg = name.partition(":")
  config = importlib.import_module(f"configs.{module}").get_config(arg)
  if config.data.source == "jsonl":
    config.data.path = "pairs.jsonl"
  return config


def size(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_the_published_model_and_its_step_and_fits_its_devices(name):
  config = config_of(name)
  config_lib.validate(config)
  assert config.optimizer.name != "rmsprop" or config.optimizer.warmup_steps == 150
  published = PUBLISHED[SAME_MODEL.get(config.model.checkpoint, config.model.checkpoint)]
  model = dataclasses.replace(
    families.read_config(published["config"]),
    dtype=config.model.dtype,
    remat=config.model.remat,
    reward_head=config.objective == "reward",
  )
  base = jax.eval_shape(lambda: transformer.init_params(model, jax.random.key(0)))
  head = model.width if model.reward_head else 0
  assert sum(leaf.size for leaf in jax.tree.leaves(base)) == published["parameters"] + head
  assert model.longest is None or config.data.max_length <= model.longest

  objective = None

  def trained_and_frozen(base):
    nonlocal objective
    setup = resolve.setup_of(model, base, config)
    objective = setup.objective
    return setup.params, setup.reference

  params, reference = jax.eval_shape(trained_and_frozen, base)
  reference = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.model.param_dtype), reference)
  tx = step.make_optimizer(
    config.optimizer.name,
    lambda step: config.optimizer.learning_rate,
    max_grad_norm=config.optimizer.max_grad_norm,
  )
  state = jax.eval_shape(lambda params: step.init_state(params, tx), params)
  whole = lambda *sizes: jax.ShapeDtypeStruct((1, *sizes), jnp.int32)
  rows = Rows(*[whole(config.row_length)] * 4, *[whole(config.row_length // 2)] * 3, whole(4))
  after, metrics = jax.eval_shape(step.make_train_step(objective, tx), state, reference, rows)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert metrics["loss"].shape == ()

  assert config.parallel.fsdp == CONFIGS[name]
  gradients = size(params)
  assert (size(state) + gradients + size(reference)) / CONFIGS[name] < 0.6 * 80e9


@pytest.mark.parametrize("name, share", [("llama3", 0.006), ("qwen3", 0.006)])
def test_the_adapters_of_configs_are_less_than_a_hundredth_of_their_model(name, share):
  config = config_of(f"{name}:lora")
  published = PUBLISHED[config.model.checkpoint]
  model = families.read_config(published["config"])
  adapter = jax.eval_shape(lambda: lora.init_adapter(model, config_lib.lora_of(config), jax.random.key(0)))
  inputs_and_outputs = (
    2 * model.width
    + model.heads * model.head_size * 2
    + 2 * model.kv_heads * model.head_size
    + 2 * model.width
    + 3 * (model.width + model.mlp_width)
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(adapter))
  assert count == 16 * model.layers * inputs_and_outputs
  assert count < share * published["parameters"]
