"""The sidecar index of a shard and the manifest of a folder: what makes plain tar files exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

MANIFEST = "manifest.json"
FORMAT = 1
FEATURE_KIND = "safetensors"
IMAGE_KINDS = ("", "png", "jpg", "webp", FEATURE_KIND)
"""Meaning of `Index.image_kind`: the extension of the image member, "" for a text-only record. The last
one stands for the features of a frozen encoder in place of the picture (data.feature_shards)."""

_BLOCK = 512


class Span(NamedTuple):
    """Where a member's data lies in its tar file. kind: its extension, one of IMAGE_KINDS for a picture."""

    kind: str
    offset: int
    size: int
    crc: int


class Offsets:
    """Byte offsets kept as numbers of 512-byte blocks, half the memory; -1 where there is no member."""

    def __init__(self, blocks: NDArray[np.uint32]) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, i: int) -> int:
        return int(self._blocks[i]) * _BLOCK or -1


@dataclass(frozen=True)
class Index:
    """Arrays over records, [n] each; blocks are those of a member's data from the start of its tar file.

    A record with several pictures has the first in `image_*`, the others in `more_*`, [k] each, sorted by
    `more_record`.
    """

    key_bytes: NDArray[np.uint8]  # all keys joined, UTF-8
    key_end: NDArray[np.uint32]  # where each key ends in key_bytes
    json_block: NDArray[np.uint32]
    json_size: NDArray[np.uint32]
    json_crc: NDArray[np.uint32]
    image_block: NDArray[np.uint32]  # 0 for a text-only record: data never begins at block 0
    image_size: NDArray[np.uint32]
    image_crc: NDArray[np.uint32]
    image_kind: NDArray[np.uint8]
    dialogs: NDArray[np.uint32]  # number of dialogs in the record
    more_record: NDArray[np.uint32]
    more_block: NDArray[np.uint32]
    more_size: NDArray[np.uint32]
    more_crc: NDArray[np.uint32]
    more_kind: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, i: int) -> str:
        start = self.key_end.item(i - 1) if i else 0
        return self.key_bytes[start : self.key_end.item(i)].tobytes().decode("utf-8")

    @property
    def json_offset(self) -> Offsets:
        return Offsets(self.json_block)

    @property
    def image_offset(self) -> Offsets:
        return Offsets(self.image_block)

    def text(self, i: int) -> Span:
        """The member that holds the text of record i."""
        block = self.json_block.item(i)
        return Span("json", block * _BLOCK or -1, self.json_size.item(i), self.json_crc.item(i))

    def images(self, i: int) -> list[Span]:
        """The pictures of record i in order, none for text only."""
        kind = self.image_kind.item(i)
        if not kind:
            return []
        first = _span(kind, self.image_block.item(i), self.image_size.item(i), self.image_crc.item(i))
        return [first, *(_span(*(column.item(j) for column in self._more)) for j in self._others(i))]

    def n_images(self, i: int) -> int:
        """Number of pictures of record i."""
        return len(self._others(i)) + 1 if self.image_kind.item(i) else 0

    def _others(self, i: int) -> range:
        if not len(self.more_record):
            return range(0)
        start, end = np.searchsorted(self.more_record, [i, i + 1])
        return range(int(start), int(end))

    @property
    def _more(self) -> tuple[NDArray[Any], ...]:
        return self.more_kind, self.more_block, self.more_size, self.more_crc


def _span(kind: int, block: int, size: int, crc: int) -> Span:
    return Span(IMAGE_KINDS[kind], block * _BLOCK, size, crc)


_DTYPES: dict[str, Any] = {
    "key_bytes": np.uint8, "key_end": np.uint32,
    "json_offset": np.int64, "json_size": np.uint32, "json_crc": np.uint32,
    "image_offset": np.int64, "image_size": np.uint32, "image_crc": np.uint32,
    "image_kind": np.uint8, "dialogs": np.uint32,
}  # fmt: skip
"""Columns of the file. Offsets there are bytes, -1 for none."""

_MORE: dict[str, Any] = {
    "more_record": np.uint32, "more_offset": np.int64, "more_size": np.uint32, "more_crc": np.uint32,
    "more_kind": np.uint8,
}  # fmt: skip
"""Columns that only a shard with several pictures in a record has."""


