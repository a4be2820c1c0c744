"""Samples of a policy: one at a time with a KV cache, in batches of prompts, as packed rows, from file to file.

Begin with `sampler`, the compiled loop; `generator` feeds it prompts and scores what it draws, `rollouts` packs
samples for a training step, `files` is the command `python -m dpojax.sample`.
"""
