"""The Flax Linen decoder and its attention; flax is imported here and nowhere else."""
