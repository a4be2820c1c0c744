"""Knobs of losses that records may bring: their names, the values that make sense, and their reading."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dpojax.data.examples import DataError


class Knob(NamedTuple):
  """The values of a knob that make sense: the check, and what they are in words."""

  sound: Callable[[float], bool]
  text: str


KNOBS = {
  "beta": Knob(lambda x: 0 < x < math.inf, "positive"),
  "label_smoothing": Knob(lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
  "delta": Knob(math.isfinite, "finite"),
  "tau": Knob(lambda x: 0 < x < math.inf, "positive"),
  "alpha": Knob(lambda x: 0 <= x < math.inf, "at least 0"),
  "gamma": Knob(lambda x: 0 <= x < math.inf, "at least 0"),
  "weight": Knob(lambda x: 0 < x < math.inf, "positive"),
  "mix": Knob(lambda x: 0 < x < 1, "in (0, 1)"),
  "gap": Knob(lambda x: 0 <= x <= 1, "in [0, 1]"),
  "margin": Knob(math.isfinite, "finite"),
  "epsilon": Knob(lambda x: 0 <= x < 1, "in [0, 1)"),
  "share": Knob(lambda x: 0 < x <= 1, "in (0, 1]"),
  "sampled_rejected": Knob(lambda x: x in (0, 1), "0 or 1"),
  "desirable_weight": Knob(lambda x: 0 <= x < math.inf, "at least 0"),
  "undesirable_weight": Knob(lambda x: 0 <= x < math.inf, "at least 0"),
}
"""Keywords of losses that a config or the data may give; `OF_DATA` the data alone."""

OF_DATA = ("sampled_rejected",)
"""Knobs that say what a pair is: XPO's, 1 where the rejected response is the reference's sample, else 0."""


def columns_text(columns: Mapping[str, str]) -> list[str]:
  """Returns what of columns decides what is prepared, in one order."""
  return [f"{knob}={column}" for knob, column in sorted(columns.items())]


def read(record: Any, columns: Mapping[str, str]) -> dict[str, float]:
  """Returns the numbers that stand under a record's columns, by knob, as float32 holds them.

  Args:
    record: an object as JSON, CSV or Parquet have it; there a number may be text.
    columns: of each knob the record's key.

  Raises:
    DataError: a number is missing, is none, or makes no sense for its knob; it names key and value.
  """
  return {knob: _number(record, column, knob) for knob, column in columns.items()}


def _number(record: Any, column: str, knob: str) -> float:
  if not isinstance(record, dict):
    raise DataError(f"the record has no keys, so no {column!r} (data.columns.{knob})")
  value = record.get(column)
  if value is None:
    there = "null" if column in record else "missing"
    raise DataError(f'"{column}" (data.columns.{knob}) is {there}; it must be a number, {KNOBS[knob].text}')
  try:
    # float(True) is 1.0, and a margin of true means nothing.
    if isinstance(value, (bool, list, dict)):
      raise ValueError
    with np.errstate(over="ignore"):
      number = float(np.float32(float(value)))  # what the loss will read
  except (TypeError, ValueError) as error:
    raise DataError(
      f'"{column}" (data.columns.{knob}) is {str(value)[:40]!r}; it must be a number, {KNOBS[knob].text}'
    ) from error
  if math.isnan(number) or not KNOBS[knob].sound(number):
    raise DataError(f'"{column}" (data.columns.{knob}) is {value}; it must be {KNOBS[knob].text}')
  return number
