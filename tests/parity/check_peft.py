"""Holds adapters that dpojax writes to PEFT live, and adapters that PEFT writes to dpojax.

python -m tests.parity.check_peft

For every family of the model vectors: a random adapter on all projections, and one on a few, give
in PEFT the logits they give here; and an adapter that PEFT has drawn is read as the model it is.
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np
import peft as theirs
import torch
import transformers

from dpojax.data import packing
from dpojax.kernels.head import logits_of
from dpojax.models import hf, lora, peft
from tests.parity import models
from tests.parity.make_model_vectors import model_of

LENGTH = 24
SPECS = {"all": lora.Lora(3, 5.0), "some": lora.Lora(4, 16.0, ("query", "value", "down"))}


def rows_of(tokens):
  """One comparison a row, the whole of it its prompt."""
  count, length = tokens.shape
  one = np.ones_like(tokens)
  nothing = np.zeros((count, 1), np.int32)
  return packing.Rows(
    tokens=tokens,
    positions=np.tile(np.arange(length, dtype=np.int32), (count, 1)),
    comparison=one,
    branch=0 * one,
    source=nothing,
    target=nothing,
    slot=nothing,
    example=nothing,
  )


def adapter_of(config, spec):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: lora.init_adapter(config, spec, jax.random.key(0)))
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


def logits_here(config, params, spec, tokens):
  outputs = lora.make_apply(config, spec)(params, rows_of(tokens))
  return np.asarray(logits_of(outputs.hidden, outputs.head))


def logits_there(model, tokens):
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()


def load(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def check(case, scratch):
  """Yields what was compared, how far it is apart, and how far the adapter moves the logits."""
  tokens = np.random.default_rng(1).integers(models.VOCAB, size=(2, LENGTH)).astype(np.int32)
  model, _ = model_of(case)
  model.save_pretrained(scratch / "base")
  config, base = hf.load(scratch / "base")
  alone = logits_here(config, base, SPECS["all"], tokens)
  for name, spec in SPECS.items():
    adapter = adapter_of(config, spec)
    peft.save(scratch / name, config, adapter, spec, base=str(scratch / "base"))
    here = logits_here(config, lora.Adapted(base, adapter), spec, tokens)
    with_adapter = theirs.PeftModel.from_pretrained(load(scratch / "base"), scratch / name).eval()
    loaded = theirs.get_peft_model_state_dict(with_adapter)
    written = len(hf.peft.read(scratch / name)[1])
    assert len(loaded) == 2 * written, f"{case}: PEFT has {len(loaded)} tensors of {2 * written}"
    apart = np.abs(here - logits_there(with_adapter, tokens)).max()
    yield f"{name} projections in PEFT", apart, np.abs(here - alone).max()
    whole = hf.load(scratch / name)
    merged = logits_here(whole.config, whole.params, spec, tokens)
    yield f"{name} projections read again", np.abs(here - merged).max(), np.abs(here - alone).max()

  torch.manual_seed(0)
  drawn = theirs.get_peft_model(
    load(scratch / "base"),
    theirs.LoraConfig(
      r=2,
      lora_alpha=6,
      target_modules="all-linear",
      use_rslora=True,
      init_lora_weights=False,
      task_type="CAUSAL_LM",
    ),
  )
  drawn.peft_config["default"].base_model_name_or_path = str(scratch / "base")
  drawn.save_pretrained(scratch / "drawn")
  whole = hf.load(scratch / "drawn")
  merged = logits_here(whole.config, whole.params, SPECS["all"], tokens)
  want = logits_there(drawn.eval(), tokens)
  yield "an adapter of PEFT's here", np.abs(merged - want).max(), np.abs(want - alone).max()


def main():
  jax.config.update("jax_platforms", "cpu")
  transformers.utils.logging.disable_progress_bar()
  wrong = []
  for case in models.CASES:
    with tempfile.TemporaryDirectory() as scratch:
      for what, apart, moved in check(case, pathlib.Path(scratch)):
        print(f"{case}: {what}: logits {apart:.1e} apart, moved by {moved:.2f}")
        if apart > 2e-4 * max(1.0, moved) or moved < 0.1:
          wrong.append(f"{case}: {what}")
  if wrong:
    sys.exit("\n".join(wrong))
  print(f"peft {theirs.__version__} and dpojax agree on {len(models.CASES)} models")


if __name__ == "__main__":
  main()
