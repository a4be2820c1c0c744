"""PPO against a reward minus beta KL (Schulman et al. 2017; Ziegler et al. 2019): the one online loop.

From Python, with params and prompts at hand:

    from dpojax import parallel, ppo

    settings = ppo.Settings(steps=100, prompts_per_step=128, num_samples=8, max_new_tokens=32,
                            beta=0.1, target_kl=6.0)          # target_kl=0: beta stays as it is
    params, history = ppo.train(
        config, params,                # ModelConfig and the params of the policy; also the reference
        prompts, lengths,              # [n, W] int32 ids padded on the right, [n] tokens of each
        reward,                        # (prompts, responses), lists of ids -> [m] float
        settings, stop_id=tokenizer.eos_token_id,
        callback=lambda step, params, metrics: ...,   # at step 0 with {}, then after each step
        devices=parallel.Mesh())       # by default all there are

`params` that come back are NumPy arrays, those of the callback are placed on the devices and are gone
after it returns; `history` holds the metrics of each step, plain floats. The reward gets every
response with the stop id that ends it, or without one where it ran out of tokens. That of a reward
model is `rollouts.LearnedReward`. `Trainer` is the same, one step at a time.

From the command line, on the prompts of any data set:

    python -m dpojax.ppo --config=configs/ppo.py --workdir=DIR \\
        --config.model.checkpoint=runs/sft --config.ppo.reward=runs/reward [--config.key=value ...]

`ppo.reward` is the workdir of a run with objective=reward and the same tokenizer, or module:function
of a prompt and a response in text. The workdir is as that of `dpojax.train`: metrics.jsonl, checkpoints
that `dpojax.sample`, `evaluate` and `export` read, and a killed run continues to the same numbers.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import losses, parallel, ppo_losses, rollouts, sampling
from dpojax import step as step_lib
from dpojax.data.packing import Rows
from dpojax.models import transformer
from dpojax.models.config import ModelConfig
from dpojax.objectives import Apply, Mean, Objective, mean_where
from dpojax.parts import Parts
from dpojax.rollouts import Reward
from dpojax.step import TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
  """How PPO runs.

  Attributes:
    steps: rollouts.
    prompts_per_step, num_samples: prompts of a rollout and samples of each, together 1024.
    max_new_tokens: of a sample.
    epochs, minibatches: passes over a rollout, and the updates of each.
    beta: what a nat of log pi - log pi_ref costs, in units of the (normalised) score; with
      `target_kl` where it starts.
    target_kl: nats of a whole response that beta is steered towards; 0 leaves beta alone.
    kl_gain: how fast, see `ppo_losses.adapted_beta`.
    normalize_rewards: scores less their mean over their deviation, both of all seen so far.
    whiten_advantages: mean 0 and deviation 1 over the tokens of a rollout.
    gamma, lam: discount, and the decay of generalised advantages.
    clip, value_clip: how far ratios and values count, see `ppo_losses`.
    optimizer: a name in `step.OPTIMIZERS`.
    learning_rate, critic_learning_rate: of the two networks.
    warmup_steps: updates over which they rise.
    schedule: a name in `step.SCHEDULES`.
    max_grad_norm: gradients are clipped to it; 0 is none.
    rows_at_once: prompts, with their samples, a device computes at once; 0 is all.
    prompts_at_once: prompts that are sampled to at once; 0 is all of a rollout.
    chunk_size: see `log_probs.token_log_probs`; 0 goes by memory.
    seed: of samples, the order of prompts, and minibatches.
  """

  steps: int = 100
  prompts_per_step: int = 128
  num_samples: int = 8
  max_new_tokens: int = 64
  epochs: int = 4
  minibatches: int = 4
  beta: float = 0.1
  target_kl: float = 0.0
  kl_gain: float = 0.1
  normalize_rewards: bool = True
  whiten_advantages: bool = True
  gamma: float = 1.0
  lam: float = 0.95
  clip: float = 0.2
  value_clip: float = 0.2
  optimizer: str = "adamw"
  learning_rate: float = 1e-5
  critic_learning_rate: float = 1e-5
  warmup_steps: int = 0
  schedule: str = "constant"
  max_grad_norm: float = 1.0
  rows_at_once: int = 0
  prompts_at_once: int = 0
  chunk_size: int = 0
  seed: int = 0