def index_bytes(keys: Sequence[str], columns: Mapping[str, Sequence[int]]) -> bytes:
    """The file content of an index; columns are named as in the file: `_DTYPES`, and `_MORE` if filled."""
    encoded = [key.encode("utf-8") for key in keys]
    dtypes = {**_DTYPES, **_MORE}
    filled = {n: v for n, v in columns.items() if n not in _MORE or len(v)}
    arrays = {name: np.asarray(values, dtype=dtypes[name]) for name, values in filled.items()}
    arrays["key_bytes"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    arrays["key_end"] = np.cumsum([len(key) for key in encoded]).astype(np.uint32)
    return save(arrays)


def parse_index(data: bytes, where: str) -> Index:
    """The index in a file's content; raises ValueError naming `where` if it is none."""
    try:
        found = load(data)
    except SafetensorError as error:
        raise ValueError(f"{where}: not an index of this toolkit: {error}; convert the data again") from error
    for name, dtype in _MORE.items():
        found.setdefault(name, np.zeros(0, dtype))
    dtypes = {**_DTYPES, **_MORE}
    if set(found) != set(dtypes):
        raise ValueError(
            f"{where}: not an index of this toolkit: it has the columns {', '.join(sorted(found))}; "
            "convert the data again"
        )
    wrong = [name for name, dtype in dtypes.items() if found[name].dtype != dtype]
    wrong += [name for name, values in found.items() if len(values) != len(found[_rows_of(name)])]
    wrong += [name for name in ("json_offset", "image_offset", "more_offset") if not _on_blocks(found[name])]
    if wrong:
        raise ValueError(f"{where}: column {wrong[0]!r} is not what it should be; convert the data again")
    for name in ("json", "image", "more"):
        blocks = np.maximum(found.pop(f"{name}_offset"), 0) // _BLOCK
        found[f"{name}_block"] = blocks.astype(np.uint32)
    return Index(**found)


def _rows_of(name: str) -> str:
    """The column that says how long column `name` must be."""
    if name == "key_bytes":
        return name
    return "more_record" if name in _MORE else "key_end"


def _on_blocks(offsets: NDArray[np.int64]) -> bool:
    """Whether all are -1 or whole blocks that 32 bits can count."""
    fit = (offsets % _BLOCK == 0) & (offsets > 0) & (offsets < _BLOCK << 32)
    return bool((fit | (offsets == -1)).all())


def joined(parts: Iterable[Index], n: int) -> Index:
    """One index over all shards, in shard order, of n records; offsets stay relative to each record's shard.

    Give an iterator, and a part is freed as soon as it is taken over.
    """
    types = {
        name.replace("_offset", "_block"): np.uint32 if "_offset" in name else t
        for name, t in _DTYPES.items()
    }
    # Allocated once: many small pieces would leave the process twice the memory.
    rows = {name: np.empty(n, t) for name, t in types.items() if name != "key_bytes"}
    keys, done = bytearray(), 0
    more: dict[str, list[NDArray[Any]]] = {f.name: [] for f in fields(Index) if f.name.startswith("more_")}
    for part in parts:
        end = done + len(part)
        for name, column in rows.items():
            column[done:end] = getattr(part, name)
        rows["key_end"][done:end] += np.uint32(len(keys))
        for name, found in more.items():
            found.append(getattr(part, name) + np.uint32(done if name == "more_record" else 0))
        keys += part.key_bytes.data
        done = end
    tails = {name: np.concatenate(found) for name, found in more.items()}
    return Index(key_bytes=np.frombuffer(keys, np.uint8), **rows, **tails)


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over what the shards hold (every index holds a CRC-32 of every member), not over notes.

    A folder that holds the samples of another one in another form (features) has that one's hash.
    """
    if manifest.get("stands_for"):
        return str(manifest["stands_for"])
    held = {"format": manifest["format"], "shardlist": manifest["shardlist"]}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def make_manifest(
    shards: Sequence[Mapping[str, Any]], about: Mapping[str, Any], stands_for: str = ""
) -> dict[str, Any]:
    """The manifest of a folder; `shardlist` uses the field names that webdataset's wids reads."""
    counted = ("nsamples", "dialogs", "images", "filesize")
    totals = {name: sum(shard[name] for shard in shards) for name in counted}
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "format": FORMAT,
        "shardlist": [dict(shard) for shard in shards],
        "totals": {"shards": len(shards), **totals},
        **({"stands_for": stands_for} if stands_for else {}),
        "about": dict(about),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard folder; raises ValueError that says what is wrong with the folder."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no shard folder: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; copy or convert the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ValueError(
            f"{file}: format {found!r}, this version reads format {FORMAT}; convert the data again"
        )
    return manifest
