"""DPO with Flax NNX: the reference is a second module, the log-probs come from hidden states.

python -m experiments.reuse.flax_nnx
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dpojax.log_probs import token_log_probs
from dpojax.losses import Pair, dpo_loss
from experiments.reuse import toy


class Model(nnx.Module):
  """Tokens [N, T] to hidden states [N, T, D]; `head` is [V, D]."""

  def __init__(self, weights):
    self.embed = nnx.Embed(toy.VOCABULARY, toy.WIDTH, rngs=nnx.Rngs(0))
    self.mix = nnx.Linear(2 * toy.WIDTH, toy.WIDTH, use_bias=False, rngs=nnx.Rngs(0))
    self.head = nnx.Param(weights["head"])
    self.embed.embedding[...] = weights["embedding"]
    self.mix.kernel[...] = weights["mix"]

  def __call__(self, tokens):
    embedded = self.embed(tokens)
    before = jax.vmap(toy.mean_so_far)(embedded)
    return jnp.tanh(self.mix(jnp.concatenate([embedded, before], axis=-1)))


def log_probs(model: Model, pairs: Pair) -> Pair:
  def of(side: toy.Sequences):
    hidden = model(side.tokens)
    values = token_log_probs(hidden[:, :-1], model.head[...], side.tokens[:, 1:])
    return jnp.sum(values, axis=-1, where=side.mask[:, 1:])

  return Pair(*map(of, pairs))


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, reference: Model, pairs: Pair, beta):
  frozen = log_probs(reference, pairs)

  def loss_fn(model):
    policy = log_probs(model, pairs)
    return dpo_loss(policy, frozen, beta=beta).mean(), policy

  (loss, policy), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
  optimizer.update(model, grads)
  return toy.Curve(loss, *toy.measure(policy, frozen, beta=beta))


def train(beta=toy.BETA):
  """Returns the trained model and the curve."""
  pairs = toy.preferences()
  model, reference = Model(toy.weights()), Model(toy.weights())
  optimizer = nnx.Optimizer(model, optax.sgd(toy.LEARNING_RATE), wrt=nnx.Param)
  points = [train_step(model, optimizer, reference, pairs, beta) for _ in range(toy.STEPS)]
  return model, jax.tree.map(lambda *values: jnp.stack(values), *points)


def held_out_accuracy(model):
  pairs = toy.preferences(seed=1)
  return toy.measure(log_probs(model, pairs), log_probs(Model(toy.weights()), pairs), beta=1.0)[0]


def main():
  model, curve = train()
  toy.show(curve, held_out_accuracy(model))


if __name__ == "__main__":
  main()
