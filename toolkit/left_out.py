"""Reports of samples left out when several ranks train: each writes its part, one file remains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.policy import lock_of, reported
from data.records import dump_json
from toolkit import ranks


def part(report: Path) -> Path:
    """The file that this rank writes: the report itself on rank 0, else `left_out-train.rank3.jsonl`.

    The ranks may be on nodes whose file system knows no locks, or which share none.
    """
    return report if ranks.main() else report.with_name(f"{report.stem}.rank{ranks.rank()}{report.suffix}")


def merged(mine: Path) -> int:
    """Brings the rows of every rank's part into that of rank 0 and removes the others; number of rows."""
    rows = {number: row for rank in ranks.gathered(_rows(mine)) for number, row in rank}
    if not ranks.main():
        for file in (mine, lock_of(mine)):
            file.unlink(missing_ok=True)
    elif len(rows) > len(reported(mine)):
        mine.write_bytes(b"".join(dump_json(row) + b"\n" for row in rows.values()))
    return len(rows)


def _rows(report: Path) -> list[Any]:
    return list(reported(report).items())


def over_ranks(trained: int, missing: int) -> tuple[int, int]:
    """The sums over the ranks."""
    found = ranks.numbers(trained, missing)
    return sum(one[0] for one in found), sum(one[1] for one in found)
