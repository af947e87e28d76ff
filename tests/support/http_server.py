"""A web server in this process, for tests that must not reach the network."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges; `server.plan` says what goes wrong, in order.

    Keys of a step: cut (bytes of body sent), status, headers (extra or None to leave
    out), ranges (False: ignored), if_range (False: ignored), stall (seconds).
    """

    def do_GET(self):
        step = self.server.plan.pop(0) if self.server.plan else {}
        self.server.seen.append((self.path, dict(self.headers)))
        body = self.server.files.get(self.path.partition("?")[0])
        if "status" in step or body is None:
            return self.answer(step.get("status", 404), b"an error\n\npage", step, {})
        etag = f'"{hash(body)}"'
        headers = {"ETag": etag, "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") == etag or not step.get("if_range", True)
        if not (wanted and same and step.get("ranges", True)):
            return self.answer(200, body, step, headers)
        start = int(wanted[1])
        if start >= len(body):
            return self.answer(
                416, b"", step, {"Content-Range": f"bytes */{len(body)}"}
            )
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(206, body[start:], step, headers)

    do_HEAD = do_GET

    def answer(self, status, body, step, headers):
        self.send_response(status)
        headers = {"Content-Length": len(body)} | headers | step.get("headers", {})
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: step.get("cut", len(body))])
            self.wfile.flush()
        self.server.stop.wait(step.get("stall", 0))

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # joined when the server is closed

    def handle_error(self, *_):
        pass  # the client went away

    def ranges(self):
        return [headers.get("Range") for _, headers in self.seen]


@contextmanager
def serving(files):
    """A server of `files` ({path: bytes}): its `url`, `plan` and what was `seen`."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.plan, server.seen = files, [], []
        server.stop = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()
