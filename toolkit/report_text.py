"""A table's report as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator
from typing import Any

from toolkit import report_order
from toolkit.report_order import Pair
from toolkit.report_table import ALL, LEVEL, Row, Table
from toolkit.stats import Paired


def markdown(table: Table) -> str:
    """The report as Markdown; percentages."""
    lines = [f"# {table.title or table.recipe}", "", table.caption, ""]
    lines += _grid(_header(table), [_cells(table, row) for row in table.rows])
    lines += ["", *notes(table)]
    if table.runs:
        lines += ["", "## Does the order hold?", "", *report_order.words(table)]
        lines += ["", report_order.fine_print(table), *_per_type(table)]
    missing = [command for row in table.rows for command in row.missing]
    if missing:
        lines += ["", "Missing:", "", *(f"    {command}" for command in missing)]
    return "\n".join(lines) + "\n"


def _header(table: Table) -> list[str]:
    best = [table.best] if table.best else []
    kinds = ["accuracy", *table.kinds[1:]]
    paper = [f"paper: {b}" for b in table.benchmarks]
    return ["row", *best, "parameters", "image tokens", "steps", "seeds", *kinds, *paper]


def _cells(table: Table, row: Row) -> list[str]:
    published = table.published.get(row.name, {})
    paper = [f"{published[b]:.2f}" if b in published else "-" for b in table.benchmarks]
    best = [row.chosen] if table.best else []
    if not row.runs:
        return [row.label, *best, "-", "-", "-", "0", "missing", *["-"] * (len(table.kinds) - 1), *paper]
    kinds = [_with_spread(row, kind) for kind in table.kinds]
    return [row.label, *best, *budget(row), str(len(row.runs)), *kinds, *paper]


def budget(row: Row) -> list[str]:
    """Parameters of the language model, image tokens and steps of an arm; a range if its runs differ."""
    parameters = {run.result["parameters"]["rwkv"] for run in row.runs}
    return [
        _range(values)
        for values in (parameters, {r.image_tokens for r in row.runs}, {r.final.step for r in row.runs})
    ]


def _range(values: set[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _with_spread(row: Row, kind: str) -> str:
    spread = row.spread(kind)
    return _percent(row.mean(kind)) + (f" ± {100 * spread:.2f}" if spread is not None else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, its columns padded to one width."""
    table = [header, *rows]
    widths = [max(len(r[i]) for r in table) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in table]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def notes(table: Table) -> list[str]:
    """What a reader must know of the numbers: floors, intervals, budget, and mixed code versions."""
    if not table.runs:
        return ["No results yet."]
    first = table.runs[0]
    widest = [c for row in table.rows if (c := row.ci95(ALL)) is not None]
    told = [
        f"Accuracy in percent on {first.final.scores[ALL].n:,} questions, exact match; "
        + ("± is the standard deviation over seeds. " if len(table.seeds) > 1 else "One seed: no spread. ")
        + (
            f"The 95 % interval of one run, clustered by image, is at most ± {100 * max(widest):.2f}."
            * bool(widest)
        )
    ]
    ended = [run for run in table.runs if "majority" in run.result]
    if ended:
        known = ended[0].result
        told.append(
            f"Floors: majority answer {_percent(known['majority'])}, "
            f"question only {_percent(known['blind'])}."
        )
    if len(ended) < len(table.runs):
        told.append(
            f"{len(table.runs) - len(ended)} of {len(table.runs)} runs have not ended: floors, and accuracy "
            "on the split that settings are chosen by, are measured at the end."
        )
    told.append(
        "Parameters are those of the part that reads the sequence; encoder and budget are the recipe's."
    )
    if table.best:
        where = f"the split {table.chosen_on}, not here" if table.chosen_on else "these questions"
        told.append(
            f"Each row keeps the {table.best} with its best mean accuracy on {where}; one grid for all rows."
        )
    commits = {r.result["commit"] for r in table.runs}
    if len(commits) > 1:
        told.append(
            f"Rows come from {len(commits)} different commits: {', '.join(sorted(c[:10] for c in commits))}."
        )
    return told


