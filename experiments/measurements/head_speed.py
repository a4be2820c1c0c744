"""Time of the log-prob primitive against the logits it holds at once.

python -m experiments.measurements.head_speed [--cores=1] [--repeats=9]

Values and gradients, for hidden states and head, with GPT-2's vocabulary. On CPUs of one row's 420 scored
tokens among 512, in float32; on accelerators of 8,192 tokens, 6,720 of them scored, in bfloat16 with a
float32 head. All forms in turns, so that what else the machine does hits each.
"""

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import log_probs
from dpojax.kernels import head as head_lib
from dpojax.kernels import head_on_cpu
from dpojax.runtime.command import settle

VOCABULARY = 50_257
TOKENS, LARGE = 512, 8192
FORMS = (
  (head_on_cpu.CPU_TOKENS, head_on_cpu.CPU_BLOCK),
  (256, 1920),
  (256, 2048),
  (256, 3200),
  (256, 4224),
  (128, 2432),
  (384, 2432),
)
"""Tokens and vocabulary of the logits held at once on CPUs."""

ELEMENTS = tuple((2**n // VOCABULARY, VOCABULARY) for n in (24, 26, 27))
"""The same on accelerators, where the vocabulary is not cut."""


def compiled(form: tuple[int, int], *arguments: jax.Array):
  """Returns the value and gradients with logits of that form, compiled."""

  def total(hidden, head, target):
    scored = jnp.arange(target.size) < target.size * 420 // 512
    return log_probs.token_log_probs(hidden, head, target, where=scored).sum()

  before = head_on_cpu.CPU_TOKENS, head_on_cpu.CPU_BLOCK, head_lib.ACCELERATOR_CHUNK_ELEMENTS
  head_on_cpu.CPU_TOKENS, head_on_cpu.CPU_BLOCK = form
  head_lib.ACCELERATOR_CHUNK_ELEMENTS = form[0] * form[1]
  program = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arguments).compile()
  head_on_cpu.CPU_TOKENS, head_on_cpu.CPU_BLOCK, head_lib.ACCELERATOR_CHUNK_ELEMENTS = before
  return program


def seconds(program, *arguments: jax.Array) -> float:
  start = time.perf_counter()
  jax.block_until_ready(program(*arguments))
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cores", type=int, default=1)
  parser.add_argument("--repeats", type=int, default=9)
  options = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before jax counts them
  settle()
  rng, on_cpu = np.random.default_rng(0), jax.default_backend() == "cpu"
  forms, tokens, dtype = (FORMS, TOKENS, "float32") if on_cpu else (ELEMENTS, LARGE, "bfloat16")
  print("| width, ms | " + " | ".join(f"{count} x {block:,}" for count, block in forms) + " |")
  print("|---" * (len(forms) + 1) + "|")
  for width in (256, 768) if on_cpu else (2048,):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * width**-0.5, jnp.float32)
    arguments = (
      draw(tokens, width).astype(dtype),
      draw(VOCABULARY, width),
      jnp.asarray(rng.integers(VOCABULARY, size=tokens), jnp.int32),
    )
    programs = [compiled(form, *arguments) for form in forms]
    times = [[seconds(program, *arguments) for program in programs] for _ in range(options.repeats + 1)]
    medians = [statistics.median(each) for each in zip(*times[1:])]
    print(f"| {width} | " + " | ".join(f"{1000 * each:.3g}" for each in medians) + " |", flush=True)


if __name__ == "__main__":
  main()
