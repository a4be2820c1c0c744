"""What a user can mend."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
  """Something given cannot be used, or what a run needs is not there: the message says what, and the fix.

  Every error of this package that is not a defect is one; a command line shows it as one line.
  """


class ConfigError(UserError, ValueError):
  """A config cannot be run; the message names the key, the value and the fix."""


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
  """Turns what a user can mend into one line and exit 1, before there are devices or other processes.

  `command.command` does so around the work itself.
  """
  try:
    yield
  except UserError as error:
    sys.exit(f"error: {error}")
