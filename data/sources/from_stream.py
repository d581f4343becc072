"""Splits of `data=stream`: tars to train on, folders with an index to score."""

from __future__ import annotations

from pathlib import Path

from data.foreign import layout_of
from data.index import read_manifest
from data.mirror import mirror
from data.remote import Origin
from data.streamed import Streamed


def streamed(split: str, urls: str, *, text: str, ask: str, shuffle: int, resample: bool) -> Streamed:
    """Tars by their names, `::` between; ValueError for what finds none and for an unknown `text`."""
    try:
        layout = layout_of(text, ask) or {"text": "auto", "ask": ask}
    except ValueError as error:
        raise ValueError(
            f"data.text={text} is unknown; write data.text=auto, json, txt or json:FIELD"
        ) from error
    made = Streamed(tuple(urls.split("::")), shuffle=shuffle, resample=resample, layout=layout)
    try:
        made.shards()
    except ValueError as error:
        raise ValueError(f"data.{split}: {error}") from error
    return made


def folder(split: str, place: str, cache: Path) -> Path:
    """A folder of shards with an index, or one behind a URL; ValueError saying how to make one."""
    advice = (
        f"data.{split}={place}: what is scored is read by an index, each sample once; write "
        f"python -m toolkit.data index TARS --out FOLDER, and data.{split}=FOLDER"
    )
    if place.partition("?")[0].endswith(".tar") or "::" in place or "{" in place or "*" in place:
        raise ValueError(advice)
    if "://" in place:
        return mirror(Origin(place, str(cache / "blocks")), cache)
    found = Path(place).expanduser()
    if not found.is_dir():
        raise ValueError(f"data.{split}={place} is no folder; give the path of one that exists")
    try:
        read_manifest(found)
    except ValueError as error:
        raise ValueError(f"{advice} ({error})") from error
    return found
