"""A world small enough to sum over: exact reward, exact KL, and the exact optimum at every beta.

Four prompts, and responses of up to three ids of six, of which one ends a response: 156 of them. The
reference is a small Transformer with random weights; the true reward a random function of the ids,
their order and the prompt, with mean 0 and deviation 1 under the reference. Comparisons are labelled by
draws from Bradley-Terry (the paper's Eq. 1), their responses from the reference or uniformly, in
halves, so that every response is compared. Exact are: reward and KL of any policy, by a sum over all
responses, and the best that any policy can do, pi_ref exp(r / beta) / Z (Eq. 4).
"""

import functools
import itertools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
import transformers

from configs import dpo
from dpojax.data import loader
from dpojax.models import config as model_config
from dpojax.models import hf, transformer
from dpojax.sample import rollouts
from dpojax.training import objectives, resolve, weights
from experiments.paper import methods

STOP, IDS, ROOM, WIDTH = 0, 6, 3, 2
"""The id that ends a response, how many ids there are, tokens of a response at most, of a prompt."""

RESPONSES = [
  np.array(ids, np.int32)
  for length in range(1, ROOM + 1)
  for ids in itertools.product(range(IDS), repeat=length)
  if STOP not in ids[:-1] and (ids[-1] == STOP or length == ROOM)
]
"""Every response there can be."""


class Sizes(NamedTuple):
  """How large the world and its comparisons are."""

  prompts: int = 4
  width: int = 32
  layers: int = 2
  comparisons: int = 512_000
  held_out: int = 2000
  batch_size: int = 256
  seed: int = 0


class Table(NamedTuple):
  """All there is to know of the world, [prompts, responses] float64."""

  log_probs: np.ndarray
  rewards: np.ndarray


def optimum(table: Table, beta: float) -> np.ndarray:
  """Returns log pi_ref exp(r / beta) / Z, [prompts, responses]."""
  unnormalised = table.log_probs + table.rewards / beta
  return unnormalised - np.logaddexp.reduce(unnormalised, axis=1, keepdims=True)


def reward_and_kl(table: Table, log_probs: np.ndarray) -> tuple[float, float]:
  """Returns exact mean reward of a policy, and its KL to the reference in nats."""
  chances = np.exp(log_probs)
  return (
    float((chances * table.rewards).sum(axis=1).mean()),
    float((chances * (log_probs - table.log_probs)).sum(axis=1).mean()),
  )


def best_reward(table: Table, kl: float) -> float:
  """Returns the largest mean reward at a KL: that of the optimum whose KL it is.

  Raises:
    ValueError: no policy that the reference allows is that far from it.
  """
  low, high = 1e-3, 1e4  # betas; the KL falls with beta
  if not reward_and_kl(table, optimum(table, high))[1] <= kl <= reward_and_kl(table, optimum(table, low))[1]:
    raise ValueError(f"the KL is {kl}; optima have those of betas {low} to {high}")
  for _ in range(200):
    middle = np.sqrt(low * high)
    low, high = (middle, high) if reward_and_kl(table, optimum(table, middle))[1] > kl else (low, middle)
  return reward_and_kl(table, optimum(table, high))[0]


class Policies:
  """Log-probs of every response to every prompt, under any params."""

  def __init__(self, config: model_config.ModelConfig, prompts: np.ndarray):
    tokens, counts = rollouts.padded(RESPONSES, ROOM)
    every = lambda x: np.broadcast_to(x, (len(prompts), *x.shape))
    rows = rollouts.rows_of(prompts, np.full(len(prompts), WIDTH), every(tokens), every(counts))
    score = functools.partial(objectives.response_log_probs, num_responses=len(RESPONSES))
    apply = transformer.make_apply(config)
    self._score = jax.jit(lambda params: score(apply(params, rows), rows).sums[:, 0])

  def log_probs(self, params: Any) -> np.ndarray:
    """Returns them, [prompts, responses], normalised in float64."""
    log_probs = np.asarray(self._score(params), np.float64)
    return log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True)


def make(folder: pathlib.Path, sizes: Sizes = Sizes()) -> tuple[methods.World, Table]:
  """Returns the world, made in the folder at the first call, and what is known of it."""
  rng = np.random.default_rng(sizes.seed)
  prompts = rng.permutation(list(itertools.product(range(1, IDS), repeat=WIDTH)))[: sizes.prompts].astype(
    np.int32
  )
  if not hf.is_model_folder(folder / "reference"):
    _save_reference(folder / "reference", sizes)
  model = weights.load(str(folder / "reference"))
  config, params = transformer.unrolled(model.config, model.params)
  model = model._replace(config=config, params=jax.tree.map(np.asarray, params))
  policies = Policies(model.config, prompts)
  log_probs = policies.log_probs(model.params)
  table = Table(log_probs, _rewards(rng, prompts, log_probs))
  place = {tuple(prompt): i for i, prompt in enumerate(prompts.tolist())}
  number = {tuple(response.tolist()): i for i, response in enumerate(RESPONSES)}

  def reward(asked, answers):
    return np.array(
      [table.rewards[place[tuple(map(int, p))], number[tuple(map(int, r))]] for p, r in zip(asked, answers)]
    )

  def measure(params, seed):
    del seed  # nothing is drawn
    value, kl = reward_and_kl(table, policies.log_probs(params))
    return {"reward": value, "reward_error": 0.0, "kl": kl, "kl_error": 0.0}

  return methods.World(
    folder=folder,
    model=model,
    config=_config(folder, sizes),
    prompts=prompts,
    data=lambda config: _data(config, table, prompts, sizes),
    reward=reward,
    measure=measure,
    prompt_lengths=np.full(len(prompts), WIDTH),
    stop_id=STOP,
    max_new_tokens=ROOM,
  ), table


