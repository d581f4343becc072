"""Which tars are streamed, and what a run that streams can promise of its data."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.plan import Resumable
from data.remote import scheme

GUARANTEES = {
    "mode": "stream",
    "exactly_once": "no: shards are drawn with repetition, or each process repeats its own shards",
    "order": "depends on the numbers of ranks and workers",
    "resume": "goes on at the step with newly drawn samples",
    "integrity": "no checksums: a shard cut between two members looks complete",
    "steps": "equal on all ranks",
}
"""What a run that streams says of its data, in the words of its result file."""


@dataclass(frozen=True)
class Streamed:
    """Shards to stream. urls: paths or URLs, `{000..123}` and, for paths, `*` are expanded.

    shuffle: samples of the buffer from which the next one is drawn. resample: shards are drawn at random
    with repetition; otherwise every process walks its own part of the shards, in a new order each time.
    layout: how the text of a sample is read, as in `data.records.parse_record`; None for this toolkit's.
    """

    urls: tuple[str, ...]
    shuffle: int = 1000
    resample: bool = True
    seed: int = 0
    layout: Mapping[str, Any] | None = None

    def shards(self) -> list[str]:
        """Every shard by name; ValueError if a pattern finds none or a scheme is not read here."""
        found: list[str] = []
        for url in self.urls:
            for name in braces(url):
                if "://" in name or name.startswith("pipe:"):
                    scheme(name)
                    found.append(name)
                    continue
                files = sorted(f for f in glob.glob(str(Path(name).expanduser())) if not Path(f).is_dir())
                if not files:
                    hint = f"; name the tars in it, such as {name}/*.tar" if Path(name).is_dir() else ""
                    raise ValueError(f"no file is called {name}{hint}")
                found += files
        return found


def braces(url: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; several ranges multiply."""
    before, opened, rest = url.partition("{")
    inside, closed, after = rest.partition("}")
    if not (opened and closed):
        return [url]
    first, dots, last = inside.partition("..")
    if dots and first.isdigit() and last.isdigit():
        names = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        names = inside.split(",")
    return [f"{before}{name}{tail}" for name in names for tail in braces(after)]


@dataclass(frozen=True)
class Endless(Resumable):
    """The order of a stream, known only as it comes: its state is the step alone, and no epoch ever ends."""

    source: Streamed
    global_batch: int

    @property
    def steps_per_epoch(self) -> int:
        return 1 << 62

    def describe(self) -> dict[str, Any]:
        return {"stream": 1, **asdict(self.source), "global_batch": self.global_batch}
