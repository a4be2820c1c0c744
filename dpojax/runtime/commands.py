"""`dpojax`: the version that is installed, and its commands by name.

dpojax --version
dpojax COMMAND [...]

`dpojax train` is `dpojax-train`, and both are `python -m dpojax.train`.
"""

import argparse
import importlib.metadata
import platform
import sys


def commands() -> dict[str, importlib.metadata.EntryPoint]:
  """Returns the commands that pip has installed, by what stands after `dpojax-`."""
  scripts = importlib.metadata.distribution("dpojax").entry_points.select(group="console_scripts")
  return {each.name.removeprefix("dpojax-"): each for each in scripts if each.name != "dpojax"}


def version() -> str:
  """Returns what a report of a defect should begin with."""
  of = importlib.metadata.version
  return f"dpojax {of('dpojax')} (jax {of('jax')}, Python {platform.python_version()})"


def main():
  known = commands()
  parser = argparse.ArgumentParser(prog="dpojax", description=f"commands: {', '.join(known)}")
  parser.add_argument("--version", action="version", version=version())
  parser.add_argument("command", choices=known, metavar="COMMAND", help="each says more with --help")
  parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
  options = parser.parse_args()
  sys.argv = [f"dpojax-{options.command}", *options.arguments]
  known[options.command].load()()
