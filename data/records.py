"""What a record's JSON may hold, checked; and an example, the unit that training and scoring count.

A record is one picture (or none) with text about it. Its JSON is either LLaVA's
`{"id", "conversations": [{"from", "value"}, ...]}`, one dialog, or several independent dialogs
about the same picture: `{"id", "source", "dialogs": [{"type", "conversations": [...]}, ...]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from toolkit.contracts import Turn

IMAGE_TAG = "<image>"
MAX_JSON = 1 << 20
"""Largest JSON of one record in bytes."""
MAX_DEPTH = 32
"""Deepest nesting of one record's JSON."""

_ROLES: dict[str, Literal["human", "gpt"]] = {"human": "human", "gpt": "gpt"}


@dataclass(frozen=True)
class Example:
    """One dialog of one record. key is unique in its data set; kind is the dialog's type, or ""."""

    key: str
    turns: tuple[Turn, ...]
    kind: str
    record: int
    has_image: bool

    @property
    def question(self) -> str:
        """The last human turn, without the image tag."""
        said = [turn.text for turn in self.turns if turn.role == "human"]
        return said[-1].replace(IMAGE_TAG, "").strip() if said else ""

    @property
    def gold(self) -> str:
        """The answer that evaluation expects: the last turn, which must be the model's."""
        if self.turns[-1].role != "gpt":
            raise ValueError(
                f"{self.key}: the last turn is not from gpt, so there is no answer to score against"
            )
        return self.turns[-1].text


@dataclass(frozen=True)
class Dialog:
    """Turns and the type they are reported under."""

    kind: str
    turns: tuple[Turn, ...]


class Different(NamedTuple):
    """The dialogs of a split without repeats: the first example of each, and how often each occurs."""

    examples: list[Example]
    times: list[int]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Different:
        """Goes through `examples` once; a dialog is told apart by its type and its turns."""
        found, number = cls([], []), dict[tuple[str, tuple[Turn, ...]], int]()
        for example in examples:
            i = number.setdefault((example.kind, example.turns), len(number))
            if i == len(found.times):
                found.examples.append(example)
                found.times.append(0)
            found.times[i] += 1
        return found


class BadRecord(ValueError):
    """The text of one record is not what it must be: a fault of the data, not of a setting."""


def parse_json(text: bytes | str, where: str) -> Any:
    """JSON without NaN or Infinity, at most MAX_DEPTH deep; raises BadRecord naming `where` otherwise."""
    if len(text) > MAX_JSON:
        raise BadRecord(f"{where}: the JSON has {len(text):,} bytes, at most {MAX_JSON:,} are read")
    try:
        if not isinstance(text, str):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        found = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not valid JSON: {error}") from error
    check_depth(found, where)
    return found


def check_depth(value: Any, where: str) -> None:
    """BadRecord for JSON that `parse_json` would not read back."""
    if _deeper(value, MAX_DEPTH):
        raise BadRecord(f"{where}: the JSON is nested more than {MAX_DEPTH} levels deep")


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep."""
    layer = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels + 1):
        if not layer:
            return False
        inner = [v.values() if isinstance(v, dict) else v for v in layer]
        layer = [v for values in inner for v in values if isinstance(v, (dict, list))]
    return True


def parse_record(text: bytes, where: str, layout: Mapping[str, Any] | None, n_images: int) -> dict[str, Any]:
    """The JSON of a record; with a layout that names a caption, one dialog made of it.

    layout: of a foreign shard (data.foreign). `text`: extension of the member that holds the text. `field`:
    the field of a JSON that is the caption. `ask`: what is asked, to be answered with the caption. Without
    `ask` the text is a record's JSON as elsewhere. Raises BadRecord naming `where`.
    """
    if layout is None or "ask" not in layout:
        return parse_json(text, where)
    caption = _caption(text, where, layout)
    question = f"{IMAGE_TAG}\n" * n_images + str(layout["ask"])
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]}


def _caption(text: bytes, where: str, layout: Mapping[str, Any]) -> str:
    """The caption without white space around it; BadRecord if there is none."""
    if layout["text"] == "json":
        record, field = parse_json(text, where), layout["field"]
        found = record.get(field) if isinstance(record, Mapping) else None
        if not isinstance(found, str):
            raise BadRecord(f"{where}: the JSON has no text in the field {field!r}")
    else:
        if len(text) > MAX_JSON:
            raise BadRecord(f"{where}: the caption has {len(text):,} bytes, at most {MAX_JSON:,} are read")
        try:
            found = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(f"{where}: the caption is no UTF-8 text: {error}") from error
    if not found.strip():
        raise BadRecord(f"{where}: the caption is empty")
    _check_characters(found, f"{where}: the caption")
    return found.strip()


def _check_characters(text: str, what: str) -> None:
    """BadRecord for half a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _half_a_pair(what, error) from error


def _half_a_pair(what: str, error: UnicodeEncodeError) -> BadRecord:
    return BadRecord(f"{what} holds half a surrogate pair at position {error.start}, which is no character")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
"""Made once: `json.loads` with an option makes one at every call."""


def dump_json(value: Any) -> bytes:
    """Compact UTF-8 JSON in the given key order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def dialogs_of(record: Any, where: str) -> list[Dialog]:
    """The dialogs of a record's JSON; raises BadRecord naming `where` if its structure is another."""
    if not isinstance(record, Mapping):
        raise BadRecord(f"{where}: a record is a JSON object, this is {type(record).__name__}")
    if ("dialogs" in record) == ("conversations" in record):
        raise BadRecord(
            f"{where}: a record has either 'conversations' or 'dialogs'; keys here: {list(record)}"
        )
    if "conversations" in record:
        kind = record.get("type", record.get("source", ""))
        return [Dialog(str(kind), _turns(record["conversations"], where))]
    dialogs = record["dialogs"]
    if not isinstance(dialogs, list) or not dialogs:
        raise BadRecord(f"{where}: 'dialogs' must be a list with at least one dialog")
    return [_dialog(item, f"{where}: dialog {i}") for i, item in enumerate(dialogs)]


def _dialog(item: Any, where: str) -> Dialog:
    if not isinstance(item, Mapping) or "conversations" not in item:
        raise BadRecord(f"{where} must be an object with 'conversations'")
    return Dialog(str(item.get("type", "")), _turns(item["conversations"], where))


def _turns(turns: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{where}: 'conversations' must be a list with at least one turn")
    return tuple(_turn(item, where, i) for i, item in enumerate(turns))


def _turn(item: Any, where: str, i: int) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRecord(f"{where}: turn {i} must be an object with 'from' and 'value'")
    role, text = item.get("from"), item.get("value")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRecord(f"{where}: turn {i} is from {role!r}; known speakers: human, gpt")
    if not isinstance(text, str):
        raise BadRecord(f"{where}: the value of turn {i} must be text, it is {type(text).__name__}")
    try:
        return (_said if len(text) <= _SHORT else _said.__wrapped__)(role, text)
    except UnicodeEncodeError as error:
        raise _half_a_pair(f"{where}: turn {i}", error) from error


_SHORT = 200  # characters of a turn that is kept


@lru_cache(maxsize=1 << 14)
def _said(role: str, text: str) -> Turn:
    """Question sets repeat short turns over many pictures: such a turn is checked and made once."""
    text.encode()
    return Turn(_ROLES[role], text)
