"""Owners: one at a time, known by name, gone with their process; and what a run refuses or waits for."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from dpojax import train
from dpojax.evaluate.judging import Answers
from dpojax.runtime import ownership
from dpojax.runtime.ownership import InUseError, owned
from dpojax.sample import files
from tests import conftest, worlds

HOLD = """
import sys, time
from dpojax.runtime.ownership import owned
with owned(sys.argv[1], "it", wait=len(sys.argv) > 2):
  print("mine", flush=True)
  time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 60)
"""


@pytest.fixture
def hold():
  """Starts a process that owns a path; it is killed in the end."""
  started = []

  def start(path, *seconds):
    process = subprocess.Popen(
      [sys.executable, "-c", HOLD, str(path), *map(str, seconds)],
      cwd=conftest.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


def test_a_second_owner_is_refused_by_the_name_of_the_first(hold, tmp_path):
  first = hold(tmp_path / "run")
  assert first.stdout.readline() == "mine\n"
  with pytest.raises(
    InUseError,
    match=rf"^it is in use by another process \(pid {first.pid} on \S+, since "
    r"20\d\d-.*: \S*python\S* -c .*\); wait for its end",
  ):
    with owned(tmp_path / "run", "it"):
      raise AssertionError("owned twice")


def test_a_kill_lets_go(hold, tmp_path):
  first = hold(tmp_path / "run")
  assert first.stdout.readline() == "mine\n"
  first.send_signal(signal.SIGKILL)
  first.wait()
  with owned(tmp_path / "run", "it"):
    holder = ownership._read(os.open(ownership.lock_file(tmp_path / "run"), os.O_RDONLY))
    assert holder.pid == os.getpid()


@pytest.mark.parametrize("killed", [False, True])
def test_who_waits_says_for_whom_and_comes_next(killed, hold, tmp_path):
  first = hold(tmp_path / "entry", 60 if killed else 1)
  assert first.stdout.readline() == "mine\n"
  second = hold(tmp_path / "entry", 0)
  line = second.stdout.readline()
  assert line.startswith(f"waiting for it, which another process is making (pid {first.pid} on ")
  if killed:
    first.kill()
  assert second.stdout.readline() == "mine\n"
  assert first.wait(timeout=30) == (-signal.SIGKILL if killed else 0)
  assert second.wait(timeout=30) == 0
  assert not list(tmp_path.iterdir())  # a cache keeps no lock files


def test_of_many_at_once_one_at_a_time_owns_an_entry_whose_lock_is_deleted_each_time(tmp_path):
  code = """
import os, sys, time
from dpojax.runtime.ownership import owned
for _ in range(20):
  with owned(sys.argv[1] + "/entry", "it", wait=True):
    os.close(os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL))
    time.sleep(0.001)
    os.unlink(sys.argv[1] + "/inside")
"""
  code = code.replace("import os,", "from dpojax.runtime import ownership\nownership._LOOK_EVERY = 0.001\nimport os,")
  many = [
    subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path)],
      cwd=conftest.ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(4)
  ]
  for process in many:
    assert process.communicate(timeout=60)[1] == ""


def test_a_forked_child_that_lives_on_holds_nothing(tmp_path):
  code = """
import os, sys, time
from dpojax.runtime.ownership import owned
with owned(sys.argv[1], "it"):
  if os.fork() == 0:
    os.close(1)
    time.sleep(60)
  print("forked", flush=True)
  os._exit(0)
"""
  parent = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path / "run")],
    cwd=conftest.ROOT,
    stdout=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    parent.communicate(timeout=30)
    with owned(tmp_path / "run", "it"):
      os.killpg(parent.pid, 0)  # the child is there
  finally:
    os.killpg(parent.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_told_and_refuses_nothing(tmp_path, monkeypatch, capsys):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", no_locks)
  with owned(tmp_path / "run", "it"), owned(tmp_path / "run", "it"):
    pass
  assert "is on a file system without locks (No locks available)" in capsys.readouterr().err


def test_a_lock_that_its_holder_has_not_signed_yet_is_refused_too(tmp_path):
  lock = ownership.lock_file(tmp_path / "run")
  with open(lock, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(InUseError, match="it has not said which"):
      with owned(tmp_path / "run", "it"):
        raise AssertionError("owned twice")


def test_a_workdir_a_samples_file_and_kept_answers_have_one_owner(hold, words, tmp_path):
  owners = [hold(tmp_path / name) for name in ("work/run", "samples.jsonl", "answers.jsonl")]
  assert [owner.stdout.readline() for owner in owners] == ["mine\n"] * 3
  path = worlds.write_jsonl(tmp_path / "pairs.jsonl", [])
  config = worlds.run_config("sft", words, path, tmp_path / "cache")
  with pytest.raises(InUseError, match=f"the workdir {tmp_path}/work is in use.*pid {owners[0].pid}"):
    train.run(config, tmp_path / "work")
  assert not (tmp_path / "work" / "config.json").exists()
  with pytest.raises(InUseError, match=f"the samples file .*pid {owners[1].pid}"):
    files.run("nowhere", path, str(tmp_path / "samples.jsonl"))
  with pytest.raises(InUseError, match=f"the file of answers .*pid {owners[2].pid}"):
    Answers(tmp_path / "answers.jsonl")
