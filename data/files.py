"""Shard files on a local disk, read by byte range."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

_MAX_OPEN = 64


class Files(Protocol):
    """Where the bytes of shards come from. Safe to pickle and to use after a fork."""

    def read(self, name: str, offset: int, size: int) -> tuple[bytes, str]:
        """(bytes, "") or (b"", why they cannot be read)."""

    def again(self, name: str, offset: int, size: int) -> tuple[bytes, str]:
        """As `read`, past every cache, after what was read before turned out to be damaged.

        (b"", "") where there is no cache; otherwise the bytes there now, none if they cannot be read, and
        what is known of the reason, "" if nothing.
        """

    def prefetch(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Brings (name, offset, size) nearer, several at a time; faults wait until they are read."""


class LocalFiles:
    """Open shard files of this process, at most a few dozen, least recently used closed first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = os.getpid()
        self._open: dict[str, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_folder": self._folder, "_process": -1, "_open": {}}

    def read(self, name: str, offset: int, size: int) -> tuple[bytes, str]:
        try:
            data = os.pread(self._handle(name), size, offset)
        except OSError as error:
            return b"", f"cannot be read: {error.strerror or errno.errorcode.get(error.errno or 0, 'error')}"
        if len(data) != size:
            return b"", f"only {len(data):,} of {size:,} bytes are there"
        return data, ""

    def again(self, name: str, offset: int, size: int) -> tuple[bytes, str]:
        return b"", ""

    def prefetch(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Nothing: the system reads ahead by itself."""

    def _handle(self, name: str) -> int:
        if os.getpid() != self._process:
            # Forked: the parent's handles are left alone and its own are opened.
            self._process, self._open = os.getpid(), {}
        handle = self._open.pop(name, None)
        if handle is None:
            handle = os.open(self._folder / name, os.O_RDONLY)
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[name] = handle
        return handle

    def __del__(self) -> None:
        if os.getpid() == self._process:
            for handle in self._open.values():
                os.close(handle)
