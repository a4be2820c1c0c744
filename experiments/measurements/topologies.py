"""A DPO step of Llama 3 of 1B, 8B and 70B compiled for TPU pods that are not there, and what it reaches.

python -m experiments.measurements.topologies [--out=runs/topologies] [--models 1B 8B 70B]
    [--kinds full lora stored] [--topologies v5e:8x8 ...] [--by_compiler] [--table]

Needs libtpu (`pip install 'dpojax[plan]'`). A cell takes minutes to half an hour of one core; each is kept
in the folder as it is done, and the same command goes on with those that are not. --by_compiler compiles the
step as the compiler cuts it by itself, for comparison; --table prints what is there.

Each device computes one row of 4,096 tokens of comparisons of 300 tokens of prompt and 2 x 200 of responses
on average, weights are cut over all devices, and all is recomputed in the backward pass.
"""

import argparse
import json
import pathlib

import jax

from configs import llama3
from dpojax.plan import compiling, needs, roofline, topology
from dpojax.runtime.command import command, say
from dpojax.runtime.errors import ConfigError
from dpojax.training import parallel

PUBLISHED = pathlib.Path(__file__).parents[2] / "tests" / "published_models.json"
MODELS = {
  "30M": (
    "meta-llama/Llama-3.2-1B",
    {
      "hidden_size": 512,
      "num_hidden_layers": 4,
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
      "intermediate_size": 1376,
      "vocab_size": 32000,
      "tie_word_embeddings": False,
    },
  ),
  "1B": ("meta-llama/Llama-3.2-1B", {}),
  "8B": ("meta-llama/Llama-3.1-8B", {}),
  "70B": (
    "meta-llama/Llama-3.1-8B",
    {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
  ),
}
"""What their config.json says; that of 30M, which is none, and of 70B by what they differ in from others."""

KINDS = ("full", "lora", "stored")
TOPOLOGIES = ("v5e:8x8", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8", "v6e:8x8", "v6e:16x16")
LENGTHS, COMPARISONS = "300,200,200", 4


def config_of(model: str, kind: str, devices: int, folder: pathlib.Path):
  """Returns the config of a cell; the model's config.json is written into the folder."""
  name, changes = MODELS[model]
  where = folder / "models" / model
  where.mkdir(parents=True, exist_ok=True)
  published = json.loads(PUBLISHED.read_text())[name]["config"]
  (where / "config.json").write_text(json.dumps(published | changes))
  config = llama3.get_config("lora" if kind == "lora" else "full")
  config.model.checkpoint = config.tokenizer = str(where)
  config.data.path, config.data.cache_dir = "none", str(folder / "cache")
  config.parallel.fsdp = devices
  config.batch_size = COMPARISONS * devices
  if kind == "stored":
    config.reference.mode = "stored"
  return config


def measured(model: str, kind: str, name: str, folder: pathlib.Path) -> dict:
  """Returns what a cell shows."""
  chips = topology.described(name)
  count = len(chips.devices)
  config = config_of(model, kind, count, folder)
  lengths = needs.drawn_lengths(LENGTHS, config)
  try:
    found = compiling.compile_for(config, chips, lengths, say=say)
  except ConfigError as error:
    return {"error": str(error)}
  bounds = roofline.roofline(found.step, found.needs, found.costs, chips)
  return {
    "peak": found.needs.peak,
    "bytes": found.costs.bytes_by_kind(),
    "paper": needs.fsdp_bytes(found.step),
    "flops": found.costs.flops,
    "memory_bytes": found.costs.memory_bytes,
    "bounds": bounds._asdict(),
    "bound": bounds.bound,
    "seconds": found.seconds,
    "versions": chips.compiler,
  }


def table(cells: dict[str, dict]) -> str:
  """Returns the table of cells that are there."""
  lines = [
    "| model | trained | chips | program | peak, GiB | gathered | scattered | summed | other "
    "| x paper | products, s | memory, s | links, s | tokens/s a chip | MFU | compiled in, s |",
    "|" + "---|" * 16,
  ]
  for key, cell in sorted(cells.items()):
    model, kind, name, program = key.split(" ")
    if "error" in cell:
      lines.append(f"| {model} | {kind} | {name} | {program} | {cell['error'].split(';')[0]} |" + " |" * 11)
      continue
    gib = {each: value / 2**30 for each, value in cell["bytes"].items()}
    named = [gib.pop(each, 0.0) for each in ("all-gather", "reduce-scatter", "all-reduce")]
    bounds = cell["bounds"]
    numbers = [f"{value:.2f}" for value in (cell["peak"] / 2**30, *named, sum(gib.values()))]
    numbers.append(f"{sum(cell['bytes'].values()) / cell['paper']:.2f}")
    seconds = {each: f"{bounds[each]:.3f}" for each in ("products", "memory", "links")}
    seconds[cell["bound"]] = f"**{seconds[cell['bound']]}**"
    numbers += [
      *seconds.values(),
      f"{bounds['tokens']:,.0f}",
      f"{bounds['mfu']:.1%}",
      f"{cell['seconds']:.0f}",
    ]
    lines.append(f"| {model} | {kind} | {name} | {program} | " + " | ".join(numbers) + " |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/topologies"))
  parser.add_argument("--models", nargs="+", default=["1B", "8B", "70B"], choices=list(MODELS))
  parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
  parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
  parser.add_argument("--by_compiler", action="store_true")
  parser.add_argument("--table", action="store_true")
  options = parser.parse_args()
  parallel.simulate(1)
  if options.by_compiler:
    parallel.Mesh.over_rows = None
  kept = options.out / "cells.json"
  with command():
    cells = json.loads(kept.read_text()) if kept.exists() else {}
    for model in options.models if not options.table else ():
      for kind in options.kinds:
        for name in options.topologies:
          key = f"{model} {kind} {name} {'compiler' if options.by_compiler else 'explicit'}"
          if key in cells:
            continue
          say(key)
          cells[key] = measured(model, kind, name, options.out)
          kept.parent.mkdir(parents=True, exist_ok=True)
          kept.write_text(json.dumps(cells, indent=1))
          jax.clear_caches()
    print(table(cells))


if __name__ == "__main__":
  main()
