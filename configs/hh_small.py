"""SFT, then DPO, on one file of Anthropic HH with a 16M-parameter model, for two CPU cores.

python -m dpojax.train --config=configs/hh_small.py:sft --workdir=runs/hh_small/sft $DATA
python -m dpojax.train --config=configs/hh_small.py:dpo --workdir=runs/hh_small/dpo $DATA \
    --config.model.checkpoint=runs/hh_small/sft
python -m dpojax.train --config=configs/hh_small.py:shuffled --workdir=runs/hh_small/shuffled $DATA \
    --config.model.checkpoint=runs/hh_small/sft

with DATA="--config.tokenizer=GPT2_FOLDER --config.data.path=HARMLESS_BASE_TEST.jsonl.gz". `shuffled`
is the control: chosen and rejected change places in a random half of the training pairs. What came
out is in experiments/README.md. The weights start at random, so the learning rates are not the
paper's.
"""

from dpojax.training import config as config_lib


def get_config(arg="dpo"):
  config = config_lib.defaults()
  config.data.source = "hh"
  config.data.max_length = 384
  config.data.max_prompt_length = 192
  config.data.eval_size = 256
  config.model.width = 256
  config.model.layers = 4
  config.model.heads = 4
  config.row_length = 1024
  config.batch_size = 32
  config.log_every = 5
  config.eval_every = 20
  config.checkpoint_every = 60
  if arg == "sft":
    config.objective = "sft"
    config.loss = "token_mean"
    config.data.unique_prompts = True
    config.steps = 120
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10
    config.optimizer.max_grad_norm = 1.0
  else:
    config.objective = "dpo"
    config.loss = "dpo"
    config.beta = 0.1
    config.data.shuffle_labels = arg == "shuffled"
    config.data.max_length = 256
    config.data.max_prompt_length = 128
    config.row_length = 512
    config.steps = 100
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 15
  return config
