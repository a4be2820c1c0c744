"""PPO, the baseline DPO is held against: `python -m dpojax.ppo`.

Begin with `loop`; `losses` are pure functions as those of `dpojax.losses`, `step` the two objectives built
of them, `config` the keys of a run. Samples are `dpojax.sample.rollouts`, the train step is
`dpojax.training.step`.
"""
