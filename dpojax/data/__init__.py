"""From preference files to packed rows, in NumPy: nothing here imports jax.

Begin with `examples`, what a comparison is, and `packing`, how rows are laid out. `files` and `hub` read
records; `records`, by `formats`, `fields` and `messages`, turns one into an example; `builders` a data set
into prepared comparisons, `tokenization` text and conversations into ids, `packing` lengths into rows,
`loader` rows into batches.
"""
