"""Comparisons to prefetched rows. The position in the data is the step number, nothing else."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dpojax.data import packing
from dpojax.data.examples import DataError
from dpojax.data.packing import Rows
from dpojax.data.tokenized import Tokenized


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some comparisons of a tokenized data set, in an order, perhaps with their labels shuffled.

  Attributes:
    data: the data set.
    index: [N] positions in it.
    swapped: [N] bool, true where chosen and rejected change places.
  """

  data: Tokenized
  index: np.ndarray
  swapped: np.ndarray

  def __len__(self) -> int:
    return len(self.index)

  @property
  def lengths(self) -> np.ndarray:
    """[N, 1 + K] tokens of the prompt and of each response, as they stand in the rows."""
    lengths = self.data.lengths[self.index]
    if not self.swapped.any():  # of ten million comparisons two copies less
      return lengths
    swapped = np.concatenate([lengths[:, :1], lengths[:, :0:-1]], axis=1)
    return np.where(self.swapped[:, None], swapped, lengths)

  def comparison(self, i: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the prompt's ids and the responses' of the i-th comparison."""
    prompt, responses = self.data[int(self.index[i])]
    return prompt, responses[::-1] if self.swapped[i] else responses

  def scored(self, i: int) -> list[np.ndarray] | None:
    """Returns which ids of each response of the i-th comparison are scored, or None where all are."""
    scored = self.data.scored(int(self.index[i]))
    return scored[::-1] if scored is not None and self.swapped[i] else scored

  @property
  def scored_lengths(self) -> np.ndarray:
    """[N, K] how many tokens of each response are scored and have a token before them."""
    if self.data.mask is None:
      lengths = self.lengths
      return np.where(lengths[:, 1:] > 0, lengths[:, 1:] - (lengths[:, :1] == 0), 0)
    return np.array(
      [
        [int(each[0 if len(prompt) else 1 :].sum()) for each in self.scored(i)]
        for i in range(len(self))
        for prompt in [self.comparison(i)[0]]
      ]
    )

  def example(self, i: int) -> int:
    """Returns the example's id in the data set."""
    return int(self.data.example[self.index[i]])

  @property
  def knobs(self) -> dict[str, np.ndarray]:
    """By name, [N] values of losses' knobs that the comparisons bring."""
    return {name: values[self.index] for name, values in self.data.knobs.items()}

  def in_order(self, values: np.ndarray) -> np.ndarray:
    """Returns values of the data set's responses, [data, K], as they stand here, [N, K]."""
    values = values[self.index]
    return np.where(self.swapped[:, None], values[:, ::-1], values)


@dataclasses.dataclass(frozen=True)
class Mismatched:
  """Comparisons that each have one more response, the last: one to another comparison's prompt.

  KTO's reference point is measured on them (Ethayarajh et al. 2024, Sec. 4.1). The response is cut
  where prompt and response would exceed `max_length` tokens.
  """

  subset: Subset
  partner: np.ndarray
  which: np.ndarray
  max_length: int

  def __len__(self) -> int:
    return len(self.subset)

  @property
  def lengths(self) -> np.ndarray:
    """[N, 2 + K] tokens of the prompt and of each response."""
    lengths = self.subset.lengths
    borrowed = lengths[self.partner, 1 + self.which]
    room = self.max_length - lengths[:, 0]
    return np.concatenate([lengths, np.minimum(borrowed, room)[:, None]], axis=1)

  def comparison(self, i: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the prompt's ids, the responses', and the borrowed response's, of the i-th comparison."""
    prompt, responses = self.subset.comparison(i)
    _, others = self.subset.comparison(int(self.partner[i]))
    return prompt, [*responses, others[self.which[i]][: self.max_length - len(prompt)]]

  def scored(self, i: int) -> list[np.ndarray] | None:
    """Returns which ids of each of those responses are scored, or None where all are."""
    scored = self.subset.scored(i)
    if scored is None:
      return None
    borrowed = self.subset.scored(int(self.partner[i]))[self.which[i]]
    return [*scored, borrowed[: self.max_length - int(self.subset.lengths[i, 0])]]

  def example(self, i: int) -> int:
    """Returns the example's id in the data set."""
    return self.subset.example(i)

  @property
  def knobs(self) -> dict[str, np.ndarray]:
    """By name, [N] values of losses' knobs that the comparisons bring."""
    return self.subset.knobs


def mismatched(subset: Subset, seed: int, max_length: int) -> Mismatched:
  """Returns the comparisons, each with a random response of another one.

  Raises:
    DataError: there is only one comparison.
  """
  if len(subset) < 2:
    raise DataError(f"there is {len(subset)} comparison, and kto needs responses to other prompts; add data")
  rng = np.random.default_rng([seed, 2])
  # A random circle: every response is borrowed once, and none by its own comparison.
  circle = rng.permutation(len(subset))
  partner = np.empty(len(subset), int)
  partner[circle] = np.roll(circle, 1)
  there = subset.lengths[partner, 1:] > 0
  which = np.argmax(rng.random(there.shape) * there, axis=1)
  return Mismatched(subset, partner, which, max_length)


def without_mismatched(subset: Subset | Mismatched) -> Subset:
  """Returns the comparisons with the responses of their own only."""
  return subset.subset if isinstance(subset, Mismatched) else subset


def all_of(data: Tokenized) -> Subset:
  """Returns every comparison, in order."""
  return Subset(data, np.arange(len(data)), np.zeros(len(data), bool))


def last_of_each_prompt(subset: Subset) -> Subset:
  """Returns the last comparison of each prompt: the paper's SFT has one example a prompt."""
  _, last = np.unique(prompt_numbers(subset)[::-1], return_index=True)
  return _take(subset, np.sort(len(subset) - 1 - last))


def hold_out(subset: Subset, count: int) -> tuple[Subset, Subset]:
  """Splits into the rest and about `count` held-out comparisons; no prompt is on both sides.

  Prompts are held out in the order of their digests, so the split depends on the data alone.
  """
  digests = subset.data.prompts()[subset.index]
  order = np.argsort(digests, kind="stable")
  cut = min(count, len(order))
  # Comparisons of one prompt stay together, so held-out numbers are of prompts never trained on.
  while 0 < cut < len(order) and digests[order[cut]] == digests[order[cut - 1]]:
    cut += 1
  return _take(subset, np.sort(order[cut:]).astype(int)), _take(subset, np.sort(order[:cut]).astype(int))


def prompt_numbers(subset: Subset) -> np.ndarray:
  """Returns a number of each comparison's prompt, [N], the same where the prompts are."""
  _, number, counts = np.unique(subset.data.prompts()[subset.index], return_inverse=True, return_counts=True)
  # Eight bytes of a digest say that two prompts differ, not that they are the same: where they are shared,
  # the ids decide.
  others: dict[bytes, int] = {}
  for i in np.nonzero(counts[number] > 1)[0]:
    ids = subset.comparison(int(i))[0].astype(np.int32).tobytes()
    number[i] = others.setdefault(ids, len(counts) + len(others))
  return number


def shuffle_labels(subset: Subset, seed: int) -> Subset:
  """Returns the comparisons with best and worst response swapped in a random half: a control."""
  # A stream of its own beside the shuffle's: the control differs from its run in the labels alone.
  swap = np.random.default_rng([seed, 1]).random(len(subset)) < 0.5
  return dataclasses.replace(subset, swapped=subset.swapped ^ swap)


def _take(subset: Subset, which: np.ndarray) -> Subset:
  return dataclasses.replace(subset, index=subset.index[which], swapped=subset.swapped[which])


class Batch(NamedTuple):
  """The rows of a step that this process fills, of `total_rows`, and what they hold.

  `step` counts from 0. `comparisons` and `tokens` are of the whole step, over all processes; tokens
  are counted for each response as if nothing were shared.
  """

  step: int
  rows: Rows
  total_rows: int
  comparisons: int
  tokens: int


class Loader:
  """Training batches of a subset by step number, and evaluation batches in order."""

  def __init__(
    self,
    subset: Subset | Mismatched,
    *,
    seed: int,
    batch_size: int,
    row_length: int,
    shards: int = 1,
    rows_at_once: int = 0,
    span: Callable[[int], tuple[int, int]] = lambda rows: (0, rows),
    coarse: bool = False,
  ):
    """Prepares the plans.

    Args:
      subset: the comparisons.
      seed: of the shuffle.
      batch_size: comparisons a step.
      row_length: tokens a row holds.
      shards: devices that the rows are cut over.
      rows_at_once: see `dpojax.training.micro_batches.MicroBatches`; rows stand as it says, in one
        shape for all steps.
      span: rows of a step -> (first row, number of rows) that this process fills.
      coarse: see `packing.plan`.

    Raises:
      PackingError: a comparison does not fit a row, or they are fewer than a step takes.
    """
    self.subset = subset
    self.reference: np.ndarray | None = None  # [N, K] stored log-probs that the rows are to carry
    self.knobs = subset.knobs  # by name, [N] values of losses' knobs that the rows are to carry
    self.lengths = subset.lengths
    self._span, self._shards, self._rows_at_once = span, shards, rows_at_once
    self.part = shards * rows_at_once  # rows computed at once over all devices; 0: all
    row_multiple = self.part or shards
    buckets = 1 if rows_at_once else packing.BUCKETS
    # Two epochs: prefetching threads cross from one into the next.
    self._plan = functools.lru_cache(maxsize=2)(
      lambda epoch: packing.plan(
        self.lengths,
        seed,
        epoch,
        batch_size,
        row_length,
        row_multiple=row_multiple,
        buckets=buckets,
        coarse=coarse,
      )
    )
    self._plan_in_order = functools.cache(
      lambda: packing.plan_in_order(self.lengths, batch_size, row_length, row_multiple=row_multiple)
    )
    self.steps_per_epoch = len(subset) // batch_size

  def training(self, start: int, stop: int) -> Iterator[Batch]:
    """Yields the batches of steps start..stop-1, read and filled ahead by other threads."""

    def batch(step):
      epoch, within = divmod(step, self.steps_per_epoch)
      return self._batch(self._plan(epoch), within, step)

    return self._ahead(batch, start, stop)

  def plan(self, epoch: int = 0) -> packing.Plan:
    """Returns the plan of an epoch."""
    return self._plan(epoch)

  def plan_in_order(self) -> packing.Plan:
    """Returns the plan of an evaluation."""
    return self._plan_in_order()

  def evaluation(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yields every comparison once, or those of some batches; the last batch may hold fewer."""
    plan = self._plan_in_order()
    stop = len(plan.rows) if stop is None else stop
    return self._ahead(lambda step: self._batch(plan, step, step), start, stop)

  def _ahead(self, batch: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    import grain  # here: it loads Orbax and more, and what is only read or planned needs none of it

    steps = grain.MapDataset.range(start, stop).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

  def _dealt(self, row: np.ndarray, total: int) -> np.ndarray:
    """Returns where rows stand: in parts they are dealt to the shards, a part after another."""
    if not self._rows_at_once:
      return row
    part, within = np.divmod(row, self.part)
    shard, place = np.divmod(within, self._rows_at_once)
    return shard * (total // self._shards) + part * self._rows_at_once + place

  def _batch(self, plan: packing.Plan, within: int, step: int) -> Batch:
    index, total = plan.index[within], int(plan.rows[within])
    first, count = self._span(total)
    row = self._dealt(plan.row[within], total)
    # A process reads and fills only the rows of its own devices; the plan is the same in all.
    mine = (row >= first) & (row < first + count) & (index >= 0)
    comparison = lambda i: (*self.subset.comparison(i), self.subset.scored(i))
    rows = packing.fill(
      [comparison(i) if here else None for i, here in zip(index, mine)],
      row,
      count,
      plan.shape,
      num_responses=self.lengths.shape[1] - 1,
      example=[self.subset.example(i) if here else -1 for i, here in zip(index, mine)],
      first_row=first,
      reference=None if self.reference is None else self.reference[index],
      knobs={name: values[index] for name, values in self.knobs.items()},
    )
    lengths = self.lengths[index[index >= 0]]
    tokens = int((lengths[:, 1:] + lengths[:, :1] * (lengths[:, 1:] > 0)).sum())
    return Batch(step, rows, total, len(lengths), tokens)
