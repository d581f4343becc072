"""`python -m toolkit.report ablation/scan`: a table recipe's results beside the paper's.

The table recipe is the plan: every row and seed is composed, its run directory is looked up by what
was asked, and what is missing is said with the command for it. Writes Markdown, CSV and a figure:
means, spread over seeds, intervals, paired differences, and in words whether the expected order holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from toolkit.explain import COMMAND_LINE, fail, guarded
from toolkit.report_collect import collect
from toolkit.report_plot import figure
from toolkit.report_table import Table, raw
from toolkit.report_text import as_csv, markdown
from toolkit.rundir import write_text


def write(table: Table, folder: Path) -> list[Path]:
    """Markdown, CSV, JSON lines of the results and, once there is one, the figure."""
    stem = folder / (table.recipe.replace("/", "-") + (f"-step{table.step}" if table.step else ""))
    made = [stem.with_suffix(".md"), stem.with_suffix(".csv"), stem.with_suffix(".jsonl")]
    write_text(made[0], markdown(table))
    write_text(made[1], as_csv(table))
    write_text(made[2], "".join(json.dumps(run.result) + "\n" for run in table.runs))
    if table.runs:
        made.append(figure(table, stem.with_suffix(".png")))
    else:  # one of other runs would stand beside an empty table
        stem.with_suffix(".png").unlink(missing_ok=True)
    return made


def write_raw(table: Table, file: Path) -> Path:
    """Puts the table's flat rows into a file of JSON lines; rows of other tables in it stay."""
    kept = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else [], 1):
        try:
            if json.loads(line)["table"] != table.recipe:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            what = f"line {number} is no row of a table"
            raise fail(COMMAND_LINE, f"--raw {file}", what, fix="name another file") from error
    write_text(file, "".join(f"{line}\n" for line in [*kept, *map(json.dumps, raw(table))]))
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 complete, 1 rows are missing, 2 the request is wrong."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m toolkit.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", help="a table recipe, e.g. ablation/scan")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as given to toolkit.run")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="default: reports")
    parser.add_argument("--raw", type=Path, metavar="FILE", help="also put flat rows into this .jsonl file")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="as after N steps; 0: at the end")
    options = parser.parse_args(words)
    if options.raw and options.step:
        parser.error("--raw writes every evaluated step; leave --step out")
    table = collect(options.recipe.removeprefix("recipe="), options.overrides, step=options.step)
    try:
        made = write(table, options.out)
        made += [write_raw(table, options.raw)] if options.raw else []
    except OSError as error:
        what = f"{error.filename or options.out} cannot be written: {error.strerror}"
        raise fail(COMMAND_LINE, "--out", what, fix="name a folder that can be written") from error
    print(markdown(table))
    print("written: " + ", ".join(str(path) for path in made))
    return 1 if any(row.missing for row in table.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
