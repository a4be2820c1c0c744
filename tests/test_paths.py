"""Paths of buckets: reading, writing, appending, weights by ranges, leases; against servers run here."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy

from dpojax.data import files
from dpojax.data.examples import DataError
from dpojax.models import ranges, tensors
from dpojax.models.families import HuggingFaceError
from dpojax.runtime import appending, digests, ownership, paths
from dpojax.runtime.ownership import InUseError, Lease, owned
from tests import stores


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
  """A bucket's root, and the environment that leads to it."""
  store = stores.Store(request.param)
  with pytest.MonkeyPatch.context() as environment:
    for name, value in store.environment().items():
      environment.setenv(name, value)
    for cached in (paths._prepare, paths.epath.backend.fsspec_backend._get_filesystem):
      cached.cache_clear()
    paths.filesystem(store.root).clear_instance_cache()
    yield store
  store.close()


@pytest.fixture
def folder(bucket, request):
  return paths.of(f"{bucket.root}/{request.node.originalname}")


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
  paths._prepare.cache_clear()
  monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(paths.PathError, match=r"^gs:// paths need gcsfs.*pip install 'dpojax\[gcs\]'$"):
    paths.of("gs://bucket/run")
  with pytest.raises(paths.PathError, match=r"pip install 'dpojax\[s3\]'$"):
    paths.of("s3://bucket/run")
  with pytest.raises(paths.PathError, match=r"^az://bucket/run is on no store that is known"):
    paths.of("az://bucket/run")


def test_a_bucket_is_no_server():
  named = (
    "https://host/v1",
    "HTTP://host",
    "gs://bucket/reward",
    "s3://bucket/reward",
    "runs/reward",
    "a.b:c",
  )
  assert [name for name in named if paths.is_url(name)] == ["https://host/v1", "HTTP://host"]


def test_files_are_written_read_found_moved_and_removed(folder):
  assert paths.is_empty(folder)
  paths.write_whole(folder / "a" / "b.txt", "one")
  paths.write_whole(folder / "a" / "b.txt", "two\n")
  paths.write_whole(folder / "c.txt", b"three")
  assert (folder / "a" / "b.txt").read_text() == "two\n" and paths.size(folder / "c.txt") == 5
  assert paths.files_under(folder) == {"a/b.txt", "c.txt"} and not paths.is_empty(folder)
  assert paths.matching(f"{folder}/*.txt") == [f"{folder}/c.txt"]
  assert paths.read_ranges(folder / "c.txt", [(0, 2), (3, 5)]) == [b"th", b"ee"]
  with pytest.raises(OSError):
    paths.read_ranges(folder / "c.txt", [(3, 9)])
  paths.move(folder / "a", folder / "d")
  assert paths.files_under(folder) == {"d/b.txt", "c.txt"}
  paths.remove(folder / "d")
  paths.remove(folder / "c.txt")
  assert paths.is_empty(folder)


def test_what_is_appended_is_there_at_once_and_after_every_kind_of_end(folder):
  path = folder / "lines"
  file = appending.Appended(path, "0\n")
  for i in range(1, 70):
    file.write(f"{i}\n")
    if i in (1, 69):  # before and after the whole was put again
      assert appending.read(path) == "".join(f"{j}\n" for j in range(i + 1))
  assert 0 < len(paths.files_under(folder)) - 1 < 64  # killed here: parts are left
  whole = appending.read(path)
  paths.write_whole(path, whole)  # killed between the two steps of putting the whole
  assert appending.read(path) == whole
  # What begins where the new start ends is one of the lines that are dropped.
  start = "".join(f"{j}\n" for j in range(65))
  file = appending.Appended(path, start)
  assert appending.read(path) == start
  file.write("é\n")
  file.close()
  assert path.read_bytes().decode() == start + "é\n" and paths.files_under(folder) == {"lines"}


def test_digests_see_a_changed_and_a_missing_object_and_tell_them_from_a_store_out_of_reach(folder):
  rng = np.random.default_rng(0)
  data = rng.bytes(100_000)
  paths.write_whole(folder / "a", data)
  paths.write_whole(folder / "b" / "c", b"x")
  digests.write(folder)
  digests.check(folder, digests.read(folder))
  paths.write_whole(folder / "a", data[:50_000] + b"\0" + data[50_001:])
  with pytest.raises(digests.DamageError, match=f"^{folder}/a is damaged"):
    digests.check(folder, digests.read(folder))
  paths.remove(folder / "b")
  with pytest.raises(digests.DamageError, match="missing"):
    digests.check(folder, digests.read(folder))


def test_records_are_read_from_files_and_globs_and_what_is_missing_is_named(folder):
  for i in range(2):
    paths.write_whole(folder / f"{i}.jsonl", json.dumps({"prompt": str(i)}) + "\n")
  found = files.local_files(f"{folder}/*.jsonl")
  assert found == [f"{folder}/{i}.jsonl" for i in range(2)]
  assert [record for each in found for _, record in files.read_records(each)] == [
    {"prompt": "0"},
    {"prompt": "1"},
  ]
  assert files.digest(found[0]).startswith("16:")
  with pytest.raises(DataError, match="no such file"):
    files.local_files(f"{folder}/other.jsonl")


