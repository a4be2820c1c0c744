"""What a policy is worth and what it cost: true reward of its samples, and their KL to the reference."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data import tokenization
from dpojax.kernels.head import logits_of
from dpojax.log_probs import predicting_states
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.sample import rollouts, sampler


class Answers(NamedTuple):
  """Samples to prompts: ids [n, K, T], tokens of each [n, K], and true rewards [n, K] float64."""

  tokens: np.ndarray
  lengths: np.ndarray
  rewards: np.ndarray


def reward_of_text(tokenizer: Any, of_text: Callable[[list[str]], Sequence[float]]) -> rollouts.Reward:
  """Returns the reward of ids that is `of_text` of prompt and response together."""

  def reward(prompts, responses):
    texts = [
      tokenizer.decode([*prompt, *response], skip_special_tokens=True)
      for prompt, response in zip(prompts, responses)
    ]
    return np.asarray(of_text(texts), np.float64)

  return reward


def prompt_ids(tokenizer: Any, texts: Sequence[str], longest: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts [n, longest] int32, padded on the right, and the tokens of each, [n]."""
  encoded = tokenization.encode_prompts(texts, tokenizer, longest=longest, keep="start")
  return rollouts.padded([ids for ids, _ in encoded], longest)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean of independent values [n], and its standard error; of one value that is nan."""
  error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
  return float(np.mean(values)), float(error)


class Bench:
  """Samples from policies of one shape to prompts of one width, and measures them; compiled once."""

  def __init__(
    self,
    config: ModelConfig,
    reward: rollouts.Reward,
    *,
    stop_id: int,
    num_samples: int,
    max_new_tokens: int,
    prompts_at_once: int,
  ):
    """Compiles nothing yet.

    Args:
      config: the policies'.
      reward: the true one.
      stop_id: the id that ends a sample.
      num_samples: K, of each prompt.
      max_new_tokens: T, of a sample.
      prompts_at_once: that are sampled to in one call.
    """
    self.reward, self._at_once = reward, prompts_at_once
    self._samples, self._room = num_samples, max_new_tokens
    self._sample = jax.jit(
      sampler.make_sampler(config, max_new_tokens=max_new_tokens, num_samples=num_samples, stop_id=stop_id)
    )
    self._kl = jax.jit(functools.partial(_kl, transformer.make_apply(config), num_samples))

  def answers(
    self, params: Any, prompts: np.ndarray, lengths: np.ndarray, *, seed: int, temperature: float = 1.0
  ) -> Answers:
    """Returns samples to prompts [n, W] of [n] tokens, each with its true reward."""
    key, parts = jax.random.key(seed), []
    for index, kept in self._parts(len(prompts)):
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
      drawn = jax.device_get(self._sample(params, prompts[index], lengths[index], keys, temperature))
      tokens, counts = drawn.tokens[:kept], drawn.lengths[:kept]
      scores = rollouts.checked_scores(
        self.reward, *rollouts.unpadded(prompts[index][:kept], lengths[index][:kept], tokens, counts)
      )
      parts.append(Answers(tokens, counts, scores.reshape(counts.shape).astype(np.float64)))
    return Answers(*map(np.concatenate, zip(*parts)))

  def kl(self, params: Any, reference: Any, prompts, lengths, answers: Answers) -> np.ndarray:
    """Returns the KL of policy and reference, nats, along each of the policy's samples, [n, K].

    It is the sum over tokens of the KL of the next token's distributions, as the paper measures it;
    its mean over samples is that of log pi - log pi_ref, with a smaller error.
    """
    parts = []
    for index, kept in self._parts(len(prompts)):
      rows = rollouts.rows_of(prompts[index], lengths[index], answers.tokens[index], answers.lengths[index])
      parts.append(np.asarray(self._kl(params, reference, rows), np.float64)[:kept])
    return np.concatenate(parts)

  def measure(self, params: Any, reference: Any, prompts, lengths, *, seed: int) -> dict[str, float]:
    """Returns means over prompts at temperature 1, each with its standard error."""
    answers = self.answers(params, prompts, lengths, seed=seed)
    kl = self.kl(params, reference, prompts, lengths, answers)
    reward, reward_error = mean_and_error(answers.rewards.mean(axis=1))
    mean_kl, kl_error = mean_and_error(kl.mean(axis=1))
    return {
      "reward": reward,
      "reward_error": reward_error,
      "kl": mean_kl,
      "kl_error": kl_error,
      "length": float(answers.lengths.mean()),
    }

  def _parts(self, count: int):
    """Yields the prompts of each call, and how many of them are new: every call has one shape."""
    for first in range(0, count, self._at_once):
      yield np.arange(first, first + self._at_once) % count, min(self._at_once, count - first)


def _kl(apply, num_samples: int, params: Any, reference: Any, rows) -> jax.Array:
  """Returns the summed KL of the next token's distributions along each sample, [R, K]."""
  policy, frozen = apply(params, rows), apply(reference, rows)

  def of_row(row):
    ours, theirs = (
      jax.nn.log_softmax(logits_of(predicting_states(hidden[None], row.source[None])[0], head))
      for hidden, head in ((row.policy, policy.head), (row.frozen, frozen.head))
    )
    return jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1)

  each = jax.lax.map(of_row, _Row(policy.hidden, frozen.hidden, rows.source))
  each = jnp.where(rows.slot < num_samples, each, 0.0)
  return each.reshape(len(each), num_samples, -1).sum(axis=-1)


class _Row(NamedTuple):
  policy: jax.Array
  frozen: jax.Array
  source: jax.Array
