"""Command lines that take a config: the file is found by path or by name, and nothing is imported before.

A config is told as absl and ml_collections do it, `--config=FILE[:arg] --config.key=value`, where FILE is a
path or the name of one that is installed with dpojax: `--config=dpo:hh` is `configs/dpo.py:hh` from anywhere.
"""

import difflib
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dpojax.runtime.errors import UserError, in_one_line

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


def start_run(room: str, about: str) -> None:
  """Parses --config and --workdir, and calls `run` of a room's `loop`; see `start`.

  The loop is not imported before its `config` has had the values of the keys checked.
  """
  define_config()
  define_workdir()
  flags.mark_flag_as_required("workdir")

  def main():
    config = flags.FLAGS.config
    importlib.import_module(f"{room}.config").check_values(config)
    from dpojax.runtime import processes
    from dpojax.runtime.command import command

    loop = importlib.import_module(f"{room}.loop")
    with command():
      processes.join_run(config.parallel)
      loop.run(config, flags.FLAGS.workdir)

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
    with in_one_line():
      main()

  with in_one_line():
    arguments = with_config_path(sys.argv)
  app.run(checked, argv=arguments, flags_parser=_parsed)


def _parsed(arguments: list[str]) -> list[str]:
  """Parses the flags as absl does; a key that the config does not have is told in one line."""
  try:
    return app.parse_flags_with_usage(arguments)
  except (AttributeError, KeyError, TypeError):  # of such a key; or of a defect in the config's own code
    given = {}
    for argument, following in zip(arguments, [*arguments[1:], ""]):
      name, equals, value = argument.lstrip("-").partition("=")
      given[name] = value if equals else following
    overrides = [each.removeprefix("config.") for each in given if each.startswith("config.")]
    if not (overrides and given.get("config")):
      raise
    # The flag has no value yet, for its parsing is what has failed: the file is read once more.
    known = list(_keys(flags.FLAGS["config"].parser.parse(given["config"])))
    unknown = [key for key in overrides if key not in known]
    if not unknown:
      raise
    near = difflib.get_close_matches(unknown[0], known, n=1)
    sys.exit(f"error: config.{unknown[0]} is not a key" + (f"; did you mean {near[0]}?" if near else ""))


def _keys(config: ConfigDict, before: str = "") -> Iterator[str]:
  """Yields the keys of a config, and the groups', as a command line says them."""
  for key, value in config.items():
    yield before + key
    if isinstance(value, ConfigDict):
      yield from _keys(value, f"{before}{key}.")
