"""Small random models and comparisons that several test files use."""

import jax
import numpy as np

from dpojax.data import packing
from dpojax.models import config as model_config
from dpojax.models import transformer

VOCAB = 61


def llama(**changes):
  return model_config.llama_style(**dict(
      dict(vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, max_positions=64), **changes))


def gpt2(**changes):
  return model_config.gpt2_style(**dict(
      dict(vocab_size=VOCAB, width=32, layers=2, heads=4, max_positions=64), **changes))


def params_of(config, seed=0):
  """Random params, all of one size, so that biases, scales and heads matter."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  return jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


def comparisons(rng, count, num_responses, *, longest=9, empty_prompts=True):
  """Random (prompt, responses) of ids; every fourth prompt empty if asked."""
  draw = lambda low: rng.integers(VOCAB, size=rng.integers(low, longest))
  return [(draw(1) if not empty_prompts or i % 4 else draw(1)[:0],
           [draw(2) for _ in range(num_responses)]) for i in range(count)]


def lengths_of(examples):
  return np.array([[len(p), *map(len, rs)] for p, rs in examples])


def packed(examples, row_length, *, rows=None, row_multiple=1, shape=None):
  """All examples in one step's rows."""
  k = len(examples[0][1])
  lengths = lengths_of(examples)
  plan = packing.plan_in_order(lengths, len(examples), row_length, row_multiple=row_multiple)
  return packing.fill(
      examples, plan.row[0], rows or int(plan.rows[0]), shape or plan.shape, num_responses=k,
      example=range(len(examples)))
