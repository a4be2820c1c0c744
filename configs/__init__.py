"""Configs: `get_config(arg)` returns what a run is told; each docstring has its command."""
