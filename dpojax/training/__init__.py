"""What is minimised and one step of it: objectives over packed rows, the reference, the step, checkpoints.

Begin with `objectives` (params, reference, rows -> loss) and `step`; `parallel` lifts both over devices,
`config` and `resolve` make them of a user's keys, `checkpoint` keeps them. The loop is `dpojax.train.loop`.
"""
