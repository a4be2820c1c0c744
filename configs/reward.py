"""A Bradley-Terry reward model: a scalar head on the last token of each response.

python -m dpojax.train --config=configs/reward.py --workdir=runs/reward \
    --config.model.checkpoint=runs/sft --config.tokenizer=FOLDER --config.data.path=pairs.jsonl
"""

from dpojax.training import config as config_lib


def get_config(arg="jsonl"):
  config = config_lib.defaults()
  config.objective = "reward"
  config.loss = "bradley_terry"
  config.data.source = arg
  config.steps = 1000
  config.batch_size = 64
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-5
  config.optimizer.warmup_steps = 50
  config.optimizer.max_grad_norm = 1.0
  config.checkpoint_every = 100
  config.checkpoint_best = "rewards/accuracies"
  return config
