"""results/kernels.jsonl -> results/kernels.md: ratios to the best peer and to the floor, pass or fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.kernel_inputs import LARGE, SHAPES, Shape
from benchmarks.kernel_peers import OURS

Row = dict[str, Any]
REFERENCE = Path(__file__).parent / "kernel_reference.json"
OFFICIAL = "official CUDA (measured before, on an H100)"
PASSES = ("fwd_ms", "fwd_bwd_ms")
LIMIT = {"bf16": 1.8e-3, "fp32": 1e-5}
TENSORS = ("o", "state", "dr", "dk", "dv", "dlog_w", "du", "dstate")


def reference_rows() -> list[Row]:
    """The reference's measured figures as rows like ours."""
    rows = json.loads(REFERENCE.read_text())["rows"]
    keys = ("op", "shape", "fwd_ms", "fwd_bwd_ms", "peak_mib")
    fixed = {"kind": "time", "impl": OFFICIAL, "dtype": "bf16", "state": False, "mode": "stream"}
    return [fixed | dict(zip(keys, row, strict=True)) for row in rows]


def large_shapes() -> set[tuple[str, str]]:
    """(op, shape) of the large shapes."""
    return {(op, str(Shape(op, *s))) for op, shapes in SHAPES.items() for s in shapes[-LARGE:]}


def number(value: Any, digits: int = 3) -> str:
    """A time or an error; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def mark(good: bool | None) -> str:
    """The cell of a target."""
    return "-" if good is None else ("pass" if good else "**FAIL**")


def line(cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [line(list(names)), "|" + "---|" * len(names)]


def cases(rows: list[Row], mode: str) -> dict[tuple[str, str, bool], list[Row]]:
    """(op, shape, state) -> the rows of all implementations, in order of first appearance."""
    found: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        if row["kind"] == "time" and row["mode"] == mode:
            found.setdefault((row["op"], row["shape"], row["state"]), []).append(row)
    return found


def best(rows: list[Row], which: str, run: str | None) -> Row | None:
    """The fastest peer of a case in one run, or measured before."""
    timed = [row for row in rows if row["impl"] != OURS and row.get(which)]
    timed = [row for row in timed if row.get("run", run) == run]
    return min(timed, key=lambda row: row[which], default=None)


def judged(rows: list[Row], which: str, *, large: bool) -> dict[str, Any] | None:
    """Ours against the best peer and the floor in one pass; None where ours has no time."""
    own = next((row for row in rows if row["impl"] == OURS and row.get(which)), None)
    if own is None:
        return None
    peer, floor = best(rows, which, own.get("run")), own[f"floor_{which}"]
    ratio = peer[which] / own[which] if peer else None
    over = own[which] / floor
    half = None if ratio is None else ratio >= 2
    return {"ms": own[which], "floor": floor, "over": over, "peer": peer, "ratio": ratio, "half": half,
            "near": over <= 3 if large else None}  # fmt: skip


def time_table(rows: list[Row], mode: str) -> list[str]:
    """One line per case and pass."""
    lines = header(
        *("op", "shape", "state", "pass", "ours ms", "floor ms", "ours/floor", "best peer", "its ms"),
        *("peer/ours", "at most half", "within 3x floor"),
    )
    big = large_shapes()
    for (op, shape, state), case in cases(rows, mode).items():
        for which in PASSES:
            j = judged(case, which, large=(op, shape) in big and mode == "stream")
            if j is None:
                continue
            peer = j["peer"] or {"impl": "-"}
            cells = [op, shape, "yes" if state else "no", which[:-3].replace("_", "+"), number(j["ms"])]
            cells += [number(j["floor"]), f"{j['over']:.2g}x", peer["impl"], number(peer.get(which))]
            cells += [f"{number(j['ratio'])}x", mark(j["half"]), mark(j["near"])]
            lines.append(line(cells))
    return [*lines, ""]


def memory_table(rows: list[Row]) -> list[str]:
    """Peak above the inputs of forward and backward, beside the budget."""
    lines = header("op", "shape", "state", "ours MiB", "budget MiB", "", "peers MiB")
    for (op, shape, state), case in cases(rows, "stream").items():
        own = next((row for row in case if row["impl"] == OURS and row.get("peak_mib")), None)
        if own is None:
            continue
        others = [f"{r['impl']} {r['peak_mib']:.0f}" for r in case if r["impl"] != OURS and r.get("peak_mib")]
        good = own["peak_mib"] <= own["budget_mib"]
        cells = [op, shape, "yes" if state else "no", f"{own['peak_mib']:.0f}", f"{own['budget_mib']:.0f}"]
        lines.append(line([*cells, mark(good), "; ".join(others)]))
    return [*lines, ""]


def every_table(rows: list[Row]) -> list[str]:
    """Every implementation's times, and the reasons of those that did not run."""
    lines = header(
        "op", "shape", "state", "mode", "implementation", "fwd ms", "fwd+bwd ms", "peak MiB", "note"
    )
    for row in rows:
        if row["kind"] == "time":
            cells = [row["op"], row["shape"], "yes" if row["state"] else "no", row["mode"], row["impl"]]
            cells += [number(row.get(name)) for name in (*PASSES, "peak_mib")]
            lines.append(line([*cells, row.get("note", "")]))
    return [*lines, ""]


