"""What was measured, as JSON and as a table."""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from dpojax.evaluate.confidence import Estimate
from dpojax.runtime import paths
from dpojax.runtime.disk import disk_errors


def show(result: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
  """Returns the rows of the table: name, value, 95 % interval."""
  rows = []
  for name, value in result.items():
    if isinstance(value, Estimate):
      rows.append((prefix + name, f"{value.value:.4g}", f"{value.low:.4g} .. {value.high:.4g}"))
    elif isinstance(value, dict):
      rows += show(value, f"{prefix}{name}/")
    elif value is not None and not isinstance(value, (list, tuple)):
      rows.append((prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value), ""))
  return rows


def write(result: dict[str, Any], out: str | os.PathLike) -> None:
  """Writes a result as JSON, estimates as objects, and numbers that are none as null.

  Raises:
    DiskError: the disk is full or cannot be written.
  """

  def plain(value):
    if isinstance(value, Estimate):
      return plain(value._asdict())
    if isinstance(value, dict):
      return {key: plain(each) for key, each in value.items()}
    # JSON has no nan: Python would write one that no other reader takes.
    return None if isinstance(value, float) and not math.isfinite(value) else value

  _write(json.dumps(plain(result), indent=2) + "\n", out)


def write_lines(records: Sequence[dict[str, Any]], out: str | os.PathLike) -> None:
  """Writes records as JSON, a line each.

  Raises:
    DiskError: the disk is full or cannot be written.
  """
  _write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), out)


def _write(text: str, out: str | os.PathLike) -> None:
  path = paths.of(out)
  with disk_errors(path.parent):
    paths.make_folder(path.parent)
    paths.write_whole(path, text)
