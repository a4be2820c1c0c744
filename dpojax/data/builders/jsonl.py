"""Local files in the forms of `dpojax.data.records`."""

from typing import Any

from dpojax.data import records
from dpojax.data.builders import base


class Jsonl(base.ComparisonBuilder, skip_registration=True):
  """Comparisons from local files or the hub, in a form that is named or recognised by its keys."""

  name = "jsonl"

  def parse(self, record: Any) -> list[records.Reading]:
    return [records.read(record, self.builder_config.form)]
