"""Files that grow by lines: metrics, samples, answers.

On this machine that is a file opened to append. A bucket's objects cannot grow: there each text that is
added becomes an object of its own beside the file, `NAME.parts/OFFSET`, put before `write` returns, so that
a kill -9 loses no more than it does here. OFFSET is where the text begins in the whole. From time to time,
and at the end, the whole is put as the file and its parts are removed; a kill between the two leaves parts
that begin before the file's end, which are passed over.
"""

import os

from dpojax.runtime import paths

_PARTS = 64
"""After so many the whole is put again."""


class Appended:
  """A file that is open to append; it is read by `read`."""

  def __init__(self, path: paths.Path, start: str | None = None):
    """Opens the file.

    Args:
      path: the file's; made if missing.
      start: what it holds from now on; None leaves it as it is.
    """
    self.path, self._file = path, None
    if not paths.is_remote(path):
      if start is not None:
        paths.write_whole(path, start)
      self._file = open(path, "ab", buffering=0)
      return
    self._whole = _whole(path)
    self._count = len(_parts(path))
    if self._count:
      self._join()
    if start is not None:  # after the parts are gone: one of them might begin where the new text ends
      self._whole = start.encode()
      paths.write_whole(path, self._whole)

  def write(self, text: str) -> None:
    """Adds a text; it stands there when this returns."""
    data = text.encode()
    if self._file is not None:
      # Unbuffered, so that a kill loses nothing; such a write may take a part only.
      while data:
        data = data[self._file.write(data) :]
      return
    if not data:
      return
    # Of one width, so that names sort as numbers do.
    part = _folder(self.path) / f"{len(self._whole):016d}"
    part.write_bytes(data)
    self._whole += data
    self._count += 1
    if self._count >= _PARTS:
      self._join()

  def close(self) -> None:
    """Lets go of the file."""
    if self._file is not None:
      self._file.close()
    elif self._count:
      self._join()

  def _join(self) -> None:
    paths.write_whole(self.path, self._whole)
    paths.remove(_folder(self.path))
    self._count = 0


def exists(path: paths.Path) -> bool:
  """Returns whether such a file is there."""
  return path.exists() or paths.is_remote(path) and bool(_parts(path))


def read(path: paths.Path, *, errors: str = "strict") -> str:
  """Returns the text of such a file, wherever it stands.

  Raises:
    OSError: it is not there.
  """
  if not paths.is_remote(path):
    return path.read_text(encoding="utf-8", errors=errors)
  if not exists(path):
    raise FileNotFoundError(f"{path} does not exist")
  return _whole(path).decode(errors=errors)


def _whole(path: paths.Path) -> bytes:
  # Parts first: if they are joined meanwhile, the file has what they had.
  parts = _parts(path)
  contents = [_or_none(part) for part in parts]
  whole = _or_none(path) or b""
  for part, content in zip(parts, contents):
    if content is not None and int(os.path.basename(part)) == len(whole):
      whole += content
  return whole


def _or_none(path: paths.Path) -> bytes | None:
  try:
    return path.read_bytes()
  except FileNotFoundError:
    return None


def _folder(path: paths.Path) -> paths.Path:
  return path.with_name(f"{path.name}.parts")


def _parts(path: paths.Path) -> list[paths.Path]:
  folder = _folder(path)
  return [folder / name for name in sorted(paths.files_under(folder)) if name.isdecimal()]
