"""Compiles the gradients of fused attention for chips that are not there, with their own compilers.

python -m experiments.measurements.attention_compile [--chips v4 v5e v5p v6e h100]

Needs libtpu (`pip install libtpu`) for TPUs, and for the H100 `pip install jax-cuda12-plugin
jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`, each of jax's version. A kernel that takes more vector memory
than a TPU has does not compile.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from dpojax.kernels.attention import TokenIds
from dpojax.kernels.fused import fused_attention
from dpojax.plan.topology import GPUS

CHIPS = {
  **{
    name: dict(platform="tpu", topology_name=f"{name}:{shape}")
    for name, shape in (("v4", "2x2x1"), ("v5e", "2x2"), ("v5p", "2x2x1"), ("v6e", "2x2"))
  },
  "h100": dict(platform="cuda", topology="1x1x1", target_config=GPUS["h100"]),
}

CASES = [  # R, L, N, M, H, dtype, form
  (8, 2048, 12, 12, 64, jnp.bfloat16, {}),
  (8, 2048, 32, 32, 80, jnp.bfloat16, {}),
  (8, 2048, 32, 8, 128, jnp.bfloat16, {}),
  (2, 8192, 8, 8, 128, jnp.bfloat16, {}),
  (8, 2048, 8, 4, 256, jnp.bfloat16, dict(window=1024, soft_cap=50.0)),
  (8, 2048, 12, 12, 64, jnp.float32, {}),
]


def compiled(chip: str, rows, length, heads, key_heads, head_size, dtype, form) -> jax.stages.Compiled:
  """Returns the gradients for q, k and v of the sum of the outputs, as the chip runs them."""
  device = topologies.get_topology_desc(**CHIPS[chip]).devices[0]
  shape = lambda dtype, *size: jax.ShapeDtypeStruct(
    (rows, length, *size), dtype, sharding=SingleDeviceSharding(device)
  )
  ids = TokenIds(*[shape(jnp.int32)] * 3)
  q, k = shape(dtype, heads, head_size), shape(dtype, key_heads, head_size)
  platform = "gpu" if chip == "h100" else "tpu"

  def gradients(q, k, v, ids):
    total = lambda *x: jnp.sum(fused_attention(*x, ids, platform=platform, **form), dtype=jnp.float32)
    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

  return jax.jit(gradients).trace(q, k, k, ids).lower(lowering_platforms=(CHIPS[chip]["platform"],)).compile()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks for the machine it is on
  print(
    f"jax {jax.__version__}\n\n| chip | rows | heads | numbers | temporaries, MiB | compiled in, s |\n"
    "|---|---|---|---|---|---|"
  )
  for chip in options.chips:
    for case in CASES:
      start = time.perf_counter()
      memory = compiled(chip, *case).memory_analysis()
      rows, length, heads, key_heads, head_size, dtype, form = case
      extra = "".join(f", {name} {value:g}" for name, value in form.items())
      print(
        f"| {chip} | {rows} x {length:,} | {heads} / {key_heads} of {head_size}{extra} "
        f"| {jnp.dtype(dtype).name} | {memory.temp_size_in_bytes / 2**20:,.0f} "
        f"| {time.perf_counter() - start:.1f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
