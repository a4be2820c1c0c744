"""Makes golden losses and gradients by running TRL's own loss code on CPU; imports no jax.

python -m tests.parity.make_vectors           writes tests/parity/vectors.json
python -m tests.parity.make_vectors --check   makes them again and fails if they have moved, or if
                                              TRL has a loss without a case

TRL's trainers get a stand-in model whose outputs are the token log-probs below, so what runs is
their `_compute_loss`, `cpo_loss` and `odds_ratio_loss` as installed. Everything is float64 but
where TRL itself goes to float32: then the case says so.
"""

import argparse
import collections
import inspect
import json
import pathlib
import re
import sys
import types

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

VECTORS = pathlib.Path(__file__).parent / "vectors.json"
BETAS = (0.05, 0.3, 1.0)
PAIRS, TOKENS = 6, 5
WHOLE_BATCH = ("aot", "aot_unpaired", "sft")  # their loss of a batch is no mean of losses of pairs
FLOAT32_IN_TRL = {"orpo", "alpha_divergence"}

DPO_CASES = [
  *(
    (name, {})
    for name in (
      "sigmoid",
      "sigmoid_norm",
      "hinge",
      "ipo",
      "nca_pair",
      "bco_pair",
      "sppo_hard",
      "apo_zero",
      "apo_down",
      "discopop",
      "aot",
      "aot_unpaired",
      "sft",
    )
  ),
  ("sigmoid", {"label_smoothing": 0.1}),
  *(("robust", {"label_smoothing": e}) for e in (0.1, 0.3)),
  *(("exo_pair", {"label_smoothing": e}) for e in (0.001, 0.2)),
  *((name, {"label_smoothing": 0.1}) for name in ("aot", "aot_unpaired")),
  ("discopop", {"discopop_tau": 0.5}),
  *(("sigmoid", {"f_divergence_type": name}) for name in ("forward_kl", "js_divergence")),
  *(("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a}) for a in (0.5, 0.7)),
  *((name, {"f_divergence_type": "js_divergence"}) for name in ("sigmoid_norm", "hinge", "ipo", "discopop")),
  *(
    (name, {"f_divergence_type": "js_divergence", "label_smoothing": 0.1}) for name in ("robust", "exo_pair")
  ),
  ("sigmoid", {"ld_alpha": 0.4}),
  ("sigmoid", {"use_weighting": True}),
]

CPO_CASES = [
  ("sigmoid", {}),
  ("sigmoid", {"label_smoothing": 0.1}),
  ("hinge", {}),
  ("ipo", {}),
  ("simpo", {"simpo_gamma": 0.5}),
  ("simpo", {"simpo_gamma": 0.5, "label_smoothing": 0.1}),
  ("simpo", {"simpo_gamma": 0.1, "alpha": 0.25}),
]

KTO_CASES = [
  ("kto", {}),
  ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.7}),
  ("kto", {"negative_kl": True}),
  ("apo_zero_unpaired", {}),
]


def draw_inputs():
  """Token log-probs [2, PAIRS, TOKENS] of policy and reference, chosen first, and their lengths.

  They are multiples of 1/64, so that float32 holds them and their sums exactly.
  """
  rng = np.random.default_rng(20231214)
  shape = (2, PAIRS, TOKENS)
  reference = -rng.integers(8, 200, size=shape) / 64
  policy = np.minimum(reference + rng.integers(-128, 129, size=shape) / 64, -1 / 64)
  lengths = rng.integers(1, TOKENS + 1, size=shape[:2])
  there = np.arange(TOKENS) < lengths[..., None]
  return {
    "policy": np.where(there, policy, 0.0),
    "reference": np.where(there, reference, 0.0),
    "log_sum_square_probs": np.where(there, -rng.integers(1, 100, size=shape) / 64, 0.0),
    "lengths": lengths,
  }


INPUTS = draw_inputs()
KL_LOG_RATIOS = np.array([1.5, -0.25, 0.5, 0.75])  # sums, of the samples KTO estimates its KL from


class StandIn(torch.nn.Module):
  """A model that looks its token log-probs up by the first id of a sequence."""

  is_gradient_checkpointing = False

  def __init__(self, log_probs, log_sum_square_probs=None):
    super().__init__()
    self.log_probs, self.log_sum_square_probs = log_probs, log_sum_square_probs

  def forward(self, input_ids, **_):
    log_probs = self.log_probs[input_ids[:, 0]]
    squares = self.log_sum_square_probs
    zeros = torch.zeros_like(log_probs)
    return types.SimpleNamespace(
      log_probs=log_probs,
      log_sum_sq_probs=None if squares is None else squares[input_ids[:, 0]],
      entropy=zeros,
      mean_logits=zeros,
      is_top1=zeros.bool(),
    )


