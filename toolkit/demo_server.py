"""The demo's web server: one page, and the few requests that it makes. The standard library is enough.

It answers its own page only: requests must name a host that it listens on (a page of another site could
otherwise reach it through a name that it controls), and those that do something must carry the key that
the page was given. Pictures come as bytes; no request names a file.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from toolkit.demo_state import Desk
from toolkit.sampling import Sampling

log = logging.getLogger("toolkit.demo")

PAGE = Path(__file__).with_name("demo.html")
KEY = "X-Demo-Key"
MAX_IMAGE = 32 << 20
MAX_JSON = 1 << 20
MAX_DRAINED = 512 << 20
"""Bytes of a body that is too large which are read and dropped, so that the page can be told."""
LOCAL = ("127.0.0.1", "localhost", "::1")
HTTP_PORT = 80
"""The port that browsers leave out of the name they ask."""


class Server(ThreadingHTTPServer):
    """Serves one desk; `url` is where. Raises OSError if the port is taken."""

    daemon_threads = True
    desk: Desk

    def __init__(self, desk: Desk, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.desk, self.key = desk, secrets.token_urlsafe(18)
        self.port = int(self.server_address[1])
        self.url = f"http://{_named(host)}:{self.port}/"
        self.hosts = hosts(self.port) if host in LOCAL else None

    def page(self) -> bytes:
        """The page with its key."""
        return PAGE.read_text(encoding="utf-8").replace("{{KEY}}", self.key).encode()


def hosts(port: int) -> set[str]:
    """What browsers on this machine call a server on that port."""
    names = {_named(name) for name in LOCAL}
    return {f"{name}:{port}" for name in names} | (names if port == HTTP_PORT else set())


def _named(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Refused(ValueError):
    """A request that is not answered; code is HTTP's."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(what)
        self.code = code


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version, sys_version = "toolkit", ""
    timeout = 60

    def do_GET(self) -> None:
        def answer() -> None:
            self._check_host()
            if self.path == "/":
                self._send(200, "text/html; charset=utf-8", self.server.page())
            elif self.path == "/about":
                self._json(200, self.server.desk.about())
            else:
                raise Refused(404, "there is nothing here")

        self._guarded(answer)

    def do_POST(self) -> None:
        def answer() -> None:
            self._check_host()
            if not secrets.compare_digest(self.headers.get(KEY, "").encode(), self.server.key.encode()):
                raise Refused(403, "reload the page: the demo was started anew")
            handlers = {"/begin": self._begin, "/ask": self._ask, "/stop": self._stop}
            if self.path not in handlers:
                raise Refused(404, "there is nothing here")
            handlers[self.path]()

        self._guarded(answer)

    def _begin(self) -> None:
        """Body: an encoded picture, or nothing."""
        self._json(200, {"conversation": self.server.desk.begin(self._body(MAX_IMAGE))})

    def _stop(self) -> None:
        self.server.desk.stop(self._asked("conversation"))
        self._json(200, {})

    def _ask(self) -> None:
        """Body: conversation, question, options. Answers JSON lines as they come."""
        body = self._object()
        events = self.server.desk.ask(
            self._asked("conversation", body), self._asked("question", body), _options(body.get("options"))
        )
        try:
            self._head(200, "application/x-ndjson; charset=utf-8")
            for event in events:
                self.wfile.write(json.dumps(event).encode() + b"\n")
                self.wfile.flush()
        finally:
            events.close()  # type: ignore[attr-defined]

    def _asked(self, field: str, body: dict[str, Any] | None = None) -> str:
        value = (self._object() if body is None else body).get(field)
        if not isinstance(value, str):
            raise Refused(400, f"the request lacks its {field}")
        return value

    def _object(self) -> dict[str, Any]:
        try:
            found = json.loads(self._body(MAX_JSON))
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the request is no JSON") from error
        if not isinstance(found, dict):
            raise Refused(400, "the request is no JSON object")
        return found

    def _body(self, limit: int) -> bytes:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError as error:
            raise Refused(411, "the request does not say its length") from error
        if not 0 <= length <= limit:
            if limit < length <= MAX_DRAINED:  # a browser reads an answer only when it has sent everything
                while length > 0 and (piece := self.rfile.read(min(length, 1 << 20))):
                    length -= len(piece)
            raise Refused(413, f"too large: at most {limit >> 20} MiB")
        return self.rfile.read(length)

    def _check_host(self) -> None:
        if self.server.hosts is not None and self.headers.get("Host") not in self.server.hosts:
            raise Refused(403, f"open {self.server.url}")

    def _guarded(self, answer: Callable[[], None]) -> None:
        with suppress(ConnectionError, TimeoutError):  # the page was closed: its answer has ended
            try:
                answer()
            except Refused as error:
                self._json(error.code, {"error": str(error)})
            except ValueError as error:
                self._json(400, {"error": str(error)})

    def _json(self, code: int, value: dict[str, Any]) -> None:
        self._send(code, "application/json; charset=utf-8", json.dumps(value).encode())

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self._head(code, kind, ("Content-Length", str(len(body))))
        self.wfile.write(body)

    def _head(self, code: int, kind: str, *more: tuple[str, str]) -> None:
        self.close_connection = True
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        policy += "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
        self.send_response(code)
        headers = [("Content-Type", kind), ("Content-Security-Policy", policy), *more]
        headers += [("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY")]
        for name, value in [*headers, ("Cache-Control", "no-store"), ("Connection", "close")]:
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def _options(given: Any) -> Sampling:
    """Sampling from the page's numbers; what it does not say keeps its default. Raises ValueError."""
    if given is None:
        return Sampling()
    known = set(Sampling.__dataclass_fields__)
    if not isinstance(given, dict) or set(given) - known:
        raise Refused(400, f"options are {', '.join(sorted(known))}")
    return Sampling(**given)
