"""The paper's theorem in worlds small enough to count every response, in float64.

A world has 3 prompts and 6 responses, a reward r [3, 6] and a reference policy [3, 6]. Training is
on exact expectations: the loss of every pair, weighted by how often it is drawn and how often each
of the two is preferred.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import losses
from dpojax.log_probs import sequence_log_prob
from dpojax.losses import Pair

BETAS = (0.1, 0.3, 1.0, 5.0)
PROMPTS, RESPONSES = 3, 6


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def world(rng):
  """Rewards and reference log-probs."""
  rewards = jnp.asarray(rng.normal(size=(PROMPTS, RESPONSES)))
  return rewards, jax.nn.log_softmax(jnp.asarray(rng.normal(size=(PROMPTS, RESPONSES))))


def optimum(rewards, reference, beta):
  """log pi_ref exp(r / beta) / Z (Rafailov et al. 2023, Eq. 4)."""
  return jax.nn.log_softmax(reference + rewards / beta)


def objective(policy, rewards, reference, beta):
  """E_pi[r] - beta KL(pi || pi_ref) of each prompt (Eq. 3)."""
  return jnp.sum(jnp.exp(policy) * losses.kl_penalized_reward(rewards, policy, reference, beta=beta), axis=-1)


def total_variation(p, q):
  return 0.5 * jnp.abs(jnp.exp(p) - jnp.exp(q)).sum(-1)


def every_pair(values):
  """[..., Y] -> Pairs [..., Y, Y] of each response chosen against each."""
  return Pair(*jnp.broadcast_arrays(values[..., :, None], values[..., None, :]))


SAMPLING = {
  "uniform": lambda rng, reference: jnp.ones((PROMPTS, RESPONSES, RESPONSES)),
  "skewed": lambda rng, reference: jnp.asarray(np.exp(2 * rng.normal(size=(PROMPTS, RESPONSES, RESPONSES)))),
  "drawn from the reference": lambda rng, reference: jnp.exp(reference[:, :, None] + reference[:, None, :]),
  "a chain of neighbours": lambda rng, reference: jnp.broadcast_to(
    jnp.eye(RESPONSES, k=1), (PROMPTS, RESPONSES, RESPONSES)
  ),
}
"""How often a pair (i, j) is shown: [3, 6, 6], in either order and of any total."""


def expected_loss(loss_fn, logits, rewards, reference, sampling):
  """The expected loss on Bradley-Terry labels of `rewards`, for pairs drawn by `sampling`."""
  shown = sampling + jnp.swapaxes(sampling, -1, -2)
  shown /= shown.sum((-1, -2), keepdims=True)
  preferred = jax.nn.sigmoid(rewards[..., :, None] - rewards[..., None, :])
  values = loss_fn(every_pair(jax.nn.log_softmax(logits)), every_pair(reference))
  return jnp.sum(shown * preferred * values)


def newton(loss, start, steps):
  """Minimises a smooth convex loss that a constant added to all logits of a prompt leaves alone."""
  shape = start.shape
  ones = jnp.kron(jnp.eye(shape[0]), jnp.ones((shape[1], shape[1])))

  def step(_, x):
    flat = lambda y: loss(y.reshape(shape))
    hessian = jax.hessian(flat)(x) + ones
    return x - jnp.linalg.solve(hessian, jax.grad(flat)(x))

  return jax.nn.log_softmax(jax.lax.fori_loop(0, steps, step, start.ravel()).reshape(shape))


@functools.partial(jax.jit, static_argnums=0)
def train(loss_fn, rewards, reference, sampling, betas):
  """Trained log-policies [betas, 3, 6]."""

  def one(beta):
    with_beta = functools.partial(loss_fn, beta=beta)
    loss = lambda logits: expected_loss(with_beta, logits, rewards, reference, sampling)
    return newton(loss, reference, 30)

  return jax.vmap(one)(betas)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_dpo_on_exact_preferences_converges_to_the_optimal_policy(sampling, world, rng):
  """It is pi_ref exp(r / beta) / Z for every beta, however the pairs are drawn (Eq. 4)."""
  rewards, reference = world
  drawn = SAMPLING[sampling](rng, reference)
  trained = train(losses.dpo_loss, rewards, reference, drawn, jnp.asarray(BETAS))
  for beta, policy in zip(BETAS, trained):
    assert total_variation(policy, optimum(rewards, reference, beta)).max() < 1e-4
    # The maximum of the KL-constrained objective is the soft value beta log Z.
    np.testing.assert_allclose(
      objective(policy, rewards, reference, beta),
      beta * jax.nn.logsumexp(reference + rewards / beta, axis=-1),
      rtol=1e-6,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_the_objective_is_its_maximum_less_beta_kl_to_the_optimum(beta, world, rng):
  rewards, reference = world
  policy = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(PROMPTS, RESPONSES))))
  best = optimum(rewards, reference, beta)
  np.testing.assert_allclose(
    objective(policy, rewards, reference, beta),
    objective(best, rewards, reference, beta) - beta * losses.token_kl(policy, best),
    rtol=1e-9,
  )


def test_dpo_by_gradient_steps_on_an_autoregressive_policy_converges_too(rng):
  """Responses of two tokens, scored token by token; Adam instead of Newton's method."""
  vocabulary, beta = 3, 0.5
  responses = jnp.asarray(np.indices((vocabulary, vocabulary)).reshape(2, -1).T)
  rewards = jnp.asarray(rng.normal(size=(1, vocabulary**2)))
  draw = lambda: {
    "first": jnp.asarray(rng.normal(size=vocabulary)),
    "second": jnp.asarray(rng.normal(size=(vocabulary, vocabulary))),
  }

  def log_probs(params):
    def one(response):  # a prompt of one token, then the response
      tokens = jnp.concatenate([jnp.zeros(1, response.dtype), response])
      logits = jnp.stack([params["first"], params["second"][response[0]], jnp.zeros(vocabulary)])
      return sequence_log_prob(logits, tokens, jnp.array([False, True, True]))

    return jax.vmap(one)(responses)[None]

  params = draw()
  reference = log_probs(params)
  tx = optax.adam(optax.cosine_decay_schedule(0.1, 2000))
  uniform = jnp.ones((1, vocabulary**2, vocabulary**2))
  loss = lambda params: expected_loss(
    functools.partial(losses.dpo_loss, beta=beta), log_probs(params), rewards, reference, uniform
  )

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  train = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=2000)[0][0])
  policy = log_probs(train(params))
  np.testing.assert_allclose(jnp.exp(policy).sum(), 1, rtol=1e-9)
  assert total_variation(policy, optimum(rewards, reference, beta)).max() < 1e-4


