"""DPO of a model that gives logits and nothing else; here a Flax Linen module stands for it.

python -m experiments.reuse.logits_only

The logits [N, T, V] are in memory. A model that shows its hidden states does better with
`token_log_probs`: see the other examples.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dpojax.log_probs import sequence_log_probs
from dpojax.losses import Pair, dpo_loss
from experiments.reuse import toy

TX = optax.sgd(toy.LEARNING_RATE)


class Model(nn.Module):
  """Tokens [N, T] to logits [N, T, V]; those at t predict the token at t + 1."""

  @nn.compact
  def __call__(self, tokens):
    embedded = nn.Embed(toy.VOCABULARY, toy.WIDTH, name="embed")(tokens)
    both = jnp.concatenate([embedded, jax.vmap(toy.mean_so_far)(embedded)], axis=-1)
    hidden = jnp.tanh(nn.Dense(toy.WIDTH, use_bias=False, name="mix")(both))
    return nn.Dense(toy.VOCABULARY, use_bias=False, name="head")(hidden)


def params_of(weights):
  return {
    "params": {
      "embed": {"embedding": weights["embedding"]},
      "mix": {"kernel": weights["mix"]},
      "head": {"kernel": weights["head"].T},
    }
  }


def log_probs(params, pairs: Pair) -> Pair:
  return Pair(
    *(sequence_log_probs(Model().apply(params, side.tokens), side.tokens, side.mask) for side in pairs)
  )


@jax.jit
def train_step(params, state, reference: Pair, pairs: Pair, beta):
  def loss_fn(params):
    policy = log_probs(params, pairs)
    return dpo_loss(policy, reference, beta=beta).mean(), policy

  (loss, policy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  updates, state = TX.update(grads, state)
  point = toy.Curve(loss, *toy.measure(policy, reference, beta=beta))
  return optax.apply_updates(params, updates), state, point


def train(beta=toy.BETA):
  """Returns the trained params and the curve."""
  pairs, params, points = toy.preferences(), params_of(toy.weights()), []
  reference = log_probs(params, pairs)
  state = TX.init(params)
  for _ in range(toy.STEPS):
    params, state, point = train_step(params, state, reference, pairs, beta)
    points.append(point)
  return params, jax.tree.map(lambda *values: jnp.stack(values), *points)


def held_out_accuracy(params):
  pairs = toy.preferences(seed=1)
  start = log_probs(params_of(toy.weights()), pairs)
  return toy.measure(log_probs(params, pairs), start, beta=1.0)[0]


def main():
  params, curve = train()
  toy.show(curve, held_out_accuracy(params))


if __name__ == "__main__":
  main()
