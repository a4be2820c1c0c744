"""DPO of Llama 3.1 8B on pairs of your own: all params, or an adapter (LoRA).

python -m dpojax.train --config=configs/llama3.py:full --workdir=runs/llama3/full \
    --config.data.path=PAIRS.jsonl
python -m dpojax.train --config=configs/llama3.py:lora --workdir=runs/llama3/lora \
    --config.data.path=PAIRS.jsonl
python -m dpojax.export --workdir=runs/llama3/lora --out=runs/llama3/adapter --lora

Settings in use for models of this size: AdamW, one pass with a cosine, 5e-7 for all params and 5e-6
for an adapter of rank 16 on all projections, clipping at 1. They are a start, measured nowhere here.

`full` is for a mesh of 8 devices of 80 GB: params, AdamW's two moments and the reference are 4 x
30 GiB in float32. `lora` holds the model once, in bfloat16, for one device of 80 GB. Not run yet.
"""

from dpojax.training import config as config_lib


def get_config(arg="full"):
  config = config_lib.defaults()
  config.objective = "dpo"
  config.loss = "dpo"
  config.beta = 0.1
  config.model.checkpoint = "meta-llama/Llama-3.1-8B"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.tokenizer = "meta-llama/Llama-3.1-8B"
  config.data.max_length = 2048
  config.data.max_prompt_length = 1024
  config.row_length = 4096
  config.rows_at_once = 1
  config.batch_size = 64
  config.steps = 1000
  config.optimizer.name = "adamw"
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.optimizer.max_grad_norm = 1.0
  config.parallel.strategy = "mesh"
  if arg == "lora":
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.model.param_dtype = "bfloat16"
    config.optimizer.learning_rate = 5e-6
  else:
    config.parallel.fsdp = 8
    config.optimizer.learning_rate = 5e-7
  return config