def bare(trainer_class, **attributes):
  """A trainer without its `__init__`: the attributes its loss reads, and nothing that trains."""
  same = lambda x: x
  trainer = object.__new__(trainer_class)
  trainer.__dict__.update(
    dict(
      accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=same, gather=same),
      args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
      aux_loss_enabled=False,
      precompute_ref_logps=False,
      _total_train_tokens=0,
      _tp_size=1,
      _metrics={"train": collections.defaultdict(list)},
      label_smoothing=0.0,
    ),
    **attributes,
  )
  return trainer


def leaf(values, dtype):
  return torch.tensor(values, dtype=dtype)


def shifted(shift, lengths):
  """The policy's token log-probs, each response's sum raised by `shift`, spread over its tokens."""
  there = torch.arange(TOKENS) < lengths[..., None]
  return leaf(INPUTS["policy"], shift.dtype) + torch.where(there, (shift / lengths)[..., None], 0.0)


def dpo_losses(name, options, beta, dtype):
  """Losses [PAIRS] of `DPOTrainer._compute_loss`, and the shifts they can be derived by."""
  lengths = torch.tensor(INPUTS["lengths"])
  shift = torch.zeros((2, PAIRS), dtype=dtype, requires_grad=True)
  mask = torch.arange(-1, TOKENS) < lengths[..., None]
  mask[..., 0] = False  # the prompt, one token
  flat = lambda x: x.reshape(2 * PAIRS, -1)
  policy = StandIn(flat(shifted(shift, lengths)), flat(leaf(INPUTS["log_sum_square_probs"], dtype)))
  settings = (
    dict(
      loss_types=[name],
      loss_weights=[1.0],
      beta=beta,
      ld_alpha=None,
      use_weighting=False,
      f_divergence_type="reverse_kl",
      f_alpha_divergence_coef=0.5,
    )
    | options
  )
  reference = StandIn(flat(leaf(INPUTS["reference"], dtype)))
  trainer = bare(DPOTrainer, model=policy, ref_model=reference, **settings)
  trainer.args.discopop_tau = options.get("discopop_tau", 0.05)

  def loss_of(pairs):
    rows = torch.cat([pairs, pairs + PAIRS])
    batch = {
      "input_ids": rows[:, None].expand(-1, TOKENS + 1),
      "attention_mask": torch.ones(len(rows)),
      "completion_mask": flat(mask)[rows],
    }
    return trainer._compute_loss(policy, batch, False)

  if name in WHOLE_BATCH:
    return loss_of(torch.arange(PAIRS)), shift
  return torch.stack([loss_of(torch.tensor([i])) for i in range(PAIRS)]), shift


def cpo_losses(name, options, beta, dtype):
  """Losses [PAIRS] of `CPOTrainer.cpo_loss`; ipo and simpo get means, as its forward pass does."""
  lengths = torch.tensor(INPUTS["lengths"])
  shift = torch.zeros((2, PAIRS), dtype=dtype, requires_grad=True)
  sums = shifted(shift, lengths).sum(-1)
  scores = sums / lengths if name in ("ipo", "simpo") else sums
  trainer = bare(CPOTrainer, **dict(loss_type=name, beta=beta, alpha=0.0) | options)
  return trainer.cpo_loss(*scores)[0], shift


def orpo_losses(name, options, beta, dtype):
  """ORPO's odds-ratio term [PAIRS]; the NLL term is over prompt and response and not here."""
  lengths = torch.tensor(INPUTS["lengths"])
  shift = torch.zeros((2, PAIRS), dtype=dtype, requires_grad=True)
  means = shifted(shift, lengths).sum(-1) / lengths
  return -bare(ORPOTrainer, beta=beta).odds_ratio_loss(*means)[0], shift