def test_robust_dpo_on_flipped_labels_converges_to_the_same_policy(world):
  """Labels flipped with probability 0.2 pull DPO off the optimum, and robust DPO not."""
  rewards, reference = world

  def on_flipped_labels(loss_fn):
    def loss(policy, reference, *, beta):
      return 0.8 * loss_fn(policy, reference, beta=beta) + 0.2 * loss_fn(
        Pair(*policy[::-1]), Pair(*reference[::-1]), beta=beta
      )

    uniform = jnp.ones((PROMPTS, RESPONSES, RESPONSES))
    return train(loss, rewards, reference, uniform, jnp.asarray([1.0]))[0]

  best = optimum(rewards, reference, 1.0)
  robust = on_flipped_labels(functools.partial(losses.robust_dpo_loss, label_smoothing=0.2))
  assert total_variation(robust, best).max() < 1e-4
  assert total_variation(on_flipped_labels(losses.dpo_loss), best).max() > 1e-2


@pytest.mark.parametrize("divergence", [losses.js_divergence, losses.alpha_divergence])
def test_f_dpo_converges_to_the_optimum_of_its_divergence(divergence, world):
  """There beta f'(pi / pi_ref) is the reward, up to a term of the prompt alone."""
  rewards, reference = (x[:1] for x in world)
  rewards = 0.3 * rewards  # with its bounded f', Jensen-Shannon reaches only so far
  tx = optax.adam(optax.cosine_decay_schedule(0.05, 3000))
  loss = lambda logits: expected_loss(
    functools.partial(losses.f_dpo_loss, beta=1.0, divergence=divergence),
    logits,
    rewards,
    reference,
    jnp.ones((1, RESPONSES, RESPONSES)),
  )

  def step(carry, _):
    logits, state = carry
    updates, state = tx.update(jax.grad(loss)(logits), state)
    return (logits + updates, state), None

  train = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=3000)[0][0])
  policy = jax.nn.log_softmax(train(reference))
  residual = divergence(policy - reference) - rewards
  np.testing.assert_allclose(residual, residual[:, :1] * jnp.ones_like(residual), atol=1e-4)


