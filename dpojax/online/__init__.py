"""DPO on the policy's own samples, round after round: `python -m dpojax.online`.

Begin with `loop`, the run from top to bottom; `rounds` samples, labels and keeps a round, `labels` says who
tells which answer is better, `pairs` makes comparisons of what was said, `config` holds the keys. Samples are
`dpojax.sample`'s, steps `dpojax.train`'s.
"""
