"""The losses in other people's training loops: small models, made-up preferences, seconds on a CPU."""
