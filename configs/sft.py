"""SFT on the chosen responses, with the paper's settings; a 15M-parameter Llama-style model by default.

python -m dpojax.train --config=configs/sft.py --workdir=runs/sft \
    --config.tokenizer=FOLDER --config.data.path=pairs.jsonl

The argument names the data set: configs/sft.py:hh reads Anthropic HH, with local files of its own
format if data.path is set, else downloaded. The loss is the reference implementation's: the summed
log-prob of a response, averaged over comparisons.
"""

from dpojax.training import config as config_lib


def get_config(arg="jsonl"):
  config = config_lib.defaults()
  config.objective = "sft"
  config.loss = "sequence_sum"
  config.data.source = arg
  config.data.unique_prompts = True
  config.steps = 1000
  config.batch_size = 64
  config.optimizer.name = "rmsprop"
  config.optimizer.learning_rate = 5e-7
  config.optimizer.warmup_steps = 150
  return config
