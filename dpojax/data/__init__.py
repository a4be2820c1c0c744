"""From preference files to packed rows, in NumPy: nothing here imports jax.

`examples` turns one record into a prompt and its responses, `builders` a data set into prepared
comparisons, `tokenization` text and conversations into ids, `packing` lengths into rows, `loader` rows
into batches.
"""
