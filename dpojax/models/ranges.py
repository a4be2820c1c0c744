"""Files of a bucket as memory, of which only what is asked for is fetched.

A file gets a place of its size in memory that holds nothing; views of it are taken as of a mapped file, and
what a view needs is fetched by ranges before it is read. Blocks stay until there are too many of them, so
that what the devices of one host read of a tensor, each its columns, is fetched once.
"""

import collections
import itertools
import mmap
import threading

import numpy as np

from dpojax.runtime import paths

BLOCK = 2**22
"""Bytes that are fetched at once: 4 MiB."""

KEPT_BYTES = 2**32
"""Of all files together, what stays in memory: 4 GiB."""

_AT_ONCE = 32


class Ranges:
  """A file of a bucket; `memory` has its size, and zeros where nothing was fetched yet."""

  def __init__(self, path: paths.Path, size: int):
    # Room of the file's size is reserved and no memory taken: pages come with what is fetched.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    self.path, self._size = path, size
    self.memory = mmap.mmap(-1, size, flags=flags)
    self._start = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]

  def fetch(self, view: np.ndarray) -> None:
    """Fetches what a view of `memory` needs.

    Raises:
      OSError: it cannot be read.
    """
    with _lock:
      blocks = self._blocks_of(view)
      missing = [block for block in blocks if (self, block) not in _kept]
      for i in range(0, len(missing), _AT_ONCE):
        part = missing[i : i + _AT_ONCE]
        spans = [(block * BLOCK, min(block * BLOCK + BLOCK, self._size)) for block in part]
        for (start, stop), data in zip(spans, paths.read_ranges(self.path, spans)):
          self.memory[start:stop] = data
      for block in blocks:
        _kept[self, block] = None
        _kept.move_to_end((self, block))
      # The longest unused first, and never what this view needs, whatever its size.
      while len(_kept) > max(KEPT_BYTES // BLOCK, len(blocks)):
        (of, block), _ = _kept.popitem(last=False)
        of.memory.madvise(mmap.MADV_DONTNEED, block * BLOCK, min(BLOCK, of._size - block * BLOCK))

  def _blocks_of(self, view: np.ndarray) -> list[int]:
    """Returns the blocks that the bytes of a view lie in."""
    if not view.size:
      return []
    axes = [(stride, length) for stride, length in zip(view.strides, view.shape) if length > 1]
    first = view.__array_interface__["data"][0] - self._start
    # Steps of a block or more leave blocks between them that nobody needs: each is a span of its own. Shorter
    # steps together are one span, holes and all.
    long = [(stride, length) for stride, length in axes if stride >= BLOCK]
    span = sum(stride * (length - 1) for stride, length in axes if stride < BLOCK) + view.itemsize
    blocks = set()
    for steps in itertools.product(*(range(length) for _, length in long)):
      start = first + sum(step * stride for step, (stride, _) in zip(steps, long))
      blocks |= set(range(start // BLOCK, (start + span - 1) // BLOCK + 1))
    return sorted(blocks)


_kept: collections.OrderedDict = collections.OrderedDict()
_lock = threading.RLock()


def forget_all() -> None:
  """Lets go of all that was fetched, and of the files."""
  with _lock:
    for of, block in _kept:
      of.memory.madvise(mmap.MADV_DONTNEED, block * BLOCK, min(BLOCK, of._size - block * BLOCK))
    _kept.clear()
