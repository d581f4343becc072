"""Shards of a stream, opened one after the other, and what of them cannot be read."""

from __future__ import annotations

import json
import logging
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.atomic import locked
from data.records import dump_json
from data.remote import Origin, Remote

log = logging.getLogger("toolkit.data")

_ROUNDS = 3
"""Shards in a row, in rounds over all of them, that may give nothing before a stream ends."""

_FAULTS = (tarfile.TarError, OSError, ValueError, EOFError, zlib.error)


class LostShard(ValueError):
    """A shard that cannot be read to its end."""

    def __str__(self) -> str:
        # webdataset adds its stream and URL to the arguments of what passes through it.
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[LostShard], tuple[str]]:
        return LostShard, (str(self),)  # an open stream cannot leave its process


class Left:
    """What a tolerant stream leaves out: a line in the report, and one in the log, once for each sample.

    shard: the one that is being read. empty: shards in a row that gave no sample.
    """

    def __init__(self, policy: str, report: Path | None) -> None:
        self.tolerant, self.report = policy == "tolerant", report
        self.shard, self.empty = "", 0
        self._noted: set[tuple[str, str]] = set()

    def __call__(self, error: Exception) -> bool:
        """As a handler of webdataset: goes on after a fault of the shard, or raises."""
        if isinstance(error, LostShard) or not isinstance(error, _FAULTS):
            raise error
        told = str(error.args[0] if error.args else error).partition(" @ ")[0]
        cause = f"the rest of the shard is lost: {told or type(error).__name__}"
        if not self.tolerant:
            raise LostShard(
                f"{self.shard}: {cause}; verify the shards, or index them and read with data=shards"
            ) from error
        self.note({"shard": self.shard, "cause": cause})
        return True

    def seen(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The samples, noting that the shard gives some."""
        for sample in samples:
            self.empty = 0
            yield sample

    def note(self, row: dict[str, Any]) -> None:
        """Adds a row, unless this or another process has done so."""
        name = (str(row["shard"]), str(row.get("key", "")))
        if name in self._noted:
            return
        self._noted.add(name)
        if self.report is None:
            log.warning("left out: %s", json.dumps(row))
            return
        with (
            locked(self.report.with_name(f".{self.report.name}.lock"), "adding to the report"),
            self.report.open("a+b") as file,
        ):
            file.seek(0)
            if all(name != (r["shard"], r.get("key", "")) for r in map(json.loads, file)):
                file.write(dump_json(row) + b"\n")
                log.warning("left out: %s", json.dumps(row))


def opened(left: Left, n: int, names: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Adds an open stream to each of endless names of n shards: a local file, or a URL through fsspec.

    Raises LostShard once _ROUNDS times n shards in a row gave nothing.
    """
    remotes: dict[str, Remote] = {}
    try:
        for sample in names:
            if left.empty > _ROUNDS * n + 10:
                raise LostShard(f"no sample came of {left.empty:,} shards in a row, {left.shard} the last")
            left.empty += 1
            left.shard = sample["url"]
            try:
                stream = _stream(left.shard, remotes)
            except _FAULTS as error:
                left(error)
                continue
            with stream:
                yield {**sample, "stream": stream}
    finally:
        for remote in remotes.values():
            remote.close()


def _stream(url: str, remotes: dict[str, Remote]) -> Any:
    if "://" not in url:
        return open(url, "rb")
    folder, _, name = url.rpartition("/")
    return Steady(remotes.setdefault(folder, Remote(Origin(folder, ""))), name)


class Steady:
    """A remote shard from front to back; after an error it is opened again and goes on where it stood."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name, self._at = remote, name, 0
        self._file: Any = None
        self._ranges = True
        self.read(0)

    def read(self, size: int = -1) -> bytes:
        """As a file's; raises RemoteError for what further tries cannot read either."""
        data = self._remote.tried(self._name, lambda: self._once(size))
        self._at += len(data)
        return data

    def _once(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._open()
            return bytes(self._file.read(size))
        except ValueError:
            # What fsspec raises for an HTTP server that sends whole files only.
            self._file = None
            if not self._ranges or not self._remote.origin.url.startswith("http"):
                raise
            self._ranges = False
            return self._once(size)
        except Exception:  # every store's package has errors of its own
            self._file = None
            raise

    def _open(self) -> None:
        url = self._remote.url(self._name)
        if self._ranges:
            self._file = self._remote.fs.open(url, "rb")
            self._file.seek(self._at)
            return
        self._file = self._remote.fs.open(url, "rb", block_size=0)
        left = self._at
        while left:
            skipped = len(self._file.read(min(left, 1 << 20)))
            if not skipped:
                raise OSError(f"it ends before byte {self._at:,}, up to which it was read before")
            left -= skipped

    def __enter__(self) -> Steady:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
