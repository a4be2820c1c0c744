"""Holds folders made of GGUF files to transformers' own reading of the same files.

python -m tests.parity.check_gguf                 small files of every architecture, several quantised types
python -m tests.parity.check_gguf FILE_OR_PACKAGE  that file: logits, greedy text of a chat, ids of texts
"""

import argparse
import pathlib
import sys
import tempfile
import warnings

import jax
import numpy as np
import torch
import transformers

from dpojax.data import tokenization
from dpojax.models import from_gguf, hf
from tests import gguf_files, made_data, test_from_gguf
from tests.parity.check_peft import logits_here

NEW_TOKENS = 40
QUESTIONS = ("What is the capital of France?", "Write one sentence about rain.", "What is 12 plus 30?")
TEXTS = (
  "The year 2024 had 366 days.",
  "a  7",
  "x = 12345\n\n  return  x",
  "na\u00efve \u2603 don't I'll",
  "\u5317\u306f\u3069\u3061\u3089\u3067\u3059\u304b 100%",
  " lead\ttab  ",
  "<|im_end|>",
)


def there(path):
  """The model as transformers reads it from the file."""
  path = pathlib.Path(path)
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
  ).eval()


def compare(path, folder, tokens):
  """Returns how far logits of the folder, here and in transformers, are from the file's in transformers."""
  model = there(path)
  with torch.no_grad():
    want = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  config, params = hf.load(folder)
  apart = {"dpojax": np.abs(logits_here(config, params, None, tokens) - want).max()}
  again = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    apart["transformers"] = np.abs(again(torch.tensor(tokens, dtype=torch.long)).logits.numpy() - want).max()
  return apart, np.abs(want).max(), (model, config, params)


def _said(apart, largest):
  return ", ".join(f"{by:.1e} in {who}" for who, by in apart.items()) + f" are logits apart, of {largest:.1f}"


def check_small(scratch):
  wrong = []
  made = scratch / made_data.NAME
  made.mkdir()
  made_data.write(made)
  for name, values in gguf_files.CONFIGS.items():
    for kind in ("F32", "F16", "Q8_0", "Q4_1"):
      for tied in (False, True):
        where = f"{name}_{kind}_{tied}"
        path = test_from_gguf.small_file(
          scratch / f"{where}.gguf", made, name, kind, tie_word_embeddings=tied
        )
        from_gguf.convert(path, scratch / where)
        tokens = np.random.default_rng(0).integers(values["vocab_size"], size=(2, 24)).astype(np.int32)
        apart, largest, _ = compare(path, scratch / where, tokens)
        print(f"{where}: {_said(apart, largest)}", flush=True)
        wrong += [f"{where} in {who}" for who, by in apart.items() if by > 1e-4 * largest]
  return wrong


def check_file(source, scratch):
  path = from_gguf.find(source)
  from_gguf.convert(path, scratch / "out")
  print(f"{path.name}, whose weights are quantised")
  tokenizer = tokenization.load_tokenizer(str(scratch / "out"))
  theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  for text in TEXTS:
    one, other = (each(text)["input_ids"] for each in (tokenizer, theirs))
    print(f"ids of {text!r}: {'the same' if one == other else f'{one}, in transformers {other}'}")
  ids = [
    tokenizer.apply_chat_template(
      [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    for question in QUESTIONS
  ]
  longest = max(map(len, ids))
  tokens = np.array([each + [0] * (longest - len(each)) for each in ids], np.int32)
  apart, largest, (model, config, params) = compare(path, scratch / "out", tokens)
  print(_said(apart, largest))
  wrong = [who for who, by in apart.items() if by > 1e-3 * largest]
  model.generation_config = transformers.GenerationConfig(
    max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
  )
  for question, prompt in zip(QUESTIONS, ids):
    with torch.no_grad():
      whole = model.generate(torch.tensor([prompt])).numpy().astype(np.int32)
    # Greedy text is the same if the likeliest id behind each beginning of it is.
    likeliest = logits_here(config, params, None, whole)[0].argmax(-1)
    same = bool(np.array_equal(likeliest[len(prompt) - 1 : -1], whole[0, len(prompt) :]))
    text = tokenizer.decode(whole[0, len(prompt) :]).partition("<|im_end|>")[0]
    print(f"{question} -> {text!r}; every id is the likeliest here too: {same}", flush=True)
    wrong += [] if same else [f"greedy text of {question!r}"]
  return wrong


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("source", nargs="?")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  warnings.simplefilter("ignore")
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    wrong = check_file(options.source, scratch) if options.source else check_small(scratch)
  if wrong:
    sys.exit("\n".join(wrong))


if __name__ == "__main__":
  main()