def kto_losses(name, options, beta, dtype):
  """Losses [2, PAIRS] of `KTOTrainer._compute_loss`, chosen responses desirable, one at a time."""
  options = dict(options)
  ratios = -KL_LOG_RATIOS if options.pop("negative_kl", False) else KL_LOG_RATIOS
  lengths = torch.tensor(INPUTS["lengths"])
  shift = torch.zeros((2, PAIRS), dtype=dtype, requires_grad=True)
  spread = leaf(np.repeat(ratios[:, None] / TOKENS, TOKENS, axis=1), dtype)
  flat = lambda x: x.reshape(2 * PAIRS, TOKENS)
  policy = StandIn(torch.cat([flat(shifted(shift, lengths)), spread]))
  reference = StandIn(torch.cat([flat(leaf(INPUTS["reference"], dtype)), torch.zeros_like(spread)]))
  trainer = bare(
    KTOTrainer,
    model=policy,
    ref_model=reference,
    loss_type=name,
    beta=beta,
    calculate_KL=name == "kto",
    **dict(desirable_weight=1.0, undesirable_weight=1.0) | options,
  )
  ids = lambda rows: rows[:, None].expand(-1, TOKENS + 1)
  samples = ids(2 * PAIRS + torch.arange(len(ratios)))

  def loss_of(i):
    row = ids(torch.tensor([i]))
    return trainer._compute_loss(
      policy,
      {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "completion_mask": torch.ones_like(row),
        "label": torch.tensor([i < PAIRS]),
        "KL_input_ids": samples,
        "KL_attention_mask": torch.ones_like(samples),
        "KL_completion_mask": torch.ones_like(samples),
      },
      False,
    )

  return torch.stack([loss_of(i) for i in range(2 * PAIRS)]).reshape(2, PAIRS), shift


def without_a_case(cases):
  """Names of losses in the installed trainers' source that no case has, as a new release may bring."""
  sources = {"dpo": DPOTrainer._compute_loss, "cpo": CPOTrainer.cpo_loss, "kto": KTOTrainer._compute_loss}
  there = {
    (trainer, name)
    for trainer, function in sources.items()
    for name in re.findall(r'loss_type == "(\w+)"', inspect.getsource(function))
  }
  assert len(there) > 15, "trl no longer chooses losses by loss_type == name"
  return [
    f"{trainer}/{name} has no case"
    for trainer, name in sorted(there - {(c["trainer"], c["name"]) for c in cases})
  ]


def make():
  """All cases: trainer, name, options and beta, with losses and gradients by each response's sum."""
  plan = [
    *(("dpo", dpo_losses, *case) for case in DPO_CASES),
    *(("cpo", cpo_losses, *case) for case in CPO_CASES),
    ("orpo", orpo_losses, "orpo", {}),
    *(("kto", kto_losses, *case) for case in KTO_CASES),
  ]
  cases = []
  for trainer, losses_of, name, options in plan:
    for beta in BETAS[:1] if name == "sft" else BETAS:
      single = bool(FLOAT32_IN_TRL & {name, options.get("f_divergence_type")})
      losses, shift = losses_of(name, options, beta, torch.float32 if single else torch.float64)
      (grads,) = torch.autograd.grad(losses.sum(), shift)
      cases.append(
        {
          "trainer": trainer,
          "name": name,
          "options": options,
          "beta": beta,
          "float32": single,
          "losses": losses.tolist(),
          "grads": grads.tolist(),
        }
      )
  return cases


def dump(cases):
  lists = {name: values.tolist() for name, values in INPUTS.items()}
  head = {
    "trl": trl.__version__,
    "torch": torch.__version__.split("+")[0],
    "kl_log_ratios": KL_LOG_RATIOS.tolist(),
    **lists,
  }
  lines = ",\n".join(json.dumps(case) for case in cases)
  return json.dumps(head)[:-1] + ',\n"cases": [\n' + lines + "\n]}\n"


def moved(old, new):
  """Names of the cases of `new` that are not those of `old`, or not their numbers."""
  if len(old) != len(new):
    return [f"{len(old)} cases were {len(new)}"]

  def same(a, b):
    keys = ("trainer", "name", "options", "beta")
    tolerance = dict(rtol=1e-5, atol=1e-6) if a["float32"] else dict(rtol=1e-9, atol=1e-12)
    return [a[k] for k in keys] == [b[k] for k in keys] and all(
      np.allclose(a[k], b[k], **tolerance) for k in ("losses", "grads")
    )

  return [
    f"{a['trainer']}/{a['name']} {a['options']} beta={a['beta']}" for a, b in zip(old, new) if not same(a, b)
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="compare with the stored vectors")
  new = make()
  if not parser.parse_args().check:
    VECTORS.write_text(dump(new))
    return print(f"{len(new)} cases in {VECTORS}")
  stored = json.loads(VECTORS.read_text())
  changes = moved(stored["cases"], new) + without_a_case(new)
  if any(not np.array_equal(stored[name], values) for name, values in INPUTS.items()):
    changes.append("the inputs")
  if changes:
    sys.exit(f"moved since trl {stored['trl']}, now {trl.__version__}:\n" + "\n".join(changes))
  print(f"{len(new)} cases have not moved: trl {trl.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
  main()
