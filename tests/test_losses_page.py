"""docs/losses.md is what its script makes of the code, its Python runs, and its claims hold."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from docs import losses_facts, make_losses
from dpojax import losses
from dpojax.losses import Pair
from tests import conftest

PAGE = make_losses.PAGE.read_text()


def test_the_page_is_what_the_script_makes():
  assert make_losses.fill(PAGE) == PAGE, "python -m docs.make_losses"


def test_the_pages_python_runs():
  blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
  assert len(blocks) >= 3
  names = {}
  for block in blocks:
    exec(block, names)
  assert names["loss"].shape == (2,)


def test_what_the_page_points_to_exists():
  targets = re.findall(r"\]\(([^)#:]+)\)", PAGE)
  assert targets
  for target in targets:
    assert (conftest.ROOT / "docs" / target).exists(), target
  anchors = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
  anchors = {re.sub(r"[^\w -]", "", a).lower().replace(" ", "-") for a in anchors}
  for anchor in re.findall(r"\]\(#([^)]+)\)", PAGE):
    assert anchor in anchors, anchor


def test_every_function_has_a_formula_and_every_paper_a_link():
  entries = make_losses.entries()
  assert {entry.name for entry in entries} >= {"dpo_loss", "kto_loss", "token_kl"}
  for entry in entries:
    assert entry.group and len(entry.formula) > 4, entry.name
  cited = {paper for entry in entries for paper, _ in entry.citations}
  assert cited == set(losses_facts.PAPERS)


def test_every_loss_of_the_table_is_measured():
  measured = {name.partition(",")[0] for name in losses_facts.BETA_IN_WORDS}
  assert measured == set(losses.PAIRWISE_LOSSES)


def test_every_name_the_vectors_of_trl_have_is_on_the_page():
  vectors = json.loads((conftest.ROOT / "tests" / "parity" / "vectors.json").read_text())
  theirs = " ".join(names.trl for names in losses_facts.NAMES.values())
  prefixes = {"dpo": "", "cpo": "CPO ", "orpo": "ORPO ", "kto": "KTO "}
  for case in vectors["cases"]:
    assert f"{prefixes[case['trainer']]}`{case['name']}`" in theirs, case["name"]


def slope_of_chosen(loss, chosen, rejected, **knobs):
  zero = jnp.zeros(())
  return jax.grad(lambda w: loss(Pair(w, jnp.float64(rejected)), Pair(zero, zero), beta=0.1, **knobs))(
    jnp.float64(chosen)
  )


def test_apo_down_rests_the_chosen_response_halfway_to_the_rejected():
  with jax.enable_x64(True):
    left, middle, right = (slope_of_chosen(losses.apo_down_loss, h, -6.0) for h in (-3.5, -3.0, -2.5))
    assert left < 0 < right
    np.testing.assert_allclose(middle, 0, atol=1e-12)


def test_discopop_starts_with_a_push_the_wrong_way():
  with jax.enable_x64(True):
    assert slope_of_chosen(losses.discopop_loss, 0.0, 0.0) > 0
    assert slope_of_chosen(losses.discopop_loss, 0.0, 0.0, tau=1.0) < 0


def test_a_resting_point_is_found_and_one_without_end_is_infinite():
  np.testing.assert_allclose(make_losses.resting_points(lambda h: 2 * (h - 3.0)), [3.0], rtol=1e-5)
  assert make_losses.resting_points(lambda h: -jnp.ones_like(h)) == [np.inf]
  assert make_losses.resting_points(lambda h: jnp.ones_like(h)) == [-np.inf]
  assert make_losses.resting_points(jnp.zeros_like) == []
