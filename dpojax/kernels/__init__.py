"""What a backend needs to compute fast what is written plainly elsewhere: attention, and the head's log-probs.

Begin with `attention`, the rule and the plain form that all others are held to; `backends` chooses between it,
`blockwise` and `fused`, and `head` is `dpojax.log_probs` on CPUs. Only jax is imported here.
"""
