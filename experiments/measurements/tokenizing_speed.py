"""Times the tokenization of conversations beside `datasets.map`: same tokenizer, template, records and run.

python -m experiments.measurements.tokenizing_speed --records=100000 --processes=2 --tokenizer=FOLDER

Records are pairs of made-up conversations of one to three turns. Both sides render prompt, chosen and
rejected with the tokenizer's chat template and make ids of them. `datasets` (pip install datasets) is timed
as its users write it: a function of one record for `map(num_proc=N)`, the cache off. Both must give as many
tokens.
Each is timed `--repeats` times, one after the other in turn, start of the processes included.
"""

import argparse
import time
from typing import Any

import numpy as np

from dpojax.data import tokenization
from dpojax.data.examples import Example
from dpojax.data.truncation import Truncation

_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_WORDS = (
  "the a spider has eight legs and which sea is salt who bakes bread in the morning before light of day "
  "answers questions about weather towns rivers prime numbers colours music history"
).split()


class Memory(list):
  """Comparisons that were never on disk."""

  fingerprint = "made up"


def records(count: int, seed: int = 0) -> list[dict]:
  """Returns pairs of conversations of about 250 words."""
  rng = np.random.default_rng(seed)
  text = lambda low, high: " ".join(rng.choice(_WORDS, size=rng.integers(low, high)))
  made = []
  for _ in range(count):
    prompt = []
    for _ in range(rng.integers(0, 3)):
      prompt += [{"role": "user", "content": text(5, 60)}, {"role": "assistant", "content": text(20, 100)}]
    prompt.append({"role": "user", "content": text(5, 60)})
    chosen, rejected = ([{"role": "assistant", "content": text(20, 100)}] for _ in range(2))
    made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
  return made


def chat_tokenizer(folder: str) -> Any:
  """Returns the folder's tokenizer with ChatML."""
  tokenizer = tokenization.load_tokenizer(folder)
  tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
  tokenizer.chat_template = _TEMPLATE
  return tokenizer


def ours(made: list[dict], tokenizer: Any, processes: int) -> tuple[float, int]:
  """Returns seconds and tokens of `tokenization.tokenize`."""
  data = Memory(Example(each["prompt"], (each["chosen"], each["rejected"])) for each in made)
  start = time.perf_counter()
  result = tokenization.tokenize(
    data,
    tokenizer,
    truncation=Truncation(100_000, 50_000, "end"),
    num_responses=2,
    workers=processes if processes > 1 else 0,
  )
  return time.perf_counter() - start, int(result.lengths.sum())


def theirs(made: list[dict], tokenizer: Any, processes: int) -> tuple[float, int]:
  """Returns seconds and tokens of `datasets.map` over the same records."""
  import datasets

  datasets.disable_progress_bars()
  data = datasets.Dataset.from_list(made)

  def tokenize(record: dict) -> dict:
    render = lambda messages, **more: tokenizer.apply_chat_template(messages, return_dict=False, **more)
    prompt = render(record["prompt"], add_generation_prompt=True)
    # What follows the end of a turn, a newline, is left out as dpojax leaves it out.
    sides = [render([*record["prompt"], *record[key]])[len(prompt) : -1] for key in ("chosen", "rejected")]
    return {"prompt_ids": prompt, "chosen_ids": sides[0], "rejected_ids": sides[1]}

  start = time.perf_counter()
  mapped = data.map(
    tokenize, num_proc=processes, remove_columns=data.column_names, load_from_cache_file=False
  )
  seconds = time.perf_counter() - start
  return seconds, sum(len(each) for key in mapped.column_names for each in mapped[key])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=100_000)
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument("--tokenizer", required=True, help="a folder; its own template is not used")
  options = parser.parse_args()
  tokenizer, made = chat_tokenizer(options.tokenizer), records(options.records)
  for repeat in range(options.repeats):
    sides = {}
    for measure in (ours, theirs)[:: 1 if repeat % 2 == 0 else -1]:
      sides[measure] = measure(made, tokenizer, options.processes)
    (one, tokens), (other, same) = sides[ours], sides[theirs]
    if tokens != same:
      raise SystemExit(f"error: {tokens} tokens here and {same} there")
    print(
      f"{len(made)} records, {tokens} tokens, {options.processes} processes: dpojax {one:.1f} s, "
      f"datasets.map {other:.1f} s, ratio {other / one:.2f}",
      flush=True,
    )


if __name__ == "__main__":
  main()
