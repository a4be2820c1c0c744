"""What a run will need, before there are weights, or devices.

python -m dpojax.plan --config=FILE[:arg] [--config.key=value ...] [--devices=8] [--chip=h100]
    [--topology=v5e:16x16] [--lengths=110,70,70]

Compiles the train step that the run would use, over as many simulated CPU devices as asked, and
prints the memory of each and the arithmetic of a step. Weights are neither read nor made: of a
Hugging Face model only the config.json has to be there. With --lengths, the mean tokens of a prompt
and of its responses, no data are read either.

With --topology the compiler is that of the chips named, of which none have to be there: v4, v5e, v5p and
v6e in any shape that they are rented in (libtpu, `pip install 'dpojax[plan]'`), or gpu:8xh100. What it makes
is read for collectives, matrix products and traffic with memory, and held against the chips' published rates.
What was compiled once is kept in the cache folder.
"""

import jax
from absl import flags

from dpojax.plan import compiling, needs, roofline, topology
from dpojax.runtime import command_line
from dpojax.runtime.command import command, say
from dpojax.training import parallel, weights
from dpojax.training.throughput import CHIPS


def main():
  given = flags.FLAGS
  if given.topology:
    parallel.simulate(1)
  elif given.devices:
    parallel.simulate(given.devices)
  with command():
    chips = topology.described(given.topology) if given.topology else None
    config = weights.with_tokenizer(given.config)
    lengths = needs.drawn_lengths(given.lengths, config) if given.lengths else None
    if chips is None:
      found = needs.plan(config, lengths)
      print(needs.report(found, devices=jax.device_count(), chip=given.chip, utilisation=given.utilisation))
    else:
      print(report(chips, compiling.compile_for(config, chips, lengths, say=say)))


def report(chips: topology.Topology, compiled: compiling.Compiled) -> str:
  """Returns the table of a step compiled for chips that are not there."""
  count, rates, costs = len(chips.devices), CHIPS[chips.chip], compiled.costs
  bounds = roofline.roofline(compiled.step, compiled.needs, costs, chip=chips.chip, devices=count)
  gib = lambda value: f"{value / 2**30:10.3f} GiB"
  lines = [
    needs.report(compiled.needs, devices=count, compiled_for=chips.name),
    f"  of            {gib(rates.memory)}",
    "collectives of a step, received by each device",
  ]
  for kind, total in sorted(costs.bytes_by_kind().items(), key=lambda each: -each[1]):
    places = [each for each in costs.collectives if each.kind == kind]
    lines.append(f"  {kind:<20} {gib(total)}  at {len(places)} places")
    for each in sorted(places, key=lambda each: -each.bytes)[:3]:
      shape = ",".join(map(str, each.dims))
      lines.append(f"    {gib(each.bytes)}  {each.times:g} x {each.dtype}[{shape}] of {each.devices}")
  total, paper = sum(costs.bytes_by_kind().values()), needs.fsdp_bytes(compiled.step)
  if paper:
    lines.append(f"  together             {gib(total)}  {total / paper:.2f} x what fsdp needs on paper")
  lines += [
    f"at the published rates of {chips.chip} a step takes at least",
    f"  {bounds.products:8.3f} s  matrix products, {rates.flops / 1e12:.0f} TFLOP/s",
    f"  {bounds.memory:8.3f} s  memory, {rates.memory_rate / 1e9:,.0f} GB/s",
    f"  {bounds.links:8.3f} s  collectives, {rates.link_rate / 1e9:,.0f} GB/s",
    f"bound by {bounds.bound}: at most {bounds.tokens:,.0f} tokens/s a chip, MFU {bounds.mfu:.1%}",
    f"compiled in {compiled.seconds:.0f} s" + (", kept from before" if compiled.kept else ""),
  ]
  if costs.unbounded:
    lines.append(f"{costs.unbounded} loops counted once: nothing says how often they run")
  return "\n".join(lines)


def cli():
  """Plans as the command line says: `dpojax-plan`, and `python -m dpojax.plan`."""
  command_line.define_config()
  flags.DEFINE_integer("devices", 0, "Simulated CPU devices; 0: the devices there are.")
  flags.DEFINE_enum("chip", "", ["", *CHIPS], "A chip to hold it against.")
  flags.DEFINE_string("topology", "", "Chips to compile for, such as v5e:16x16; none have to be there.")
  flags.DEFINE_float("utilisation", 0.4, "Share of the chip's rate that is reached.")
  flags.DEFINE_string("lengths", "", "Mean tokens of prompt and responses, in place of data.")
  command_line.start(main, __doc__)


if __name__ == "__main__":
  cli()
