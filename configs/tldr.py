"""The paper's summaries (Section 6.2): DPO of GPT-J 6B on TL;DR, from a published SFT.

python -m experiments.paper.tldr --workdir=runs/paper/tldr --test=FILE --judge_model=MODEL
python -m dpojax.train --config=configs/tldr.py --workdir=runs/tldr/dpo

The first is the whole experiment: this DPO, Preferred-FT (:preferred_ft), the reward model of best-of-N
(:reward), samples and their judge. The second is DPO alone.

From the paper: start and reference CarperAI/openai_summarize_tldr_sft, the 92.5k comparisons of
CarperAI/openai_summarize_comparisons (here those of Stiennon et al. 2020, which they come from),
beta 0.5, batches of 64, RMSprop at 1e-6 after 150 steps of warm-up. The judged checkpoint was that
of step 2400. Not given and so chosen here: lengths of 640 tokens, 512 of them of the post; one epoch
of Preferred-FT with DPO's optimizer, one of the reward model with AdamW at 1e-5.

If the hub has the weights in another format than safetensors, load them with transformers, save
them to a folder and name it: --config.model.checkpoint=FOLDER.

For a mesh of 8 devices of 80 GB. Not run yet.
"""

from dpojax.training import config as config_lib


def get_config(arg="dpo"):
  config = config_lib.defaults()
  config.model.checkpoint = "CarperAI/openai_summarize_tldr_sft"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.tokenizer = "EleutherAI/gpt-j-6b"
  config.data.source = "tldr"
  config.data.max_length = 640
  config.data.max_prompt_length = 512
  config.batch_size = 64
  config.rows_at_once = 2
  config.optimizer.name = "rmsprop"
  config.optimizer.learning_rate = 1e-6
  config.optimizer.warmup_steps = 150
  config.eval_every = 300
  config.checkpoint_every = 300
  config.parallel.strategy = "mesh"
  config.parallel.fsdp = 8
  if arg == "preferred_ft":
    config.objective = "sft"
    config.loss = "sequence_sum"
    config.steps = 1400
  elif arg == "reward":
    config.objective = "reward"
    config.loss = "bradley_terry"
    config.steps = 1400
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.max_grad_norm = 1.0
    config.eval_every = 100
    config.checkpoint_every = 100
    config.checkpoint_best = "rewards/accuracies"
  else:
    config.objective = "dpo"
    config.loss = "dpo"
    config.beta = 0.5
    config.steps = 2400
  return config
