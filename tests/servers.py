"""A server of chat completions on this machine, for tests of judges."""

import collections
import http.server
import json
import threading


class Server(http.server.ThreadingHTTPServer):
  """Answers chat completions on 127.0.0.1 as `answer(request, headers)` says.

  It returns text, or (status, headers, body). `asked` counts requests by their text.
  """

  def __init__(self, answer):
    super().__init__(("127.0.0.1", 0), Handler)
    self.answer, self.asked = answer, collections.Counter()
    self.lock = threading.Lock()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with self.server.lock:
      self.server.asked[request["messages"][0]["content"]] += 1
    answer = self.server.answer(request, self.headers)
    if isinstance(answer, str):
      answer = 200, {}, {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
    status, headers, body = answer
    data = json.dumps(body).encode()
    self.send_response(status)
    for name, value in {"Content-Length": len(data), **headers}.items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass
