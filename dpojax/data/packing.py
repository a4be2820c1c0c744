"""Which comparisons are in which step and row, and the arrays a row is made of. NumPy only.

A step holds exactly `batch_size` comparisons, whatever the packing: packing never changes the
optimisation. Within a step comparisons are packed first-fit, longest first, into rows of fixed
length; the number of rows is rounded up to one of a few buckets, so that a run compiles few shapes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.runtime.errors import UserError

BUCKETS = 3
"""Row counts a plan uses, rare overflows aside: the shapes a run compiles."""


class PackingError(UserError, ValueError):
  """Comparisons cannot be packed as asked; the message names the value and the fix."""


class Rows(NamedTuple):
  """A batch of packed rows, int32 but for the last two. See the legend in `dpojax`.

  As packed they are NumPy's arrays, placed on devices jax's, and shapes where a step is compiled ahead.

  Attributes:
    tokens: [R, L] ids; 0 on padding.
    positions: [R, L] position of a token in its own sequence; every response continues its prompt.
    comparison: [R, L] which comparison of the row, 1..P; 0 is padding.
    branch: [R, L] 0 is the prompt, k the k-th response.
    source: [R, S] where in the row the hidden state stands that predicts a scored token.
    target: [R, S] the id to score.
    slot: [R, S] (comparison - 1) * K + (branch - 1); P * K is padding.
    example: [R, P] the example's id in the data set, -1 is padding.
    reference: [R, P, K] float32 log-probs under the reference where they were stored, else None.
    knobs: by name [R, P] float32 knobs of losses that comparisons bring, such as beta; None: none.
  """

  tokens: Any
  positions: Any
  comparison: Any
  branch: Any
  source: Any
  target: Any
  slot: Any
  example: Any
  reference: Any = None
  knobs: dict[str, Any] | None = None


class RowShape(NamedTuple):
  """What a row can hold: `length` L tokens, `scored` S scored tokens, `comparisons` P."""

  length: int
  scored: int
  comparisons: int


class Plan(NamedTuple):
  """The steps of an epoch.

  Attributes:
    index: [steps, B] position in `lengths` of each comparison, -1 for none (last step of an
      evaluation only).
    row: [steps, B] the row each comparison is in.
    rows: [steps] rows of the step, a bucket.
    shape: what a row can hold, the same in every step and epoch of a data set.
  """

  index: np.ndarray
  row: np.ndarray
  rows: np.ndarray
  shape: RowShape


def plan(
  lengths: np.ndarray,
  seed: int,
  epoch: int,
  batch_size: int,
  row_length: int,
  *,
  row_multiple: int = 1,
  buckets: int = BUCKETS,
  coarse: bool = False,
) -> Plan:
  """Returns the steps of one epoch: a pure function of its arguments.

  Comparisons are shuffled by (seed, epoch) and cut into steps of `batch_size`; the remainder, a
  different one each epoch, is left out.

  Args:
    lengths: [N, 1 + K] tokens of the prompt and of each response, 0 for an absent response.
    seed: of the shuffle.
    epoch: which pass over the data, from 0.
    batch_size: comparisons a step.
    row_length: tokens a row holds.
    row_multiple: the number of rows is a multiple of it.
    buckets: row counts steps are rounded up to. With one, all steps have as many rows and the last
      ones of most are empty.
    coarse: what a row holds and how many there are is rounded up to few values, so that data sets like one
      another, such as those of rounds, have the same shapes; there is then one row count, whatever `buckets`.

  Raises:
    PackingError: a comparison is longer than a row, or there are fewer than `batch_size`.
  """
  lengths = _checked(lengths, row_length)
  steps = len(lengths) // batch_size
  if steps == 0:
    raise PackingError(
      f"batch_size is {batch_size} but there are {len(lengths)} comparisons; lower batch_size or add data"
    )
  # Of seed and epoch alone: any step of any epoch can be laid out without those before it, as a resume does.
  order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
  index = order[: steps * batch_size].reshape(steps, batch_size)
  shape = row_shape(lengths, row_length)
  if coarse:
    shape = RowShape(row_length, _few(shape.scored), _few(shape.comparisons))
  row, needed = _first_fit(lengths, index, shape)
  if coarse:
    rows = row_multiple * _few(-(-int(needed.max()) // row_multiple))
    return Plan(index, row, np.full(steps, rows), shape)
  counts = row_buckets(lengths, batch_size, row_length, row_multiple=row_multiple, buckets=buckets)
  return Plan(index, row, _round_up(needed, counts), shape)


def plan_in_order(lengths: np.ndarray, batch_size: int, row_length: int, *, row_multiple: int = 1) -> Plan:
  """Returns the steps of one evaluation: every comparison once, in order, the last step partial."""
  lengths = _checked(lengths, row_length)
  steps = -(-len(lengths) // batch_size)
  index = np.full(steps * batch_size, -1)
  index[: len(lengths)] = np.arange(len(lengths))
  index = index.reshape(steps, batch_size)
  shape = row_shape(lengths, row_length)
  row, needed = _first_fit(lengths, index, shape)
  most = max(1, int(needed.max(initial=1)))
  return Plan(index, row, np.full(steps, -(-most // row_multiple) * row_multiple), shape)


def row_shape(lengths: np.ndarray, row_length: int) -> RowShape:
  """Returns what a row holds: half as much room again for scored tokens as rows need on average.

  Rows are then filled up by their tokens alone. The room costs memory only: the output head skips
  chunks of padding. For comparisons, which cost next to nothing, there is three times the room.
  """
  tokens, scored = lengths.sum(axis=1), _scored(lengths)
  share = scored.sum() / max(1, tokens.sum())
  room = max(int(scored.max(initial=1)), math.ceil(1.5 * share * row_length), 1)
  room = min(-(-room // 8) * 8, max(row_length, int(scored.max(initial=1))))
  return RowShape(row_length, room, max(1, math.ceil(3 * row_length / max(1.0, tokens.mean()))))


def row_buckets(
  lengths: np.ndarray, batch_size: int, row_length: int, *, row_multiple: int = 1, buckets: int = BUCKETS
) -> tuple[int, ...]:
  """Returns the row counts steps are rounded up to, ascending; they do not depend on the epoch.

  512 random steps are packed and the `buckets` counts chosen that leave the fewest rows empty
  on average. Larger ones follow, up to one comparison a row, for steps that need more than any of
  those did.
  """
  # A fixed seed: the shapes to compile must not hang on the run's, or every seed would compile anew.
  rng = np.random.default_rng(0)
  index = rng.integers(len(lengths), size=(512, batch_size))
  _, needed = _first_fit(lengths, index, row_shape(lengths, row_length))
  needed = -(-needed // row_multiple) * row_multiple
  counts, weights = np.unique(needed, return_counts=True)
  chosen = _best_buckets(counts, weights, buckets)
  most = -(-batch_size // row_multiple) * row_multiple
  while chosen[-1] < most:
    larger = -(-math.ceil(chosen[-1] * 1.25) // row_multiple) * row_multiple
    chosen.append(min(larger, most))
  return tuple(chosen)


def row_fill(plan: Plan, lengths: np.ndarray, *, part: int = 0) -> float:
  """Returns the share of the computed rows' tokens that are not padding.

  Args:
    plan: the steps.
    lengths: [N, 1 + K], what was planned.
    part: rows are computed in parts of so many, and parts that hold nothing are not; 0 is all rows.
  """
  tokens = np.append(lengths.sum(axis=1), 0)[plan.index].sum()
  rows = plan.rows
  if part:
    rows = -(-(np.where(plan.index >= 0, plan.row, 0).max(axis=1) + 1) // part) * part
  return float(tokens / (rows.sum() * plan.shape.length))


def empty(
  rows: int, shape: RowShape, *, num_responses: int, with_reference: bool = False, knobs: Sequence[str] = ()
) -> Rows:
  """Returns rows that hold nothing; see `fill`."""
  full = lambda size, value: np.full((rows, size), value, np.int32)
  return Rows(
    tokens=full(shape.length, 0),
    positions=full(shape.length, 0),
    comparison=full(shape.length, 0),
    branch=full(shape.length, 0),
    source=full(shape.scored, 0),
    target=full(shape.scored, 0),
    slot=full(shape.scored, shape.comparisons * num_responses),
    example=full(shape.comparisons, -1),
    reference=np.zeros((rows, shape.comparisons, num_responses), np.float32) if with_reference else None,
    knobs={name: np.ones((rows, shape.comparisons), np.float32) for name in knobs} or None,
  )


def fill(
  comparisons: Sequence[tuple | None],
  row: np.ndarray,
  rows: int,
  shape: RowShape,
  *,
  num_responses: int,
  example: Sequence[int],
  first_row: int = 0,
  reference: np.ndarray | None = None,
  knobs: dict[str, np.ndarray] | None = None,
) -> Rows:
  """Returns the arrays of a step's rows, or of the `rows` of them that start at `first_row`.

  The first token of a response is predicted by the last of its prompt. With an empty prompt
  nothing predicts it: it is read, not scored.

  Args:
    comparisons: prompt ids and the list of response ids of each comparison; a list of which ids of each
      response are scored may come third, None where all are.
    row: [B] the row of each comparison.
    rows: how many rows to fill.
    shape: what a row can hold.
    num_responses: `K`.
    example: [B] ids for `Rows.example`.
    first_row: the first row to fill; comparisons of other rows are passed over.
    reference: [B, K] stored log-probs for `Rows.reference`.
    knobs: [B] values by name for `Rows.knobs`; padding gets the first, which is as sound as any.
  """
  knobs = knobs or {}
  out = empty(
    rows, shape, num_responses=num_responses, with_reference=reference is not None, knobs=list(knobs)
  )
  # Padding is computed as well, and a beta of 0 would make it nan.
  for name, values in knobs.items():
    out.knobs[name][:] = values[0]
  used = np.zeros((rows, 3), np.int64)  # tokens, scored tokens and comparisons in each row
  for i, (r, comparison, identity) in enumerate(zip(row - first_row, comparisons, example)):
    if comparison is None or not 0 <= r < rows:
      continue
    prompt, responses, *which = comparison
    start, scored, number = used[r]
    out.example[r, number] = identity
    if reference is not None:
      out.reference[r, number] = reference[i]
    for name, values in knobs.items():
      out.knobs[name][r, number] = values[i]
    _place(out, r, start, prompt, number + 1, 0, 0)
    at = start + len(prompt)
    for k, response in enumerate(responses):
      if not len(response):
        continue
      _place(out, r, at, response, number + 1, k + 1, len(prompt))
      # Each token is predicted by the one before it; a branch's first by the end of the prompt, wherever that
      # stands.
      source = np.arange(at - 1, at + len(response) - 1)
      source[0] = start + len(prompt) - 1
      chosen = np.ones(len(response), bool) if not which or which[0] is None else which[0][k].copy()
      # Nothing predicts the first token of a text without a prompt.
      chosen[:1] &= len(prompt) > 0
      count = int(chosen.sum())
      out.source[r, scored : scored + count] = source[chosen]
      out.target[r, scored : scored + count] = response[chosen]
      out.slot[r, scored : scored + count] = number * num_responses + k
      at, scored = at + len(response), scored + count
    used[r] = at, scored, number + 1
  return out


def _place(out: Rows, r: int, at: int, ids: np.ndarray, comparison: int, branch: int, position: int):
  """Writes one prompt or response into row r."""
  span = slice(at, at + len(ids))
  out.tokens[r, span] = ids
  out.positions[r, span] = np.arange(position, position + len(ids))
  out.comparison[r, span] = comparison
  out.branch[r, span] = branch


def _checked(lengths: np.ndarray, row_length: int) -> np.ndarray:
  lengths = np.asarray(lengths)
  tokens = lengths.sum(axis=1)
  if len(tokens) and tokens.max() > row_length:
    longest = int(tokens.argmax())
    raise PackingError(
      f"comparison {longest} has {tokens[longest]} tokens (prompt and responses) but row_length "
      f"is {row_length}; raise row_length or lower data.max_length"
    )
  return lengths


def _scored(lengths: np.ndarray) -> np.ndarray:
  """Scored tokens of each comparison: the first of a response has no prediction without a prompt."""
  unpredicted = (lengths[:, :1] == 0) & (lengths[:, 1:] > 0)
  return (lengths[:, 1:] - unpredicted).sum(axis=1)


_STEPS_AT_ONCE = 4096
"""Steps that are packed side by side: what they take of memory does not grow with the data."""


def _first_fit(lengths: np.ndarray, index: np.ndarray, shape: RowShape) -> tuple[np.ndarray, np.ndarray]:
  """Packs every step first-fit, longest first, many steps at once. Returns rows and row counts."""
  packed = [
    _first_fit_of(lengths, index[start : start + _STEPS_AT_ONCE], shape)
    for start in range(0, max(len(index), 1), _STEPS_AT_ONCE)
  ]
  row, needed = zip(*packed)
  return np.concatenate(row), np.concatenate(needed)


def _first_fit_of(lengths: np.ndarray, index: np.ndarray, shape: RowShape) -> tuple[np.ndarray, np.ndarray]:
  taken = lengths[index] * (index >= 0)[..., None]  # -1: nothing, size 0
  flat = taken.reshape(-1, taken.shape[-1])
  sizes = np.stack([flat.sum(axis=1), _scored(flat), (index >= 0).reshape(-1)], -1)
  sizes = sizes.reshape(*index.shape, 3).astype(np.int64)
  # Longest first: of one size first-fit then takes at most 11/9 of the fewest bins (Johnson 1973).
  by_length = np.argsort(-sizes[:, :, 0], axis=1, kind="stable")
  steps, batch_size = index.shape
  free = np.broadcast_to(np.array(shape), (steps, batch_size, 3)).copy()
  row, used = np.zeros((steps, batch_size), np.int32), 1
  every = np.arange(steps)
  # One comparison of every step at a time: NumPy packs all steps of an epoch side by side.
  for item in by_length.T:
    size = sizes[every, item]
    fits = np.all(free[:, : used + 1] >= size[:, None], axis=-1)
    first = fits.argmax(axis=1)
    free[every, first] -= size
    row[every, item] = first
    # Only rows that some step has opened, and one more, are looked at.
    used = min(max(used, int(first.max()) + 1), batch_size - 1)
  needed = np.where(index >= 0, row + 1, 1).max(axis=1)
  return row, needed


def _best_buckets(counts: np.ndarray, weights: np.ndarray, most: int) -> list[int]:
  """Chooses at most `most` of the ascending counts, the last among them, with the least waste.

  waste[i] is the least waste of rounding counts[:i + 1] up, with counts[i] itself a bucket.
  """
  cost = lambda i, j: float(np.sum(weights[i : j + 1] * (counts[j] - counts[i : j + 1])))
  waste = [(cost(0, j), [int(counts[j])]) for j in range(len(counts))]
  for _ in range(most - 1):
    waste = [
      min(
        [waste[j]] + [(waste[i][0] + cost(i + 1, j), waste[i][1] + [int(counts[j])]) for i in range(j)],
        key=lambda entry: entry[0],
      )
      for j in range(len(counts))
    ]
  return waste[-1][1]


def _few(count: int) -> int:
  """Returns the least power of two, or one and a half of one, that is not below a count."""
  power = 1 << max(0, count - 1).bit_length()
  return power * 3 // 4 if 4 <= power and power * 3 // 4 >= count else power


def _round_up(needed: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
  return np.asarray(buckets)[np.searchsorted(buckets, needed)]
