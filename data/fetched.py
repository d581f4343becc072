"""Tars behind a URL for commands that read every byte of them once: one at a time on the local disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data.remote import Origin, Remote, RemoteError, scheme
from data.streamed import braces

_PART = 8 << 20
_THREADS = 8


@contextmanager
def fetched(origin: Origin, name: str) -> Iterator[Path]:
    """A copy of a remote file under its name in a temporary folder, fetched by byte ranges with retries.

    Raises RemoteError for a file that cannot be read, or is another one at the end of reading.
    """
    remote = Remote(origin)
    try:
        size, tag = remote.status(name)
        if size is None:
            raise RemoteError(f"{remote.url(name)}: the server does not say how many bytes it has")
        with tempfile.TemporaryDirectory(prefix="toolkit-data-") as folder:
            path = Path(folder, name)
            _fetch(remote, name, path, size)
            if remote.status(name) != (size, tag):
                raise RemoteError(f"{remote.url(name)} was replaced while it was read; start again")
            yield path
    finally:
        remote.close()


def _fetch(remote: Remote, name: str, path: Path, size: int) -> None:
    with path.open("wb") as file, ThreadPoolExecutor(_THREADS) as pool:

        def part(start: int) -> None:
            data = remote.part(name, start, min(start + _PART, size))
            os.pwrite(file.fileno(), data, start)

        list(pool.map(part, range(0, size, _PART)))


def tars_at(urls: Sequence[str], origin: Origin) -> tuple[Origin, list[str]]:
    """The folder that tars at URLs lie in, as an origin with the options of the given one, and their names.

    urls: tars, `{000..123}` for several; in object stores also `*`, or the folder. Raises ValueError for
    URLs of several folders, and for those that name no tar.
    """
    found: dict[str, list[str]] = {}
    for url in [one for given in urls for one in braces(given)]:
        kind = scheme(url)
        folder, _, name = url.rpartition("/")
        listed = kind not in ("http", "https")
        if not name.endswith(".tar") and listed and "*" not in name:
            folder, name = url.rstrip("/"), "*.tar"
        if "*" in folder or not name.endswith(".tar") or ("*" in name and not listed):
            raise ValueError(_refused(url, kind, folder))
        named = [name] if "*" not in name else _named(replace(origin, url=folder), name)
        if not named:
            raise ValueError(f"{folder} holds no file called {name}")
        found.setdefault(folder, []).extend(named)
    if len(found) != 1:
        raise ValueError(
            f"the tars lie in {len(found)} folders ({', '.join(found)}); index them one by one, and train on "
            "all with stages.NAME.mix"
        )
    ((folder, names),) = found.items()
    return replace(origin, url=folder), names


def _named(origin: Origin, pattern: str) -> list[str]:
    remote = Remote(origin)
    try:
        return remote.names(pattern)
    finally:
        remote.close()


def _refused(url: str, kind: str, folder: str) -> str:
    if kind in ("http", "https"):
        return (
            f"{url} names no tar, and an HTTP server lists no files; name them, such as "
            f"{url.rstrip('/') if url.endswith('/') else folder}/{{00000..00099}}.tar"
        )
    return f"{url}: `*` may stand in the name of the tars alone, such as {kind}://bucket/folder/*.tar"
