"""What a backend needs to compute fast what is plain elsewhere: attention, and the head's log-probs.

Begin with `attention`, the rule and the plain form that all others are held to; `backends` chooses between
it, `blockwise` and `fused`. `head` is what `dpojax.log_probs` is made of, `head_on_cpu` its form on CPUs.
Only jax is imported here.
"""
