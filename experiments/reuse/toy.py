"""What the examples share: made-up preferences, starting weights, and what is measured."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.losses import Pair, implicit_reward

VOCABULARY, WIDTH, LENGTH = 16, 12, 9
STEPS, LEARNING_RATE, BETA = 60, 4.0, 0.1


class Sequences(NamedTuple):
  """Prompts of 3 tokens, each with a response of 2 to 6: [N, LENGTH]."""

  tokens: jax.Array
  mask: jax.Array  # true on the response


class Curve(NamedTuple):
  """Of every step before its update: mean loss, share of pairs ranked right, mean reward margin."""

  loss: jax.Array
  accuracy: jax.Array
  margin: jax.Array


def preferences(seed: int = 0, size: int = 128) -> Pair:
  """Returns pairs of `Sequences`. The response with the larger mean id is the chosen one."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, VOCABULARY, size=(2, size, LENGTH))
  tokens[1, :, :3] = tokens[0, :, :3]
  end = 3 + rng.integers(2, 7, size=(2, size, 1))
  mask = (np.arange(LENGTH) >= 3) & (np.arange(LENGTH) < end)
  score = np.where(mask, tokens, 0).sum(-1) / mask.sum(-1)
  chosen, pair = (score[1] > score[0]).astype(int), np.arange(size)
  return Pair(
    *(
      Sequences(jnp.asarray(tokens[i, pair], jnp.int32), jnp.asarray(mask[i, pair]))
      for i in (chosen, 1 - chosen)
    )
  )


def weights(seed: int = 0) -> dict[str, jax.Array]:
  """Returns the weights that every example starts from."""
  embedding, mix, head = jax.random.split(jax.random.key(seed), 3)
  return {
    "embedding": jax.random.normal(embedding, (VOCABULARY, WIDTH)),
    "mix": jax.random.normal(mix, (2 * WIDTH, WIDTH)) / np.sqrt(2 * WIDTH),
    "head": jax.random.normal(head, (VOCABULARY, WIDTH)) / np.sqrt(WIDTH),
  }


def mean_so_far(embedded: jax.Array) -> jax.Array:
  """[T, D] -> [T, D]: how these models look back."""
  return jnp.cumsum(embedded, axis=0) / jnp.arange(1.0, len(embedded) + 1)[:, None]


def measure(policy: Pair, reference: Pair, *, beta: float) -> tuple[jax.Array, jax.Array]:
  """Returns accuracy and mean margin of log-probs under policy and reference."""
  chosen, rejected = (implicit_reward(p, r, beta=beta) for p, r in zip(policy, reference))
  return jnp.mean(chosen > rejected), jnp.mean(chosen - rejected)


def show(curve: Curve, accuracy: jax.Array) -> None:
  """Prints every tenth step, and the accuracy on pairs that were not trained on."""
  for step in [*range(0, len(curve.loss), 10), len(curve.loss) - 1]:
    print(
      f"step {step:2d}  loss {curve.loss[step]:.4f}  accuracy {curve.accuracy[step]:.2f}  "
      f"margin {curve.margin[step]:+.3f}"
    )
  print(f"held-out accuracy {accuracy:.2f}")
