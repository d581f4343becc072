"""Shard folders behind a URL: manifest and indexes here, shards read by byte range through a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.atomic import draft_of, locked, publish
from data.cache import BlockCache
from data.index import MANIFEST
from data.remote import Origin, Remote, RemoteError, ShortRead, Unreachable

log = logging.getLogger("toolkit.data")

ORIGIN = "origin.json"
"""Beside a manifest: the shards of this folder are not here but behind the URL that this file names."""

_THREADS = 8


def mirror(origin: Origin, cache: Path) -> Path:
    """A local folder with manifest and indexes of the shards at a URL; the shards stay where they are.

    The folder is named by URL and manifest, so that shards converted anew are not mistaken for the old.
    Raises ValueError if they cannot be read or an index is not the manifest's.
    """
    remote = Remote(origin)
    try:
        text = remote.whole(MANIFEST)
        name = hashlib.sha256(origin.url.rstrip("/").encode() + b"\n" + text).hexdigest()[:16]
        out = cache / "remote" / name
        with locked(cache / "remote" / f".{name}.lock", f"fetching the indexes of {origin.url}"):
            if not (out / MANIFEST).exists():
                _fetch_indexes(remote, text, out)
    finally:
        remote.close()
    # How a folder is read may change from run to run; what it holds may not.
    write_origin(origin, out)
    return out


def write_origin(origin: Origin, folder: Path) -> None:
    """Notes where the shards of a folder lie."""
    part = folder / f".{ORIGIN}.{os.getpid()}.part"
    part.write_text(json.dumps(asdict(origin), indent=1), encoding="utf-8")
    part.replace(folder / ORIGIN)


def _fetch_indexes(remote: Remote, manifest: bytes, out: Path) -> None:
    shards = _shards_of(manifest, remote.origin.url)
    with draft_of(out) as draft:
        (draft / MANIFEST).write_bytes(manifest)

        def fetch(shard: Mapping[str, Any]) -> None:
            content = remote.whole(shard["index"])
            if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
                raise ValueError(
                    f"{remote.url(shard['index'])} is not the index that the manifest was written with; "
                    "upload the folder again"
                )
            (draft / shard["index"]).write_bytes(content)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, shards))
        publish(draft, out)


def _shards_of(manifest: bytes, url: str) -> list[dict[str, Any]]:
    """The shard list of a manifest whose names are plain file names."""
    try:
        shards: list[dict[str, Any]] = json.loads(manifest)["shardlist"]
        names = [str(shard[part]) for shard in shards for part in ("url", "index")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{url}/{MANIFEST} is no manifest of this toolkit: {error!r}") from error
    odd = [name for name in names if Path(name).name != name or name.startswith(".")]
    if odd:
        raise ValueError(f"{url}/{MANIFEST} names {odd[0]!r}, which is no plain file name")
    return shards


class RemoteFiles:
    """Shards behind a URL, as `data.files.Files`; sizes: bytes of each by the manifest."""

    def __init__(self, origin: Origin, sizes: Mapping[str, int], identity: str) -> None:
        self._remote, self._sizes, self._identity = Remote(origin), dict(sizes), identity
        self._block = origin.block_kb << 10
        self._cache = BlockCache(Path(origin.cache).expanduser(), origin.cache_mb << 20)
        self._tags: dict[str, str] = {}

    def read(self, name: str, offset: int, size: int) -> tuple[bytes, str]:
        try:
            return b"".join(self._pieces(name, offset, size)), ""
        except Unreachable:
            raise
        except RemoteError as error:
            return b"", f"cannot be read: {error}"

    def again(self, name: str, offset: int, size: int) -> tuple[bytes, str]:
        try:
            before = self._tags.get(name, "")
            now = self._checked(name)
            for number in self._numbers(offset, size):
                self._cache.drop(self._path(name, number))
            found = b"".join(self._pieces(name, offset, size))
        except Unreachable:
            raise
        except RemoteError as error:
            return b"", f"cannot be read: {error}"
        changed = bool(before) and now != before
        return found, f"was replaced since it was first read (ETag {before}, now {now})" if changed else ""

    def prefetch(self, spans: Iterable[tuple[str, int, int]]) -> None:
        wanted = {(name, b) for name, offset, size in spans for b in self._numbers(offset, size)}
        missing = sorted(w for w in wanted if not self._cache.holds(self._path(*w)))
        if len(missing) < 2:
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda block: self._quietly(*block), missing))

    def _quietly(self, name: str, number: int) -> None:
        try:
            self._piece(name, number, 0, 0)
        except RemoteError:
            log.debug("%s block %d will be asked for again when it is read", name, number)

    def _numbers(self, offset: int, size: int) -> range:
        return range(offset // self._block, -(-(offset + size) // self._block))

    def _path(self, name: str, number: int) -> str:
        return f"{self._identity}/{name}/{self._block >> 10}-{number:08d}"

    def _pieces(self, name: str, offset: int, size: int) -> Iterable[bytes]:
        for number in self._numbers(offset, size):
            start = max(0, offset - number * self._block)
            end = min(self._block, offset + size - number * self._block)
            yield self._piece(name, number, start, end - start)

    def _piece(self, name: str, number: int, start: int, size: int) -> bytes:
        def fetch() -> bytes:
            if name not in self._tags:
                self._checked(name)
            first = number * self._block
            try:
                return self._remote.part(name, first, min(first + self._block, self._sizes[name]))
            except RemoteError as error:
                cause = error.__cause__
                if isinstance(cause, ShortRead) or getattr(cause, "status", None) == 416:
                    self._checked(name)  # says if the shard was cut since it was first read
                raise

        return self._cache.read(self._path(name, number), start, size, fetch)

    def _checked(self, name: str) -> str:
        """Notes the tag of a shard whose size is the manifest's."""
        size, tag = self._remote.status(name)
        if size is not None and size != self._sizes[name]:
            raise RemoteError(
                f"{self._remote.url(name)} has {size:,} bytes, the manifest says {self._sizes[name]:,}: it "
                "was cut or replaced; upload it again, or convert the data again"
            )
        self._tags[name] = tag
        return tag


def open_origin(folder: Path) -> Origin | None:
    """The origin that a folder names, None for a folder that holds its shards itself."""
    file = folder / ORIGIN
    if not file.exists():
        return None
    return Origin(**json.loads(file.read_text(encoding="utf-8")))
