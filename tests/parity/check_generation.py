"""Holds greedy text of trained and exported models to transformers' generate, and folders of runs.

python -m tests.parity.check_generation [CASE ...]   every family: trained here, exported, 64 tokens
python -m tests.parity.check_generation --stops      a base that ends at one id, trained to end at another:
    transformers' generate, with nothing said, stops where training ended
python -m tests.parity.check_generation --out=OUT    what experiments.from_hugging_face left in OUT:
    its folders give in transformers, and in PEFT, the logits they give here
"""

import argparse
import pathlib
import sys
import tempfile

import jax
import numpy as np
import peft
import torch
import transformers

from dpojax import train
from dpojax.export import writer
from dpojax.models import transformer
from dpojax.sample import sampler
from dpojax.training import checkpoint
from tests import worlds
from tests.parity import models
from tests.parity.check_peft import load, logits_here, logits_there
from tests.parity.make_model_vectors import model_of

NEW_TOKENS = 64


def greedy_here(config, params, prompts):
  """[B, 64] ids from the sampler, at temperature 0."""
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  padded = np.zeros((len(prompts), max(lengths)), np.int32)
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  config, params = transformer.unrolled(config, params)
  sample = jax.jit(sampler.make_sampler(config, max_new_tokens=NEW_TOKENS))
  return np.asarray(sample(params, padded, lengths, jax.random.key(0), 0.0).tokens)[:, 0]


def greedy_there(folder, prompts):
  """The same from transformers, each prompt alone."""
  model = load(folder)
  model.generation_config.eos_token_id = None  # nothing ends a text, and no id is held back for it
  settings = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
  with torch.no_grad():
    return np.array(
      [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].numpy()
        for prompt in prompts
      ]
    )


def check_family(case, scratch):
  """Trains a case with DPO, all params and an adapter.

  Returns:
    How many texts agree, of how many, and how many different ids stand in them on average.
  """
  longest = {key: 128 for key in models.CASES[case] if key in ("n_positions", "max_position_embeddings")}
  model, _ = model_of(case, **longest)
  model.save_pretrained(scratch / "base")
  worlds.save_tokenizer(scratch / "tokenizer")
  path = worlds.write_jsonl(scratch / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 40))
  agree = total = ids = 0
  prompts = [[3, 4, 5], [7, 1, 9, 2, 8], [11]]
  for name, changes in {"all": {}, "adapter": {"lora.rank": 2}}.items():
    train.run(
      worlds.run_config(
        "dpo",
        str(scratch / "tokenizer"),
        path,
        scratch / "cache",
        **{"model.checkpoint": str(scratch / "base"), "eval_every": 0, "log_every": 4} | changes,
      ),
      scratch / name,
    )
    writer.export(scratch / name, scratch / f"{name}_hf")
    policy = checkpoint.load_policy(scratch / name)
    here = greedy_here(policy.config, policy.params, prompts)
    there = greedy_there(scratch / f"{name}_hf", prompts)
    agree += int(np.all(here == there, axis=1).sum())
    total += len(prompts)
    ids += sum(len(set(text)) for text in here.tolist())
  return agree, total, ids / total


def check_stops(scratch):
  """Trains texts that end at 0 from a base that ends at 5; says what does not end there in transformers."""
  model, _ = model_of("llama3", eos_token_id=5, pad_token_id=5)
  model.generation_config.eos_token_id = 5
  model.save_pretrained(scratch / "base")
  worlds.save_tokenizer(scratch / "tokenizer")
  path = worlds.write_jsonl(scratch / "pairs.jsonl", worlds.pairs(np.random.default_rng(0), 80))
  given = ("sft", str(scratch / "tokenizer"), path, scratch / "cache")
  changes = {
    "model.checkpoint": str(scratch / "base"),
    "eval_every": 0,
    "log_every": 40,
    "steps": 80,
    "checkpoint_every": 80,
    "optimizer.learning_rate": 2e-2,
  }
  wrong = []
  for name, adapter in {"all": {}, "adapter": {"lora.rank": 4}}.items():
    train.run(worlds.run_config(*given, **changes | adapter), scratch / name)
    folders = {"exported": scratch / f"{name}_hf"}
    print(*writer.export(scratch / name, folders["exported"]), sep="\n")
    model = load(folders["exported"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["exported"])
    configs = {f"{name}, exported": model.generation_config}
    if name == "adapter":
      folders["peft"] = scratch / "adapter_peft"
      print(*writer.export_adapter(scratch / name, folders["peft"]), sep="\n")
      configs["adapter, PEFT's folder"] = transformers.GenerationConfig.from_pretrained(folders["peft"])
    configs["as the base's"] = transformers.GenerationConfig.from_pretrained(scratch / "base")
    prompts = tokenizer(["the film is", "the score is"], return_tensors="pt")
    for said, settings in configs.items():
      settings.max_new_tokens, settings.do_sample = 24, False
      text = model.generate(**prompts, generation_config=settings)
      stopped = [row[3:].tolist().index(0) + 1 if 0 in row[3:] else None for row in text]
      print(
        f"{said}: stops at {settings.eos_token_id}; {text.shape[1] - 3} tokens, the first 0 is at {stopped}"
      )
      if said != "as the base's" and (None in stopped or text.shape[1] - 3 != max(stopped)):
        wrong.append(said)
      if said == "as the base's" and text.shape[1] - 3 != 24:
        wrong.append("the base's own stop ids would have done")
  return wrong


def check_folders(out):
  """Compares the logits of the folders of a run on the prompt of a pair."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(out / "all_params_hf")
  tokens = np.array(
    [tokenizer("\n\nHuman: How do I make tea?\n\nAssistant: Boil water, then")["input_ids"]], np.int32
  )
  wrong = []
  for name in ("all_params", "adapter"):
    policy = checkpoint.load_policy(out / name)
    here = logits_here(policy.config, policy.params, None, tokens)
    there = {"transformers": load(out / f"{name}_hf")}
    if name == "adapter":
      there["PEFT"] = peft.PeftModel.from_pretrained(load(out / "base"), out / "adapter_peft").eval()
    for library, model in there.items():
      apart = np.abs(here - logits_there(model, tokens)).max()
      print(f"{name} in {library}: logits {apart:.1e} apart, of {np.abs(here).max():.1f}")
      if apart > 1e-3:
        wrong.append(f"{name} in {library}")
  return wrong


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="*", choices=[[], *models.CASES])
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--stops", action="store_true")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  transformers.utils.logging.disable_progress_bar()
  wrong = []
  if options.out:
    wrong = check_folders(options.out)
  elif options.stops:
    with tempfile.TemporaryDirectory() as scratch:
      wrong = check_stops(pathlib.Path(scratch))
  else:
    for case in options.cases or models.CASES:
      with tempfile.TemporaryDirectory() as scratch:
        agree, total, ids = check_family(case, pathlib.Path(scratch))
      print(
        f"{case}: {agree} of {total} greedy texts of {NEW_TOKENS} tokens agree, with {ids:.0f} "
        "different ids each",
        flush=True,
      )
      if agree < total:
        wrong.append(case)
  if wrong:
    sys.exit("\n".join(wrong))


if __name__ == "__main__":
  main()
