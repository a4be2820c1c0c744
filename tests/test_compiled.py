"""What the compiled train step holds and costs, counted on a fixed case, so that it stays so."""

import math
import re

import jax
import numpy as np
import optax
import pytest

from dpojax.data import loader
from dpojax.data.tokenized import Tokenized
from dpojax.models import config as model_config
from dpojax.models import transformer
from dpojax.training import preference, step
from dpojax.training.micro_batches import MicroBatches

LENGTH, VOCABULARY = 512, 10000
FLOPS, BYTES = 2.246e9, 106.4e6
"""What XLA says of the step below, jax 0.10.2 on a CPU; the body of a loop counts once."""

CONFIG = model_config.llama_style(
  vocab_size=VOCABULARY, width=64, layers=2, heads=4, max_positions=1024, tie_embeddings=True
)


def batches(**options):
  """Rows of comparisons as long as HH's, 16 a step."""
  rng = np.random.default_rng(0)
  lengths = np.stack([rng.integers(40, 200, 64), rng.integers(10, 90, 64), rng.integers(10, 90, 64)], 1)
  offsets = np.concatenate([[0], lengths.sum(1).cumsum()])
  data = Tokenized(
    lengths.astype(np.int32),
    rng.integers(VOCABULARY, size=offsets[-1]).astype(np.int32),
    offsets,
    np.arange(64, dtype=np.int32),
    {},
    "",
  )
  return loader.Loader(loader.all_of(data), seed=0, batch_size=16, row_length=LENGTH, **options)


def compiled(rows, micro_batches=MicroBatches()):
  objective = preference.preference_objective(
    transformer.make_apply(CONFIG), preference.make_terms(["dpo"]), beta=0.1
  )
  tx = optax.adam(1e-3)
  params = jax.eval_shape(lambda: transformer.init_params(CONFIG, jax.random.key(0)))
  state = jax.eval_shape(lambda p: step.init_state(p, tx), params)
  train_step = jax.jit(step.make_train_step(objective, tx, micro_batches=micro_batches), donate_argnums=0)
  return train_step.lower(state, params, rows).compile()


@pytest.fixture(scope="module")
def whole():
  rows = next(batches().training(0, 1)).rows
  return rows, compiled(rows)


def shapes(program):
  """Every array shape that stands in the compiled program."""
  return {
    tuple(map(int, dims.split(",")))
    for dims in re.findall(r"\b(?:f32|f64|bf16|s32|pred)\[([\d,]+)\]", program.as_text())
  }


def test_no_array_has_the_vocabulary_for_every_token_nor_a_length_squared(whole):
  rows, program = whole
  tokens = rows.tokens.size
  held = shapes(program)
  assert (VOCABULARY, CONFIG.width) in held and (rows.tokens.shape[0], LENGTH) in held
  assert max(map(math.prod, held)) < tokens * VOCABULARY / 10
  assert not [shape for shape in held if shape.count(LENGTH) > 1]


def test_the_steps_arithmetic_and_memory_stay_within_what_they_were(whole):
  _, program = whole
  memory = program.memory_analysis()
  assert program.cost_analysis()["flops"] < 1.1 * FLOPS
  assert memory.temp_size_in_bytes < 1.1 * BYTES


def test_a_part_at_a_time_needs_less_memory_and_one_shape(whole):
  taken = batches(rows_at_once=1)
  rows = next(taken.training(0, 1)).rows
  program = compiled(rows, MicroBatches(1))
  assert program.memory_analysis().temp_size_in_bytes < 0.5 * BYTES
  assert len({batch.rows.tokens.shape for batch in taken.training(0, 12)}) == 1
