"""Runs whose every path is in a bucket, against real servers: killed, shared, refused, and while it fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import conftest, stores


class Forks:
  """Asks a process that has imported everything for children; see `tests.remote_runs`."""

  def __init__(self, folder):
    self.folder, self._count = folder, 0
    environment = stores.without_stores() | {
      "XLA_FLAGS": f"{conftest.QUICK_COMPILES} --xla_force_host_platform_device_count=1",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "DPOJAX_MIRROR": str(folder / "mirror"),
      "DPOJAX_CACHE": str(folder / "cache"),
      "AWS_EC2_METADATA_DISABLED": "true",
      "TMPDIR": str(folder),
      "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.remote_runs"],
      cwd=conftest.ROOT,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def _ask(self, **asked):
    print(json.dumps(asked), file=self._process.stdin, flush=True)
    return json.loads(self._process.stdout.readline())

  def start(self, run, environment, **given):
    """Returns the pid of a run and the file it writes to."""
    self._count += 1
    log = self.folder / f"log{self._count}"
    return self._ask(run=run, given=given, environment=environment, log=str(log)), log

  def wait(self, started, seconds=300):
    """Returns the exit code of a run and what it said."""
    pid, log = started
    code = self._ask(wait=pid, seconds=seconds)
    if code is None:
      os.kill(pid, signal.SIGKILL)
      self._ask(wait=pid, seconds=10)
    return code, log.read_text()

  def outcome(self, started, seconds=300):
    """Returns what a run came to, which has to end well."""
    code, said = self.wait(started, seconds)
    assert code == 0, said[-6000:]
    return json.loads(started[1].with_name(f"{started[1].name}.json").read_text())

  def close(self):
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.kill()
    self._process.wait()


def await_line(started, pattern, seconds=300):
  until = time.monotonic() + seconds
  while not re.search(pattern, said := started[1].read_text() if started[1].exists() else ""):
    assert time.monotonic() < until and "error: " not in said, said[-6000:]
    time.sleep(0.01)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
  forks = Forks(tmp_path_factory.mktemp("remote"))
  yield forks
  forks.close()


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request, forks):
  """A server with the world of the runs in its bucket."""
  store = stores.Store(request.param)
  here = forks.folder / f"world_{store.scheme}"
  here.mkdir()
  forks.outcome(forks.start("make_world", store.environment(), root=store.root, here=str(here)))
  yield store
  store.close()


@pytest.fixture(scope="module")
def disk(forks):
  """A folder with the same world."""
  here = forks.folder / "world"
  here.mkdir()
  forks.outcome(forks.start("make_world", {}, root=str(here), here=str(here)))
  return str(here)


@pytest.fixture(scope="module")
def whole(forks, disk):
  """What the run comes to in that folder, left alone."""
  return forks.outcome(forks.start("dpo", {}, root=disk))


@pytest.mark.buckets
def test_a_killed_run_in_a_bucket_comes_to_the_bits_of_one_on_disk(store, forks, whole):
  run = forks.start("dpo", store.environment(), root=store.root, slow=1.5)
  await_line(run, "step 5/")
  rival = forks.start("dpo", store.environment(), root=store.root)
  code, said = forks.wait(rival)
  assert code == 1 and re.search(
    rf"the workdir {store.root}/dpo is in use by another process \(pid {run[0]} on .*\); wait for its end",
    said,
  ), said[-3000:]
  os.kill(run[0], signal.SIGKILL)
  forks.wait(run)
  resumed = forks.start("dpo", store.environment(), root=store.root)
  assert forks.outcome(resumed) == whole
  assert re.search(rf"continuing from step [24] of {store.root}/dpo", resumed[1].read_text())


@pytest.mark.buckets
def test_two_processes_that_share_only_the_bucket_come_to_the_bits_of_two_that_share_a_disk(
  store, forks, disk
):
  port = stores.free_port()
  two = lambda i: {
    "parallel.strategy": "mesh",
    "parallel.data": 2,
    "parallel.coordinator": f"127.0.0.1:{port}",
    "parallel.num_processes": 2,
    "parallel.process_id": i,
  }
  outcomes = {}
  for where, root, environment in (("disk", disk, {}), ("bucket", store.root, store.environment())):
    name = f"two_{store.scheme}"
    started = [
      forks.start(
        "dpo",
        environment | {"DPOJAX_MIRROR": str(forks.folder / f"mirror{i}")},  # nothing else is shared
        root=root,
        name=name,
        sampled=False,
        **two(i),
      )
      for i in range(2)
    ]
    outcomes[where], _ = (forks.outcome(each) for each in started)
  assert outcomes["bucket"] == outcomes["disk"]


@pytest.mark.buckets
def test_every_fifth_request_that_fails_loses_nothing(store, forks, disk, whole):
  proxy = stores.Proxy(store.port, every=5)
  # Programs are read from the disk: of the seconds that clients wait after each failure there are enough.
  given = dict(
    root=store.root,
    name="fifth",
    sampled=False,
    impatient=True,
    checkpoint_every=8,
    compile_cache=f"{disk}/compiled",
  )
  outcome = forks.outcome(forks.start("dpo", store.environment(proxy.port), **given), seconds=400)
  proxy.shutdown()
  proxy.server_close()
  assert outcome == {name: whole[name] for name in outcome}
  assert proxy.failed > 10


@pytest.mark.buckets
def test_a_store_that_is_away_for_ten_seconds_loses_nothing(store, forks, disk, whole):
  proxy = stores.Proxy(store.port)
  given = dict(root=store.root, name="away", sampled=False, slow=0.1, compile_cache=f"{disk}/compiled")
  run = forks.start("dpo", store.environment(proxy.port), **given)
  await_line(run, "step 3/")
  proxy.away_until = time.monotonic() + 10
  outcome = forks.outcome(run)
  proxy.shutdown()
  proxy.server_close()
  assert outcome == {name: whole[name] for name in outcome}
  assert proxy.failed


@pytest.fixture(scope="module", params=["adapter", "rewarded"])
def others(request, forks, disk):
  """Other commands and what they come to in a folder; see `tests.remote_runs`."""
  given = {"compiled": f"{disk}/compiled"}
  return request.param, given, forks.outcome(forks.start(request.param, {}, root=disk, **given))


@pytest.mark.buckets
def test_every_other_command_comes_to_the_bits_of_one_on_disk(others, store, forks):
  name, given, on_disk = others
  assert forks.outcome(forks.start(name, store.environment(), root=store.root, **given)) == on_disk
