"""Methods at the same KL in small: exact training, tuning alike, and what is said of a difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import losses
from dpojax.training import config as config_lib
from dpojax.training import step as step_lib
from experiments import sweep
from experiments.measurements import learning_rates
from experiments.paper import enumerable, exact, kl_matched, methods

pytestmark = pytest.mark.usefixtures("compiled")

SIZES = kl_matched.Sizes(steps=8, batch_size=64, comparisons=256, seeds=(0, 1))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("exact")
  world, table = enumerable.make(folder, enumerable.Sizes(layers=1))
  return world, table, exact.Chances(world.model.config, world.prompts)


def test_the_chances_behind_every_beginning_tell_those_of_every_response(world):
  """Against the score of whole responses as packed rows."""
  made, table, chances = world
  assert len(exact.BEGINNINGS) == 1 + 5 + 25
  next_ids = jax.jit(chances.next_ids)(made.model.params)
  np.testing.assert_allclose(np.exp(next_ids).sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(chances.responses(next_ids), table.log_probs, atol=1e-5)


def test_a_run_is_plain_steps_of_the_same_loss(world):
  made, table, chances = world
  data = exact.draw(table, (3,), steps=4, batch_size=32, size=100)
  method = exact.Method(kl_matched.of_pairs(losses.dpo_loss))
  members = exact.Members(np.array([0]), *(np.array([x], np.float32) for x in (3e-3, 0.5)), {})
  got = exact.make_train(chances, method)(made.model.params, data, members)

  schedule = step_lib.make_schedule("linear", learning_rate=3e-3, warmup_steps=20, steps=4)
  tx = step_lib.make_optimizer("adamw", schedule, max_grad_norm=1.0)
  params, state = made.model.params, tx.init(made.model.params)
  reference = jnp.asarray(table.log_probs, jnp.float32)

  @jax.jit
  def step(params, state, rows):
    def loss(params):
      every = chances.responses(chances.next_ids(params))
      pair = lambda of: losses.Pair(of[rows[:, 0], rows[:, 1]], of[rows[:, 0], rows[:, 2]])
      return losses.dpo_loss(pair(every), pair(reference), beta=0.5).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return jax.tree.map(jnp.add, params, updates), state

  for rows in data[0]:
    params, state = step(params, state, rows.astype(int))
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g[0], w, atol=2e-5), got, params)


def test_a_reference_that_moves_is_the_policy_of_the_period_before(world):
  """Moved wholly after every step, every h is 0 again."""
  made, table, chances = world
  seen = []

  def loss(view, memory, *, beta):
    jax.debug.callback(lambda m: seen.append(float(np.abs(m).max())), kl_matched.margins_of(view))
    return losses.dpo_loss(view.policy, view.reference, beta=beta), {}

  data = exact.draw(table, (0,), steps=3, batch_size=16, size=48)
  numbers = lambda x: np.array([x], np.float32)
  members = exact.Members(np.array([0]), numbers(1e-2), numbers(0.5), {"sync_alpha": numbers(1.0)})
  train = exact.make_train(chances, exact.Method(loss, sync_every=1))
  jax.block_until_ready(train(made.model.params, data, members))
  jax.effects_barrier()
  assert len(seen) >= 3 and max(seen) < 1e-5


def test_methods_are_tuned_alike_and_none_is_above_the_optimum(tmp_path, capsys):
  every = kl_matched.contenders(SIZES)
  assert {len(contender.candidates()) for contender in every.values()} == {6}
  assert not {contender.knob[0] for contender in every.values()} & set(kl_matched.OF_RUN)
  run = lambda: kl_matched.run_exact(tmp_path, SIZES, (kl_matched.DPO,))
  lines = run()
  assert len(lines) == 2 * 4 and all(0 < line["share"] < 1 for line in lines)
  tuned = sweep.read_table(tmp_path / "tuning" / "dpo")
  assert {line["seed"] for line in tuned} == {kl_matched.TUNING_SEED} and len(tuned) == 6 * 2
  assert lines[0]["rate"] == kl_matched.best_candidate(tuned)["rate"]
  assert run() == lines  # from its folders
  kl_matched.show(lines)
  assert "| DPO | rate " in capsys.readouterr().out
  kl_matched.plot(lines, tmp_path / "kl.png")
  assert (tmp_path / "kl.png").stat().st_size > 10_000


def test_a_difference_counts_from_two_standard_errors_on_and_seed_by_seed():
  world = kl_matched.World((1.0,), lambda lines, kl: lines[0]["value"], "value")
  line = lambda method, seed, value: {"method": method, "seed": seed, "value": value}
  base = [line(kl_matched.DPO, seed, value) for seed, value in enumerate((0.2, 0.9, 0.5))]
  better = [line("better", seed, value) for seed, value in enumerate((0.21, 0.92, 0.51))]
  same = [line("same", seed, value) for seed, value in enumerate((0.25, 0.85, 0.5))]
  cells = kl_matched.compare([*base, *better, *same], world)
  assert cells["better"][0].verdict == "above" and cells["same"][0].verdict == ""
  assert cells["better"][0].difference == pytest.approx(0.04 / 3)
  assert cells["better"][0].difference_error == pytest.approx(np.std([0.01, 0.02, 0.01], ddof=1) / 3**0.5)


def test_a_share_is_read_between_a_seeds_own_points():
  lines = [{"kl": 1.0, "share": 0.9}, {"kl": 0.2, "share": 0.8}]
  assert kl_matched.share_of_seed(lines, 0.2**0.5) == pytest.approx(0.85)
  assert np.isnan(kl_matched.share_of_seed(lines, 0.1)) and np.isnan(kl_matched.share_of_seed(lines, 1.1))


def test_text_is_read_at_a_kl_of_runs_that_go_so_far():
  point = lambda beta, kl, reward: {"beta": beta, "kl": kl, "reward": reward}
  lines = [point(0.1, 0.0, 0.5), point(0.1, 2.0, 0.9), point(0.5, 0.0, 0.5), point(0.5, 0.5, 0.7)]
  assert kl_matched.reward_of_seed(lines, 0.5) == pytest.approx(0.7)
  assert kl_matched.reward_of_seed(lines, 1.0) == pytest.approx(0.7)
  assert np.isnan(kl_matched.reward_of_seed(lines, 3.0))


def test_every_change_of_the_text_methods_is_a_config_that_can_run(world):
  made, *_ = world
  for changes in kl_matched.text_methods(60).values():
    config_lib.validate(methods.config_of(made, changes))


def test_every_optimizer_has_as_many_learning_rates_and_the_lowest_loss_is_bold(capsys):
  cases = learning_rates.CASES
  assert {case.name for case in cases} == set(step_lib.OPTIMIZERS)
  assert {len(case.rates) for case in cases} == {4}
  line = lambda rate, loss: {
    "optimizer": "adamw, ema 0.9",
    "optimizer.learning_rate": rate,
    "loss": loss,
    "rewards/accuracies": 0.6,
  }
  learning_rates.show([line(1e-4, 0.6), line(1e-4, 0.7), line(1e-3, 0.64)])
  assert "| `adamw, ema 0.9` | 0.0001: 0.6500 (0.600), **0.001: 0.6400 (0.600)** |" in capsys.readouterr().out
