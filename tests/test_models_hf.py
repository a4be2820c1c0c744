"""Published families against vectors of transformers, and their folders in and out. No torch here.

`tests/parity/make_model_vectors.py` makes the vectors, and checks with transformers what is written.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpojax.data import packing
from dpojax.log_probs import logits_of, token_log_probs
from dpojax.models import hf, transformer
from tests.parity import models

ABOUT, VECTORS = models.load_vectors()
SEQUENCES = models.sequences()
SHAPE = packing.RowShape(length=32, scored=24, comparisons=2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Returns `folder_of(case)`: the case as a Hugging Face folder."""
  root = tmp_path_factory.mktemp("models")
  @functools.cache
  def folder_of(case):
    models.write_folder(root / case, case, ABOUT["tensors"][case])
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
  return packing.fill(
      examples, row, 4, SHAPE, num_responses=num_responses, example=range(len(examples)))


def tokens_of(rows, num_responses):
  """Where the tokens of the sequences stand in the rows, sequence after sequence, as two indices."""
  places = []
  for sequence in range(len(SEQUENCES)):
    example, branch = divmod(sequence, num_responses)
    (r, number), = np.argwhere(rows.example == example)
    here = (rows.comparison[r] == number + 1) & np.isin(rows.branch[r], (0, branch + 1))
    at, = np.nonzero(here)
    places += [(r, i) for i in at[np.argsort(rows.positions[r, at])]]
  return tuple(np.transpose(places))


def weights_of(rows, num_responses):
  """[R, S] weights of the scored tokens in the loss; 0 is padding."""
  number, response = np.divmod(rows.slot, num_responses)
  there = number < SHAPE.comparisons
  example = np.take_along_axis(rows.example, np.where(there, number, 0), axis=1)
  position = np.take_along_axis(rows.positions, rows.source, axis=1) + 1
  return np.where(there, models.weight(example * num_responses + response, position), 0.0).astype(
      np.float32)


def make_score(config):
  """Returns the loss of the vectors with its gradient, the hidden states and the logits."""
  apply = transformer.make_apply(config)
  def score(params, rows, weights):
    outputs = apply(params, rows)
    predicting = jnp.take_along_axis(outputs.hidden, rows.source[..., None], axis=1)
    loss = jnp.sum(weights * token_log_probs(predicting, outputs.head, rows.target))
    return loss, (outputs.hidden, logits_of(outputs.hidden, outputs.head))
  return jax.jit(jax.value_and_grad(score, has_aux=True))


def theirs(folder, config, params):
  """Params or their gradients as tensors of the family, flat, in the order of the vectors."""
  hf.save(folder, config, params)
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  return tensors


@pytest.mark.parametrize("case", models.CASES)
def test_packed_rows_give_the_hidden_states_logits_and_gradients_of_transformers(
    case, folder_of, tmp_path):
  """And so does each sequence alone."""
  config, params = hf.load(folder_of(case))
  score = make_score(config)
  for num_responses in (2, 1):
    rows = rows_of(num_responses)
    (_, (hidden, logits)), grads = score(params, rows, weights_of(rows, num_responses))
    at = tokens_of(rows, num_responses)
    np.testing.assert_allclose(hidden[at], VECTORS[case]["hidden"], atol=1e-4)
    np.testing.assert_allclose(logits[at], VECTORS[case]["logits"], atol=1e-4)
    got = theirs(tmp_path / str(num_responses), config, grads)
    flat = np.concatenate([got[name].ravel() for name in ABOUT["tensors"][case]])
    largest = np.abs(VECTORS[case]["grads"]).max()
    np.testing.assert_allclose(flat, VECTORS[case]["grads"], atol=1e-5 * largest, rtol=1e-3)
