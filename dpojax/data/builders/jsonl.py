"""Local JSON lines in the four forms of `dpojax.data.examples.parse_record`."""

from typing import Any

from dpojax.data import examples
from dpojax.data.builders import base


class Jsonl(base.ComparisonBuilder, skip_registration=True):
  """Comparisons from local .jsonl or .jsonl.gz files."""

  name = "jsonl"

  def parse(self, record: Any) -> list[examples.Example]:
    return [examples.parse_record(record)]
