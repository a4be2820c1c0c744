"""What gives a response a number: a reward model, or a function of text."""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpojax.data import loader, tokenization
from dpojax.data.examples import Example
from dpojax.data.truncation import end_kept
from dpojax.models import transformer
from dpojax.runtime import processes
from dpojax.runtime.errors import ConfigError
from dpojax.training import objectives, parallel, weights

Prompt = str | list[dict] | Example
"""Text, messages, or an example with the tools of its prompt."""

Response = str | list[dict]
Scorer = Callable[[Sequence[Prompt], Sequence[Response]], np.ndarray]
"""(prompts, responses) -> a number of each response, [N]."""

_BATCH = 64


def make_scorer(name: str, devices: parallel.Mesh, step: int | None = None) -> Scorer:
  """Returns the scorer of a name: the workdir of a reward model's run, or module:function.

  Args:
    name: a function takes a prompt and a response and returns a number.
    devices: where a reward model stands.
    step: of a reward model's checkpoint; None is the last.

  Raises:
    ConfigError: there is no such function, or the run is of no reward model.
    CheckpointError: there is no such run.
  """
  if not is_function(name):
    return RewardModel(weights.load(name, step), devices)
  function = load_function(name, ("prompt", "response"))
  plain = lambda prompt: prompt.prompt if isinstance(prompt, Example) else prompt

  def score(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
    # Of several processes one calls it: it may ask a server, count its calls, or draw.
    values = processes.from_first(
      name, lambda: [float(function(plain(p), r)) for p, r in zip(prompts, responses)]
    )
    return np.array(values, np.float64)

  return score


def is_function(name: str) -> bool:
  """Returns whether a name is of the form module:function."""
  module, colon, function = name.partition(":")
  return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str, *signatures: tuple[str, ...]) -> Callable:
  """Returns the function of 'module:function', looked for in the current folder too.

  Args:
    name: of the function.
    *signatures: what it may take, in words.

  Raises:
    ConfigError: it is not there, or takes another number of arguments.
  """
  module, _, attribute = name.partition(":")
  # An installed command has its own folder in the path, not the one it is called in.
  if "" not in sys.path:
    sys.path.insert(0, "")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ConfigError(f"{name} cannot be imported ({error}); give module:function") from error
  taken = len(inspect.signature(function).parameters)
  if taken not in map(len, signatures):
    forms = " or ".join(f"({', '.join(signature)})" for signature in signatures)
    raise ConfigError(f"{name} takes {taken} arguments; it must take {forms}")
  return function


def arity(function: Callable) -> int:
  """Returns how many arguments a function takes."""
  return len(inspect.signature(function).parameters)


class RewardModel:
  """The scorer of a run with objective=reward: its scalar head on a response's last token, EOS."""

  def __init__(self, model: weights.Loaded, devices: parallel.Mesh):
    """Places the params.

    Raises:
      ConfigError: the model is no reward model.
    """
    if not model.config.reward_head or model.settings is None:
      raise ConfigError(f"{model.name} is no reward model; give the workdir of a run with objective=reward")
    self._devices, self._settings = devices, model.settings
    self._tokenizer = tokenization.load_tokenizer(model.tokenizer)
    self._params = devices.place(model.params)
    apply = transformer.make_apply(model.config)

    def score(params, rows):
      return objectives.response_rewards(apply(params, rows), rows, num_responses=1), rows.example

    self._score = devices.lift(devices.map_rows(score), donate_state=False)

  def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
    """Returns the reward of each response, [N] float64.

    Prompts and responses are cut as in the run's training.

    Raises:
      DataError: a text cannot be tokenized.
    """
    data = self._settings.data
    tokenized = tokenization.tokenize_answers(
      list(zip(prompts, responses)),
      self._tokenizer,
      truncation=tokenization.Truncation(data.max_length, data.max_prompt_length, end_kept(data)),
      reading=tokenization.Reading.of(data),
    )
    # Packed as in training: the same program, and rows of the length that the model was trained with.
    batches = loader.Loader(
      loader.all_of(tokenized),
      seed=0,
      batch_size=_BATCH,
      row_length=self._settings.row_length,
      shards=self._devices.row_multiple,
    )
    return response_values(batches, self._score, self._params, self._devices)[:, 0]


def response_values(
  batches: loader.Loader, score: Callable, params: Any, devices: parallel.Mesh, *, columns: int = 0
) -> np.ndarray:
  """Returns a value of every response of a loader's comparisons, [N, K] float64, 0 for an absent one.

  Args:
    batches: the comparisons.
    score: lifted (params, rows) -> (values [R, P, K], examples [R, P]).
    params: placed.
    devices: where they are placed.
    columns: values of a comparison where they are not one of each response.
  """
  position = {batches.subset.example(i): i for i in range(len(batches.subset))}
  # nan, so that a comparison that no row held would show.
  values = np.full((len(batches.subset), columns or batches.lengths.shape[1] - 1), np.nan)
  for batch in batches.evaluation():
    of_rows, examples = devices.collect_rows(score(params, devices.place_all_rows(batch.rows)))
    for where in zip(*np.nonzero(examples >= 0)):
      values[position[int(examples[where])]] = of_rows[where]
  return values
