"""What a user can mend."""


class UserError(Exception):
  """Something given cannot be used, or what a run needs is not there: the message says what, and the fix.

  Every error of this package that is not a defect is one; a command line shows it as one line.
  """


class ConfigError(UserError, ValueError):
  """A config cannot be run; the message names the key, the value and the fix."""
