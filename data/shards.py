"""Writes records as tar shards in webdataset's convention, with index and manifest beside them."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from data.atomic import draft_of, publish
from data.images import extension
from data.index import IMAGE_KINDS, MANIFEST, index_bytes, make_manifest, manifest_hash, read_manifest
from data.records import MAX_JSON, dialogs_of, dump_json

Record = tuple[Mapping[str, Any], bytes | None]
"""The JSON of a record (see data.records) and its picture's original bytes, None for text only."""

_BLOCK = 512
_COLUMNS = (
    *("json_offset", "json_size", "json_crc"),
    *("image_offset", "image_size", "image_crc", "image_kind"),
    "dialogs",
)


def write_shards(
    records: Iterable[Record], out: Path, *, shard_bytes: int = 256 << 20, about: Mapping[str, Any]
) -> Path:
    """Writes `out/shard-000000.tar` ... with an index each, then `out/manifest.json`; returns `out`.

    Members are `{key}.png|jpg|webp` (original bytes) and `{key}.json`; the key is a zero-padded
    running number. Equal records give equal bytes. shard_bytes: size at which a new shard begins.
    `about` goes into the manifest and is read after the last record. Everything is written beside
    `out` and renamed: `out` exists whole or not at all. Two writers of the same data may race.
    Raises ValueError for a malformed record, for no records, and if `out` holds other data.
    """
    if (out / MANIFEST).exists():
        raise ValueError(f"{out} holds converted data already; delete it or choose another folder")
    with draft_of(out) as draft:
        shards = list(_write_all(records, draft, shard_bytes))
        if not shards:
            raise ValueError(f"no records to write to {out}")
        manifest = make_manifest(shards, about)
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if not publish(draft, out) and manifest_hash(read_manifest(out)) != manifest_hash(manifest):
            raise ValueError(
                f"{out} was filled with other data meanwhile; delete it or choose another folder"
            )
    return out


def _write_all(records: Iterable[Record], folder: Path, shard_bytes: int) -> Iterator[dict[str, Any]]:
    """Writes shard after shard; yields their manifest entries."""
    shard: _Shard | None = None
    n_shards = 0
    try:
        for number, (meta, image) in enumerate(records):
            text, kind, n_dialogs = _checked(meta, image, f"record {number:,}")
            if shard is not None and shard.size + _padded(text) + _padded(image or b"") > shard_bytes:
                yield shard.finish()
                shard = None
            if shard is None:
                shard = _Shard(folder / f"shard-{n_shards:06d}.tar")
                n_shards += 1
            shard.add(f"{number:08d}", text, image, kind, n_dialogs)
        if shard is not None:
            yield shard.finish()
    finally:
        if shard is not None:
            shard.close()


def _checked(meta: Mapping[str, Any], image: bytes | None, where: str) -> tuple[bytes, str, int]:
    """(JSON bytes, image extension or "", number of dialogs) of a record."""
    n_dialogs = len(dialogs_of(meta, where))
    text = dump_json(meta)
    if len(text) > MAX_JSON:
        raise ValueError(f"{where}: the JSON has {len(text):,} bytes, at most {MAX_JSON:,} can be read back")
    if image is None:
        return text, "", n_dialogs
    kind = extension(image)
    if kind is None:
        raise ValueError(
            f"{where}: the image is no JPEG, PNG or WebP (starts with {image[:8]!r}); convert it first"
        )
    if len(image) >= 1 << 32:
        raise ValueError(f"{where}: the image has {len(image):,} bytes, less than 4 GiB is possible")
    return text, kind, n_dialogs


def _padded(data: bytes) -> int:
    """Bytes that a member takes in a tar file: header and data in blocks of 512."""
    return _BLOCK + -(-len(data) // _BLOCK) * _BLOCK if data else 0


class _Shard:
    """A tar file being written, and the columns of its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # tarfile writes in small pieces; the buffer turns them into few system calls.
        self._file = path.open("wb", buffering=1 << 20)
        self.tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.keys: list[str] = []
        self.columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}

    @property
    def size(self) -> int:
        return int(self.tar.offset)

    def add(self, key: str, text: bytes, image: bytes | None, kind: str, n_dialogs: int) -> None:
        offset = -1 if image is None else self._member(f"{key}.{kind}", image)
        row = {
            "image_offset": offset,
            "image_size": len(image or b""),
            "image_crc": zlib.crc32(image or b""),
            "image_kind": IMAGE_KINDS.index(kind),
            "json_offset": self._member(f"{key}.json", text),
            "json_size": len(text),
            "json_crc": zlib.crc32(text),
            "dialogs": n_dialogs,
        }
        self.keys.append(key)
        for name, value in row.items():
            self.columns[name].append(value)

    def _member(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data."""
        info = tarfile.TarInfo(name)  # owner, group and times are zero by default
        info.size = len(data)
        start = self.size
        self.tar.addfile(info, BytesIO(data))
        return start + _BLOCK

    def close(self) -> None:
        self.tar.close()
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
            "images": sum(kind > 0 for kind in self.columns["image_kind"]),
            "index": index.name,
            "index_sha256": hashlib.sha256(content).hexdigest(),
        }
