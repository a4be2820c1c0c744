"""How good a policy is: against its reference, against other responses, by a judge, while it trains.

Begin with `measure` (a run) and `compare` (two files), which `python -m dpojax.evaluate` calls; `scorers`
and `judging` give a response its number or its rival, `confidence` the error bars, `watching` the samples
of a run.
"""
