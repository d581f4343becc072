"""What a record's JSON may hold, checked; and an example, the unit that training and scoring count.

A record is one picture (or none) with text about it. Its JSON is either LLaVA's
`{"id", "conversations": [{"from", "value"}, ...]}`, one dialog, or several independent dialogs
about the same picture: `{"id", "source", "dialogs": [{"type", "conversations": [...]}, ...]}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.contracts import Turn

IMAGE_TAG = "<image>"
MAX_JSON = 1 << 20
"""Largest JSON of one record in bytes."""

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


def parse_json(text: bytes | str, where: str) -> Any:
    """JSON without NaN or Infinity; raises ValueError naming `where` for anything else."""
    if len(text) > MAX_JSON:
        raise ValueError(f"{where}: the JSON has {len(text):,} bytes, at most {MAX_JSON:,} are read")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def dump_json(value: Any) -> bytes:
    """Compact UTF-8 JSON in the given key order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def dialogs_of(record: Any, where: str) -> list[Dialog]:
    """The dialogs of a record's JSON; raises ValueError naming `where` if its structure is another."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record is a JSON object, this is {type(record).__name__}")
    if ("dialogs" in record) == ("conversations" in record):
        raise ValueError(
            f"{where}: a record has either 'conversations' or 'dialogs'; keys here: {list(record)}"
        )
    if "conversations" in record:
        kind = record.get("type", record.get("source", ""))
        return [Dialog(str(kind), _turns(record["conversations"], where))]
    dialogs = record["dialogs"]
    if not isinstance(dialogs, list) or not dialogs:
        raise ValueError(f"{where}: 'dialogs' must be a list with at least one dialog")
    return [_dialog(item, f"{where}: dialog {i}") for i, item in enumerate(dialogs)]


def _dialog(item: Any, where: str) -> Dialog:
    if not isinstance(item, Mapping) or "conversations" not in item:
        raise ValueError(f"{where} must be an object with 'conversations'")
    return Dialog(str(item.get("type", "")), _turns(item["conversations"], where))


def _turns(turns: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: 'conversations' must be a list with at least one turn")
    return tuple(_turn(item, where, i) for i, item in enumerate(turns))


def _turn(item: Any, where: str, i: int) -> Turn:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: turn {i} must be an object with 'from' and 'value'")
    role, text = item.get("from"), item.get("value")
    if role not in _ROLES:
        raise ValueError(f"{where}: turn {i} is from {role!r}; known speakers: human, gpt")
    if not isinstance(text, str):
        raise ValueError(f"{where}: the value of turn {i} must be text, it is {type(text).__name__}")
    return Turn(_ROLES[role], text)
