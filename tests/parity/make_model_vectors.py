"""Makes golden hidden states, logits and gradients of tiny models by running transformers on CPU.

python -m tests.parity.make_model_vectors           writes tests/parity/models.npz
python -m tests.parity.make_model_vectors --check   makes them again and fails if they have moved;
    then imports and exports each model through dpojax, and fails if transformers reads it otherwise
"""

import argparse
import json
import sys
import tempfile

import numpy as np
import torch
import transformers

from tests.parity import models


def model_of(name):
  """The model of a case with its weights by formula, and their names and shapes."""
  values = dict(models.CASES[name])
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
  return {"hidden": torch.cat(hidden).detach().numpy(), "logits": torch.cat(logits).detach().numpy(),
          "grads": torch.cat([grad.reshape(-1) for grad in grads]).float().numpy()}


def make():
  """All cases' vectors, and what is to be known of them."""
  about = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
           "tensors": {}}
  cases = {}
  for name in models.CASES:
    model, parameters = model_of(name)
    about["tensors"][name] = {key: list(value.shape) for key, value in parameters.items()}
    cases[name] = vectors_of(model, parameters)
  return about, cases


def moved(old, new):
  """Names of the arrays of `new` that are not those of `old`."""
  if old.keys() != new.keys():
    return [f"the cases: {sorted(old.keys() ^ new.keys())}"]
  return [f"{case}/{key}" for case in new for key in new[case]
          if not np.allclose(old[case][key], new[case][key], rtol=1e-4, atol=1e-5)]


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
    sys.exit(f"moved since transformers {stored['transformers']}, now {about['transformers']}:\n"
             + "\n".join(changes))
  print(f"{len(cases)} models have not moved: transformers {about['transformers']}, "
        f"torch {about['torch']}")


if __name__ == "__main__":
  main()
