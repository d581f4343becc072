"""Converts a split once and finds it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from data.atomic import locked, remove_drafts
from data.images import extension
from data.index import MANIFEST
from data.shards import Pictured, write_shards


def converted(
    out: Path,
    records: Callable[[], Iterable[Pictured]],
    about: Mapping[str, Any],
    *,
    shard_bytes: int = 256 << 20,
    kind_of: Callable[[bytes], str | None] = extension,
    stands_for: str = "",
) -> Path:
    """`out`, filled from `records()` if it is not there yet; a second process waits for the first."""
    if (out / MANIFEST).exists():
        return out
    with locked(out.parent / f".{out.name}.lock", f"converting data to {out}"):
        remove_drafts(out)
        if not (out / MANIFEST).exists():
            write_shards(
                records(), out, about=about, shard_bytes=shard_bytes, kind_of=kind_of, stands_for=stands_for
            )
    return out
