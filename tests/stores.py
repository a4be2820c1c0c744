"""Object stores on this machine for tests: servers of their own, and a proxy before them that fails."""

import contextlib
import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

BUCKET = "bucket"
_EMULATOR = """
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

without = objects.download


def download(request, response, storage, *args, **kwargs):
  try:
    found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
    response["x-goog-generation"] = found["generation"]
  except NotFound:
    pass
  without(request, response, storage, *args, **kwargs)


objects.download = download

from gcp_storage_emulator.__main__ import main

main()
"""
"""What is read has its version with it, as GCS has it: TensorStore writes over no other one."""

_SERVERS = {
  "gs": lambda port: [
    *("-c", _EMULATOR, "start", "--host=127.0.0.1", f"--port={port}"),
    *("--in-memory", f"--default-bucket={BUCKET}"),
  ],
  "s3": lambda port: ["-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)],
}


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


class Store:
  """A server of a store, in a process of its own; `environment` points clients at it, or at a proxy."""

  def __init__(self, scheme):
    self.scheme, self.port = scheme, free_port()
    self.root = f"{scheme}://{BUCKET}"
    self._process = subprocess.Popen(
      [sys.executable, *_SERVERS[scheme](self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while True:
      with contextlib.suppress(OSError):
        method, path = ("PUT", f"/{BUCKET}") if scheme == "s3" else ("GET", f"/storage/v1/b/{BUCKET}")
        url = f"http://127.0.0.1:{self.port}{path}"
        urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5).close()
        return
      assert self._process.poll() is None and time.monotonic() < until, f"no server of {scheme}://"
      time.sleep(0.1)

  def environment(self, port=None):
    server = f"http://127.0.0.1:{port or self.port}"
    if self.scheme == "gs":
      return {"STORAGE_EMULATOR_HOST": server, "TENSORSTORE_GCS_HTTP_URL": server}
    return {
      "AWS_ENDPOINT_URL": server,
      "AWS_ACCESS_KEY_ID": "test",
      "AWS_SECRET_ACCESS_KEY": "test",
      "AWS_DEFAULT_REGION": "us-east-1",
    }

  def close(self):
    self._process.kill()
    self._process.wait()


class Proxy(http.server.ThreadingHTTPServer):
  """Passes requests on, but for every n-th, which it answers with 503, and for those of a time it is away."""

  daemon_threads, request_queue_size = True, 128

  def __init__(self, port, *, every=0):
    self.every, self.to, self.count, self.failed, self.away_until = every, port, 0, 0, 0.0
    self._lock = threading.Lock()
    super().__init__(("127.0.0.1", 0), _Handler)
    self.port = self.server_address[1]
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

  def fails(self):
    """Counts a request, and returns whether it is to fail."""
    with self._lock:
      self.count += 1
      failing = bool(self.every) and self.count % self.every == 0
      self.failed += failing
      return failing

  def handle_error(self, *_):
    pass  # a client that was killed

  def is_away(self):
    away = time.monotonic() < self.away_until
    self.failed += away
    return away


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def do_GET(self):
    if self.server.is_away():
      self.close_connection = True  # as if there were no server
      self.connection.shutdown(socket.SHUT_RDWR)
      return
    if "chunked" in self.headers.get("Transfer-Encoding", ""):
      body = b""
      while size := int(self.rfile.readline().split(b";")[0], 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    else:
      body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if self.server.fails():
      return self._answer(503, {"Content-Type": "text/plain"}, b"Service Unavailable")
    connection = http.client.HTTPConnection("127.0.0.1", self.server.to, timeout=60)
    try:
      leave_out = ("connection", "transfer-encoding", "expect", "content-length")
      headers = {name: value for name, value in self.headers.items() if name.lower() not in leave_out}
      headers["Content-Length"] = str(len(body))
      connection.request(self.command, self.path, body, headers)
      answer = connection.getresponse()
      self._answer(answer.status, dict(answer.getheaders()), answer.read())
    finally:
      connection.close()

  do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = do_GET

  def _answer(self, status, headers, body):
    self.send_response_only(status)
    for name, value in headers.items():
      if name.lower() not in ("connection", "transfer-encoding", "content-length"):
        self.send_header(name, value)
    length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
    self.send_header("Content-Length", length)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def log_message(self, *_):
    pass


def without_stores():
  """The environment without any store's credentials or servers."""
  ours = ("AWS_", "GOOGLE_", "STORAGE_", "TENSORSTORE_")
  return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
