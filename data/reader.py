"""Reads records of a shard folder by byte range, in any order, every member checked by CRC-32."""

from __future__ import annotations

import hashlib
import logging
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.files import Files, LocalFiles
from data.index import Index, Span, joined, manifest_hash, parse_index, read_manifest
from data.mirror import RemoteFiles, open_origin
from data.records import Example, dialogs_of, parse_record

_BLOCK = 512
log = logging.getLogger("toolkit.data")

_KEPT_JSON = 16 << 20
"""Bytes of JSON whose records stay parsed; a small question set is parsed once in all."""


AGAIN = "copy the shard again or convert again"
"""What helps with a member that is damaged."""


class DamagedSample(ValueError):
    """A member that cannot be read; the message names shard, key, member, byte offset, cause and fix."""

    def __init__(
        self,
        *,
        shard: str,
        key: str,
        member: str,
        offset: int,
        cause: str,
        fix: str = AGAIN,
    ) -> None:
        self.shard, self.key, self.member, self.offset, self.cause = shard, key, member, offset, cause
        self.fix = fix
        super().__init__(f"{shard}: key {key}: member {member} at byte {offset:,}: {cause}; {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes send errors by pickle, which would call __init__ with the message alone.
        names = ("shard", "key", "member", "offset", "cause", "fix")
        return _damaged, tuple(getattr(self, name) for name in names)


def _damaged(shard: str, key: str, member: str, offset: int, cause: str, fix: str) -> DamagedSample:
    return DamagedSample(shard=shard, key=key, member=member, offset=offset, cause=cause, fix=fix)


class ExampleTable(NamedTuple):
    """Where each example lies: record index [J] and dialog index in that record [J]."""

    record: NDArray[np.int32]
    dialog: NDArray[np.int32]


class ShardReader:
    """Random access to a shard folder. Safe to pickle and to use after a fork; use one per thread.

    Opening reads manifest and indexes and compares every shard file's size. Raises ValueError
    naming the shard if one is missing or has another size, or if an index was changed.
    whole=False: such a shard is only warned of, and what is missing of it is DamagedSample when read.
    """

    def __init__(self, folder: Path | str, *, whole: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        shards: list[dict[str, Any]] = self.manifest["shardlist"]
        self._names = [str(shard["url"]) for shard in shards]
        self._layouts = [shard.get("layout") for shard in shards]
        self._ends = list(accumulate(int(shard["nsamples"]) for shard in shards))
        self._files = self._opened(shards, whole=whole)
        parts = (_load_index(self.folder, shard) for shard in shards)
        self._index = joined(parts, sum(shard["nsamples"] for shard in shards))
        self._kept: dict[int, tuple[Example, ...]] = {}
        self._kept_json = 0
        self.manifest_hash = manifest_hash(self.manifest)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._index)

    def _opened(self, shards: list[dict[str, Any]], *, whole: bool) -> Files:
        origin = open_origin(self.folder)
        if origin is None:
            for shard in shards:
                try:
                    _check_file(self.folder, shard)
                except ValueError as error:
                    if whole:
                        raise
                    log.warning("%s", error)
            return LocalFiles(self.folder)
        sizes = {str(shard["url"]): int(shard["filesize"]) for shard in shards}
        # Named by what is cached: folders of one name may stand for other shards.
        identity = hashlib.sha256(f"{origin.url}\n{manifest_hash(self.manifest)}".encode()).hexdigest()[:16]
        return RemoteFiles(origin, sizes, identity)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_json": 0}

    def key(self, i: int) -> str:
        return self._index.key(i)

    def dialogs(self, i: int) -> int:
        """Number of dialogs of record i."""
        return int(self._index.dialogs[i])

    def has_image(self, i: int) -> bool:
        return bool(self._index.image_kind[i])

    def n_images(self, i: int) -> int:
        """Number of pictures of record i."""
        return self._index.n_images(i)

    def record(self, i: int) -> dict[str, Any]:
        """The JSON of record i; for a caption of foreign shards, the one dialog that is made of it."""
        text, layout = self._member(i, self._text(i)), self._layouts[self._shard_number(i)]
        return parse_record(text, f"{self._shard(i)}: key {self.key(i)}", layout, self.n_images(i))

    def _text(self, i: int) -> Span:
        layout, span = self._layouts[self._shard_number(i)], self._index.text(i)
        return span if layout is None else span._replace(kind=str(layout["text"]))

    def image_bytes(self, i: int) -> bytes | None:
        """The picture of record i as it was converted, its first if it has several, None for text only."""
        spans = self._index.images(i)
        return self._member(i, spans[0]) if spans else None

    def images(self, i: int) -> list[tuple[str, bytes]]:
        """(extension, bytes) of every picture of record i, in order."""
        return [(span.kind, self._member(i, span)) for span in self._index.images(i)]

    def place(self, i: int, *, image: bool) -> tuple[str, Span]:
        """(shard, where it lies) of the first picture of record i, or of its text."""
        spans = self._index.images(i)
        return self._shard(i), spans[0] if image and spans else self._text(i)

    def raw(self, i: int) -> list[bytes]:
        """The bytes of every member of record i, text first, as they are: for tools that only move bytes.

        Nothing is checked. Raises DamagedSample for what is not there.
        """
        index, shard = self._index, self._shard(i)
        if len(index.more_record) and index.n_images(i) > 1:
            return [self._read(i, span) for span in (index.text(i), *index.images(i))]
        spans = [(index.json_block.item(i), index.json_size.item(i))]
        if index.image_kind.item(i):
            spans.append((index.image_block.item(i), index.image_size.item(i)))
        read = [self._files.read(shard, block * _BLOCK, size) for block, size in spans]
        if any(cause for _, cause in read):
            return [self._read(i, span) for span in (index.text(i), *index.images(i))]
        return [data for data, _ in read]

    def prefetch(self, records: Iterable[int]) -> None:
        """Brings the members of these records nearer, several at a time, if they are behind a URL."""
        if isinstance(self._files, LocalFiles):
            return
        spans = ((self._shard(i), s) for i in records for s in (self._index.text(i), *self._index.images(i)))
        self._files.prefetch((shard, span.offset, span.size) for shard, span in spans)

    @cached_property
    def examples(self) -> ExampleTable:
        """Every dialog of every record, in order."""
        counts = self._index.dialogs
        if bool((counts == 1).all()):
            return ExampleTable(np.arange(len(counts), dtype=np.int32), np.zeros(len(counts), np.int32))
        record = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        first = np.cumsum(counts, dtype=np.int32) - counts.astype(np.int32)
        return ExampleTable(record, np.arange(len(record), dtype=np.int32) - np.repeat(first, counts))

    @property
    def text_sizes(self) -> NDArray[np.int64]:
        """Bytes of text of each example, [J]; dialogs of one record count alike."""
        record = self.examples.record
        return self._index.json_size[record].astype(np.int64) // self._index.dialogs[record]

    def example(self, j: int) -> Example:
        """Dialog j, counted over all records."""
        return self._examples_of(int(self.examples.record[j]))[int(self.examples.dialog[j])]

    def all_examples(self) -> Iterator[Example]:
        """Every example in order."""
        for i in range(len(self)):
            yield from self._examples_of(i)

    def _examples_of(self, i: int) -> tuple[Example, ...]:
        """Examples of record i, kept parsed within a memory limit, as its dialogs are read one by one."""
        found = self._kept.get(i)
        if found is None:
            found = self._parsed(i)
            self._kept_json += int(self._index.json_size[i])
            if self._kept_json > _KEPT_JSON:
                self._kept, self._kept_json = {}, int(self._index.json_size[i])
            self._kept[i] = found
        return found

    def _parsed(self, i: int) -> tuple[Example, ...]:
        key, record = self.key(i), self.record(i)
        dialogs = dialogs_of(record, f"{self._shard(i)}: key {key}")
        if len(dialogs) != self.dialogs(i):
            raise ValueError(
                f"{self._shard(i)}: key {key}: {len(dialogs)} dialogs, the index says {self.dialogs(i)}"
            )
        keys = [f"{key}-{n}" for n in range(len(dialogs))] if "dialogs" in record else [key]
        image = self.has_image(i)
        return tuple(Example(k, d.turns, d.kind, i, image) for k, d in zip(keys, dialogs, strict=True))

    def _shard(self, i: int) -> str:
        return self._names[self._shard_number(i)]

    def _shard_number(self, i: int) -> int:
        return bisect_right(self._ends, i)

    def _member(self, i: int, span: Span) -> bytes:
        """A member's data, checked."""
        data = self._read(i, span)
        if zlib.crc32(data) != span.crc:
            # What is damaged may be a cache, or a shard may be newer than what was cached of it.
            fresh, why = self._files.again(self._shard(i), span.offset, span.size)
            if fresh and zlib.crc32(fresh) == span.crc:
                return fresh
            found = f"CRC-32 is {zlib.crc32(fresh or data):08x}, the index says {span.crc:08x}"
            raise self._damaged(i, span, f"{why or 'damaged data'}: {found}")
        return data

    def _read(self, i: int, span: Span) -> bytes:
        data, cause = self._files.read(self._shard(i), span.offset, span.size)
        if cause:
            raise self._damaged(i, span, cause)
        return data

    def _damaged(self, i: int, span: Span, cause: str) -> DamagedSample:
        key = self.key(i)
        return DamagedSample(
            shard=self._shard(i), key=key, member=f"{key}.{span.kind}", offset=span.offset, cause=cause
        )


def _check_file(folder: Path, shard: dict[str, Any]) -> None:
    """ValueError if a shard's file is not there in full."""
    file, name = folder / shard["url"], shard["url"]
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ValueError(
            f"{name} is missing in {folder}: {error.strerror}; copy it again or convert again"
        ) from error
    if size != shard["filesize"]:
        raise ValueError(
            f"{name} in {folder} has {size:,} bytes, the manifest says {shard['filesize']:,}: the file "
            "was cut or replaced; copy it again or convert again"
        )


def _load_index(folder: Path, shard: dict[str, Any]) -> Index:
    """The checked index of one shard."""
    path = folder / shard["index"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"the index {path} cannot be read: {error.strerror}; convert the data again"
        ) from error
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        raise ValueError(
            f"{path} is not the index that the manifest was written with; convert the data again"
        )
    index = parse_index(content, str(path))
    if len(index) != shard["nsamples"]:
        raise ValueError(
            f"{path} lists {len(index):,} records, the manifest {shard['nsamples']:,}; convert again"
        )
    return index
