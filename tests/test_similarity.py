"""The CHES score: the sums of the paper, however pairs are packed, and a column of the evaluation."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.data import tokenization
from dpojax.evaluate import measure, report, similarity
from dpojax.models import transformer
from dpojax.training import weights
from dpojax.training.config import ConfigError
from tests import worlds

pytestmark = pytest.mark.usefixtures("compiled")


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, params, tokens, there):
  places = jnp.arange(tokens.shape[1])[None]
  return transformer.Transformer(config).apply({"params": params}, tokens, places, there, 0 * there)


def plain(config, params, prompt, responses):
  """Definition 2 of Razin et al. 2024 on two sequences by themselves: its score, and that of means."""
  sums, lengths = [], []
  for response in responses:
    tokens, there = np.zeros((2, 1, 128), np.int32)
    tokens[0, : len(prompt) + len(response)] = [*prompt, *response]
    there[0, : len(prompt) + len(response)] = 1
    hidden = np.asarray(hidden_states(config, params, tokens, there), np.float64)[0]
    sums.append(hidden[len(prompt) - 1 : len(prompt) + len(response) - 1].sum(axis=0))
    lengths.append(len(response))
  score = lambda chosen, rejected: chosen @ rejected - chosen @ chosen
  return score(*sums), score(*(total / length for total, length in zip(sums, lengths)))


def test_scores_of_packed_pairs_are_those_of_the_papers_definition(rng):
  config = worlds.llama()
  params = worlds.params_of(config)
  examples = worlds.comparisons(rng, 7, 3, empty_prompts=False)
  rows = worlds.packed(examples, 64)
  outputs = transformer.make_apply(config)(params, rows)
  found = similarity.of_rows(outputs, rows, num_responses=3)
  there = np.argwhere(rows.example >= 0)
  assert len(there) == 7 and len(rows.tokens) > 1
  for row, place in there:
    prompt, responses = examples[rows.example[row, place]]
    want = plain(config, params, prompt, responses[:2])
    np.testing.assert_allclose([each[row, place] for each in found], want, rtol=1e-4, atol=1e-3)


def test_a_response_alike_to_the_chosen_one_scores_highest():
  """||y|| at 0: what equals the chosen sum; below it all that points elsewhere or is shorter."""
  chosen = np.array([3.0, 4.0])
  rejected = np.array([[3.0, 4.0], [1.5, 2.0], [4.0, -3.0], [-3.0, -4.0]])
  np.testing.assert_allclose(similarity.ches(chosen[None], rejected), [0, -12.5, -25, -50])
  lengths = np.array([2.0, 1.0, 2.0, 2.0]), np.full(1, 2.0)
  np.testing.assert_allclose(
    similarity.length_normalized_ches(chosen[None], rejected, lengths[1], lengths[0]),
    [0, 0, -25 / 4, -50 / 4],
  )


def test_the_evaluation_scores_every_pair_of_a_folder_and_writes_it_as_a_pair(chat_model, tmp_path):
  pairs = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.dialogues(9))
  out = tmp_path / "scores.jsonl"
  found = measure.evaluate_run(chat_model, pairs=pairs, num_prompts=0, pair_scores=str(out))
  assert found["reference"] is None and found["pairs"] == 9
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(lines) == 9
  model = weights.load(chat_model)
  config = dataclasses.replace(model.config, published="")
  tokenizer = tokenization.load_tokenizer(chat_model)
  for line in lines:
    (encoded,) = tokenization.encode(
      [tokenization.Example(line["prompt"], (line["chosen"], line["rejected"]))], tokenizer
    )
    want = plain(config, model.params, *encoded[:2])
    got = line["ches"], line["ches_length_normalized"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(line["margin"], line["log_prob_chosen"] - line["log_prob_rejected"], atol=1e-4)
  np.testing.assert_allclose(
    found["held_out"]["ches"].value, np.mean([line["ches"] for line in lines]), rtol=1e-5
  )
  assert "held_out/ches_length_normalized" in [name for name, *_ in report.show(found)]
  again = measure.evaluate_run(chat_model, pairs=str(out), num_prompts=0)  # it is a file of pairs itself
  np.testing.assert_allclose(again["held_out"]["ches"].value, found["held_out"]["ches"].value, rtol=1e-5)


def test_a_folder_without_pairs_is_refused(chat_model):
  with pytest.raises(ConfigError, match=f"{re.escape(chat_model)} is no run's workdir .*give --pairs=FILE"):
    measure.evaluate_run(chat_model)
