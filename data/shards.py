"""Writes records as tar shards in webdataset's convention, with index and manifest beside them."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.atomic import draft_of, publish
from data.images import extension
from data.index import IMAGE_KINDS, MANIFEST, index_bytes, make_manifest, manifest_hash, read_manifest
from data.records import MAX_JSON, dialogs_of, dump_json

Record = tuple[Mapping[str, Any], bytes | None]
"""The JSON of a record (see data.records) and its picture's original bytes, None for text only."""

Pictured = tuple[Mapping[str, Any], bytes | Sequence[bytes] | None]
"""A record that may have several pictures."""

_BLOCK = 512
_COLUMNS = (
    *("json_offset", "json_size", "json_crc"),
    *("image_offset", "image_size", "image_crc", "image_kind"),
    "dialogs",
    *("more_record", "more_offset", "more_size", "more_crc", "more_kind"),
)


def write_shards(
    records: Iterable[Pictured],
    out: Path,
    *,
    shard_bytes: int = 256 << 20,
    about: Mapping[str, Any],
    kind_of: Callable[[bytes], str | None] = extension,
    stands_for: str = "",
) -> Path:
    """Writes `out/shard-000000.tar` ... with an index each, then `out/manifest.json`; returns `out`.

    Members are `{key}.png|jpg|webp` (original bytes) and `{key}.json`; of several pictures
    `{key}.0.png`, `{key}.1.jpg` and so on. The key is a zero-padded running number. Equal records give
    equal bytes. shard_bytes: size at which a new shard begins. kind_of: bytes -> extension of a picture.
    stands_for: manifest hash of the data whose samples these are in another form.
    `about` goes into the manifest and is read after the last record. Everything is written beside
    `out` and renamed: `out` exists whole or not at all. Two writers of the same data may race.
    Raises ValueError for a malformed record, for no records, and if `out` holds other data.
    """
    if (out / MANIFEST).exists():
        raise ValueError(f"{out} holds converted data already; delete it or choose another folder")
    with draft_of(out) as draft:
        shards = list(_write_all(records, draft, shard_bytes, kind_of))
        if not shards:
            raise ValueError(f"no records to write to {out}")
        manifest = make_manifest(shards, about, stands_for)
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if not publish(draft, out) and manifest_hash(read_manifest(out)) != manifest_hash(manifest):
            raise ValueError(
                f"{out} was filled with other data meanwhile; delete it or choose another folder"
            )
    return out


def _write_all(
    records: Iterable[Pictured], folder: Path, shard_bytes: int, kind_of: Callable[[bytes], str | None]
) -> Iterator[dict[str, Any]]:
    """Writes shard after shard; yields their manifest entries."""
    shard: _Shard | None = None
    n_shards = 0
    try:
        for number, (meta, held) in enumerate(records):
            pictures = [] if held is None else [held] if isinstance(held, bytes) else list(held)
            text, n_dialogs = _checked(meta, f"record {number:,}")
            kinds = [_kind(picture, kind_of, f"record {number:,}") for picture in pictures]
            size = _padded(text) + sum(_padded(picture) for picture in pictures)
            if shard is not None and shard.size + size > shard_bytes:
                yield shard.finish()
                shard = None
            if shard is None:
                shard = _Shard(folder / f"shard-{n_shards:06d}.tar")
                n_shards += 1
            shard.add(f"{number:08d}", text, list(zip(kinds, pictures, strict=True)), n_dialogs)
        if shard is not None:
            yield shard.finish()
    finally:
        if shard is not None:
            shard.close()


def _checked(meta: Mapping[str, Any], where: str) -> tuple[bytes, int]:
    """(JSON bytes, number of dialogs) of a record."""
    n_dialogs = len(dialogs_of(meta, where))
    text = dump_json(meta)
    if len(text) > MAX_JSON:
        raise ValueError(f"{where}: the JSON has {len(text):,} bytes, at most {MAX_JSON:,} can be read back")
    return text, n_dialogs