def test_of_weights_in_a_bucket_each_part_is_fetched_by_its_ranges(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(ranges, "BLOCK", 2**12)
  rng = np.random.default_rng(0)
  arrays = {
    "rows": rng.normal(size=(256, 64)).astype(np.float32),
    "wide": rng.normal(size=(64, 512)).astype(np.float16),
  }
  (folder / "model.safetensors").write_bytes(safetensors.numpy.save(arrays))
  asked = []
  real = paths.read_ranges
  monkeypatch.setattr(paths, "read_ranges", lambda path, spans: asked.extend(spans) or real(path, spans))
  entries = tensors.open_tensors(folder / "model.safetensors")
  fetched = lambda: sum(stop - start for start, stop in asked)
  assert fetched() < 1000  # the header
  part = entries["rows"].fetch(entries["rows"].array("rows")[64:128])
  np.testing.assert_array_equal(part, arrays["rows"][64:128])
  assert fetched() < 1000 + 64 * 64 * 4 + 2 * 2**12
  part = entries["wide"].fetch(entries["wide"].array("wide").T[100:200])
  np.testing.assert_array_equal(part, arrays["wide"].T[100:200])
  before = fetched()
  entries["wide"].fetch(entries["wide"].array("wide").T[200:300])  # the columns of another device
  assert fetched() == before
  monkeypatch.setattr(ranges, "KEPT_BYTES", 2**13)
  for _ in range(2):  # more than is kept: fetched again, and right
    for name, array in arrays.items():
      np.testing.assert_array_equal(entries[name].fetch(entries[name].array(name)), array)
  ranges.forget_all()


@pytest.mark.parametrize("damage", ["cut", "long", "empty", "header"])
def test_damaged_weights_in_a_bucket_are_refused_as_those_on_disk_are(damage, folder, tmp_path):
  raw = safetensors.numpy.save({"a": np.ones((8, 8), np.float32)})
  raw = {"cut": raw[:-1], "long": raw + b"0", "empty": b"", "header": raw.replace(b"[8,8]", b"[8,9]")}[damage]
  (folder / "model.safetensors").write_bytes(raw)
  (tmp_path / "model.safetensors").write_bytes(raw)
  said = []
  for where in (folder, tmp_path):
    with pytest.raises(HuggingFaceError, match=r"model\.safetensors is damaged") as caught:
      tensors.open_tensors(where / "model.safetensors")
    said.append(str(caught.value).replace(str(where), ""))
  assert said[0] == said[1]


def seemingly_of_another_machine(monkeypatch):
  monkeypatch.setattr(ownership, "kernel", lambda: f"kernel {threading.get_ident()}")


def test_a_lease_that_is_renewed_is_refused_and_one_that_is_not_is_taken(folder, monkeypatch):
  monkeypatch.setattr(ownership, "LEASE", 1.2)
  seemingly_of_another_machine(monkeypatch)
  path = folder / ".run.lock"
  first = Lease(path)
  assert first.take() is None
  said = json.loads(path.read_bytes())
  assert {"host", "pid", "command", "renewed", "expires"} <= said.keys() and said["pid"] == os.getpid()
  with ThreadPoolExecutor(1) as other:  # of another kernel, by its thread
    start = time.monotonic()
    holder = other.submit(Lease(path).take).result()
    assert holder.pid == os.getpid() and time.monotonic() - start < 1.0
    first._ended.set()  # killed: nobody renews it
    first._thread.join()
    start = time.monotonic()
    second = Lease(path)
    assert other.submit(second.take).result() is None
    assert 1.0 < time.monotonic() - start < 5.0
    assert json.loads(path.read_bytes())["token"] == second._token
    second.release()
  assert not path.exists()
  first.release()


def test_who_holds_a_workdir_in_a_bucket_is_named(folder):
  with owned(folder / "run", "it"), pytest.raises(InUseError) as caught:
    with owned(folder / "run", "it"):
      raise AssertionError("owned twice")
  assert f"it is in use by another process (pid {os.getpid()} on " in str(caught.value)
  with owned(folder / "run", "it"):
    pass


def test_of_many_that_want_a_lease_at_once_one_has_it(bucket, folder, monkeypatch):
  if bucket.scheme == "gs":
    monkeypatch.setattr(ownership, "_LOOK_EVERY", 1.0)  # this server passes conditions over
  seemingly_of_another_machine(monkeypatch)
  leases = [Lease(folder / ".entry.lock") for _ in range(6)]
  with ThreadPoolExecutor(6) as pool:
    taken = [each is None for each in pool.map(lambda lease: lease.take(), leases)]
  assert sum(taken) == 1
  for lease in leases:
    lease.release()


def test_a_holder_whose_lease_another_has_taken_ends(folder):
  code = f"""
import time
from dpojax.runtime import ownership, paths
ownership.LEASE = 0.6
with ownership.owned({str(folder / "run")!r}, "it"):
  paths.write_whole(ownership.lock_file({str(folder / "run")!r}), "{{}}")
  time.sleep(30)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.returncode == 1 and "was taken over by another process" in done.stderr
  with contextlib.suppress(FileNotFoundError):
    ownership.lock_file(folder / "run").unlink()
