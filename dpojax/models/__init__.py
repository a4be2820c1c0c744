"""The Flax Linen decoder, its families and adapters, and the files that published weights come in.

Begin with `config.ModelConfig` and `transformer`; `families` says what makes a Llama a Llama, `hf`, `peft`
and `gguf` read and write the files, `from_gguf` is a command. flax is imported here and nowhere else.
"""
