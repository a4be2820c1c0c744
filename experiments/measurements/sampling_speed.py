"""Tokens a second of dpojax.sample beside transformers.generate: same model, same machine, in turns.

python -m experiments.measurements.sampling_speed [--batches 1 16] [--repeats 5] [--cores 1]
    [--draws greedy 'temperature 1'] [--model=FOLDER]

A Llama-style model of 16M random parameters is written by transformers and read by both, or both read the one
in a folder. Every sample has all its tokens (no stop id), and each side is asked in turn, so that what else
the machine does hits both. Needs torch: `pip install -e '.[parity]'`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

from dpojax.models import hf, transformer
from dpojax.runtime.command import settle
from dpojax.sample import decoding
from dpojax.training import parallel

PROMPT, NEW = 64, 128

DRAWS = {
  "temperature 1": dict(temperature=1.0),
  "greedy": dict(temperature=0.0),
  "top-p 0.9": dict(temperature=1.0, top_p=0.9),
  "top-k 50": dict(temperature=1.0, top_k=50),
}


def make_model(folder: str) -> transformers.PreTrainedModel:
  """Returns a random model, written to a folder too."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=32000,
      hidden_size=256,
      num_hidden_layers=10,
      num_attention_heads=4,
      num_key_value_heads=4,
      intermediate_size=704,
      max_position_embeddings=1024,
      tie_word_embeddings=True,
    )
  ).eval()
  model.save_pretrained(folder)
  return model


def read_model(folder: str) -> transformers.PreTrainedModel:
  """Returns the model of a folder, in float32, without the ids that end its answers."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  model.generation_config.eos_token_id = None
  return model


def dpojax_side(folder: str, num_samples: int = 1) -> Callable:
  """Returns `generate(prompts, **draw)`, by what the commands sample with."""
  config, params = transformer.unrolled(*hf.load(folder))
  devices = parallel.Mesh()
  params = devices.place(params)
  sample = decoding.make_sampler(devices, config, max_new_tokens=NEW, num_samples=num_samples)

  def generate(prompts, temperature=1.0, top_p=1.0, top_k=0):
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    return np.asarray(sample(params, prompts, lengths, keys, temperature, top_p, top_k).tokens)

  return generate


def transformers_side(model: transformers.PreTrainedModel, num_samples: int = 1) -> Callable:
  """Returns `generate(prompts, **draw)` of the library."""

  @torch.inference_mode()
  def generate(prompts, temperature=1.0, top_p=1.0, top_k=0):
    ids = torch.from_numpy(prompts.astype(np.int64))
    draw = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    out = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=NEW,
      min_new_tokens=NEW,
      pad_token_id=0,
      num_return_sequences=num_samples,
      **(draw if temperature else dict(do_sample=False)),
    )
    return out[:, prompts.shape[1] :].numpy()

  return generate


def seconds(generate: Callable, prompts: np.ndarray, draw: dict) -> float:
  start = time.perf_counter()
  generate(prompts, **draw)
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--cores", type=int, default=1, help="that both sides may use")
  parser.add_argument("--draws", nargs="+", default=list(DRAWS), choices=DRAWS)
  parser.add_argument("--model", help="a Hugging Face folder")
  options = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before jax counts them
  settle()  # as every command of dpojax does; torch's buffers are kept too
  torch.set_num_threads(options.cores)
  transformers.utils.logging.disable_progress_bar()
  rng = np.random.default_rng(0)
  print(
    f"{options.model or '16M parameters'}, prompts of {PROMPT} tokens, {NEW} new ones; median of "
    f"{options.repeats} runs each, in turns, {options.cores} CPU core(s)\njax {jax.__version__}, torch "
    f"{torch.__version__}, transformers {transformers.__version__}\n"
  )
  print("| samples | draw | transformers, tokens/s | dpojax, tokens/s | ratio |\n|---|---|---|---|---|")
  with tempfile.TemporaryDirectory() as folder:
    model = read_model(options.model) if options.model else make_model(folder)
    cases = [(batch, 1, name) for batch in options.batches for name in options.draws]
    cases += [(1, 16, name) for name in options.draws if name == "temperature 1"]
    sides = {k: [transformers_side(model, k), dpojax_side(options.model or folder, k)] for k in (1, 16)}
    for batch, num_samples, name in cases:
      prompts = rng.integers(model.config.vocab_size, size=(batch, PROMPT)).astype(np.int32)
      draw = DRAWS[name]
      theirs, ours = (side(prompts, **draw) for side in sides[num_samples])  # compiles
      if draw["temperature"] == 0:
        same = np.mean(theirs[:, :16] == ours[:, 0, :16])
        assert same > 0.9, f"only {same:.0%} of the first greedy tokens are the same"
      times = [[seconds(side, prompts, draw) for side in sides[num_samples]] for _ in range(options.repeats)]
      theirs, ours = (batch * num_samples * NEW / statistics.median(each) for each in zip(*times))
      what = f"{batch}" if num_samples == 1 else f"{num_samples} of one prompt"
      print(f"| {what} | {name} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.1f} |", flush=True)


if __name__ == "__main__":
  main()
