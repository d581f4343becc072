"""A local HTTP server with byte ranges that can be told to fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Served:
    """What the server was asked, and how it shall misbehave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.reads: list[tuple[str, str]] = []
        self.failures: list[int | str] = []
        self.status_failures: list[int | str] = []
        self.ranges = True
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.together = threading.Barrier(1)


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    state = Served(folder)
    handler = type("Bound", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        # fsspec asks once more by GET, which ends the same way.
        failure = self.state.status_failures.pop(0) if self.state.status_failures else None
        if failure is None:
            self._answer(body=False)
        else:
            self.state.failures.insert(0, failure)
            self._fail(failure)

    def _fail(self, failure: int | str) -> None:
        if failure == "hang up":
            self.close_connection = True
            return
        self.send_response(int(failure))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        with self.state.lock:
            self.state.busy += 1
            self.state.most_busy = max(self.state.most_busy, self.state.busy)
            wanted = self.headers.get("Range", "")
            self.state.reads.append((self.path.strip("/"), wanted))
            failure = self.state.failures.pop(0) if self.state.failures else None
        try:
            if failure is not None:
                self._fail(failure)
            else:
                self.state.together.wait(timeout=5)
                self._answer(body=True)
        finally:
            with self.state.lock:
                self.state.busy -= 1

    def _answer(self, *, body: bool) -> None:
        file = self.state.folder / self.path.strip("/")
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(found[1]) : int(found[2]) + 1] if found and self.state.ranges else data
        self.send_response(206 if found and self.state.ranges else 200)
        if self.state.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(part) if body else len(data)))
        self.end_headers()
        if body:
            self.wfile.write(part)
