"""A record's keys while they are read: what is asked for, what was changed, and what nobody asked for."""

import collections
from typing import Any

from dpojax.data import examples
from dpojax.data.examples import RecordError, kind_of, require

MEDIA = (
  "image",
  "images",
  "audio",
  "audios",
  "video",
  "videos",
  "image_url",
  "input_audio",
  "objects",
  "rejected_images",
  "rejected_audios",
  "rejected_videos",
)
OTHERS = {
  "history": 'write its turns in front of the others as messages, or set data.form="alpaca"',
  "documents": "put their text into a message",
  "functions": 'write them as "tools"',
}
"""Keys that change what is asked, and that no form but those that name them reads."""


class Fields:
  """The keys of a record.

  Attributes:
    notes: what was changed or left out of it, (kind, what) -> how often.
    prompt_only: whether responses may be missing.
  """

  def __init__(self, record: Any, inside: str = "", *, prompt_only: bool = False):
    require(
      isinstance(record, dict),
      "wrong_type",
      f"{inside.rstrip('.') or 'the record'} is {kind_of(record)}, not an object",
    )
    self._record, self._inside, self._asked, self._parts = record, inside, set(), []
    self.notes, self.prompt_only = collections.Counter(), prompt_only

  def __contains__(self, key: str) -> bool:
    return self._record.get(key) is not None

  def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
    """Returns what stands under a key; raises RecordError if it is missing or not a `kind`."""
    self._asked.add(key)
    require(key in self._record, "missing_key", f"{self.name(key)} is missing")
    return examples.of_kind(self._record[key], self.name(key), kind)

  def optional(self, key: str, kind: type | tuple[type, ...]) -> Any:
    """Returns what stands under a key, or None if nothing does, or null."""
    self._asked.add(key)
    return self.get(key, kind) if key in self else None

  def raw(self, key: str) -> Any:
    """Returns what stands under a key, whatever it is, or None."""
    self._asked.add(key)
    return self._record.get(key)

  def inside(self, key: str) -> "Fields":
    """Returns the keys of the object under a key."""
    part = Fields(self.get(key, dict), f"{key}.")
    self._parts.append(part)
    return part

  def name(self, key: str) -> str:
    """Returns what to call a key in an error."""
    return f'"{self._inside}{key}"'

  def note(self, kind: str, what: str):
    """Keeps in mind that something was changed or left out."""
    self.notes[kind, what] += 1

  def ignored(self) -> list[str]:
    """Returns the keys that nobody asked for.

    Raises:
      RecordError: one of them holds images, audio or video, or changes what is asked.
    """
    names = []
    for key in self._record:
      if key in self._asked:
        continue
      # A pair about an image that nobody sees would teach to answer without looking.
      refuse_media(self._record, key, self.name(key))
      # To leave them out in silence would be to train on another question.
      if key in OTHERS and self._record[key]:
        raise RecordError(
          "unread_key", f"{self.name(key)} changes what is asked and is not read here; {OTHERS[key]}"
        )
      names.append(f"{self._inside}{key}")
    return names + [name for part in self._parts for name in part.ignored()]


def refuse_media(of: dict, key: str, name: str):
  """Raises RecordError if `key` is one of images, audio or video and something stands there."""
  if key in MEDIA and of[key]:
    raise RecordError(
      "media", f"{name} holds {key}, and dpojax trains on text alone; drop the record or the key"
    )


def is_json(value: Any) -> bool:
  """Returns whether JSON can hold a value: Parquet has timestamps, bytes and decimals too."""
  # A list and no recursion: records may be nested deeper than Python's stack.
  waiting = [value]
  while waiting:
    value = waiting.pop()
    if isinstance(value, dict):
      if not all(isinstance(key, str) for key in value):
        return False
      waiting += value.values()
    elif isinstance(value, list):
      waiting += value
    elif value is not None and not isinstance(value, (str, int, float, bool)):
      return False
  return True
