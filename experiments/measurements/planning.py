"""How long an epoch takes to plan, how full its rows are and how many shapes they have.

python -m experiments.measurements.planning

Lengths are drawn log-normal with the means of Anthropic HH in GPT-2 tokens: a prompt of about 110,
responses of about 41 and 50.
"""

import time

import numpy as np

from dpojax.data import packing


def hh_like(count: int) -> np.ndarray:
  """Returns [count, 3] lengths of prompt, chosen and rejected."""
  rng = np.random.default_rng(0)
  draw = lambda mean, most: 1 + np.minimum(most, rng.lognormal(mean, 0.8, count)).astype(int)
  return np.stack([draw(4.5, 256), draw(3.4, 200), draw(3.6, 200)], axis=1)


def main():
  print("| comparisons | batch size | row length | seconds | row fill | rows of a step |")
  print("|---|---|---|---|---|---|")
  for count, batch_size, row_length in (
    (2_000, 64, 1024),
    (161_000, 64, 1024),
    (161_000, 64, 2048),
    (1_000_000, 64, 1024),
    (1_000_000, 1024, 1024),
  ):
    lengths = hh_like(count)
    start = time.perf_counter()
    plan = packing.plan(lengths, 0, 0, batch_size, row_length)
    seconds = time.perf_counter() - start
    rows = ", ".join(map(str, np.unique(plan.rows)))
    print(
      f"| {count:,} | {batch_size} | {row_length} | {seconds:.1f} "
      f"| {packing.row_fill(plan, lengths):.1%} | {rows} |"
    )


if __name__ == "__main__":
  main()
