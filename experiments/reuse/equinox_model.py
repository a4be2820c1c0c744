"""DPO with Equinox: the model is a tree, so the reference is simply the model before training.

python -m experiments.reuse.equinox_model
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from dpojax.log_probs import token_log_probs
from dpojax.losses import Pair, dpo_loss
from experiments.reuse import toy

TX = optax.sgd(toy.LEARNING_RATE)


class Model(eqx.Module):
  """Tokens [T] of one sequence to hidden states [T, D]; `head` is [V, D]."""

  embed: eqx.nn.Embedding
  mix: eqx.nn.Linear
  head: jax.Array

  def __init__(self, weights):
    self.embed = eqx.nn.Embedding(weight=weights["embedding"])
    linear = eqx.nn.Linear(2 * toy.WIDTH, toy.WIDTH, use_bias=False, key=jax.random.key(0))
    self.mix = eqx.tree_at(lambda layer: layer.weight, linear, weights["mix"].T)
    self.head = weights["head"]

  def __call__(self, tokens):
    embedded = jax.vmap(self.embed)(tokens)
    both = jnp.concatenate([embedded, toy.mean_so_far(embedded)], axis=-1)
    return jnp.tanh(jax.vmap(self.mix)(both))


def log_prob(model: Model, sequence: toy.Sequences):
  values = token_log_probs(model(sequence.tokens)[:-1], model.head, sequence.tokens[1:])
  return jnp.sum(values, where=sequence.mask[1:])


def log_probs(model: Model, pairs: Pair) -> Pair:
  return Pair(*(jax.vmap(log_prob, in_axes=(None, 0))(model, side) for side in pairs))


@eqx.filter_jit
def train_step(model: Model, state, reference: Pair, pairs: Pair, beta):
  def loss_fn(model):
    policy = log_probs(model, pairs)
    return dpo_loss(policy, reference, beta=beta).mean(), policy

  (loss, policy), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
  updates, state = TX.update(grads, state)
  point = toy.Curve(loss, *toy.measure(policy, reference, beta=beta))
  return eqx.apply_updates(model, updates), state, point


def train(beta=toy.BETA):
  """Returns the trained model and the curve."""
  pairs, model, points = toy.preferences(), Model(toy.weights()), []
  reference = log_probs(model, pairs)
  state = TX.init(eqx.filter(model, eqx.is_array))
  for _ in range(toy.STEPS):
    model, state, point = train_step(model, state, reference, pairs, jnp.asarray(beta))
    points.append(point)
  return model, jax.tree.map(lambda *values: jnp.stack(values), *points)


def held_out_accuracy(model):
  pairs = toy.preferences(seed=1)
  return toy.measure(log_probs(model, pairs), log_probs(Model(toy.weights()), pairs), beta=1.0)[0]


def main():
  model, curve = train()
  toy.show(curve, held_out_accuracy(model))


if __name__ == "__main__":
  main()
