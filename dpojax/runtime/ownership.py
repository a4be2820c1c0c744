"""Who may write: one run a workdir or file, and one maker at a time of an entry of a cache.

`owned` is the one door. Behind it stands a `Lock`; for folders of this machine or of a mounted file system
it is a `FileLock`: a file beside what is owned, kept under `flock` for as long as the owner lives. The
kernel lets go of it however the owner ends, kill -9 included. In the file stands who that is.

On NFS, Linux turns `flock` into a byte-range lock of the server: it holds between hosts, unless the mount
says `nolock` or `local_lock=flock`; of a host that is gone, the server lets go after its lease, 90 s as a
rule. Lustre needs the mount option `flock`. A file system without locks is named aloud, and nothing is
refused there.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import UserError

_LOOK_EVERY = 0.2
_LONGEST_COMMAND = 300
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class InUseError(UserError, RuntimeError):
  """Another process writes there; the message says which."""


class Holder(NamedTuple):
  """The process that owns something."""

  host: str
  pid: int
  command: str
  since: str

  def __str__(self):
    return f"pid {self.pid} on {self.host}, since {self.since}: {self.command}"


class Lock(Protocol):
  """What `owned` needs of a lock; a lease on an object store would be another."""

  def take(self) -> Holder | str | None:
    """Takes it if it is free: returns None then, else who holds it as far as is known. Never waits."""

  def release(self) -> None:
    """Lets go of it."""


@contextlib.contextmanager
def owned(path: str | os.PathLike, what: str, *, wait: bool = False) -> Iterator[None]:
  """Owns a workdir, a file or an entry of a cache until the block ends or the process does.

  Args:
    path: of what is owned, which need not exist.
    what: its name in messages.
    wait: whether to wait for another owner, and say so, rather than be refused.

  Raises:
    InUseError: another process owns it.
    DiskError: no lock can be written there.
  """
  lock = FileLock(lock_file(path), keep=not wait)
  with disk_errors(pathlib.Path(path).parent):
    holder = lock.take()
    if holder is not None and not wait:
      raise InUseError(
        f"{what} is in use by another process ({holder}); wait for its end, stop it, or take another"
      )
    if holder is not None:
      print(f"waiting for {what}, which another process is making ({holder})", flush=True)
    while holder is not None:
      time.sleep(_LOOK_EVERY)
      holder = lock.take()
  try:
    yield
  finally:
    lock.release()


def lock_file(path: str | os.PathLike) -> pathlib.Path:
  """Returns where the lock of a path stands: beside it, hidden."""
  path = pathlib.Path(path).absolute()
  return path.with_name(f".{path.name}.lock")


class FileLock:
  """A file under `flock`. One that is kept is never deleted, so that no two processes lock two files."""

  def __init__(self, path: pathlib.Path, *, keep: bool):
    self._path, self._keep, self._file = path, keep, None

  def take(self) -> Holder | str | None:
    self._path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        return self._without_locks(file, error)
      time.sleep(0.05)  # a new holder writes its name a moment after it took the lock
      holder = _read(file)
      os.close(file)
      return holder
    if not self._is_there(file):  # the last holder has deleted it: what was locked is no one's any more
      os.close(file)
      return self.take()
    command = " ".join(shlex.join(sys.orig_argv).split())[:_LONGEST_COMMAND]  # in one line
    _write(
      file,
      Holder(
        socket.gethostname(),
        os.getpid(),
        command,
        datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
      ),
    )
    self._hold(file)
    return None

  def release(self) -> None:
    if self._file is None:
      return
    if self._keep:
      os.ftruncate(self._file, 0)
    else:
      self._path.unlink(missing_ok=True)
    _HELD.discard(self._file)
    os.close(self._file)
    self._file = None

  def _hold(self, file: int) -> None:
    self._file = file
    _HELD.add(file)

  def _without_locks(self, file: int, error: OSError) -> None:
    os.close(file)
    if error.errno not in _WITHOUT_LOCKS:
      raise error
    print(
      f"{self._path.parent} is on a file system without locks ({error.strerror}): nothing keeps two "
      "processes from writing there at once",
      file=sys.stderr,
      flush=True,
    )

  def _is_there(self, file: int) -> bool:
    try:
      return os.path.samestat(os.fstat(file), os.stat(self._path))
    except FileNotFoundError:
      return False


_HELD: set[int] = set()


def _let_go_in_a_fork() -> None:
  """A forked child holds no lock: it could outlive the owner."""
  for file in _HELD:
    with contextlib.suppress(OSError):
      os.close(file)
  _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_a_fork)


def _write(file: int, holder: Holder) -> None:
  os.ftruncate(file, 0)
  os.pwrite(file, json.dumps(holder._asdict()).encode() + b"\n", 0)


def _read(file: int) -> Holder | str:
  try:
    return Holder(**json.loads(os.pread(file, 2**16, 0)))
  except (ValueError, TypeError):
    return "it has not said which"
