"""Makes golden hidden states, logits and gradients of tiny models by running transformers on CPU.

python -m tests.parity.make_model_vectors           writes tests/parity/models.npz
python -m tests.parity.make_model_vectors --check   makes them again and fails if they have moved;
    then holds dpojax to transformers live: logits, exports and rotary frequencies
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpojax.kernels.head import logits_of
from dpojax.models import hf, rotary, transformer
from dpojax.models.families import read_config
from tests.parity import models

PUBLISHED = pathlib.Path(__file__).parents[1] / "published_models.json"


def model_of(name, **changes):
  """The model of a case with its weights by formula, and their names and shapes."""
  values = models.CASES[name] | changes
  values.pop("architectures")
  config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  parameters = dict(model.named_parameters())  # tied ones once
  with torch.no_grad():
    for key, parameter in parameters.items():
      parameter.copy_(torch.from_numpy(models.tensor(key, parameter.shape)))
  return model, parameters


def vectors_of(model, parameters):
  """Hidden states and logits of all tokens, sequence after sequence, and all gradients, flat."""
  hidden, logits, loss = [], [], 0.0
  for i, (ids, prompt) in enumerate(models.sequences()):
    tokens = torch.tensor([ids])
    hidden.append(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0])
    logits.append(model(input_ids=tokens, use_cache=False).logits[0])
    positions = torch.arange(prompt, len(ids))
    log_probs = torch.log_softmax(logits[-1], -1)[positions - 1, tokens[0, positions]]
    loss = loss + (torch.tensor(models.weight(i, positions.numpy())) * log_probs).sum()
  grads = torch.autograd.grad(loss, list(parameters.values()))
  return {
    "hidden": torch.cat(hidden).detach().numpy(),
    "logits": torch.cat(logits).detach().numpy(),
    "grads": torch.cat([grad.reshape(-1) for grad in grads]).float().numpy(),
  }


def make():
  """All cases' vectors, and what is to be known of them."""
  about = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "tensors": {}}
  cases = {}
  for name in models.CASES:
    model, parameters = model_of(name)
    about["tensors"][name] = {key: list(value.shape) for key, value in parameters.items()}
    cases[name] = vectors_of(model, parameters)
  return about, cases


def wrong_exports(scratch):
  """Models that transformers reads otherwise after an import and an export, or dpojax from it.

  Each is saved by transformers, read and written by dpojax, and read by transformers again.
  """
  wrong = []
  tokens = np.random.default_rng(0).integers(models.VOCAB, size=(2, 24))
  for name in models.CASES:
    model, _ = model_of(name)
    folder = scratch / name
    model.save_pretrained(folder / "theirs")
    config, params = hf.load(folder / "theirs")
    hf.save(folder / "ours", config, params)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder / "ours", attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
      want = model(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
      got = again(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    state, other = model.state_dict(), again.state_dict()
    if (
      any(len(names) for names in report.values())
      or state.keys() != other.keys()
      or any(not torch.equal(state[key], other[key]) for key in state)
      or not np.array_equal(want, got)
    ):
      wrong.append(f"{name}: transformers reads the export otherwise, {report}")
    position = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    one = jnp.ones_like(position)
    hidden = transformer.Transformer(config).apply(
      {"params": params}, jnp.asarray(tokens), position, one, 0 * one
    )
    apart = np.abs(logits_of(hidden, transformer.make_head(config, params)) - want).max()
    print(f"{name}: live logits are {apart:.1e} apart")
    if apart > 1e-4:
      wrong.append(f"{name}: logits are {apart:.1e} apart")
  return wrong


def wrong_frequencies():
  """Published models, and stretchings of them, whose rotary frequencies are not transformers'."""
  wrong = []
  for name, entry in json.loads(PUBLISHED.read_text()).items():
    values = dict(entry["config"])
    if values["model_type"] not in ("llama", "qwen2", "qwen3"):
      continue
    longest = values["max_position_embeddings"]
    for scaling in (
      values.get("rope_scaling"),
      {"rope_type": "linear", "factor": 4.0},
      {"rope_type": "dynamic", "factor": 4.0},
      {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": longest},
      {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "attention_factor": 1.5,
      },
    ):
      if scaling is None:
        continue
      changed = {key: value for key, value in values.items() if key != "architectures"} | {
        "rope_scaling": dict(scaling)
      }
      ours = read_config(changed)
      theirs = transformers.AutoConfig.for_model(changed.pop("model_type"), **changed)
      want, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
      got = rotary.frequencies(ours.head_size, ours.rope_theta, ours.rope_scaling)
      if not (
        np.allclose(got, want.numpy(), rtol=1e-5, atol=0)
        and np.isclose(ours.rope_scaling.magnitude, magnitude)
      ):
        wrong.append(f"{name} with {scaling}: {np.abs(got / want.numpy() - 1).max():.1e} apart")
  return wrong


def moved(old, new):
  """Names of the arrays of `new` that are not those of `old`, but for what other CPUs round otherwise."""
  rounding = lambda array: 2e-5 * max(0.5, np.abs(array).max())
  if old.keys() != new.keys():
    return [f"the cases: {sorted(old.keys() ^ new.keys())}"]
  return [
    f"{case}/{key}"
    for case in new
    for key in new[case]
    if not np.allclose(old[case][key], new[case][key], rtol=1e-4, atol=rounding(old[case][key]))
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="compare with the stored vectors")
  about, cases = make()
  if not parser.parse_args().check:
    flat = {f"{case}/{key}": array for case, arrays in cases.items() for key, array in arrays.items()}
    np.savez_compressed(models.VECTORS, about=json.dumps(about), **flat)
    return print(f"{len(cases)} models in {models.VECTORS}, {models.VECTORS.stat().st_size} bytes")
  stored, old = models.load_vectors()
  changes = moved(old, cases)
  if changes:
    sys.exit(
      f"moved since transformers {stored['transformers']}, now {about['transformers']}:\n"
      + "\n".join(changes)
    )
  print(f"{len(cases)} models have not moved: transformers {about['transformers']}, torch {about['torch']}")
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory() as scratch:
    wrong = wrong_exports(pathlib.Path(scratch)) + wrong_frequencies()
  if wrong:
    sys.exit("\n".join(wrong))
  print("transformers reads every export as the model it was")


if __name__ == "__main__":
  main()
