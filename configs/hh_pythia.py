"""The paper's dialogue (Section 6.2): Pythia-2.8B on Anthropic HH, SFT on the chosen, then DPO.

python -m experiments.paper.hh --workdir=runs/paper/hh --judge_model=MODEL
python -m dpojax.train --config=configs/hh_pythia.py:sft --workdir=runs/hh_pythia/sft
python -m dpojax.train --config=configs/hh_pythia.py:dpo --workdir=runs/hh_pythia/dpo \
    --config.model.checkpoint=runs/hh_pythia/sft

The first is the whole experiment: the two runs below it, the reward model of best-of-N (:reward),
samples and their judge.

From the paper: beta 0.1, batches of 64, RMSprop at 1e-6 after 150 steps of warm-up. From its code:
512 tokens, of them 256 of the prompt, whose end is kept; one epoch; clipping at 10; an evaluation
every 19,968 pairs; the learning rate of the SFT, 5e-7. Not given and so chosen here: the reward
model's, one epoch with AdamW at 1e-5.

For a mesh of 4 devices of 80 GB (parallel.fsdp is 4; set it to your number of devices); the
paper's code took 4 A100s of 80 GB. Not run yet.
"""

from dpojax.training import config as config_lib


def get_config(arg="dpo"):
  config = config_lib.defaults()
  config.model.checkpoint = "EleutherAI/pythia-2.8b"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.tokenizer = "EleutherAI/pythia-2.8b"
  config.data.source = "hh"
  config.batch_size = 64
  config.rows_at_once = 4
  config.optimizer.name = "rmsprop"
  config.optimizer.warmup_steps = 150
  config.eval_every = 312
  config.checkpoint_every = 312
  config.parallel.strategy = "mesh"
  config.parallel.fsdp = 4
  if arg == "sft":
    config.objective = "sft"
    config.loss = "sequence_sum"
    config.data.unique_prompts = True
    config.steps = 2500
    config.optimizer.learning_rate = 5e-7
  elif arg == "reward":
    config.objective = "reward"
    config.loss = "bradley_terry"
    config.steps = 2500
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.max_grad_norm = 1.0
    config.checkpoint_best = "rewards/accuracies"
  else:
    config.objective = "dpo"
    config.loss = "dpo"
    config.beta = 0.1
    config.steps = 2500
    config.optimizer.learning_rate = 1e-6
  return config