def _per_type(table: Table) -> Iterator[str]:
    """One section per question type: arms, then paired differences."""
    found = report_order.pairs(table)
    for kind in table.shown:
        yield from ("", f"## {'All questions' if kind == ALL else kind}", "", _floors(table, kind), "")
        header = [
            "row",
            "mean",
            "spread",
            "image ±",
            f"steps to {LEVEL:.0%}".replace("%", " %"),
            "over training",
        ]
        yield from _grid([*header, "per seed"], [_arm(row, kind) for row in table.rows if row.final(kind)])
        compared = [line for pair in found if (line := _difference(pair, kind))]
        if compared:
            yield ""
            yield from _grid(
                ["difference", "seeds", "points", "95 %", "p", "ahead", "over training", "p "], compared
            )
    yield ""
    yield legend(table)


def _floors(table: Table, kind: str) -> str:
    run = next(r for r in table.runs if kind in r.final.scores)
    known = run.floors(kind)
    text = f"{run.final.scores[kind].n:,} questions"
    if known:
        text += f"; majority answer {_percent(known['majority'])}, question only {_percent(known['blind'])}"
    return text + "."


def legend(table: Table) -> str:
    """What the columns of the sections per question type mean."""
    text = (
        "spread: standard deviation over seeds. image ±: half of the 95 % interval clustered by image, the "
        "widest of the seeds. "
    )
    if not table.curves:
        return text + "No evaluation before the last (eval.every), so no steps and no curves."
    return text + (
        f"steps to {100 * LEVEL:.0f} %: median over seeds of the first evaluated step at or above it, in "
        "brackets the seeds that got there. over training: mean accuracy over the evaluated steps. "
        "95 %: interval of the difference."
    )


def _arm(row: Row, kind: str) -> list[str]:
    area = list(row.area(kind).values())
    return [
        row.label,
        _percent(row.mean(kind)),
        _percent(row.spread(kind)),
        _percent(row.ci95(kind)),
        steps_to(row, kind),
        _percent(statistics.fmean(area) if area else None),
        " ".join(f"{100 * value:.1f}" for _, value in sorted(row.final(kind).items())),
    ]


def steps_to(row: Row, kind: str) -> str:
    """`1,200 (3/5)`, or `> 2,000 (1/5)` where the median seed never got to LEVEL; a dash without points."""
    found = row.steps_to(kind)
    if not found:
        return "-"
    middle, reached = statistics.median_high(found), sum(math.isfinite(s) for s in found)
    last = max(run.final.step for run in row.runs)
    text = f"{middle:,.0f}" if math.isfinite(middle) else f"> {last:,}"
    return f"{text} ({reached}/{len(found)})"


def _difference(pair: Pair, kind: str) -> list[str]:
    end, training = pair.at_end(kind), pair.over_training(kind)
    if end is None:
        return []
    half = "-" if end.half95 is None else f"± {100 * end.half95:.1f}"
    ahead = f"{end.ahead}/{end.n}"
    name = f"{pair.a.label} − {pair.b.label}"
    return [name, str(end.n), report_order.points_of(end.mean), half, _p(end), ahead, *_short(training)]


def _short(found: Paired | None) -> list[str]:
    return ["-", "-"] if found is None else [report_order.points_of(found.mean), _p(found)]


def _p(found: Paired) -> str:
    return "-" if found.p is None else report_order.p_value(found.p).removeprefix("= ")


def as_csv(table: Table) -> str:
    """One line per row and seed, shares between 0 and 1; the paper's values as published."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kinds, paper = table.kinds[1:], [f"paper_{b}" for b in table.benchmarks]
    facts = ["row", "seed", "step", "accuracy", "ci95", "n", "majority", "blind", "seconds"]
    writer.writerow([*facts, *kinds, *paper])
    for row in table.rows:
        published = table.published.get(row.name, {})
        for run in row.runs:
            scores = run.final.scores
            own: list[Any] = [run.seed, run.final.step]
            own += [scores[ALL].accuracy, scores[ALL].ci95, scores[ALL].n]
            own += [run.result.get(k, "") for k in ("majority", "blind", "seconds")]
            by_kind = [scores[k].accuracy if k in scores else "" for k in kinds]
            writer.writerow([row.name, *own, *by_kind, *(published.get(b, "") for b in table.benchmarks)])
    return out.getvalue()
