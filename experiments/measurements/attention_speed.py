"""Milliseconds and TFLOP/s of the forms of attention on packed rows, side by side.

python -m experiments.measurements.attention_speed [--repeats=20] [--check]

Each form first has to give the numbers of the dense one; then all take turns. TFLOP/s count visible
pairs of tokens only: forward two products of a head's size, backward five more. On NVIDIA GPUs cuDNN's
kernel on plain causal rows stands beside them, as what is to be reached. --check only compares, on toy
rows; where there is no accelerator it interprets the fused form.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data import packing
from dpojax.kernels.attention import TokenIds, attention, visible
from dpojax.kernels.blockwise import blockwise_attention
from dpojax.kernels.fused import PLATFORMS, fused_attention
from dpojax.runtime import xla
from experiments.measurements import planning

DENSE_BYTES = 2**34
"""Scores that the dense form may hold; where it would hold more it is left out."""


class Case(NamedTuple):
  """Rows of comparisons, and the heads that attend in them: [R, L] ids, N, M and H."""

  name: str
  ids: TokenIds
  heads: int
  key_heads: int
  head_size: int

  @property
  def pairs(self) -> int:
    """How many keys all queries see together."""
    seen = lambda row: np.sum(visible(row, row) & (row.comparison > 0)[..., None])
    rows = range(len(self.ids.comparison))
    return sum(int(seen(jax.tree.map(lambda x: x[r], self.ids))) for r in rows)


def pack(lengths: np.ndarray, rows: int, row_length: int) -> TokenIds:
  """Returns the ids of the first rows [R, L] that comparisons of such lengths [n, 3] are packed into."""
  plan = packing.plan_in_order(lengths, len(lengths), row_length)
  blank = lambda count: np.zeros(count, np.int32)
  packed = packing.fill(
    [(blank(prompt), [blank(n) for n in responses]) for prompt, *responses in lengths],
    plan.row[0],
    rows,
    plan.shape,
    num_responses=2,
    example=range(len(lengths)),
  )
  return TokenIds(packed.positions, packed.comparison, packed.branch)


def cases(toy: bool) -> list[Case]:
  """Returns rows as long as HH's comparisons make them, and rows of one comparison with long responses."""
  rows, row_length, heads = (2, 512, (4, 2, 64)) if toy else (8, 2048, (32, 8, 128))
  hh = planning.hh_like(rows * row_length // 100)
  prompt, response = row_length // 8, row_length * 7 // 8
  return [
    Case("HH-like, packed", pack(hh[hh.sum(1) <= row_length], rows, row_length), *heads),
    Case(
      "long responses",
      pack(np.array([[prompt, response // 2, response // 2]] * rows), rows, row_length),
      *heads,
    ),
    Case(
      "longer responses",
      pack(
        np.array([[prompt, 2 * response - prompt, 2 * response]] * (rows // 2)), rows // 2, 4 * row_length
      ),
      *heads,
    ),
  ]


def make_forms(case: Case) -> dict[str, Callable]:
  """Returns the forms of attention that can run here, over q, k, v and ids."""
  interpreted = partial(fused_attention, platform="gpu", interpret=True)
  forms = {
    "blockwise": blockwise_attention,
    "fused": fused_attention if jax.default_backend() in PLATFORMS else interpreted,
  }
  if 4 * case.heads * case.ids.comparison.size * case.ids.comparison.shape[1] <= DENSE_BYTES:
    forms["dense"] = lambda q, k, v, ids: attention(q, k, v, ids, ids)
  return forms


def causal(q: jax.Array, k: jax.Array, v: jax.Array, ids: TokenIds) -> jax.Array:
  """Returns cuDNN's attention of plain causal rows."""
  del ids
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def draw(case: Case, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
  """Returns random q, k and v, and a cotangent that is 0 for padding."""
  rng, (rows, length) = np.random.default_rng(0), case.ids.comparison.shape
  normal = lambda heads: jnp.asarray(rng.normal(size=(rows, length, heads, case.head_size)), dtype)
  q, k, v, cotangent = map(normal, (case.heads, case.key_heads, case.key_heads, case.heads))
  return q, k, v, jnp.where(_there(case), cotangent, 0)


def _there(case: Case) -> jax.Array:
  return jnp.asarray(case.ids.comparison > 0)[..., None, None]


def gradients(form: Callable) -> Callable:
  """Returns the gradients of a form for q, k and v, from these, ids and a cotangent."""
  return lambda q, k, v, ids, cotangent: jax.vjp(lambda *x: form(*x, ids), q, k, v)[1](cotangent)


def check(case: Case, dtype: jnp.dtype) -> dict[str, float]:
  """Returns how far each form's outputs and gradients are from the dense ones, of their largest.

  Without the dense form, from those in blocks.
  """
  *inputs, cotangent = draw(case, dtype)
  results = {
    name: (
      jnp.where(_there(case), jax.jit(form)(*inputs, case.ids), 0),
      *jax.jit(gradients(form))(*inputs, case.ids, cotangent),
    )
    for name, form in make_forms(case).items()
  }
  want = results.get("dense", results["blockwise"])
  wide = lambda x: np.asarray(x, np.float32)
  return {
    name: max(np.abs(wide(a) - wide(b)).max() / np.abs(wide(b)).max() for a, b in zip(got, want))
    for name, got in results.items()
  }


def seconds(run: Callable, arguments: tuple) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run(*arguments))
  return time.perf_counter() - start


def medians(runs: dict[str, Callable], arguments: tuple, repeats: int) -> dict[str, float]:
  """Returns the median seconds of each run, all of them in turns, after one that compiles."""
  runs = {name: jax.jit(run) for name, run in runs.items()}
  for run in runs.values():
    seconds(run, arguments)
  times = [[seconds(run, arguments) for run in runs.values()] for _ in range(repeats)]
  return dict(zip(runs, map(statistics.median, zip(*times))))


def report(case: Case, dtype: jnp.dtype, repeats: int) -> None:
  """Times the forms of a case and prints a line each."""
  forms = make_forms(case)
  if jax.default_backend() not in PLATFORMS:
    del forms["fused"]
  rows, length = case.ids.comparison.shape
  pairs = dict.fromkeys(forms, case.pairs)
  if jax.default_backend() == "gpu":
    forms["cudnn, causal"] = causal
    pairs["cudnn, causal"] = rows * length * (length + 1) // 2
  *inputs, cotangent = draw(case, dtype)
  ids = jax.tree.map(jnp.asarray, case.ids)
  forward = medians(forms, (*inputs, ids), repeats)
  both = medians({name: gradients(form) for name, form in forms.items()}, (*inputs, ids, cotangent), repeats)
  for name in forms:
    product = 2 * case.heads * case.head_size * pairs[name]
    print(
      f"| {case.name}, {rows} x {length:,} | {name} | {forward[name] * 1e3:.2f} | "
      f"{2 * product / forward[name] / 1e12:.3g} | {both[name] * 1e3:.2f} | "
      f"{7 * product / both[name] / 1e12:.3g} |",
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--check", action="store_true", help="only compare, on toy rows")
  options = parser.parse_args()
  xla.keep_sums_right()  # as every command of dpojax does
  accelerated = jax.default_backend() in PLATFORMS
  dtype = jnp.dtype(jnp.bfloat16 if accelerated else jnp.float32)
  for case in cases(toy=options.check or not accelerated):
    if options.check or accelerated:
      apart = check(case, dtype)
      print(f"{case.name}: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
      worst = max(apart.values())
      assert worst < (0.03 if accelerated else 1e-5), f"the forms differ by {worst:.1e} of the largest"
  if options.check:
    return
  print(
    f"\n{jax.devices()[0].device_kind}, {dtype.name}, medians of {options.repeats}, in turns; "
    f"jax {jax.__version__}\n"
  )
  print(
    "| rows | form | forward, ms | TFLOP/s | forward and backward, ms | TFLOP/s |\n|---|---|---|---|---|---|"
  )
  for case in cases(toy=not accelerated):
    report(case, dtype, options.repeats)


if __name__ == "__main__":
  main()
