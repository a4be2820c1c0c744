"""The worked examples of using the losses elsewhere: they learn, and they agree with each other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import Pair
from experiments.reuse import bare_jax, equinox_model, flax_nnx, logits_only, toy

EXAMPLES = {
  "bare_jax": bare_jax,
  "flax_nnx": flax_nnx,
  "equinox_model": equinox_model,
  "logits_only": logits_only,
}


@functools.cache
def trained(name):
  return EXAMPLES[name].train(toy.BETA)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_starts_at_log_2_and_learns_to_rank_its_pairs(name):
  curve = trained(name)[1]
  assert curve.loss.shape == curve.accuracy.shape == curve.margin.shape == (toy.STEPS,)
  np.testing.assert_allclose(curve.loss[0], np.log(2), rtol=1e-6)
  np.testing.assert_allclose(curve.margin[0], 0, atol=1e-6)
  assert curve.loss[-1] < 0.3 and (jnp.diff(curve.loss) < 0).all()
  assert curve.accuracy[-1] > 0.9 and curve.margin[-1] > 1.5


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_ranks_pairs_it_has_not_seen(name):
  """Three standard errors above chance, on 128 pairs."""
  assert EXAMPLES[name].held_out_accuracy(trained(name)[0]) > 0.5 + 3 * 0.5 / np.sqrt(128)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"bare_jax"}))
def test_the_same_weights_give_the_same_curve_whatever_library_holds_them(name):
  curve, want = trained(name)[1], trained("bare_jax")[1]
  np.testing.assert_allclose(curve.loss, want.loss, rtol=1e-4)
  np.testing.assert_allclose(curve.margin, want.margin, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_its_curve(name, capsys):
  trained(name)
  EXAMPLES[name].main()
  printed = capsys.readouterr().out
  losses = [float(x) for x in re.findall(r"^step .* loss (\S+)", printed, re.MULTILINE)]
  assert losses[0] == 0.6931 and losses == sorted(losses, reverse=True)
  assert re.search(r"held-out accuracy 0\.\d\d", printed)


def test_betas_trained_in_one_vmap_are_those_trained_alone():
  betas = jnp.array([0.05, 0.1])
  _, curves = jax.vmap(bare_jax.train)(betas)
  for i, beta in enumerate(betas):
    np.testing.assert_allclose(curves.loss[i], bare_jax.train(beta)[1].loss, rtol=1e-4)
  assert curves.loss[0, -1] > curves.loss[1, -1]  # a smaller beta leaves more loss at a margin


def test_log_probs_from_logits_and_from_hidden_states_are_the_same():
  pairs = toy.preferences(seed=2, size=8)
  np.testing.assert_allclose(
    logits_only.log_probs(logits_only.params_of(toy.weights()), pairs),
    bare_jax.log_probs(toy.weights(), pairs),
    rtol=1e-5,
  )


def test_the_made_up_preferences_are_what_they_say():
  pairs = toy.preferences()
  assert isinstance(pairs, Pair) and pairs.chosen.tokens.shape == (128, toy.LENGTH)
  np.testing.assert_array_equal(pairs.chosen.tokens[:, :3], pairs.rejected.tokens[:, :3])
  assert not pairs.chosen.mask[:, :3].any()
  chosen, rejected = (np.asarray(side.tokens, float).mean(-1, where=np.asarray(side.mask)) for side in pairs)
  assert (chosen >= rejected).all() and (chosen > rejected).mean() > 0.9