def test_dpo_on_exact_rankings_converges_to_the_optimal_policy(rng):
  """All 24 rankings of 4 responses with their Plackett-Luce probabilities (App. A.3)."""
  rewards = jnp.asarray(rng.normal(size=(1, 4)))
  reference = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1, 4))))
  rankings = np.array(list(itertools.permutations(range(4))))
  chances = jnp.exp(-losses.plackett_luce_loss(rewards[0][rankings]))
  np.testing.assert_allclose(chances.sum(), 1, rtol=1e-9)
  loss = lambda logits: jnp.sum(
    chances
    * losses.dpo_plackett_luce_loss(jax.nn.log_softmax(logits)[0][rankings], reference[0][rankings], beta=0.5)
  )
  policy = jax.jit(lambda x: newton(loss, x, 30))(reference)
  assert total_variation(policy, optimum(rewards, reference, 0.5)).max() < 1e-4


def test_pairs_that_leave_two_groups_unconnected_leave_their_balance_open(world):
  """The condition of the theorem: the loss cannot tell these policies apart."""
  rewards, reference = world
  best = optimum(rewards, reference, 1.0)
  group = jnp.arange(RESPONSES) < 3
  apart = jnp.broadcast_to(group[:, None] == group[None, :], (PROMPTS, RESPONSES, RESPONSES))
  loss = lambda logits: expected_loss(
    functools.partial(losses.dpo_loss, beta=1.0), logits, rewards, reference, apart.astype(float)
  )
  moved = jax.nn.log_softmax(best + 2.0 * group[None])
  np.testing.assert_allclose(loss(moved), loss(best), rtol=1e-9)
  assert total_variation(moved, best).max() > 0.1


# Rewards that differ by a term of the prompt alone.


def test_a_reward_of_the_prompt_changes_neither_preferences_nor_the_optimum(world, rng):
  """Lemmas 1 and 2."""
  rewards, reference = world
  shifted = rewards + jnp.asarray(rng.normal(size=(PROMPTS, 1)))
  np.testing.assert_allclose(
    losses.plackett_luce_loss(shifted), losses.plackett_luce_loss(rewards), rtol=1e-9
  )
  pairwise = lambda r: losses.bradley_terry_loss(*every_pair(r))
  np.testing.assert_allclose(pairwise(shifted), pairwise(rewards), rtol=1e-9)
  np.testing.assert_allclose(optimum(shifted, reference, 0.3), optimum(rewards, reference, 0.3), rtol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_the_implicit_reward_of_the_optimum_is_the_one_of_its_class_that_needs_no_normaliser(beta, world):
  """Theorem 1: r - beta log Z is in r's class, is its own projection, and has sum 1 (Eq. 9)."""
  rewards, reference = world
  project = lambda r: losses.implicit_reward(optimum(r, reference, beta), reference, beta=beta)
  projected = project(rewards)
  shift = projected - rewards
  np.testing.assert_allclose(shift, shift[:, :1] * jnp.ones_like(shift), rtol=1e-8)
  np.testing.assert_allclose(project(projected), projected, rtol=1e-8)
  np.testing.assert_allclose(project(rewards + 3.0), projected, rtol=1e-8)
  np.testing.assert_allclose(jnp.exp(reference + projected / beta).sum(-1), 1, rtol=1e-9)


def test_reward_and_kl_both_fall_as_beta_rises(world):
  rewards, reference = world
  policies = jax.vmap(lambda beta: optimum(rewards, reference, beta))(jnp.geomspace(0.05, 20, 12))
  reward = jnp.einsum("bxy,xy->bx", jnp.exp(policies), rewards)
  kl = losses.token_kl(policies, jnp.broadcast_to(reference, policies.shape))
  assert (jnp.diff(reward, axis=0) < 0).all() and (jnp.diff(kl, axis=0) < 0).all()


def test_deterministic_labels_drive_dpo_without_end_and_ipo_to_a_stop():
  h = jnp.asarray([1.0, 10.0, 100.0])
  zero = jnp.zeros_like(h)
  slope = lambda loss: jax.grad(lambda h: loss(Pair(h, zero), Pair(zero, zero), beta=0.1).sum())(h)
  assert (slope(losses.dpo_loss) < 0).all()
  np.testing.assert_allclose(slope(losses.ipo_loss), 2 * (h - 5.0))
