"""DPO in bare JAX: params are a dict, the optimizer is one line, and a sweep over beta is a vmap.

python -m experiments.reuse.bare_jax
"""

import jax
import jax.numpy as jnp

from dpojax.log_probs import token_log_probs
from dpojax.losses import Pair, dpo_loss
from experiments.reuse import toy


def hidden_states(params, tokens):
  """[T] -> [T, D]."""
  embedded = params["embedding"][tokens]
  both = jnp.concatenate([embedded, toy.mean_so_far(embedded)], axis=-1)
  return jnp.tanh(both @ params["mix"])


def log_prob(params, sequence: toy.Sequences):
  """Summed log-prob of one response, from hidden states: no [T, V] logits are kept."""
  hidden = hidden_states(params, sequence.tokens)
  values = token_log_probs(hidden[:-1], params["head"], sequence.tokens[1:])
  return jnp.sum(values, where=sequence.mask[1:])


def log_probs(params, pairs: Pair) -> Pair:
  return Pair(*(jax.vmap(log_prob, in_axes=(None, 0))(params, side) for side in pairs))


@jax.jit
def train(beta):
  """Returns the trained params and the curve; beta may be traced."""
  pairs, start = toy.preferences(), toy.weights()
  reference = log_probs(start, pairs)  # it does not move: once is enough

  def loss_fn(params):
    policy = log_probs(params, pairs)
    return dpo_loss(policy, reference, beta=beta).mean(), policy

  def step(params, _):
    (loss, policy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updated = jax.tree.map(lambda p, g: p - toy.LEARNING_RATE * g, params, grads)
    return updated, toy.Curve(loss, *toy.measure(policy, reference, beta=beta))

  return jax.lax.scan(step, start, length=toy.STEPS)


def held_out_accuracy(params):
  pairs = toy.preferences(seed=1)
  return toy.measure(log_probs(params, pairs), log_probs(toy.weights(), pairs), beta=1.0)[0]


def main():
  params, curve = train(toy.BETA)
  toy.show(curve, held_out_accuracy(params))
  betas = jnp.array([0.05, 0.1, 0.5])
  _, curves = jax.vmap(train)(betas)
  for beta, losses in zip(betas, curves.loss):
    print(f"beta {beta:.2f}: loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
  main()
