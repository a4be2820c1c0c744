"""Small random models and comparisons that several test files use."""

import functools
import importlib
import json

import jax
import numpy as np
import tokenizers
import transformers

from dpojax.data import packing
from dpojax.models import config as model_config
from dpojax.models import transformer

VOCAB = 61


def llama(**changes):
  return model_config.llama_style(
    **dict(dict(vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, max_positions=64), **changes)
  )


def gpt2(**changes):
  return model_config.gpt2_style(
    **dict(dict(vocab_size=VOCAB, width=32, layers=2, heads=4, max_positions=64), **changes)
  )


def gptj(**changes):
  """Neighbours rotated in part of a head, one norm for attention and MLP, a bias on the logits."""
  return gpt2(
    **dict(
      positions="interleaved",
      rotary_size=4,
      residual="shared",
      biases="mlp",
      tie_embeddings=False,
      head_bias=True,
    )
    | changes
  )


def gemma(**changes):
  """Windows in two layers of three, of which the last period lacks one; norms, caps and scales."""
  return llama(
    **dict(
      layers=5,
      head_size=12,
      mlp="geglu",
      norm="rms_offset",
      post_norms=True,
      query_key_norms=True,
      layer_windows=(3, 4, 0),
      local_rope_theta=100.0,
      attention_scale=0.4,
      attention_soft_cap=3.0,
      embedding_scale=32**0.5,
      tie_embeddings=True,
      logit_soft_cap=2.0,
    )
    | changes
  )


@functools.cache
def shapes_of(config):
  return jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))


def params_of(config, seed=0):
  """Random params, all of one size, so that biases, scales and heads matter."""
  rng = np.random.default_rng(seed)
  draw = lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32)
  return jax.tree.map(draw, shapes_of(config))


def comparisons(rng, count, num_responses, *, longest=9, empty_prompts=True):
  """Random (prompt, responses) of ids; every fourth prompt empty if asked."""
  draw = lambda low: rng.integers(VOCAB, size=rng.integers(low, longest))
  return [
    (draw(1) if not empty_prompts or i % 4 else draw(1)[:0], [draw(2) for _ in range(num_responses)])
    for i in range(count)
  ]


def lengths_of(examples):
  return np.array([[len(p), *map(len, rs)] for p, rs in examples])


def packed(examples, row_length, *, rows=None, row_multiple=1, shape=None):
  """All examples in one step's rows."""
  k = len(examples[0][1])
  lengths = lengths_of(examples)
  plan = packing.plan_in_order(lengths, len(examples), row_length, row_multiple=row_multiple)
  return packing.fill(
    examples,
    plan.row[0],
    rows or int(plan.rows[0]),
    shape or plan.shape,
    num_responses=k,
    example=range(len(examples)),
  )


NOUNS = "film plot cast score ending dialogue pacing camera".split()
GOOD = "wonderful moving clever warm".split()
BAD = "dull clumsy cold tired".split()


def save_tokenizer(folder):
  """Saves a word-level tokenizer as a Hugging Face folder."""
  vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", "the", "is", *NOUNS, *GOOD, *BAD])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
  ).save_pretrained(folder)


def pairs(rng, count):
  """Records in which the chosen response is kind and the rejected one is not."""

  def record():
    noun = rng.choice(NOUNS)
    kind, unkind = (" ".join(rng.choice(words, size=rng.integers(1, 5))) for words in (GOOD, BAD))
    return {"prompt": f"the {noun} is", "chosen": f" {kind}", "rejected": f" {unkind}"}

  return [record() for _ in range(count)]


def dialogues(count):
  """Pairs in the form of Anthropic HH, no prompt twice."""
  records = pairs(np.random.default_rng(0), count)
  starts = [f"\n\nHuman: {i} {each['prompt']}?\n\nAssistant:" for i, each in enumerate(records)]
  return [
    {side: start + each[side] for side in ("chosen", "rejected")} for start, each in zip(starts, records)
  ]


def write_jsonl(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(path)


def run_config(kind, tokenizer, path, cache_dir, **changes):
  """The shipped config of an objective, made small; changes are by dotted key."""
  module = importlib.import_module(f"configs.{kind}")
  config = module.get_config()
  with config.unlocked():
    config.update_from_flattened_dict(
      {
        "tokenizer": tokenizer,
        "data.path": path,
        "data.cache_dir": str(cache_dir),
        "data.max_length": 32,
        "data.max_prompt_length": 16,
        "data.eval_size": 16,
        "data.unique_prompts": False,
        "row_length": 64,
        "batch_size": 16,
        "steps": 4,
        "log_every": 1,
        "eval_every": 2,
        "checkpoint_every": 2,
        "model.width": 32,
        "model.layers": 1,
        "model.heads": 2,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 0,
      }
      | changes
    )
  return config
