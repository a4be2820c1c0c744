"""How fast a compiled step can be on its chips at their published rates, and which of them bounds it.

The roofline model (Williams, Waterman and Patterson 2009) with the links between chips as a third roof: no
step is faster than its matrix products, its traffic with memory or its collectives would take alone.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from dpojax.plan.needs import Needs, Step, parts_of, seen_keys
from dpojax.plan.program import Costs
from dpojax.plan.topology import Topology
from dpojax.training.chips import CHIPS

PRODUCTS = {"_forward_kernel": 2, "_query_kernel": 3, "_key_kernel": 4}
"""Matrix products of queries with keys that `kernels.fused` makes in each kernel."""


class Roofline(NamedTuple):
  """Seconds that a step takes at least, and what follows.

  Attributes:
    products, memory, links: of its matrix products, its traffic with memory, its collectives.
    tokens: tokens a second and chip at most: prompt and response, counted for each response.
    mfu: share of the chips' peak at that rate, of the arithmetic that is necessary.
  """

  products: float
  memory: float
  links: float
  tokens: float
  mfu: float

  @property
  def seconds(self) -> float:
    return max(self.products, self.memory, self.links)

  @property
  def bound(self) -> str:
    """Returns what takes longest: 'products', 'memory' or 'links'."""
    return max(("products", "memory", "links"), key=lambda name: getattr(self, name))


def roofline(step: Step, needs: Needs, costs: Costs, topology: Topology) -> Roofline:
  """Returns what a chip's rates allow.

  Args:
    step: of `needs.step_of`.
    needs, costs: of its program.
    topology: the chips it was compiled for.
  """
  rates, devices = CHIPS[topology.chip], len(topology.devices)
  batch_size, lengths, model = step.config.batch_size, step.batches.lengths, step.setup.model
  # Kernels of our own are no dots in the program: their products are counted from the lengths.
  a_product = 2 * model.heads * model.head_size * seen_keys(lengths) * batch_size / devices
  attention = (
    a_product * sum(PRODUCTS.get(name, 0) * times for name, times in costs.kernels.items()) / parts_of(step)
  )
  products = (costs.flops + attention) / rates.flops
  memory = costs.memory_bytes / rates.memory_rate
  linked = lambda each: rates.link_rate * share_of_links(each.devices, topology.torus)
  links = sum(each.bytes / linked(each) for each in costs.collectives)
  seconds = max(products, memory, links)
  tokens = float(np.mean(lengths[:, 1:].sum(1) + lengths[:, 0] * (lengths.shape[1] - 1))) * batch_size
  return Roofline(
    products, memory, links, tokens / seconds / devices, needs.flops / seconds / (rates.flops * devices)
  )


def share_of_links(devices: int, torus: tuple[int, ...]) -> float:
  """Returns the share of a chip's links that an exchange among so many devices goes over.

  In a torus of n directions those along one ring use one n-th, those in a plane of it two.
  """
  for directions in range(1, len(torus)):
    if devices in map(math.prod, itertools.combinations(torus, directions)):
      return directions / len(torus)
  return 1.0
