"""Who may write: one run a workdir or file, and one maker at a time of an entry of a cache.

`owned` is the one door. Behind it stands a `Lock`; for folders of this machine or of a mounted file system
it is a `FileLock`: a file beside what is owned, kept under `flock` for as long as the owner lives. The
kernel lets go of it however the owner ends, kill -9 included. In the file stands who that is. In a bucket
it is a `Lease`: an object that its holder renews, and that is anyone's when it was not renewed for long
enough.

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
import threading
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from dpojax.runtime import paths
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
  """What `owned` needs of a lock."""

  def take(self) -> Holder | str | None:
    """Takes it if it is free: returns None then, else who holds it as far as is known.

    It waits for no holder that lives; of a lease, which has none to ask, it may wait to see whether one does.
    """

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
  file = lock_file(path)
  lock = Lease(file) if paths.is_remote(file) else FileLock(file, keep=not wait)
  with disk_errors(file.parent):
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


def lock_file(path: str | os.PathLike) -> paths.Path:
  """Returns where the lock of a path stands: beside it, hidden."""
  path = paths.absolute(path)
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
    _write(file, _this_process())
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


LEASE = 60.0
"""Seconds without a renewal after which a lease is anyone's; it is renewed six times as often."""


class Lease:
  """An object of a bucket that says who owns something, and is put again and again for as long as he does.

  Whether a holder lives is seen by whether the object changes: no two clocks are compared. One that does
  not change for `LEASE` seconds, or whose process was on this machine and is gone, is taken. Where the
  store puts an object only if there is none, or only over the one that was read (S3, GCS), two never take it
  at once; elsewhere, and on a server that passes the condition over, the last of two at the same moment has
  it, and the other sees that when it looks again. A holder that finds another name in its lease, as it was
  stopped for longer, ends at once: it may not write any more.
  """

  def __init__(self, path: paths.Path):
    self._path, self._store = path, paths.filesystem(path)
    self._token, self._holder, self._thread = uuid.uuid4().hex, None, None
    self._ended = threading.Event()

  def take(self) -> Holder | str | None:
    seen, version = self._read()
    until = time.monotonic() + LEASE
    while seen is not None and not _is_gone(seen) and time.monotonic() < until:
      if _is_neighbour(seen):
        return _holder_of(seen)
      time.sleep(max(_LOOK_EVERY, LEASE / 60))
      seen, now = self._read()
      if seen is not None and now != version:
        return _holder_of(seen)
    version = None if seen is None else version
    self._holder = _this_process()
    self._put(over=version)
    time.sleep(_LOOK_EVERY)  # on a store without conditions another may have put its own over it
    seen, _ = self._read()
    if seen is None or seen.get("token") != self._token:
      return _holder_of(seen or {})
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self._thread.start()
    return None

  def release(self) -> None:
    if self._thread is None:
      return
    self._ended.set()
    self._thread.join()
    self._thread = None
    seen, _ = self._read()
    if seen is not None and seen.get("token") == self._token:
      self._path.unlink(missing_ok=True)

  def _renew(self) -> None:
    while not self._ended.wait(LEASE / 6):
      try:
        seen, version = self._read()
        if seen is None or seen.get("token") == self._token:
          self._put(over=version)  # if another was faster, that is seen the next time
          continue
      except Exception:  # the store does not answer: nobody else can take it either
        continue
      who = _holder_of(seen)
      print(f"error: {self._path} was taken over by another process ({who}); this one ends", file=sys.stderr)
      sys.stderr.flush()
      os._exit(1)

  def _read(self) -> tuple[dict | None, str | None]:
    """Returns what the lease says and which version of the object that is; None where there is none."""
    try:
      info = self._store.info(os.fspath(self._path))
      said = json.loads(self._path.read_bytes())
    except FileNotFoundError:
      return None, None
    except (ValueError, TypeError):
      said = {}
    version = info.get("generation") or info.get("ETag") or info.get("etag")
    # What it says counts too: a server may give an object that is put again the version it had.
    return said if isinstance(said, dict) else {}, f"{version} {said}"

  def _put(self, *, over: str | None) -> None:
    """Puts the lease over the version that was read, or where there is none; reading tells whether it was."""
    now = datetime.datetime.now().astimezone()
    said = self._holder._asdict() | {
      "token": self._token,
      "kernel": kernel(),
      "renewed": now.isoformat(" ", "milliseconds"),
      "expires": (now + datetime.timedelta(seconds=LEASE)).isoformat(" ", "milliseconds"),
    }
    with contextlib.suppress(FileExistsError):
      paths.put_over(self._path, json.dumps(said).encode() + b"\n", over and over.partition(" ")[0])


def _this_process() -> Holder:
  command = " ".join(shlex.join(sys.orig_argv).split())[:_LONGEST_COMMAND]  # in one line
  now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
  return Holder(socket.gethostname(), os.getpid(), command, now)


def _holder_of(said: dict) -> Holder | str:
  try:
    return Holder(**{name: said[name] for name in Holder._fields})
  except LookupError:
    return "it has not said which"


def _is_neighbour(said: dict) -> bool:
  """Returns whether a holder is of this machine, and lives."""
  return said.get("kernel") == kernel() and lives(said["pid"])


def _is_gone(said: dict) -> bool:
  """Returns whether a holder was of this machine, and lives no more."""
  return said.get("kernel") == kernel() and not lives(said["pid"])


def kernel() -> str:
  """Returns what names the machine's boot and the space that its pids are of."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
  except OSError:  # not Linux: no two processes are taken for neighbours
    return f"{socket.gethostname()} {os.getpid()}"


def lives(pid: int) -> bool:
  """Returns whether a process of this machine is there and no zombie."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
  except OSError:
    return False


def _write(file: int, holder: Holder) -> None:
  os.ftruncate(file, 0)
  os.pwrite(file, json.dumps(holder._asdict()).encode() + b"\n", 0)


def _read(file: int) -> Holder | str:
  try:
    return Holder(**json.loads(os.pread(file, 2**16, 0)))
  except (ValueError, TypeError):
    return "it has not said which"
