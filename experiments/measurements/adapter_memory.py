"""Peak memory of a DPO step: all params trained, and an adapter on a frozen base, as compiled.

python -m experiments.measurements.adapter_memory [MODEL ...]

No weights are needed: shapes are those of published models, and the step is compiled, never run.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from dpojax.data.packing import Rows
from dpojax.models import families, lora, transformer
from dpojax.training import objectives, preference
from dpojax.training import step as step_lib

MODELS = (
  "openai-community/gpt2-large",
  "meta-llama/Llama-3.2-1B",
  "EleutherAI/pythia-2.8b",
  "meta-llama/Llama-3.1-8B",
)
FORMS = {"all params": None, "adapter, rank 16": lora.Lora(16, 32.0)}

ROWS, LENGTH, SCORED, COMPARISONS = 1, 1024, 512, 4
PUBLISHED = pathlib.Path(__file__).parents[1] / "tests" / "published_models.json"


def rows() -> Rows:
  """Returns the shapes of one packed row."""
  shape = lambda *sizes: jax.ShapeDtypeStruct((ROWS, *sizes), jnp.int32)
  return Rows(*[shape(LENGTH)] * 4, *[shape(SCORED)] * 3, shape(COMPARISONS))


def step_bytes(config, adapter: lora.Lora | None, optimizer: str = "adamw") -> dict[str, int]:
  """Returns the bytes of a step's arguments, of its temporaries, and its peak.

  Args:
    config: the model's.
    adapter: what is trained; None is all params, beside a reference of the same size.
    optimizer: a name of `step.OPTIMIZERS`.
  """
  base = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  apply = lora.make_apply(config, adapter) if adapter else transformer.make_apply(config)
  objective = preference.preference_objective(apply, preference.make_terms(["dpo"]), beta=0.1)
  trained = base
  if adapter:
    objective = objectives.of_adapter(objective)
    trained = jax.eval_shape(lambda: lora.init_adapter(config, adapter, jax.random.key(0)))
  tx = step_lib.make_optimizer(optimizer, lambda step: 1e-5, max_grad_norm=1.0)
  state = jax.eval_shape(lambda params: step_lib.init_state(params, tx), trained)
  train_step = step_lib.make_train_step(objective, tx)
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  found = jax.jit(train_step, donate_argnums=0).lower(state, base, rows()).compile().memory_analysis()
  return {
    "trained params": size(state.params),
    "optimizer state": size(state.opt_state),
    "frozen params": size(base),
    "temporaries": found.temp_size_in_bytes,
    "peak": (
      found.argument_size_in_bytes
      + found.output_size_in_bytes
      - found.alias_size_in_bytes
      + found.temp_size_in_bytes
    ),
  }


def main(names):
  published = json.loads(PUBLISHED.read_text())
  print(
    f"DPO, {ROWS} row of {LENGTH} tokens, {SCORED} of them scored; AdamW, float32, remat=full; "
    f"compiled for {jax.devices()[0].device_kind}, jax {jax.__version__}; GiB\n"
  )
  print(
    "| model | trained | trained params | optimizer state | frozen params | temporaries "
    "| peak | all params / adapter |"
  )
  print("|---|---|---|---|---|---|---|---|")
  for name in names or MODELS:
    config = families.read_config(published[name]["config"])
    config = type(config)(**{**vars(config), "remat": "full"})
    peaks = []
    for form, adapter in FORMS.items():
      found = step_bytes(config, adapter)
      peaks.append(found["peak"])
      ratio = f"{peaks[0] / peaks[1]:.1f}" if adapter else ""
      print(
        f"| {name} | {form} | "
        + " | ".join(f"{value / 2**30:,.2f}" for value in found.values())
        + f" | {ratio} |",
        flush=True,
      )


if __name__ == "__main__":
  main(sys.argv[1:])
