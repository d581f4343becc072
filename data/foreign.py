"""Makes webdataset tars that others wrote readable as they are: an index per shard, and a manifest.

The tars themselves are only read. What belongs to a sample is said in data.members.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import sync
from data.content import MAX_PICTURE, check_picture, check_text
from data.faults import Fault
from data.fetched import fetched
from data.images import BadPicture
from data.index import IMAGE_KINDS, MANIFEST, index_bytes, make_manifest
from data.members import GIVEN_UP, MAX_FAULTS, Sample, members, split_name
from data.mirror import ORIGIN, write_origin
from data.records import MAX_JSON, BadRecord, parse_json
from data.remote import Origin
from data.tar import Member

_TRIED = 100
"""Samples that are asked where the text lies."""

Layout = Mapping[str, Any]
"""Where the text of a sample lies; see data.records.parse_record."""

Progress = Callable[[int, int], None]


@dataclass
class Shard:
    """What an examined shard holds: rows of the index, faults, and bytes read."""

    path: Path
    keys: list[str]
    columns: dict[str, list[int]]
    faults: list[Fault]


def layout_of(text: str, ask: str) -> Layout | None:
    """The layout that `--text` names: `txt`, `json` or `json:FIELD`; None for `auto`."""
    kind, _, name = text.partition(":")
    if text == "auto":
        return None
    if text == "json":
        return {"text": "json"}
    if text == "txt":
        return {"text": "txt", "ask": ask}
    if kind == "json" and name:
        return {"text": "json", "field": name, "ask": ask}
    raise ValueError(f"--text {text!r} is unknown; use auto, json, txt or json:FIELD, such as json:caption")


def index_shards(
    shards: Sequence[Path],
    out: Path,
    *,
    text: str = "auto",
    ask: str = "Describe the image briefly.",
    full: bool = False,
    allow: int = 0,
    origin: Origin | None = None,
    progress: Progress | None = None,
) -> list[Fault]:
    """Writes an index per shard and `out/manifest.json`, unless more than `allow` samples are faulty or a
    shard was given up (GIVEN_UP).

    The tars are only read. Faulty samples are left out and returned. text: `auto` takes a JSON with
    conversations, else a .txt, else the `caption` of a JSON (img2dataset). ask: what a caption answers.
    full: decode every picture. origin: where the shards lie if not here; they are then names below its URL,
    and `out` becomes a folder whose shards are read from there. Raises ValueError for no samples, for shards
    of the same name, where a manifest is there already, and RemoteError for what cannot be fetched.
    """
    _check_names(shards, out)
    layout = layout_of(text, ask)
    made: list[tuple[dict[str, Any], bytes]] = []
    found: list[Fault] = []
    for number, named in enumerate(shards):
        with nullcontext(named) if origin is None else fetched(origin, str(named)) as path:
            samples, faults = members(path)
            layout = layout or guessed(path, samples, ask)
            shard = examine(path, samples, faults, layout or {"text": "json"}, full=full)
            found += shard.faults
            made.append(_packed(shard, _url(named, out, origin)))
        if progress is not None:
            progress(number + 1, len(shards))
    if not any(entry["nsamples"] for entry, _ in made):
        why = f"; the first fault: {found[0]}" if found else ""
        raise ValueError(f"no samples in {len(shards)} shards, {shards[0]} the first{why}")
    if len(found) <= allow and not any(fault.cause == GIVEN_UP for fault in found):
        assert layout is not None
        _write(made, out, layout, len(found), origin)
    return found


def _check_names(shards: Sequence[Path], out: Path) -> None:
    if not shards:
        raise ValueError("no shards to index; name .tar files or a folder that holds some")
    stems = [path.stem for path in shards]
    twice = next((stem for stem, n in Counter(stems).items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"two shards are called {twice}.tar; index their folders one by one")
    if (out / MANIFEST).exists():
        raise ValueError(
            f"{out / MANIFEST} is there already; delete it to index again, or name another --out"
        )


def guessed(path: Path, samples: Sequence[Sample], ask: str) -> Layout | None:
    """The layout that the first readable sample speaks for; None for no samples. Raises ValueError."""
    fields: list[Any] = []
    for sample in samples[:_TRIED]:
        found = _fields(path, sample)
        if "conversations" in found or "dialogs" in found:
            return {"text": "json"}
        if "txt" in sample.texts:
            return {"text": "txt", "ask": ask}
        if "caption" in found:
            return {"text": "json", "field": "caption", "ask": ask}
        fields = fields or found
    if not samples:
        return None
    raise ValueError(
        f"{path.name}: sample {samples[0].key} has no conversations, no .txt and no caption (fields of its "
        f"JSON: {', '.join(map(str, fields[:20])) or 'none'}); say where the text is with --text json:FIELD"
    )


def _fields(path: Path, sample: Sample) -> list[Any]:
    """Names of the fields of a sample's JSON, none where there is no such JSON."""
    member = sample.texts.get("json")
    if member is None or member.size > MAX_JSON:
        return []
    try:
        record = parse_json(_read(path, member), "")
    except BadRecord:
        return []
    return list(record) if isinstance(record, dict) else []


