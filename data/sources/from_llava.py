"""LLaVA-format JSON and a folder of pictures, checked record by record."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.images import decode, header
from data.records import IMAGE_TAG, MAX_JSON, Dialog, dialogs_of, dump_json, parse_json
from data.shards import Record
from data.sources.convert import converted

log = logging.getLogger(__name__)

_CONVERTER = 1  # raise it when records or checks change


@dataclass(frozen=True)
class Checks:
    """How strict a conversion is. full: decode every picture instead of reading its header."""

    images: Path
    allow_rejects: int
    keep_repeated_ids: bool
    full: bool


class Reject(Exception):
    """Why one record is left out."""


def prepare(cache: Path, files: Mapping[str, Path], checks: Checks) -> dict[str, Path]:
    """Split -> folder, converted into `cache` at first use.

    A conversion is found again by the content of its JSON, the folder of pictures and the options;
    pictures that change later under the same name are not noticed.
    """
    return {split: _split(cache, split, file, checks) for split, file in files.items()}


def _split(cache: Path, split: str, file: Path, checks: Checks) -> Path:
    root = checks.images.resolve()
    if not root.is_dir():
        raise ValueError(f"data.images={checks.images} is no folder")
    if not file.is_file():
        raise ValueError(f"data.{split}={file} is no file")
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    options = [_CONVERTER, content, str(root), checks.allow_rejects, checks.keep_repeated_ids, checks.full]
    name = hashlib.sha256(dump_json(options)).hexdigest()[:12]
    out = cache / f"llava-{name}" / split
    about = {"source": "llava", "converter": _CONVERTER, "json": file.name, "json_sha256": content}
    return converted(out, partial(_records, file, root, checks, out, about), about)


def _records(file: Path, root: Path, checks: Checks, out: Path, about: dict[str, Any]) -> Iterator[Record]:
    """The accepted records; lists the rejects beside `out` and raises ValueError for too many."""
    rejects: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    for place, item in _items(file):
        try:
            if isinstance(item, ValueError):
                raise Reject(str(item))
            if not checks.keep_repeated_ids:
                _check_id(item, place, seen)
            yield _checked(item, place, root, full=checks.full)
        except Reject as reason:
            record_id = item.get("id", "") if isinstance(item, Mapping) else ""
            rejects.append({"id": str(record_id), "place": f"{file.name}: {place}", "reason": str(reason)})
    about["rejects"] = len(rejects)
    _report(rejects, checks, out)


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a JSON list or of JSON lines; a line that is no JSON gives its ValueError."""
    with file.open("rb") as opened:
        first = opened.read(64).lstrip()[:1]
        opened.seek(0)
        if first == b"[":
            yield from _listed(file, opened.read())
            return
        for number, line in enumerate(opened, 1):
            place = f"line {number:,}"
            try:
                if line.strip():
                    yield place, parse_json(line, place)
            except ValueError as error:
                yield place, error


def _listed(file: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    for number, item in enumerate(items):
        yield f"record {number:,}", item


def _check_id(item: Any, place: str, seen: dict[str, str]) -> None:
    record_id = item.get("id", item.get("sample_id")) if isinstance(item, Mapping) else None
    if record_id is None:
        return
    if str(record_id) in seen:
        raise Reject(f"the id was used before, in {seen[str(record_id)]}; data.repeated_ids=keep allows that")
    seen[str(record_id)] = place


def _checked(item: Any, place: str, root: Path, *, full: bool) -> Record:
    """The record to write; raises Reject with the first thing that is wrong."""
    try:
        dialogs = dialogs_of(item, place)
        size = len(dump_json(item))
    except ValueError as error:
        raise Reject(str(error)) from error
    if size > MAX_JSON - 1024:
        raise Reject(f"the JSON has {size:,} bytes, at most {MAX_JSON - 1024:,} are possible")
    name = _image_name(item)
    for dialog in dialogs:
        _check_turns(dialog, name is not None)
    if name is None:
        return dict(item), None
    image = _image(root, name)
    try:
        width, height = decode(image, name).size if full else header(image, name)
    except ValueError as error:
        raise Reject(str(error)) from error
    return {**item, "image": name, "w": width, "h": height}, image


def _image_name(item: Mapping[str, Any]) -> str | None:
    """The record's picture, None for text only."""
    if "video" in item:
        raise Reject("the record has a video; only pictures are supported")
    image = item.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, list):
        raise Reject(f"the record has {len(image)} images; one picture per record is supported")
    if image is not None and (not isinstance(image, str) or not image):
        raise Reject(f"'image' must be the path of a file, it is {image!r}")
    return image


def _check_turns(dialog: Dialog, has_image: bool) -> None:
    tags = sum(turn.text.count(IMAGE_TAG) for turn in dialog.turns)
    if tags != int(has_image):
        raise Reject(f"{tags} {IMAGE_TAG} tags for {int(has_image)} images; the numbers must be equal")
    for number, turn in enumerate(dialog.turns):
        expected = "gpt" if number % 2 else "human"
        if turn.role != expected:
            raise Reject(
                f"turn {number} is from {turn.role}, expected {expected}: turns alternate, human first"
            )
        if turn.role == "gpt" and not turn.text.strip():
            raise Reject(f"turn {number}, an answer, is empty")
    if len(dialog.turns) % 2:
        raise Reject("the conversation ends with a human turn, so an answer is missing")


def _image(root: Path, name: str) -> bytes:
    """Bytes of a picture that lies under `root` after all links are resolved."""
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise Reject(f"image {name!r} lies outside of the folder of pictures")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise Reject(f"image {name!r} cannot be read: {cause}") from error


def _report(rejects: list[dict[str, str]], checks: Checks, out: Path) -> None:
    file = out.with_name(f"{out.name}.rejects.jsonl")
    lines = b"".join(dump_json(reject) + b"\n" for reject in rejects)
    file.write_bytes(lines)
    if not rejects:
        return
    if len(rejects) <= checks.allow_rejects:
        log.warning("%d records were left out, listed in %s", len(rejects), file)
        return
    first = "; ".join(f"{r['place']} (id {r['id']!r}): {r['reason']}" for r in rejects[:3])
    raise ValueError(
        f"{len(rejects)} records are unusable, data.allow_rejects={checks.allow_rejects}. First: {first}. "
        f"All are listed in {file}; repair them or set data.allow_rejects={len(rejects)}"
    )
