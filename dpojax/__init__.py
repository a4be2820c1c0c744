"""dpojax: Direct Preference Optimization in JAX.

Axis legend, used in every docstring: `B` comparisons in a step, `K` responses of a comparison,
`R` rows, `L` row length, `P` comparisons a row can hold, `S` scored tokens a row can hold,
`D` width, `N` heads, `H` head size, `V` vocabulary.

A comparison is one prompt with K responses, best first. A row holds several comparisons; each
prompt stands in it once, and its responses are branches that see the prompt and themselves, never
each other. `dpojax.data.packing.Rows` is that layout, `dpojax.kernels.attention` the rule.
"""
