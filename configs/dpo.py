"""DPO with the paper's settings: beta 0.1, batch 64, RMSprop 1e-6 after 150 steps of warm-up.

python -m dpojax.train --config=configs/dpo.py --workdir=runs/dpo \
    --config.model.checkpoint=runs/sft --config.tokenizer=FOLDER --config.data.path=pairs.jsonl

The argument names the data set, as in configs/sft.py. The reference is the checkpoint the policy
starts from.
"""

from dpojax.training import config as config_lib


def get_config(arg="jsonl"):
  config = config_lib.defaults()
  config.objective = "dpo"
  config.loss = "dpo"
  config.beta = 0.1
  config.data.source = arg
  config.steps = 1000
  config.batch_size = 64
  config.optimizer.name = "rmsprop"
  config.optimizer.learning_rate = 1e-6
  config.optimizer.warmup_steps = 150
  return config
