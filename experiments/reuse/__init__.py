"""The losses in other training loops: small models, made-up preferences, seconds on a CPU."""
