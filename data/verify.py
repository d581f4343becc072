"""Finds what is wrong with a shard folder, member by member: structure, checksums, texts, pictures."""

from __future__ import annotations

import hashlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data.content import check_picture, check_text
from data.faults import Fault
from data.fetched import fetched
from data.images import BadPicture
from data.index import FEATURE_KIND, Index, Span, parse_index, read_manifest
from data.members import named
from data.mirror import open_origin
from data.records import BadRecord
from data.remote import Origin, RemoteError
from data.tar import BLOCK, Member, scan

Progress = Callable[[int, int], None]


class _Held(NamedTuple):
    """A member that the index promises."""

    key: str
    span: Span


def verify(folder: Path, *, full: bool = False, progress: Progress | None = None) -> Iterator[Fault]:
    """Every fault of an indexed folder, at most one for each member; nothing is changed.

    Shards behind a URL are fetched whole, one at a time. full: decode every picture, otherwise read its
    header. progress is called with (shards done, in all). Raises ValueError for a folder without a manifest.
    """
    shards: list[dict[str, Any]] = read_manifest(folder)["shardlist"]
    origin = open_origin(folder)
    for number, shard in enumerate(shards):
        yield from _shard(folder, shard, origin, full=full)
        if progress is not None:
            progress(number + 1, len(shards))


def _shard(folder: Path, shard: Mapping[str, Any], origin: Origin | None, *, full: bool) -> Iterator[Fault]:
    name = str(shard["url"])
    if origin is None:
        yield from _file(folder, folder / name, shard, full=full)
        return
    try:
        with fetched(origin, name) as path:
            yield from _file(folder, path, shard, full=full)
    except RemoteError as error:
        yield Fault(name, "", "", 0, f"cannot be read: {error}")


def _file(folder: Path, path: Path, shard: Mapping[str, Any], *, full: bool) -> Iterator[Fault]:
    name = str(shard["url"])
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        yield Fault(name, "", "", 0, f"cannot be read: {error.strerror}; copy the shard again")
        return
    try:
        index = _index(folder, shard)
        size = os.fstat(handle).st_size
        if size != shard["filesize"]:
            told = shard["filesize"]
            yield Fault(
                name, "", "", min(size, told), f"the file has {size:,} bytes, the manifest says {told:,}"
            )
        if isinstance(index, Fault):
            yield index
        else:
            yield from _members(name, handle, size, index, shard.get("layout"), full=full)
    finally:
        os.close(handle)


def _index(folder: Path, shard: Mapping[str, Any]) -> Index | Fault:
    """The index as the manifest knows it, or why it cannot be used."""
    file = folder / str(shard["index"])
    try:
        content = file.read_bytes()
    except OSError as error:
        return Fault(
            file.name, "", "", 0, f"the index cannot be read: {error.strerror}; index the shard again"
        )
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        return Fault(file.name, "", "", 0, "not the index that the manifest was written with; copy it again")
    try:
        return parse_index(content, file.name)
    except ValueError as error:
        return Fault(file.name, "", "", 0, str(error))


def _members(
    shard: str, handle: int, size: int, index: Index, layout: Mapping[str, Any] | None, *, full: bool
) -> Iterator[Fault]:
    held = sorted(_promised(index, layout), key=lambda one: one.span.offset)
    starts = [one.span.offset for one in held]
    told: set[int] = set()
    present: dict[int, Member] = {}
    for item in scan(handle, size):
        if isinstance(item, Member):
            present[item.offset] = item
            continue
        owner = _owner(held, starts, item.offset)
        if owner is not None:
            told.add(owner.span.offset)
        key, kind = (owner.key, owner.span.kind) if owner else ("", "")
        yield Fault(shard, key, kind, item.offset, item.cause)
    yield from _unlisted(shard, present, set(starts), layout)
    for one in held:
        if one.span.offset not in told:
            cause = _broken(handle, one, present.get(one.span.offset))
            if cause:
                told.add(one.span.offset)
                yield Fault(shard, one.key, one.span.kind, one.span.offset, cause)
    yield from _contents(shard, handle, index, told, layout, full=full)


def _promised(index: Index, layout: Mapping[str, Any] | None) -> Iterator[_Held]:
    for i in range(len(index)):
        text = index.text(i)
        yield _Held(index.key(i), text if layout is None else text._replace(kind=str(layout["text"])))
        for span in index.images(i):
            yield _Held(index.key(i), span)


def _owner(held: list[_Held], starts: list[int], offset: int) -> _Held | None:
    """The promised member whose header or data covers a byte; None for the space between."""
    i = bisect_right(starts, offset + BLOCK) - 1
    if i < 0:
        return None
    end = held[i].span.offset + -(-held[i].span.size // BLOCK) * BLOCK
    return held[i] if held[i].span.offset - BLOCK <= offset < end else None


def _unlisted(
    shard: str, present: Mapping[int, Member], listed: set[int], layout: Mapping[str, Any] | None
) -> Iterator[Fault]:
    """Members that the index does not know; shards of others may hold any."""
    if layout is None:
        for offset, member in present.items():
            if offset not in listed:
                key, _, kind = member.name.rpartition(".")
                yield Fault(shard, key, kind, offset, "the member is not in the index")


def _broken(handle: int, one: _Held, found: Member | None) -> str:
    """Why a promised member is not there as it was written, or ""."""
    if found is None:
        return "the tar has no member here: it was cut, damaged or replaced; copy the shard again"
    if not named(found.name, one.key):
        return f"the member is called {found.name!r}: headers were exchanged; copy the shard again"
    if found.size != one.span.size:
        return f"the member has {found.size:,} bytes, the index says {one.span.size:,}"
    crc = zlib.crc32(os.pread(handle, one.span.size, one.span.offset))
    if crc != one.span.crc:
        return f"damaged data: CRC-32 is {crc:08x}, the index says {one.span.crc:08x}; copy the shard again"
    return ""


def _contents(
    shard: str, handle: int, index: Index, told: set[int], layout: Mapping[str, Any] | None, *, full: bool
) -> Iterator[Fault]:
    """Texts and pictures of what is whole."""
    for i in range(len(index)):
        text, pictures = index.text(i), index.images(i)
        for span in pictures:
            if span.offset in told or span.kind == FEATURE_KIND:
                continue
            try:
                check_picture(os.pread(handle, span.size, span.offset), full=full)
            except BadPicture as error:
                yield Fault(shard, index.key(i), span.kind, span.offset, str(error))
        if text.offset not in told:
            kind = "json" if layout is None else str(layout["text"])
            try:
                dialogs = check_text(os.pread(handle, text.size, text.offset), layout, len(pictures))
            except BadRecord as error:
                yield Fault(shard, index.key(i), kind, text.offset, str(error))
                continue
            if dialogs != int(index.dialogs[i]):
                cause = f"{dialogs} dialogs, the index says {int(index.dialogs[i])}"
                yield Fault(shard, index.key(i), kind, text.offset, cause)
