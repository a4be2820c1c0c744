"""How alike a model finds the two responses of a pair: the CHES score, which tells what DPO may displace.

Where the hidden states of chosen and rejected responses are alike, to push one down pushes the other down
too, and probability goes to what nobody chose (Razin et al. 2024, arXiv 2410.08847). Pairs of the highest
scores are those to leave out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpojax.data.packing import Rows
from dpojax.kernels.precision import wide_of
from dpojax.log_probs import predicting_states, sum_by_slots
from dpojax.models.transformer import Outputs


def ches(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """Returns the centered hidden embedding similarity [...] (Razin et al. 2024, Def. 2), float32.

  <sum of chosen, sum of rejected> - ||sum of chosen||^2.

  Args:
    chosen, rejected: [..., D] sums of the hidden states from which each token of the response is predicted,
      behind the final norm.
  """
  chosen, rejected = (x.astype(wide_of(x.dtype)) for x in (chosen, rejected))
  # As one sum of differences: the two terms are large and nearly equal where answers are alike.
  return jnp.sum(chosen * (rejected - chosen), axis=-1)


def length_normalized_ches(
  chosen: jax.Array, rejected: jax.Array, chosen_length: jax.Array, rejected_length: jax.Array
) -> jax.Array:
  """Returns the CHES score of means in place of sums (Razin et al. 2024, Sec. 5): lengths cancel.

  Args:
    chosen, rejected: as of `ches`.
    chosen_length, rejected_length: [...] tokens of each response, at least 1.
  """
  mean = lambda total, length: total / length.astype(total.dtype)[..., None]
  return ches(mean(chosen, chosen_length), mean(rejected, rejected_length))


class Similarity(NamedTuple):
  """Scores of the pairs in packed rows, [R, P] each; of a place without a pair they mean nothing."""

  ches: jax.Array
  length_normalized: jax.Array


def of_rows(outputs: Outputs, rows: Rows, *, num_responses: int) -> Similarity:
  """Returns the scores of the first two responses of every comparison.

  Args:
    outputs: of the model, for the rows.
    rows: packed comparisons.
    num_responses: `K`, at least 2.
  """
  comparisons = rows.example.shape[-1]
  slots = comparisons * num_responses
  states = predicting_states(outputs.hidden, rows.source)
  states = states.astype(wide_of(states.dtype))
  sums = jax.vmap(lambda values, slot: jax.ops.segment_sum(values, slot, num_segments=slots + 1)[:-1])(
    states, rows.slot
  ).reshape(len(rows.slot), comparisons, num_responses, -1)
  ones = jnp.ones(rows.slot.shape, sums.dtype)
  lengths = sum_by_slots(ones, rows.slot, num_slots=slots).reshape(-1, comparisons, num_responses)
  pair = sums[..., 0, :], sums[..., 1, :]
  # Of a place without a response: what comes out means nothing, but must not be a division by 0.
  lengths = jnp.maximum(lengths, 1)
  return Similarity(ches(*pair), length_normalized_ches(*pair, lengths[..., 0], lengths[..., 1]))
