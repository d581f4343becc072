"""A record that a stream has just read, in place of a reader that finds records by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.index import FEATURE_KIND
from data.members import PICTURES
from data.records import BadRecord, Example, dialogs_of, parse_json, parse_record


class Passing:
    """The record that a stream has just read, as the reader that `Examples` asks.

    layout: where the text lies, as in `data.records.parse_record`; None for this toolkit's own records.
    With `{"text": "auto", "ask": ...}` the first record decides, as `python -m toolkit.data index` does.
    """

    def __init__(self, layout: Mapping[str, Any] | None) -> None:
        self._layout = layout
        self._examples: list[Example] = []
        self._images: list[bytes] = []

    def load(self, sample: Mapping[str, Any]) -> int:
        """Takes a sample of webdataset; returns its number of examples. Raises BadRecord."""
        key = str(sample["__key__"])
        where = f"{sample['__url__']}: key {key}"
        if self._layout is not None and self._layout["text"] == "auto":
            self._layout = _layout_of(sample, where, self._layout["ask"])
        wanted = str(self._layout["text"]) if self._layout else "json"
        if wanted not in sample:
            raise BadRecord(f"{where}: there is no member {key}.{wanted}")
        if FEATURE_KIND in sample:
            raise BadRecord(
                f"{where}: it holds features of an encoder, and a stream is of pictures; read the shards "
                "with data=shards"
            )
        self._images = [sample[name] for name in sorted(sample) if name.rpartition(".")[2] in PICTURES]
        n = len(self._images)
        dialogs = dialogs_of(parse_record(sample[wanted], where, self._layout, n), where)
        self._examples = [Example(key, d.turns, d.kind, 0, bool(n)) for d in dialogs]
        return len(dialogs)

    def example(self, j: int) -> Example:
        return self._examples[j]

    def n_images(self, i: int) -> int:
        return len(self._images)

    def image_bytes(self, i: int) -> bytes | None:
        return self._images[0] if self._images else None


def _layout_of(sample: Mapping[str, Any], where: str, ask: str) -> dict[str, Any]:
    """A JSON with conversations, else a .txt, else the `caption` of a JSON (img2dataset)."""
    record = parse_json(sample["json"], where) if "json" in sample else {}
    fields = list(record) if isinstance(record, dict) else []
    if "conversations" in fields or "dialogs" in fields:
        return {"text": "json"}
    if "txt" in sample:
        return {"text": "txt", "ask": ask}
    if "caption" in fields:
        return {"text": "json", "field": "caption", "ask": ask}
    raise BadRecord(
        f"{where}: there are no conversations, no .txt and no caption (fields of its JSON: "
        f"{', '.join(map(str, fields[:20])) or 'none'}); say where the text is with data.text=json:FIELD"
    )