def _kind(image: bytes, kind_of: Callable[[bytes], str | None], where: str) -> str:
    kind = kind_of(image)
    if kind is None:
        raise ValueError(
            f"{where}: the image is no JPEG, PNG or WebP (starts with {image[:8]!r}); convert it first"
        )
    if len(image) >= 1 << 32:
        raise ValueError(f"{where}: the image has {len(image):,} bytes, less than 4 GiB is possible")
    return kind


def _padded(data: bytes) -> int:
    """Bytes that a member takes in a tar file: header and data in blocks of 512."""
    return _BLOCK + -(-len(data) // _BLOCK) * _BLOCK if data else 0


# Owner, group and times are zero, the mode 0644.
_FIELDS = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
_REST = sum(_FIELDS[100:124]) + sum(_FIELDS[136:148]) + 8 * ord(" ") + sum(_FIELDS[156:])


def _header(name: str, size: int) -> bytes:
    """What `tarfile` writes in front of a member in USTAR form, without most of its cost.

    name: up to 100 ASCII characters; size: less than 8 GiB. Keys and pictures never come near either.
    """
    named, sized = name.encode("ascii").ljust(100, b"\0"), b"%011o\0" % size
    checksum = b"%06o\0 " % (_REST + sum(named) + sum(sized))
    return named + _FIELDS[100:124] + sized + _FIELDS[136:148] + checksum + _FIELDS[156:]


class _Shard:
    """A tar file being written, and the columns of its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=1 << 20)
        self.size = 0
        self.keys: list[str] = []
        self.columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}

    def add(self, key: str, text: bytes, pictures: Sequence[tuple[str, bytes]], n_dialogs: int) -> None:
        """Appends a record. pictures: (extension, bytes) of each."""
        numbered = [f"{key}.{i}" for i in range(len(pictures))] if len(pictures) > 1 else [key]
        spans = [
            (self._member(f"{stem}.{kind}", data), len(data), zlib.crc32(data), IMAGE_KINDS.index(kind))
            for stem, (kind, data) in zip(numbered, pictures, strict=False)
        ]
        first = spans[0] if spans else (-1, 0, 0, 0)
        for span in spans[1:]:
            self._row("more_", (len(self.keys), *span), ("record", "offset", "size", "crc", "kind"))
        self._row("image_", first, ("offset", "size", "crc", "kind"))
        self._row(
            "json_",
            (self._member(f"{key}.json", text), len(text), zlib.crc32(text)),
            ("offset", "size", "crc"),
        )
        self.columns["dialogs"].append(n_dialogs)
        self.keys.append(key)

    def _row(self, prefix: str, values: Sequence[int], names: Sequence[str]) -> None:
        for name, value in zip(names, values, strict=True):
            self.columns[prefix + name].append(value)

    def _member(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data."""
        self._file.write(_header(name, len(data)))
        self._file.write(data)
        self._file.write(bytes(-len(data) % _BLOCK))
        start = self.size + _BLOCK
        self.size = start + len(data) + -len(data) % _BLOCK
        return start

    def close(self) -> None:
        """Ends the tar with two empty blocks, filled up to tar's usual record size."""
        if not self._file.closed:
            self._file.write(bytes(2 * _BLOCK + -(self.size + 2 * _BLOCK) % tarfile.RECORDSIZE))
            self._file.close()

    def finish(self) -> dict[str, Any]:
        """Closes the shard, writes its index and returns its manifest entry."""
        self.close()
        content = index_bytes(self.keys, self.columns)
        index = self.path.with_suffix(".index")
        index.write_bytes(content)
        return {
            "url": self.path.name,
            "nsamples": len(self.keys),
            "filesize": self.path.stat().st_size,
            "dialogs": sum(self.columns["dialogs"]),
            "images": sum(kind > 0 for kind in self.columns["image_kind"]) + len(self.columns["more_kind"]),
            "index": index.name,
            "index_sha256": hashlib.sha256(content).hexdigest(),
        }