def _read(path: Path, member: Member) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), member.size, member.offset)


def examine(
    path: Path, samples: Sequence[Sample], faults: list[Fault], layout: Layout, *, full: bool
) -> Shard:
    """Reads every sample; index rows of the good ones, one fault for each of the others."""
    names = ("json_offset", "json_size", "json_crc", "image_offset", "image_size", "image_crc", "image_kind")
    more = ("more_record", "more_offset", "more_size", "more_crc", "more_kind")
    shard = Shard(path, [], {name: [] for name in (*names, "dialogs", *more)}, faults)
    bad = {fault.key for fault in faults if fault.key}
    if not samples:
        return shard
    with path.open("rb") as file:
        for sample in samples:
            if sample.key in bad:
                continue
            row = _examined(file.fileno(), path.name, sample, layout, full=full)
            if isinstance(row, Fault):
                shard.faults.append(row)
                if len(shard.faults) >= MAX_FAULTS:
                    shard.faults.append(Fault(path.name, "", "", sample.first(), GIVEN_UP))
                    break
            else:
                _add(shard, sample.key, *row)
    return shard


Row = tuple[list[int], list[list[int]], int]
"""(offset, size, crc) of the text, (offset, size, crc, kind) of each picture, number of dialogs."""


def _examined(handle: int, shard: str, sample: Sample, layout: Layout, *, full: bool) -> Row | Fault:
    text = sample.texts.get(layout["text"])
    if text is None:
        return Fault(shard, sample.key, str(layout["text"]), sample.first(), "the member is missing")
    at: Member = text
    if "ask" in layout and not sample.pictures:
        return Fault(
            shard, sample.key, "jpg", sample.first(), "the member is missing: a caption without a picture"
        )
    try:
        pictures = []
        for _, at in sample.pictures:
            data = _limited(handle, at, MAX_PICTURE)
            kind = check_picture(data, full=full)
            pictures.append([at.offset, at.size, zlib.crc32(data), IMAGE_KINDS.index(kind)])
        at = text
        data = _limited(handle, text, MAX_JSON)
        dialogs = check_text(data, layout, len(pictures))
    except (BadPicture, BadRecord) as error:
        return Fault(shard, sample.key, split_name(at.name)[1], at.offset, str(error))
    return [text.offset, text.size, zlib.crc32(data)], pictures, dialogs


def _limited(handle: int, member: Member, limit: int) -> bytes:
    if not 0 < member.size <= limit:
        raise BadRecord(f"the member has {member.size:,} bytes; from 1 to {limit:,} are read")
    return os.pread(handle, member.size, member.offset)


def _add(shard: Shard, key: str, text: list[int], pictures: list[list[int]], dialogs: int) -> None:
    columns = shard.columns
    for name, value in zip(("offset", "size", "crc"), text, strict=True):
        columns[f"json_{name}"].append(value)
    for name, value in zip(("offset", "size", "crc", "kind"), (pictures or [[-1, 0, 0, 0]])[0], strict=True):
        columns[f"image_{name}"].append(value)
    for other in pictures[1:]:
        columns["more_record"].append(len(shard.keys))
        for name, value in zip(("offset", "size", "crc", "kind"), other, strict=True):
            columns[f"more_{name}"].append(value)
    columns["dialogs"].append(dialogs)
    shard.keys.append(key)


def _url(path: Path, out: Path, origin: Origin | None) -> str:
    """What the manifest calls a shard: its name if it lies beside the manifest or below the origin."""
    beside = origin is not None or path.parent.resolve() == out.resolve()
    return path.name if beside else str(path.resolve())


def _packed(shard: Shard, url: str) -> tuple[dict[str, Any], bytes]:
    """(manifest entry without a layout, index) of a shard; a tenth of the memory that the columns take."""
    content = index_bytes(shard.keys, shard.columns)
    entry = {
        "url": url,
        "nsamples": len(shard.keys),
        "filesize": shard.path.stat().st_size if shard.path.exists() else 0,
        "dialogs": sum(shard.columns["dialogs"]),
        "images": sum(k > 0 for k in shard.columns["image_kind"]) + len(shard.columns["more_kind"]),
        "index": f"{shard.path.stem}.index",
        "index_sha256": hashlib.sha256(content).hexdigest(),
    }
    return entry, content


def _write(
    made: Sequence[tuple[dict[str, Any], bytes]],
    out: Path,
    layout: Layout,
    left_out: int,
    origin: Origin | None,
) -> None:
    """Where the shards lie, the indexes, then the manifest; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    if origin is None:
        (out / ORIGIN).unlink(missing_ok=True)
    else:
        write_origin(origin, out)
    for entry, content in made:
        _replace(out / entry["index"], content)
    entries = [{**entry, "layout": dict(layout)} for entry, _ in made]
    manifest = make_manifest(entries, {"source": "foreign", "rejects": left_out})
    _replace(out / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def _replace(file: Path, content: bytes) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    unfinished.write_bytes(content)
    sync(unfinished)
    os.replace(unfinished, file)
