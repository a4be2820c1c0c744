"""What all sides are given: pairs in the order dpojax takes them, their ids, and a model's folder."""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from dpojax.data import builders, loader, packing, tokenization
from dpojax.models import config as model_config
from dpojax.models import hf, transformer
from dpojax.training import config as config_lib
from dpojax.training import resolve


def run_config(settings: dict) -> ml_collections.ConfigDict:
  """Returns the config of the benchmark's run."""
  config = config_lib.defaults()
  config.update_from_flattened_dict(
    {
      "beta": settings["beta"],
      "steps": settings["steps"],
      "batch_size": settings["batch_size"],
      "row_length": settings["row_length"],
      "tokenizer": settings["tokenizer"],
      "rows_at_once": settings.get("rows_at_once", 0),
      "model.checkpoint": settings["model"],
      "model.dtype": settings["dtype"],
      "chunk_size": settings.get("chunk_size", 0),
      "model.remat": settings.get("remat", "none"),
      "model.scan_layers": settings.get("scan_layers", False),
      "lora.rank": settings.get("rank", 0),
      "lora.alpha": 2.0 * max(settings.get("rank", 0), 1),
      "reference.mode": "stored" if settings.get("stored") else "inline",
      "data.source": settings["source"],
      "data.path": settings["path"],
      "data.max_length": settings["max_length"],
      "data.max_prompt_length": settings["max_length"] // 2,
      "data.cache_dir": settings["cache"],
      "optimizer.name": "adamw",
      "optimizer.learning_rate": settings["learning_rate"],
      "optimizer.warmup_steps": 0,
      "eval_every": 0,
      "checkpoint_every": 0,
    }
  )
  return config


def make_model(settings: dict, folder: pathlib.Path) -> model_config.ModelConfig:
  """Returns the config of the folder, into which random Llama-style weights are written if there is none."""
  if hf.is_model_folder(folder):
    return hf.read_config(folder)
  config = model_config.llama_style(
    vocab_size=settings["vocab_size"],
    width=settings["width"],
    layers=settings["layers"],
    heads=settings["heads"],
    max_positions=2 * settings["row_length"],
    tie_embeddings=True,
  )
  params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(0)))
  hf.save(folder, config, params)
  return config


def make_loader(config: ml_collections.ConfigDict, **options: Any) -> loader.Loader:
  """Returns the loader of the run's training pairs."""
  return loader.Loader(
    resolve.load_data(config).train,
    seed=config.seed,
    batch_size=config.batch_size,
    row_length=config.row_length,
    **options,
  )


def write_pairs(settings: dict, batches: loader.Loader, folder: pathlib.Path) -> dict[str, str]:
  """Writes the pairs of all steps, as text for TRL and as ids for the plain step; messages are rendered."""
  index = batches.plan(0).index[: settings["steps"]].ravel()
  texts = builders.prepare(
    settings["source"], path=settings["path"], data_dir=pathlib.Path(settings["cache"]) / "prepared"
  )
  tokenizer = tokenization.load_tokenizer(settings["tokenizer"])
  pairs, ids = folder / "pairs.jsonl", folder / "ids.jsonl"
  with open(pairs, "w") as text_lines, open(ids, "w") as id_lines:
    for i in index:
      prompt, responses, *_ = texts[batches.subset.example(int(i))]
      if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        responses = ["".join(message["content"] for message in response) for response in responses]
      text_lines.write(
        json.dumps({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}) + "\n"
      )
      prompt, responses = batches.subset.comparison(int(i))
      id_lines.write(json.dumps([prompt.tolist(), *(r.tolist() for r in responses)]) + "\n")
  return {"pairs": str(pairs), "ids": str(ids)}


def row_fill(batches: loader.Loader, steps: int) -> float:
  """Returns the share of row tokens that are not padding, over the steps that are run."""
  plan = batches.plan(0)
  cut = plan._replace(index=plan.index[:steps], row=plan.row[:steps], rows=plan.rows[:steps])
  return packing.row_fill(cut, batches.lengths, part=batches.part)
