"""The paper's controlled sentiment (Section 6.1): GPT-2 large on IMDb, SFT and DPO.

python -m experiments.paper.imdb --workdir=runs/paper/imdb
python -m dpojax.train --config=configs/imdb.py:sft --workdir=runs/imdb/sft
python -m dpojax.sample --workdir=runs/imdb/sft --prompts=PREFIXES.jsonl --out=SAMPLES.jsonl \
    --num_samples=4 --max_new_tokens=60
python -m dpojax.train --config=configs/imdb.py:dpo --workdir=runs/imdb/dpo_0.1 \
    --config.model.checkpoint=runs/imdb/sft --config.data.path=PAIRS.jsonl --config.beta=0.1

The first is the whole experiment, with every method of the paper; the others are parts of it.

From the paper: gpt2-large, prefixes of 2 to 8 tokens of reviews, 4 samples of each of 25,000
prefixes, all 6 pairs of the 4 labelled by the true reward (siebert/sentiment-roberta-large-english),
beta 0.05, 0.1, 1 and 5, batches of 64, RMSprop at 1e-6 after 150 steps of warm-up, an evaluation
every 100 steps. The pairs were never published: PREFIXES are beginnings of reviews, PAIRS the
labelled samples, {"prompt", "chosen", "rejected"} a line. Not given and so chosen here: words for
tokens in the prefixes of the SFT, its learning rate and length, and the number of steps of DPO.

For one device of 80 GB, or several. Not run yet.
"""

from dpojax.training import config as config_lib


def get_config(arg="dpo"):
  config = config_lib.defaults()
  config.model.checkpoint = "openai-community/gpt2-large"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.tokenizer = "openai-community/gpt2-large"
  config.batch_size = 64
  config.rows_at_once = 8
  config.optimizer.name = "rmsprop"
  config.optimizer.warmup_steps = 150
  if arg == "sft":
    config.objective = "sft"
    config.loss = "token_mean"
    config.data.source = "imdb"
    config.data.max_prompt_length = 32
    config.steps = 390  # one epoch of 25,000 reviews
    config.optimizer.learning_rate = 1e-5
  else:
    config.objective = "dpo"
    config.loss = "dpo"
    config.beta = 0.1
    config.data.max_length = 128
    config.data.max_prompt_length = 32
    config.steps = 2300  # one epoch of 150,000 pairs
    config.optimizer.learning_rate = 1e-6
    config.checkpoint_every = 100
    config.checkpoint_keep = 0
  return config
