"""Files behind a URL: HTTP and object stores through fsspec, with retries and errors that say what to do."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from time import sleep
from typing import Any, TypeVar

log = logging.getLogger("toolkit.data")
T = TypeVar("T")

PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "memory": "fsspec",
}
"""Schemes that may be read, and the package that reads each. No other scheme ever reaches fsspec."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_MIN_BLOCKS = 16
_SILENT = 60.0
"""Seconds of silence after which an HTTP read is given up and tried again."""


class RemoteError(ValueError):
    """A remote file that cannot be read; the message says why and how often it was tried."""


class Unreachable(RemoteError):
    """A server or network that fails for longer than it is tried: no fault of the data; all policies stop."""


class ShortRead(OSError):
    """Fewer bytes than asked for: cut on the way, or a file that ends before."""


@dataclass(frozen=True)
class Origin:
    """Where a folder of shards lies and how it is read.

    url: the folder. cache: local folder of blocks, of at most cache_mb MiB, in blocks of block_kb KiB.
    retries: further tries after a failed read, with growing waits. anonymous: read without credentials,
    which else come from the environment, as the store's own package finds them. endpoint: URL of an
    S3-compatible store.
    """

    url: str
    cache: str
    cache_mb: int = 20480
    block_kb: int = 1024
    retries: int = 5
    anonymous: bool = False
    endpoint: str = ""

    def __post_init__(self) -> None:
        if self.cache_mb << 10 < self.block_kb * _MIN_BLOCKS:
            raise ValueError(
                f"cache_mb={self.cache_mb} holds less than {_MIN_BLOCKS} blocks of block_kb={self.block_kb}; "
                "raise the one or lower the other"
            )
        scheme(self.url)

    def filesystem(self) -> Any:
        """The fsspec file system of the URL; ValueError naming the package to install."""
        import fsspec

        kind = scheme(self.url)
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if kind == "s3":
            options["anon"] = self.anonymous
            if self.endpoint:
                options["endpoint_url"] = self.endpoint
        elif kind in ("http", "https"):
            import aiohttp

            # The default waits five minutes for a server that says nothing.
            silent = aiohttp.ClientTimeout(total=None, sock_connect=_SILENT, sock_read=_SILENT)
            options["client_kwargs"] = {"timeout": silent}
        elif kind == "gs" and self.anonymous:
            options["token"] = "anon"
        elif kind == "az":
            options["anon"] = self.anonymous
        try:
            return fsspec.filesystem(kind, **options)
        except ImportError as error:
            package = PACKAGES[kind]
            raise ValueError(
                f"{self.url}: {kind}:// needs the package {package}: pip install {package}"
            ) from error


def scheme(url: str) -> str:
    """The scheme of a URL that may be read; ValueError for any other."""
    kind, found, _ = url.partition("://")
    if not found or kind not in PACKAGES:
        offered = ", ".join(f"{name}://" for name in PACKAGES if name != "memory")
        raise ValueError(
            f"{url!r} cannot be read: a URL here begins with {offered}; a local folder is data=shards"
        )
    return kind


class Remote:
    """Files below a URL, read with retries. A process makes its own connection after a fork."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._process, self._fs = -1, None

    def __getstate__(self) -> dict[str, Any]:
        return {"origin": self.origin, "_process": -1, "_fs": None}

    def url(self, name: str) -> str:
        return f"{self.origin.url.rstrip('/')}/{name}"

    @property
    def fs(self) -> Any:
        if self._process != os.getpid():
            self._fs, self._process = self.origin.filesystem(), os.getpid()
        return self._fs

    def close(self) -> None:
        """Ends the connection, which else every process forked from here would wait for at its end."""
        self._process, self._fs = -1, None

    def whole(self, name: str) -> bytes:
        return bytes(self.tried(name, lambda: self.fs.cat_file(self.url(name))))

    def part(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file."""

        def once() -> bytes:
            data = bytes(self.fs.cat_file(self.url(name), start=start, end=end))
            if len(data) > end - start:
                raise RemoteError(
                    f"the server sent {len(data):,} bytes where {end - start:,} were asked for: it does not "
                    "serve byte ranges; use another server, or data=stream"
                )
            if len(data) < end - start:
                raise ShortRead(f"only {len(data):,} of {end - start:,} bytes arrived")
            return data

        return self.tried(name, once)

    def names(self, pattern: str) -> list[str]:
        """Names of the files of the folder that fit a pattern with `*`, sorted; not behind HTTP."""
        found: list[str] = self.tried(pattern, lambda: self.fs.glob(self.url(pattern)))
        return sorted(path.rpartition("/")[2] for path in found)

    def status(self, name: str) -> tuple[int | None, str]:
        """(size, tag that changes with the content, or "") of a file."""
        info = self.tried(name, lambda: self.fs.info(self.url(name)))
        tag = next(
            (str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified") if info.get(key)), ""
        )
        return info.get("size"), tag

    def tried(self, name: str, once: Callable[[], T]) -> T:
        """What `once` gives, tried again after errors that may pass; RemoteError for others, and at last."""
        tries = self.origin.retries + 1
        for attempt in range(1, tries + 1):
            try:
                return once()
            except Exception as raised:  # every store's package has errors of its own
                error = _cause(raised)
                final = _final(error, self.url(name))
                if final is not None:
                    raise final from error
                if attempt == tries:
                    raise Unreachable(
                        f"{self.url(name)} cannot be read, tried {tries} times: {_told(error)}; when it "
                        "can be read again, the same command goes on"
                    ) from error
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.SystemRandom().uniform(
                    0.5, 1
                )
                log.warning(
                    "%s: %s; try %d of %d in %.1f s", self.url(name), _told(error), attempt + 1, tries, wait
                )
                sleep(wait)
        raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """What went wrong: fsspec's HTTP calls a file missing whatever kept it from asking for its size."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    return error if getattr(cause, "status", None) in (404, 410) else cause


def _final(error: Exception, url: str) -> RemoteError | None:
    """The error to end with if trying again cannot help."""
    if isinstance(error, RemoteError):
        return RemoteError(f"{url}: {error}")
    if isinstance(error, FileNotFoundError):
        return RemoteError(f"{url} is gone; put it back, or convert and upload the data again")
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    if isinstance(error, PermissionError) or refused:
        return RemoteError(f"{url} may not be read: {_told(error)}; check the credentials in the environment")
    if isinstance(error, (TypeError, AttributeError, ImportError)):
        return RemoteError(f"{url} cannot be read: {_told(error)}")
    return None


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
