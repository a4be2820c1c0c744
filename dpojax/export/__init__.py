"""A run's policy as a Hugging Face folder: `python -m dpojax.export`.

Begin with `writer`; `verify` holds what was written to the policy. Models' own files are
`dpojax.models.hf`.
"""
