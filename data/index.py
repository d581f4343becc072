"""The sidecar index of a shard and the manifest of a folder: what makes plain tar files exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

MANIFEST = "manifest.json"
FORMAT = 1
IMAGE_KINDS = ("", "png", "jpg", "webp")
"""Meaning of `Index.image_kind`: the extension of the image member, "" for a text-only record."""


@dataclass(frozen=True)
class Index:
    """Arrays over records, [n] each; offsets are of a member's data from the start of its tar file."""

    key_bytes: NDArray[np.uint8]  # all keys joined, ASCII
    key_end: NDArray[np.uint32]  # where each key ends in key_bytes
    json_offset: NDArray[np.int64]
    json_size: NDArray[np.uint32]
    json_crc: NDArray[np.uint32]
    image_offset: NDArray[np.int64]
    image_size: NDArray[np.uint32]
    image_crc: NDArray[np.uint32]
    image_kind: NDArray[np.uint8]
    dialogs: NDArray[np.uint32]  # number of dialogs in the record

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, i: int) -> str:
        start = int(self.key_end[i - 1]) if i else 0
        return self.key_bytes[start : int(self.key_end[i])].tobytes().decode("ascii")


_DTYPES: dict[str, Any] = {
    "key_bytes": np.uint8, "key_end": np.uint32,
    "json_offset": np.int64, "json_size": np.uint32, "json_crc": np.uint32,
    "image_offset": np.int64, "image_size": np.uint32, "image_crc": np.uint32,
    "image_kind": np.uint8, "dialogs": np.uint32,
}  # fmt: skip


def index_bytes(keys: Sequence[str], columns: Mapping[str, Sequence[int]]) -> bytes:
    """The file content of an index; columns are named as the fields of `Index`."""
    joined = "".join(keys).encode("ascii")
    arrays = {name: np.asarray(values, dtype=_DTYPES[name]) for name, values in columns.items()}
    arrays["key_bytes"] = np.frombuffer(joined, dtype=np.uint8)
    arrays["key_end"] = np.cumsum([len(key) for key in keys]).astype(np.uint32)
    return save(arrays)


def parse_index(data: bytes, where: str) -> Index:
    """The index in a file's content; raises ValueError naming `where` if it is none."""
    try:
        index = Index(**load(data))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{where}: not an index of this toolkit: {error}; convert the data again") from error
    wrong = [name for name, dtype in _DTYPES.items() if getattr(index, name).dtype != dtype]
    if wrong:
        raise ValueError(
            f"{where}: column {wrong[0]!r} has another type than it should; convert the data again"
        )
    return index


def joined(parts: Sequence[Index]) -> Index:
    """One index over all shards, in shard order; offsets stay relative to each record's own shard."""
    columns = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Index)}
    lengths = [len(part.key_bytes) for part in parts]
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), [len(part) for part in parts])
    columns["key_end"] = (columns["key_end"] + starts).astype(np.uint32)
    return Index(**columns)


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over what the shards hold (every index holds a CRC-32 of every member), not over notes."""
    held = {"format": manifest["format"], "shardlist": manifest["shardlist"]}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def make_manifest(shards: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a folder; `shardlist` uses the field names that webdataset's wids reads."""
    counted = ("nsamples", "dialogs", "images", "filesize")
    totals = {name: sum(shard[name] for shard in shards) for name in counted}
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "format": FORMAT,
        "shardlist": [dict(shard) for shard in shards],
        "totals": {"shards": len(shards), **totals},
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
