"""Walks through a tar file block by block and says where it is damaged. Nothing is ever unpacked.

Format: POSIX.1-1988 ustar with the pax (POSIX.1-2001) and GNU long names that common tools write. Python's
`tarfile` stops without a word at the first damaged header, which is what this module is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_CHUNK = 1 << 20
_MAX_NOTE = 1 << 16
"""Largest pax or GNU long-name entry that is read."""
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}

_WITHOUT_DATA = (*_KINDS, b"5")


class Member(NamedTuple):
    """A regular file in the tar; offset: of its data."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """What is wrong at a byte of the tar; name: the member's, where it can still be read."""

    offset: int
    cause: str
    name: str = ""


class _Bad(Exception):
    """A header that cannot be used."""


def scan(handle: int, size: int) -> Iterator[Member | Damage]:
    """Members and damages of an open file of `size` bytes, in order.

    After a damaged header it goes on at the next whole one. Links, devices and names that lead out of the
    folder are damages; folders are passed over.
    """
    at, name, length = 0, "", -1
    while True:
        block = os.pread(handle, BLOCK, at)
        if len(block) < BLOCK:
            missing = "in a header" if block else "before the two empty blocks that end a tar file"
            yield Damage(at, f"the file was cut {missing}")
            return
        if not block.strip(b"\0"):
            following = _next_header(handle, size, at)
            if following < 0:
                return
            yield Damage(at, f"empty blocks in the middle; the next header is at byte {following:,}")
            at, name, length = following, "", -1
            continue
        try:
            kind, own_name, own_length = _header(block)
        except _Bad as error:
            yield Damage(at, f"damaged header: {error}")
            at, name, length = _next_header(handle, size, at), "", -1
            if at < 0:
                return
            continue
        data = at + BLOCK
        if kind in (b"x", b"L"):
            name, length, problem = _note(handle, kind, data, own_length, name, length)
            if problem:
                yield Damage(at, problem)
        elif kind not in (b"g", b"K"):
            name, own_length = name or own_name, own_length if length < 0 else length
            found = _member(kind, name, at, own_length, size)
            if found is not None:
                yield found
            name, length = "", -1
        # A link, device or folder has no data, whatever its header says of a size.
        at = data + (0 if kind in _WITHOUT_DATA else -(-own_length // BLOCK) * BLOCK)
        if at > size:
            return


def _header(block: bytes) -> tuple[bytes, str, int]:
    """(kind, name, size) of a header block."""
    try:
        told = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise _Bad("its checksum is no number") from error
    if told != sum(block) - sum(block[148:156]) + 8 * 32:
        raise _Bad("its checksum does not fit")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return block[156:157], name.decode("utf-8", "backslashreplace"), _number(block[124:136])


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form for more than 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):
        raise _Bad(f"its size {field!r} is no number")
    return int(digits, 8)


def _note(handle: int, kind: bytes, data: int, size: int, name: str, length: int) -> tuple[str, int, str]:
    """(name, size, what is wrong) that an entry in front of a member gives it."""
    if size > _MAX_NOTE:
        return name, length, f"an entry of {size:,} bytes for a long name; at most {_MAX_NOTE:,} are read"
    content = os.pread(handle, size, data)
    if kind == b"L":
        return content.rstrip(b"\0").decode("utf-8", "backslashreplace"), length, ""
    for key, value in _records(content):
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        elif key == b"size":
            if not value.isdigit():
                return name, length, f"its size {value[:20]!r} is no number"
            length = int(value)
    return name, length, ""


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax entry, `12 key=value\\n` each; a value may hold line ends."""
    while content:
        digits = content.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        if not len(digits) < length <= len(content):
            return
        key, _, value = content[len(digits) + 1 : length].removesuffix(b"\n").partition(b"=")
        yield key, value
        content = content[length:]


def _member(kind: bytes, name: str, at: int, length: int, size: int) -> Member | Damage | None:
    if kind == b"5":
        return None
    if kind not in _REGULAR:
        return Damage(at, f"{_KINDS.get(kind, f'an entry of kind {kind!r}')}, no file", name)
    if name.startswith("/") or ".." in name.split("/"):
        return Damage(at, f"the name {name!r} leads out of the folder", name)
    data = at + BLOCK
    if data + length > size:
        there = max(size - data, 0)
        return Damage(data, f"the file was cut in this member: {there:,} of {length:,} bytes are there", name)
    return Member(name, data, length)


def _next_header(handle: int, size: int, after: int) -> int:
    """Where the next whole header behind the block at `after` begins; -1 if there is none."""
    start = after + BLOCK
    while start < size:
        chunk = os.pread(handle, _CHUNK, start)
        for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[i + 257 : i + 262] == b"ustar" and _is_header(chunk[i : i + BLOCK]):
                return start + i
        start += _CHUNK
    return -1


def _is_header(block: bytes) -> bool:
    try:
        _header(block)
    except _Bad:
        return False
    return True
