"""DPO on the policy's own samples: four rounds, the reward model of an earlier run as the judge.

python -m dpojax.online --config=configs/online.py --workdir=runs/online \
    --config.model.checkpoint=runs/sft --config.data.path=pairs.jsonl --config.online.judge=runs/reward

The argument names the data set, as in configs/sft.py; its prompts are answered, its held-out pairs evaluate.
The judge may also be module:function, of (prompt, response) a number or of (prompt, A, B) 'A', 'B' or
'tie', or with online.pairing=choice the URL of a server. online.steps_per_round=1 and a batch's prompts a
round is fully on-policy; online.offline_share mixes in the data's pairs; online.reference=last_round holds
each round to the policy that it began with.
"""

from dpojax.online import config as online_config


def get_config(arg="jsonl"):
  config = online_config.defaults()
  config.data.source = arg
  config.beta = 0.1
  config.batch_size = 64
  config.steps = 128
  config.optimizer.name = "rmsprop"
  config.optimizer.learning_rate = 1e-6
  config.optimizer.warmup_steps = 15
  config.eval_every = config.checkpoint_every = 32
  config.online.steps_per_round = 32
  config.online.prompts_per_round = 2048
  config.online.num_samples = 4
  config.online.max_new_tokens = 128
  return config
