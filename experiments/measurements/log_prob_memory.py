"""Peak memory of the log-prob primitive against the naive form, from the compiled programs.

python -m experiments.measurements.log_prob_memory
"""

import jax
import jax.numpy as jnp

from dpojax import log_probs
from dpojax.kernels import distributions


def naive(hidden, head, target):
  """All logits at once, as most trainers compute it."""
  logits = jnp.einsum("sd,vd->sv", hidden, head).astype(jnp.float32)
  return jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=-1)[:, 0]


def peak_bytes(form: str, *, tokens: int, vocab: int, width: int, chunk_size: int | None = None) -> int:
  """Returns the bytes of temporaries of the compiled value and gradient, for hidden and head.

  Args:
    form: 'naive', 'chunked', or 'kl', the KL from a reference of the same width.
    tokens: S, scored tokens.
    vocab: V.
    width: D.
    chunk_size: of the chunked form; None is its default.
  """
  score = {
    "naive": naive,
    "chunked": lambda hidden, head, target: log_probs.token_log_probs(
      hidden, head, target, chunk_size=chunk_size
    ),
    "kl": lambda hidden, head, target: distributions.token_kl_from(
      hidden, head, 2 * hidden, head, chunk_size=chunk_size
    ),
  }[form]
  value_and_grad = jax.value_and_grad(lambda *args: score(*args).sum(), argnums=(0, 1))
  shapes = (
    jax.ShapeDtypeStruct((tokens, width), jnp.float32),
    jax.ShapeDtypeStruct((vocab, width), jnp.float32),
    jax.ShapeDtypeStruct((tokens,), jnp.int32),
  )
  analysis = jax.jit(value_and_grad).lower(*shapes).compile().memory_analysis()
  return analysis.temp_size_in_bytes


def main():
  tokens, width = 4096, 768
  print(
    f"S = {tokens} scored tokens, D = {width}, float32, value and gradients, "
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n"
  )
  print("| V | naive, MiB | chunked, MiB | ratio | logits alone, MiB |")
  print("|---|---|---|---|---|")
  for vocab in (50_257, 128_256):
    plain, chunked = (
      peak_bytes(form, tokens=tokens, vocab=vocab, width=width) / 2**20 for form in ("naive", "chunked")
    )
    print(
      f"| {vocab:,} | {plain:,.0f} | {chunked:,.0f} | {plain / chunked:.1f} "
      f"| {tokens * vocab * 4 / 2**20:,.0f} |"
    )


if __name__ == "__main__":
  main()
