"""Command lines that take a config: the file is found by path or by name, and nothing is imported before.

A config is told as absl and ml_collections do it, `--config=FILE[:arg] --config.key=value`, where FILE is a
path or the name of one that is installed with dpojax: `--config=dpo:hh` is `configs/dpo.py:hh` from anywhere.
"""

import importlib
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from dpojax.runtime.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
"""Configs stand beside the package, in a checkout as where pip puts both; another `configs` may come first in
Python's path."""


class CommandLineError(UserError, ValueError):
  """What a command line names is not there; the message lists what is."""


def config_path(name: str) -> str:
  """Returns the path of a config, `:arg` included, that is given by path or by name.

  Raises:
    CommandLineError: there is no such file, nor a config of that name.
  """
  file, colon, argument = name.partition(":")
  path = pathlib.Path(file)
  named = CONFIGS / f"{file}.py"
  if path.suffix != ".py" and path.name == file and named.is_file():
    path = named
  if not path.is_file():
    names = sorted(each.stem for each in CONFIGS.glob("[!_]*.py"))
    raise CommandLineError(
      f"--config is {name!r}, which is no file; give the path of one, or a name with its argument, such as "
      f"dpo:hh: {', '.join(names)}"
    )
  return f"{path}{colon}{argument}"


def with_config_path(arguments: Sequence[str]) -> list[str]:
  """Returns a command line in which --config, if it is there, is told by path.

  Raises:
    CommandLineError: see `config_path`.
  """
  found = list(arguments)
  for i, argument in enumerate(arguments):
    flag, equals, value = argument.partition("=")
    if flag in ("--config", "-config"):
      if equals:
        found[i] = f"{flag}={config_path(value)}"
      elif i + 1 < len(arguments):
        found[i + 1] = config_path(arguments[i + 1])
  return found


def define_config() -> None:
  """Defines --config."""
  config_flags.DEFINE_config_file("config", None, "Config: a file or a name, with :arg if it takes one.")
  flags.mark_flag_as_required("config")


def define_workdir() -> None:
  """Defines --workdir, of the commands that train."""
  flags.DEFINE_string("workdir", None, "Folder of the run.")


def start_run(module: str, about: str) -> None:
  """Parses --config and --workdir, and calls `run` of a module, which is not imported before: see `start`."""
  define_config()
  define_workdir()
  flags.mark_flag_as_required("workdir")

  def main():
    from dpojax.runtime.command import command

    loop = importlib.import_module(module)
    with command():
      loop.run(flags.FLAGS.config, flags.FLAGS.workdir)

  start(main, about)


def start(main: Callable[[], None], about: str) -> None:
  """Parses the flags that are defined, and calls `main`; --help shows `about` and them."""
  # absl shows what the main script says of itself, and the flags that it defines: of a command that pip
  # has installed these would be nothing.
  sys.modules["__main__"].__doc__ = about
  for module in (__name__, main.__module__):
    for flag in flags.FLAGS.get_flags_for_module(module):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

  def checked(arguments: list[str]) -> None:
    if len(arguments) > 1:
      raise app.UsageError(f"unknown argument {arguments[1]}")
    logging.set_verbosity(logging.WARNING)
    main()

  try:
    arguments = with_config_path(sys.argv)
  except CommandLineError as error:
    sys.exit(f"error: {error}")
  app.run(checked, argv=arguments)
