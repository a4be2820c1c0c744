"""Samples of a policy: the decoding loop, batches of prompts, packed rows, and files of both.

Begin with `sampler`, the compiled loop; `generator` feeds it prompts and scores what it draws, `rollouts`
packs samples for a training step, `files` is the command `python -m dpojax.sample`.
"""
