"""Blocks of remote files on a local disk, shared by all processes of a node and bounded in size."""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCKS = 64
"""Lock files: two processes that want the same block wait for each other, others hardly ever do."""
_STALE = 3600.0
"""Seconds after which a half-written block is taken for that of a killed process."""
_TOUCH = 60.0
"""Seconds between two notes that a block is in use."""


class BlockCache:
    """A folder of blocks, at most `limit` bytes; the least recently used go first.

    Blocks appear whole or not at all, however a process ends. Each is fetched by one process while
    others that want it wait.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        with self._writable():
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, block: str, start: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Bytes [start, start + size) of a block, which is fetched first if it is not here.

        block: a relative path that names the block. Returns fewer bytes if the block has fewer.
        """
        path = self.folder / block
        found = _pread(path, start, size)
        if found is None:
            with self._locked(f".lock-{zlib.crc32(block.encode()) % _LOCKS:02d}"):
                found = _pread(path, start, size)
                if found is None:
                    data = fetch()
                    with self._writable():
                        self._write(path, data)
                    found = data[start : start + size]
        return found

    def holds(self, block: str) -> bool:
        return (self.folder / block).exists()

    def drop(self, block: str) -> None:
        """Forgets a block, so that it is fetched again."""
        (self.folder / block).unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        self._reserve(len(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, size: int) -> None:
        """Makes room for a block before it is written."""
        with self._locked(".total") as handle:
            noted = os.pread(handle, 20, 0) or b"0"
            # A number that was damaged is no reason to stop: it is counted anew as well.
            total = (int(noted) if noted.isdigit() else self.limit) + size
            if total > self.limit:
                # A killed process may have counted what it never wrote: counted anew here.
                total = self._trim(self.limit * 9 // 10 - size) + size
            os.pwrite(handle, f"{total:020d}".encode(), 0)

    def _trim(self, limit: int) -> int:
        """Deletes the blocks unused for longest until `limit` bytes are left; returns what is left."""
        found, total = [], 0
        for path in self.folder.rglob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            half = path.name.startswith(".")
            if not path.is_file() or (half and path.suffix != ".part"):
                continue
            total += status.st_size
            if not half or time.time() - status.st_mtime > _STALE:
                found.append((status.st_mtime, str(path), status.st_size))
        for _, name, size in sorted(found):
            if total <= limit:
                break
            Path(name).unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """ValueError for a folder that cannot be written: no fault of the data, whatever the policy is."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.folder}, the cache of blocks, cannot be written: {error.strerror}; make room there, "
                f"lower data.cache_mb (now {self.limit >> 20}), or name another folder by paths.cache"
            ) from error

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """The kernel frees the lock when its process ends, however it ends."""
        with self._writable():
            handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)


def _pread(path: Path, start: int, size: int) -> bytes | None:
    """Part of a file, None if there is no such file; notes that it is in use."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if time.time() - os.fstat(handle).st_mtime > _TOUCH:
            os.utime(handle)
        return os.pread(handle, size, start)
    finally:
        os.close(handle)