def _config(folder: pathlib.Path, sizes: Sizes):
  """What all runs in this world have in common."""
  config = dpo.get_config()
  config.model.checkpoint = config.tokenizer = str(folder / "reference")
  config.data.path = "drawn, not read"
  config.data.max_length = WIDTH + ROOM
  config.data.max_prompt_length = WIDTH
  config.batch_size = sizes.batch_size
  config.row_length = 32
  config.model.scan_layers = False
  config.steps = sizes.comparisons // sizes.batch_size
  config.optimizer.name = "adamw"
  config.optimizer.schedule = "linear"
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 20
  config.optimizer.max_grad_norm = 1.0
  config.eval_every = config.log_every = config.checkpoint_every = config.steps
  return config


def _save_reference(folder: pathlib.Path, sizes: Sizes) -> None:
  """Saves the reference as a Hugging Face folder: random weights that make responses unequal."""
  config = model_config.llama_style(
    vocab_size=IDS,
    width=sizes.width,
    layers=sizes.layers,
    heads=2,
    max_positions=WIDTH + ROOM,
    tie_embeddings=False,
  )
  rng = np.random.default_rng([sizes.seed, 1])
  params = transformer.init_params(config, jax.random.key(sizes.seed))
  params = jax.tree.map(
    lambda x: np.asarray(x) + rng.normal(size=x.shape, scale=0.08).astype(np.float32), params
  )
  hf.save(folder, config, params, eos_token_id=STOP)
  words = {"<eos>": STOP} | {chr(ord("a") + i - 1): i for i in range(1, IDS)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def _rewards(rng: np.random.Generator, prompts: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
  """Returns the reward of every response: of ids by place, of neighbours, and of the prompt's last id."""
  by_place, neighbours = rng.normal(size=(ROOM, IDS)), rng.normal(size=(IDS, IDS))
  by_prompt = rng.normal(size=(IDS, IDS))
  rewards = np.array(
    [
      [
        by_place[np.arange(len(response)), response].sum()
        + by_prompt[prompt[-1], response[0]]
        + neighbours[response[:-1], response[1:]].sum()
        for response in RESPONSES
      ]
      for prompt in prompts
    ]
  )
  chances = np.exp(log_probs)
  rewards -= (chances * rewards).sum(axis=1, keepdims=True)
  return rewards / np.sqrt((chances * rewards**2).sum(axis=1).mean())


def _data(config, table: Table, prompts: np.ndarray, sizes: Sizes) -> resolve.Data:
  """Draws the comparisons of a seed; for SFT the chosen ones alone."""
  count = config.steps * config.batch_size
  rng = np.random.default_rng([sizes.seed, 2, config.seed])
  which, chosen, rejected = draw_comparisons(rng, table, count + sizes.held_out)
  kept = [chosen] if config.objective == "sft" else [chosen, rejected]
  part = lambda of: loader.all_of(
    methods.in_ids(prompts[which[of]], *([RESPONSES[i] for i in each[of]] for each in kept))
  )
  train, held_out = part(slice(0, count)), part(slice(count, None))
  if config.data.shuffle_labels:
    train = loader.shuffle_labels(train, config.seed)
  return resolve.Data(train, held_out, train.data.fingerprint)


def draw_comparisons(
  rng: np.random.Generator, table: Table, count: int, *, uniform: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns prompts and the numbers of chosen and rejected responses, [count] each.

  A share `uniform` of the responses is drawn uniformly, the others from the reference.
  """
  size, most = table.rewards.shape
  chances = uniform / most + (1 - uniform) * np.exp(table.log_probs)
  bounds = np.cumsum(chances, axis=1)
  which = rng.integers(size, size=count)
  first, second = (_drawn(rng, bounds, which) for _ in range(2))
  while np.any(same := first == second):
    second[same] = _drawn(rng, bounds, which[same])
  margin = table.rewards[which, first] - table.rewards[which, second]
  first_wins = rng.random(count) < 1 / (1 + np.exp(-margin))
  return which, np.where(first_wins, first, second), np.where(first_wins, second, first)


def _drawn(rng: np.random.Generator, bounds: np.ndarray, which: np.ndarray) -> np.ndarray:
  """Returns a response to each prompt, by cumulated chances [prompts, responses]."""
  drawn = np.empty(len(which), int)
  for prompt, bound in enumerate(bounds):
    of = which == prompt
    drawn[of] = np.searchsorted(bound, rng.random(of.sum()) * bound[-1], side="right")
  return drawn
