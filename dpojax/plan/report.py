"""What is told of a step that was compiled for chips that are not there."""

from dpojax.plan import compiling, needs, roofline, topology
from dpojax.training.chips import CHIPS


def of_chips(chips: topology.Topology, compiled: compiling.Compiled) -> str:
  """Returns the table of a step compiled for chips that are not there."""
  count, rates, costs = len(chips.devices), CHIPS[chips.chip], compiled.costs
  bounds = roofline.roofline(compiled.step, compiled.needs, costs, chips)
  gib = lambda value: f"{value / 2**30:10.3f} GiB"
  lines = [
    needs.report(compiled.needs, devices=count, compiled_for=chips.name),
    f"  of            {gib(rates.memory)}",
    "collectives of a step, received by each device" + ("" if costs.collectives else ": none"),
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
