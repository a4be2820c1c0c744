"""A plain PyTorch DPO step: one concatenated, padded forward a part, full logits, AdamW.

python -m experiments.benchmark.torch_side SETTINGS OUT
"""

import json
import sys

import torch
import transformers

from experiments.benchmark import measure


def tokenized(settings: dict) -> list[tuple[list[int], list[int], list[int]]]:
  """Returns prompt, chosen and rejected ids of each pair, cut as dpojax cuts them."""
  with open(settings["ids"]) as lines:
    return [json.loads(line) for line in lines]


def log_probs(model, part, device):
  """Summed log-probs of the responses of a part: all chosen, then all rejected."""
  sequences = [prompt + chosen for prompt, chosen, _ in part]
  sequences += [prompt + rejected for prompt, _, rejected in part]
  starts = [len(prompt) for prompt, *_ in part] * 2
  longest = max(map(len, sequences))
  ids = torch.tensor([each + [0] * (longest - len(each)) for each in sequences], device=device)
  place = torch.arange(longest, device=device)
  length = torch.tensor([len(each) for each in sequences], device=device)[:, None]
  scored = (place >= torch.tensor(starts, device=device)[:, None]) & (place < length)
  logits = model(input_ids=ids, attention_mask=(place < length).long()).logits[:, :-1]
  values = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
  return (values * scored[:, 1:]).sum(-1)


def run(settings: dict) -> dict:
  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cpu":
    torch.set_num_threads(settings["threads"])
  dtype = torch.bfloat16 if settings["dtype"] == "bfloat16" else torch.float32
  load = lambda: transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).to(device)
  policy, reference = load(), load().requires_grad_(False)
  optimizer = torch.optim.AdamW(policy.parameters(), lr=settings["learning_rate"], weight_decay=0.0)
  pairs, batch, micro = tokenized(settings), settings["batch_size"], settings["micro"]
  seconds, losses = [], []
  for step in range(settings["steps"]):
    start, total = measure.now(), 0.0
    whole = pairs[step * batch : (step + 1) * batch]
    for at in range(0, batch, micro):
      part = whole[at : at + micro]
      with torch.no_grad():
        frozen = log_probs(reference, part, device)
      ratios = log_probs(policy, part, device) - frozen
      chosen, rejected = ratios.chunk(2)
      loss = -torch.nn.functional.logsigmoid(settings["beta"] * (chosen - rejected)).sum() / batch
      loss.backward()
      total += loss.item()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(measure.now() - start)
    losses.append(total)
  return {
    "seconds": seconds,
    "losses": losses,
    "peak_bytes": measure.peak_bytes(torch if device == "cuda" else None),
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
  }


if __name__ == "__main__":
  with open(sys.argv[1]) as given, open(sys.argv[2], "w") as out:
    json.dump(run(json.load(given)), out)
