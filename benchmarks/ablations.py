"""Runs ablation tables and keeps what came out: `python -m benchmarks.ablations [TABLE ...] [key=value ...]`.

Each table is the ordinary sweep, `python -m toolkit.run recipe=ablation/TABLE scale=SCALE key=value ...`, so
what is done already is not trained again. Report, CSV and figure land in benchmarks/results/ablations-SCALE/;
every evaluated step of every run is a line of benchmarks/results/ablations.jsonl, with scale, table,
recurrence, scan, prompt, tokens, seed, step, type, n and accuracy. Whatever comes out is written as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import report, run
from toolkit.report_collect import collect
from toolkit.report_table import Table, raw
from toolkit.rundir import write_text

RESULTS = Path(__file__).parent / "results"
TABLES = ("scan", "prompt", "recurrence", "tokens")


def keep(table: Table, scale: str, file: Path) -> None:
    """Puts the table's flat rows into `file`; rows of other tables and of other scales stay."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    kept = [row for row in rows if (row["scale"], row["table"]) != (scale, table.recipe)]
    kept += [{"scale": scale, **row} for row in raw(table)]
    write_text(file, "".join(json.dumps(row) + "\n" for row in kept))


def one(name: str, scale: str, words: Sequence[str], results: Path) -> int:
    """Trains and reports a table; returns the exit code of the sweep, or 1 if rows are missing."""
    asked = [f"scale={scale}", *words]
    began = time.monotonic()
    code = run.main([f"recipe=ablation/{name}", *asked])
    minutes = (time.monotonic() - began) / 60
    if code > 1:
        return code
    table = collect(f"ablation/{name}", asked)
    made = report.write(table, results / f"ablations-{scale}")
    keep(table, scale, results / "ablations.jsonl")
    print(f"{name}: {minutes:.1f} minutes, {len(table.runs)} runs; {', '.join(map(str, made))}", flush=True)
    return code or int(any(row.missing for row in table.rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the worst exit code of the tables: 0 all done, 1 a row failed, 2 a request is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("words", nargs="*", metavar="TABLE or key=value", help=f"default: {' '.join(TABLES)}")
    parser.add_argument("--scale", default="tiny", help="tiny (two CPU cores, the default), small (one GPU)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results"
    )
    options = parser.parse_intermixed_args(argv)
    words = [word for word in options.words if "=" in word]
    names = [word for word in options.words if "=" not in word] or list(TABLES)
    return max(one(name.removeprefix("ablation/"), options.scale, words, options.out) for name in names)


if __name__ == "__main__":
    sys.exit(main())
