"""What the makers of chips publish of them."""

from typing import NamedTuple


class Chip(NamedTuple):
  """What its maker publishes of a chip.

  Attributes:
    flops: dense bfloat16 multiplications and additions a second.
    memory: bytes of it.
    memory_rate: bytes a second read from it or written.
    link_rate: bytes a second that it receives from other chips over all its links, while it sends as many.
  """

  flops: float
  memory: float
  memory_rate: float
  link_rate: float


CHIPS = {
  "a100": Chip(312e12, 80e9, 2.039e12, 300e9),
  "h100": Chip(989e12, 80e9, 3.35e12, 450e9),
  "h200": Chip(989e12, 141e9, 4.8e12, 450e9),
  "v4": Chip(275e12, 32 * 2**30, 1.228e12, 300e9),
  "v5e": Chip(197e12, 16 * 2**30, 0.819e12, 200e9),
  "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 600e9),
  "v6e": Chip(918e12, 32 * 2**30, 1.64e12, 400e9),
}
"""TPUs: cloud.google.com/tpu/docs, the page of each; links at half of what is called bidirectional there.
GPUs: NVIDIA's data sheets of the SXM modules; links are NVLink's, within one host."""