def error_table(rows: list[Row]) -> list[str]:
    """One line per implementation, type, length and regime."""
    lines = header("op", "implementation", "dtype", "T", "regime", *TENSORS, "finite", "target")
    for row in rows:
        if row["kind"] == "error":
            cells = [str(row[name]) for name in ("op", "impl", "dtype", "T", "regime")]
            cells += [number(row.get(name), 2) for name in TENSORS]
            beyond = f" ({row['beyond']} beyond {row['dtype']})" if row.get("beyond") else ""
            cells += [f"{row.get('finite', row.get('note', '-'))}{beyond}", mark(error_passes(row))]
            lines.append(line(cells))
    return [*lines, ""]


def error_passes(row: Row) -> bool | None:
    """Ours only: finite, and for RWKV-5 and -6 within the limit of its type; None where no target is set."""
    if row["impl"] != OURS or "finite" not in row:
        return None
    limit = LIMIT.get(row["dtype"])
    if limit is None or (row["op"] == "wkv4" and row["dtype"] != "fp32"):
        return bool(row["finite"])
    return bool(row["finite"]) and all(row[name] <= limit for name in TENSORS if name in row)


def rounding_alone(row: Row) -> bool:
    """Whether a row that misses its target is, where it does, as far off as the exact answer once rounded.

    To a hundredth of that error; beyond the type's range rounding gives no finite number either.
    """
    limit = LIMIT.get(row["dtype"], float("inf"))
    missed = [name for name in TENSORS if name in row and row[name] > limit]
    return row.get("lost") == 0 and all(row[name] <= 1.01 * row[f"{name}_rounded"] for name in missed)


def target_list(rows: list[Row]) -> list[str]:
    """How many cases reach each target, and which do not."""
    big, lines = large_shapes(), []
    halves: dict[str, bool] = {}
    nears: dict[str, bool] = {}
    for mode in ("stream", "packed", "eager", "graph"):
        for (op, shape, state), case in cases(rows, mode).items():
            for which in PASSES:
                j = judged(case, which, large=(op, shape) in big and mode == "stream")
                name = f"{op} {shape} {mode}{' state' if state else ''} {which[:-3]}"
                if j and j["half"] is not None:
                    halves[name] = j["half"]
                if j and j["near"] is not None:
                    nears[name] = j["near"]
    own = [r for r in rows if r["kind"] == "time" and r["impl"] == OURS and r["mode"] == "stream"]
    memory = {
        f"{r['op']} {r['shape']}{' state' if r['state'] else ''}": r["peak_mib"] <= r["budget_mib"]
        for r in own
        if r.get("peak_mib")
    }
    verdicts = [(row, error_passes(row)) for row in rows if row["kind"] == "error"]
    exact = {
        f"{row['op']} {row['dtype']} T={row['T']} {row['regime']}"
        + (" (rounding alone)" if not passed and rounding_alone(row) else ""): passed
        for row, passed in verdicts
        if passed is not None
    }
    titles = {
        "time at most half of the best peer's": halves,
        "large shapes within 3x of the floor": nears,
        "memory within the budget": memory,
        "errors": exact,
    }
    for title, found in titles.items():
        missed = [name for name, good in found.items() if not good]
        tail = "" if not missed else "; not: " + ", ".join(missed)
        lines.append(f"- {title}: {len(found) - len(missed)} of {len(found)}{tail}")
    return [*lines, ""]


INTRODUCTION = """# Kernels

`python -m benchmarks.kernels`; bf16, N = 64, medians of device events, implementations taking turns in one
process, random data, rotating buffers. The official training kernels are in no installable package: their
rows are figures measured before on an H100. fla-core's kernels run with what its own tuner chose on this
machine (fla_tuned.json). An implementation that has only a padded form pays for padding and unpadding.
"""


def table(rows: list[Row]) -> str:
    """The Markdown page of all rows."""
    machines = [row for row in rows if row["kind"] == "machine"]
    measured = [row for row in rows if row["kind"] != "machine"]
    ops = {row["op"] for row in measured}
    measured += [row for row in reference_rows() if row["op"] in ops]
    lines = [INTRODUCTION]
    for row in machines:
        lines.append("- " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "kind"))
    lines += ["", "## Targets", "", *target_list(measured)]
    lines += ["## Time", "", *time_table(measured, "stream")]
    lines += ["## Packed batch (lengths 100 to 2,048)", "", *time_table(measured, "packed")]
    lines += ["## Small shape, eager", "", *time_table(measured, "eager")]
    lines += ["## Small shape, in a CUDA graph", "", *time_table(measured, "graph")]
    lines += ["## Memory, forward and backward, above the inputs", "", *memory_table(measured)]
    lines += ["## Errors against fp64", "", *error_table(measured)]
    lines += ["## Every measurement", "", *every_table(measured)]
    return "\n".join(lines)
