"""PPO as the paper's baseline: 1024 samples a step, normalised rewards, beta steered to a KL of 6 nats.

python -m dpojax.ppo --config=configs/ppo.py --workdir=runs/ppo \
    --config.model.checkpoint=runs/sft --config.ppo.reward=runs/reward --config.data.path=pairs.jsonl

The argument names the data set, as in configs/sft.py; its prompts are what is answered. The reward is a
run with objective=reward (PPO), or module:function of a prompt and a response (PPO-GT, the true one).
The paper's target KLs are 3, 6, 9 and 12; ppo.target_kl=0 leaves beta as it is. Its other settings are
not published: those here are our own.
"""

from dpojax.ppo import config as ppo_config


def get_config(arg="jsonl"):
  config = ppo_config.defaults()
  config.data.source = arg
  config.batch_size = 128
  config.ppo.num_samples = 8
  config.ppo.target_kl = 6.0
  config.data.max_prompt_length = 64
  config.data.max_length = 128
  return config
