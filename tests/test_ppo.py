"""PPO: its functions against plain loops, its optimum against the closed form, kills and refusals."""

import itertools

import jax
import numpy as np
import pytest

from dpojax import ppo, ppo_losses, rollouts
from dpojax.models import transformer
from dpojax.objectives import response_log_probs
from tests import worlds

STOP, VOCAB, ROOM = 0, 5, 3


def tiny(seed=0):
  config = worlds.llama(vocab_size=VOCAB, width=16, layers=1, heads=2, kv_heads=2)
  return config, worlds.params_of(config, seed)


RESPONSES = [
    np.array(ids, np.int32) for length in range(1, ROOM + 1)
    for ids in itertools.product(range(VOCAB), repeat=length)
    if STOP not in ids[:-1] and (ids[-1] == STOP or length == ROOM)]
"""Every response there can be."""

PROMPTS, LENGTHS = np.array([[1, 2], [3, 0], [2, 4], [4, 0]], np.int32), np.array([2, 1, 2, 1])


def exact_log_probs(config, params):
  """Log-probs of every response to every prompt, [4, N]."""
  tokens, counts = rollouts.padded(RESPONSES, ROOM)
  every = lambda x: np.broadcast_to(x, (len(PROMPTS), *x.shape))
  rows = rollouts.rows_of(PROMPTS, LENGTHS, every(tokens), every(counts))
  apply = transformer.make_apply(config)
  score = jax.jit(lambda params, rows: response_log_probs(
      apply(params, rows), rows, num_responses=len(RESPONSES)).sums[:, 0])
  return np.asarray(score(params, rows), np.float64)


def table_reward(prompts, responses):
  """Pays for each 1, and for 2 behind the prompt's last id 2."""
  return np.array([np.sum(r == 1) * 0.6 - 0.5 * np.sum(r == 3) + 0.4 * (p[-1] == 2) * (r[0] == 2)
                   for p, r in zip(prompts, responses)])
