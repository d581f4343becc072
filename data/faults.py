"""One thing that is wrong with a sample, in the words that every command and log uses."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Fault:
    """shard: file name. key, field: sample and member, "" where unknown. offset: byte in the shard."""

    shard: str
    key: str
    field: str
    offset: int
    cause: str

    def __str__(self) -> str:
        """`shard-000000.tar: key 00000012: field jpg: byte 12,800: what is wrong`."""
        parts = [self.shard]
        parts += [f"key {self.key}"] if self.key else []
        parts += [f"field {self.field}"] if self.field else []
        return ": ".join([*parts, f"byte {self.offset:,}", self.cause])

    def row(self) -> dict[str, str | int]:
        """The fault as a line of a report."""
        return asdict(self)
