"""LLaVA-format JSON and a folder of pictures, checked record by record."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.content import MAX_PICTURE
from data.images import decode, header
from data.index import MANIFEST, read_manifest
from data.records import IMAGE_TAG, MAX_JSON, Dialog, check_depth, dialogs_of, dump_json, parse_json
from data.shards import Pictured
from data.sources.convert import converted

log = logging.getLogger(__name__)

_CONVERTER = 2  # raise it when records or checks change

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checks:
    """How strict a conversion is.

    full: decode every picture instead of reading its header. several: more than one picture in a record.
    """

    images: Path
    allow_rejects: int
    keep_repeated_ids: bool
    full: bool
    several: bool = False


class Reject(Exception):
    """Why one record is left out."""


class TooManyRejects(ValueError):
    """More records are unusable than allowed. rejects: {"id", "place", "reason"} of each; file: the list."""

    def __init__(self, message: str, rejects: list[dict[str, str]], file: Path) -> None:
        super().__init__(message)
        self.rejects, self.file = rejects, file


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
    content = _digest(file)
    options = [_CONVERTER, content, str(root), checks.allow_rejects, checks.keep_repeated_ids, checks.full]
    name = hashlib.sha256(dump_json(options)).hexdigest()[:12]
    out = cache / f"llava-{name}" / split
    about = {"source": "llava", "converter": _CONVERTER, "json": file.name, "json_sha256": content}
    return converted(out, partial(_records, file, root, checks, out, about, None), about)


def convert(
    file: Path, out: Path, checks: Checks, *, shard_bytes: int = 256 << 20, progress: Progress | None = None
) -> bool:
    """Converts one JSON file to `out`; False if that was done before.

    Rejects are listed in `out`.rejects.jsonl. Raises TooManyRejects, and ValueError for paths that are not
    there and for an `out` that holds something else.
    """
    if not checks.images.is_dir():
        raise ValueError(f"--images {checks.images} is no folder")
    if not file.is_file():
        raise ValueError(f"--json {file} is no file")
    about: dict[str, Any] = {"source": "llava", "converter": _CONVERTER, "json": file.name}
    about |= {"json_sha256": _digest(file), "decoded": checks.full, "repeated_ids": checks.keep_repeated_ids}
    about["shard_bytes"] = shard_bytes
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ValueError(f"--out {out} is not empty; delete it or name another --out")
    if (out / MANIFEST).exists():
        found = read_manifest(out)["about"]
        if {k: v for k, v in found.items() if k != "rejects"} != about:
            raise ValueError(f"{out} holds other converted data; delete it or name another --out")
        return False
    records = partial(_records, file, checks.images.resolve(), checks, out, about, progress)
    converted(out, records, about, shard_bytes=shard_bytes)
    return True


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _records(
    file: Path, root: Path, checks: Checks, out: Path, about: dict[str, Any], progress: Progress | None
) -> Iterator[Pictured]:
    """The accepted records; lists the rejects beside `out` and raises TooManyRejects for too many."""
    rejects: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    total, items = _items(file)
    if not total:
        raise ValueError(f"{file} holds no records; give a list of them, or leave the split out")
    for number, (place, item) in enumerate(items, 1):
        try:
            if isinstance(item, ValueError):
                raise Reject(str(item))
            if not checks.keep_repeated_ids:
                _check_id(item, place, seen)
            yield _checked(item, place, root, checks)
        except Reject as reason:
            record_id = item.get("id", "") if isinstance(item, Mapping) else ""
            # An id may be the very thing that cannot be written.
            record_id = str(record_id).encode("utf-8", "backslashreplace").decode()
            rejects.append({"id": record_id, "place": f"{file.name}: {place}", "reason": str(reason)})
        if progress is not None:
            progress(number, total)
    about["rejects"] = len(rejects)
    _report(rejects, checks, out)


def _items(file: Path) -> tuple[int, Iterator[tuple[str, Any]]]:
    """(number of records, (place, record) of each) of a JSON list or of JSON lines."""
    with file.open("rb") as opened:
        if opened.read(64).lstrip()[:1] != b"[":
            opened.seek(0)
            return sum(1 for line in opened if line.strip()), _lines(file)
    items = _list(file)
    return len(items), ((f"record {number:,}", item) for number, item in enumerate(items))


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """A line that is no JSON gives its ValueError."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            place = f"line {number:,}"
            try:
                if line.strip():
                    yield place, parse_json(line, place)
            except ValueError as error:
                yield place, error


def _list(file: Path) -> list[Any]:
    try:
        items = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    return list(items)


def _check_id(item: Any, place: str, seen: dict[str, str]) -> None:
    record_id = item.get("id", item.get("sample_id")) if isinstance(item, Mapping) else None
    if record_id is None:
        return
    if str(record_id) in seen:
        raise Reject(f"the id was used before, in {seen[str(record_id)]}; repeated_ids=keep allows that")
    seen[str(record_id)] = place


def _checked(item: Any, place: str, root: Path, checks: Checks) -> Pictured:
    """The record to write; raises Reject with the first thing that is wrong."""
    try:
        dialogs = dialogs_of(item, place)
        check_depth(item, place)
        size = len(dump_json(item))
    except UnicodeEncodeError as error:
        raise Reject(f"half a surrogate pair, which is no character: {error}") from error
    except ValueError as error:
        raise Reject(str(error)) from error
    if size > MAX_JSON - 1024:
        raise Reject(f"the JSON has {size:,} bytes, at most {MAX_JSON - 1024:,} are possible")
    names = _image_names(item, several=checks.several)
    for dialog in dialogs:
        _check_turns(dialog, len(names))
    if not names:
        return dict(item), None
    images = [_image(root, name) for name in names]
    try:
        sizes = [_size(image, name, full=checks.full) for image, name in zip(images, names, strict=True)]
    except ValueError as error:
        raise Reject(str(error)) from error
    if len(names) == 1:
        return {**item, "w": sizes[0][0], "h": sizes[0][1]}, images[0]
    return {**item, "w": [w for w, _ in sizes], "h": [h for _, h in sizes]}, images


def _size(image: bytes, name: str, *, full: bool) -> tuple[int, int]:
    return decode(image, name).size if full else header(image, name)


def _image_names(item: Mapping[str, Any], *, several: bool) -> list[str]:
    """The record's pictures, none for text only."""
    if "video" in item:
        raise Reject("the record has a video; only pictures are supported")
    image = item.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if len(names) > 1 and not several:
        raise Reject(f"the record has {len(names)} images; one picture per record is supported")
    for name in names:
        if not isinstance(name, str) or not name:
            raise Reject(f"'image' must be the path of a file, it is {name!r}")
    return names


def _check_turns(dialog: Dialog, n_images: int) -> None:
    tags = sum(turn.text.count(IMAGE_TAG) for turn in dialog.turns)
    if tags != n_images:
        raise Reject(f"{tags} {IMAGE_TAG} tags for {n_images} images; the numbers must be equal")
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
        size = path.stat().st_size
        if size > MAX_PICTURE:
            raise Reject(f"image {name!r} has {size:,} bytes, at most {MAX_PICTURE:,} are read")
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
    raise TooManyRejects(
        f"{len(rejects)} records are unusable, data.allow_rejects={checks.allow_rejects}. First: {first}. "
        f"All are listed in {file}; repair them or set data.allow_rejects={len(rejects)}",
        rejects,
        file,
    )
