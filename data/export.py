"""The way back: a shard folder as LLaVA JSON and pictures, each with the bytes it had."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data.atomic import draft_of, publish
from data.reader import ShardReader
from data.records import dialogs_of, dump_json

Progress = Callable[[int, int], None]

_ADDED = ("w", "h")
"""What converting LLaVA JSON puts into a record."""


def export(folder: Path, out: Path, *, progress: Progress | None = None) -> int:
    """Writes `out/data.json` and `out/images/`; returns the number of records written.

    Pictures get the paths their records name, or `{key}.jpg` where none is named or it leads elsewhere. A
    record with several independent dialogs becomes as many. `out` appears whole or not at all. Raises
    DamagedSample for what cannot be read, ValueError for an `out` that is not empty and for features.
    """
    reader = ShardReader(folder)
    if "features" in reader.manifest["about"]:
        raise ValueError(f"{folder} holds features, not pictures; export the folder they were made from")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; delete it or name another --out")
    count = 0
    with draft_of(out) as draft:
        (draft / "images").mkdir()
        pictures = _Pictures(draft / "images")
        with (draft / "data.json").open("wb") as file:
            file.write(b"[")
            for i in range(len(reader)):
                for item in _items(reader, i, pictures):
                    file.write((b",\n" if count else b"\n") + dump_json(item))
                    count += 1
                if progress is not None:
                    progress(i + 1, len(reader))
            file.write(b"\n]\n")
        if not publish(draft, out):
            raise ValueError(f"{out} was filled meanwhile; delete it or name another --out")
    return count


def _items(reader: ShardReader, i: int, pictures: _Pictures) -> Iterator[dict[str, Any]]:
    """The LLaVA records of record i; writes its pictures."""
    key, record = reader.key(i), reader.record(i)
    converted = reader.manifest["about"].get("source") == "llava"
    rest = {k: v for k, v in record.items() if k != "dialogs" and not (converted and k in _ADDED)}
    held = reader.images(i)
    named = record.get("image")
    names = named if isinstance(named, list) else [named]
    stored = [
        pictures.add(names[n] if len(names) == len(held) else None, f"{key}.{n}.{kind}", data)
        for n, (kind, data) in enumerate(held)
    ]
    rest.setdefault("id", key)
    if stored:
        rest["image"] = stored if len(stored) > 1 or isinstance(named, list) else stored[0]
    if "conversations" in record:
        yield rest
        return
    for number, dialog in enumerate(dialogs_of(record, key)):
        turns = [{"from": turn.role, "value": turn.text} for turn in dialog.turns]
        yield {**rest, "id": f"{rest['id']}-{number}", "type": dialog.kind, "conversations": turns}


class _Pictures:
    """Picture files of an export; equal pictures of one name are written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: dict[str, bytes] = {}

    def add(self, wanted: object, fallback: str, data: bytes) -> str:
        """Writes a picture, under its wanted path if that is safe and free; returns the path."""
        name = wanted if isinstance(wanted, str) and _safe(wanted) else fallback
        digest = hashlib.sha256(data).digest()
        if self._written.get(name, digest) != digest:
            name = f"other/{fallback}"
        if name not in self._written:
            file = self._folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            self._written[name] = digest
        return name


def _safe(name: str) -> bool:
    """Whether a path stays below the folder it is put into, on every system, and reads as it is written."""
    path = PurePosixPath(name)
    plain = str(path) == name and not any(c in name for c in "\0\\:")
    return plain and not path.is_absolute() and ".." not in path.parts and bool(path.parts)
