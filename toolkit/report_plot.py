"""The figure of a table: one panel per question type, arms as lines over training, the paper's last."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.report_table import ALL, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D1F", "#3B3B98", "#56B4E9", "#555555")
"""Told apart by colour-blind readers, dark enough for text on white (after Okabe and Ito)."""

STYLES = ("-", "--", ":", "-.")

MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"))
"""What stands for each style where arms are dots: drawn, and before a label."""

Look = tuple[str, str]
"""Colour and line style."""
_INK, _FAINT = "#222222", "#767676"
_COLUMNS = 4  # panels side by side
_PANEL = 2.9, 2.35  # inches
_LABEL = 7.5  # points


def figure(table: Table, path: Path) -> Path:
    """Draws the report's figure to an image file and returns its path; its suffix decides the format.

    Lines are means over seeds, bands reach from the worst to the best seed; runs that were not evaluated
    while training are shown as a dot per seed. The last panel has the paper's numbers.
    """
    from matplotlib.figure import Figure

    kinds = table.shown
    n = len(kinds) + bool(table.published)
    columns = _columns(n)
    rows = -(-n // columns)
    width, height = _PANEL
    width += 0.06 * max(0, max(len(row.label) for row in table.rows) - 5)
    drawing = Figure(figsize=(width * columns + 0.3, height * rows + 0.75), layout="constrained")
    drawing.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg,union-attr]
    grid = drawing.subplots(rows, columns, squeeze=False)
    low = _lowest(table)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        _ours(axes, table, kind, low)
    if table.published:
        _paper(grid.flat[len(kinds)], table)
    for axes in grid.flat[n:]:
        axes.set_axis_off()
    for line in grid:
        line[0].set_ylabel("exact match (%)", fontsize=8)
    _head(drawing, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150, facecolor="white")
    return path


def _columns(n: int) -> int:
    """As few rows as _COLUMNS allows, filled as evenly as they can be."""
    rows = -(-n // _COLUMNS)
    return -(-n // rows)


def _head(drawing: Figure, table: Table) -> None:
    seeds = len(table.seeds)
    line = "line: mean, band: all seeds" if table.curves else "dot: a seed, bar: mean"
    line = (
        line if seeds > 1 else "line: accuracy on held-out questions" if table.curves else "dot: the one run"
    )
    dashed = "; dashed: question only" if any(_floor(table, kind) for kind in table.shown) else ""
    told = f"{seeds} seed{'s' * (seeds != 1)}; {line}{dashed}"
    drawing.suptitle(table.title or table.recipe, fontsize=10.5, color=_INK)
    drawing.supxlabel(told, fontsize=7.5, color=_FAINT)


def _lowest(table: Table) -> float:
    """Where the y axis of all panels begins, in percent."""
    seen = [a for run in table.runs for kind in run.final.scores for _, a in run.curve(kind)]
    seen += [floor for kind in table.shown if (floor := _floor(table, kind)) is not None]
    return max(0.0, 10 * math.floor((100 * min(seen) - 3) / 10))


def _floor(table: Table, kind: str) -> float | None:
    """What the question alone gives, if the runs know it for this type."""
    for run in table.runs:
        known = run.floors(kind)
        if known.get("blind") is not None:
            return float(known["blind"])
    return None


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, color=_INK, loc="left")
    axes.tick_params(labelsize=7.5, colors=_INK, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.grid(axis="y", color="#ececec", linewidth=0.7)
    axes.set_axisbelow(True)


def _ours(axes: Axes, table: Table, kind: str, low: float) -> None:
    rows = [(look, row) for row in table.rows if (look := looks(table)[row.name]) and row.final(kind)]
    _style(axes, "all questions" if kind == ALL else kind)
    axes.set_ylim(low, 103 if low < 90 else 101)
    if any(len(run.curve(kind)) > 1 for _, row in rows for run in row.runs):
        _lines(axes, rows, kind)
    else:
        _dots(axes, rows, kind)
    floor = _floor(table, kind)
    if floor is not None:
        axes.axhline(100 * floor, linestyle=(0, (4, 3)), linewidth=0.9, color=_FAINT, zorder=1)


def _lines(axes: Axes, rows: Sequence[tuple[Look, Row]], kind: str) -> None:
    """Mean over seeds by step, the seeds' range as a band, each line labelled at its end."""
    ends: list[End] = []
    last = 0
    for (colour, style), row in rows:
        by_step = _by_step(row, kind)
        steps = list(by_step)
        means = [100 * statistics.fmean(values) for values in by_step.values()]
        axes.plot(steps, means, style, color=colour, linewidth=1.6, zorder=3, marker="o", markersize=2.4)
        if len(row.runs) > 1:
            low = [100 * min(values) for values in by_step.values()]
            high = [100 * max(values) for values in by_step.values()]
            axes.fill_between(
                steps, low, high, color=colour, alpha=0.14 if len(rows) < 5 else 0.07, linewidth=0, zorder=2
            )
        apart = ":" if row.label[-1:].isdigit() else ""
        ends.append((means[-1], f"{row.label}{apart} {means[-1]:.0f}", (colour, style)))
        last = max(last, steps[-1])
    axes.set_xlim(0, last)
    axes.set_xlabel("steps", fontsize=7.5, labelpad=1)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _label(axes, ends)


def _few_ticks() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)


def _by_step(row: Row, kind: str) -> dict[int, list[float]]:
    """Step -> accuracies, of the steps at which every seed was evaluated."""
    curves = [dict(run.curve(kind)) for run in row.runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: [curve[step] for curve in curves] for step in shared}


def looks(table: Table) -> dict[str, Look]:
    """Row name -> colour and style; of two keys that rows vary, one decides the colour, one the style."""
    firsts = list(dict.fromkeys(row.parts[0] for row in table.rows))
    rests = list(dict.fromkeys(row.parts[1:] for row in table.rows))
    found = {}
    for row in table.rows:
        i, k = firsts.index(row.parts[0]), rests.index(row.parts[1:])
        found[row.name] = COLOURS[i % len(COLOURS)], STYLES[(k + i // len(COLOURS)) % len(STYLES)]
    return found


End = tuple[float, str, Look]
"""Where a line ends, what is written there, and how the line looks."""


def _label(axes: Axes, ends: Sequence[End]) -> None:
    """Words in the arm's colour beside its line's end, moved apart where they would overlap.

    Where styles differ, a piece of the line stands before them.
    """
    low, high = axes.get_ylim()
    gap = (high - low) * 0.085
    order = sorted(ends)
    places = spaced([min(max(y, low), high) for y, _, _ in order], gap, low, high)
    styled = len({style for _, _, (_, style) in order}) > 1
    for (_, text, (colour, style)), y in zip(order, places, strict=True):
        if styled:
            across = axes.get_yaxis_transform()
            axes.plot(
                [1.03, 1.13], [y, y], style, color=colour, linewidth=1.4, transform=across, clip_on=False
            )
        axes.annotate(
            text,
            (1.16 if styled else 1.03, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=_LABEL,
            color=colour,
            annotation_clip=False,
        )


def spaced(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising values pushed at least `gap` apart, kept within low and high as far as there is room."""
    blocks: list[tuple[float, int]] = []  # (centre, members)
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and _overlap(blocks[-2], blocks[-1], gap):
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    placed = [c + (k - (n - 1) / 2) * gap for c, n in blocks for k in range(n)]
    over = max(0.0, (placed[-1] if placed else high) - high)
    for k in range(len(placed) - 1, -1, -1):
        above = placed[k + 1] - gap if k + 1 < len(placed) else high
        placed[k] = min(placed[k], above) if over else placed[k]
    for k in range(len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap if k else low)
    return placed


def _overlap(a: tuple[float, int], b: tuple[float, int], gap: float) -> bool:
    return b[0] - (b[1] - 1) / 2 * gap - (a[0] + (a[1] - 1) / 2 * gap) < gap


def _dots(axes: Axes, rows: Sequence[tuple[Look, Row]], kind: str) -> None:
    """A dot per seed over the arm's name, a bar at their mean, its value above."""
    for at, ((colour, _), row) in enumerate(rows):
        values = [100 * a for a in row.final(kind).values()]
        mean = statistics.fmean(values)
        if len(values) > 1:
            axes.plot([at - 0.22, at + 0.22], [mean, mean], color=colour, linewidth=2.2, zorder=3)
        axes.scatter([at] * len(values), values, s=20, color=colour, zorder=4, linewidth=0, alpha=0.75)
        axes.annotate(
            f"{mean:.1f}",
            (at + (0.26 if len(values) > 1 else 0.12), mean),
            va="center",
            fontsize=_LABEL,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=2,
        )
    axes.set_xticks(range(len(rows)), [row.label for _, row in rows])
    if max(len(row.label) for _, row in rows) * len(rows) > 36:
        axes.tick_params(axis="x", rotation=30)
    axes.set_xlim(-0.6, len(rows) - 0.2)


def _paper(axes: Axes, table: Table) -> None:
    """The paper's benchmarks, a dot per arm in its colour."""
    shown = [(looks(table)[row.name], row) for row in table.rows if row.name in table.published]
    step = min(0.14, 0.8 / max(1, len(shown)))  # no dot comes nearer to the next benchmark
    _style(axes, "published (other data and size)")
    ends: list[End] = []
    for at, ((colour, style), row) in enumerate(shown):
        values = [table.published[row.name].get(b, math.nan) for b in table.benchmarks]
        offset = (at - (len(shown) - 1) / 2) * step
        places = [k + offset for k in range(len(values))]
        marker, sign = MARKERS[STYLES.index(style)]
        axes.scatter(places, values, s=24, color=colour, marker=marker, zorder=3, linewidth=0)
        known = [v for v in values if not math.isnan(v)]
        if known:
            text = f"{sign} {row.label}" if len({one for (_, one), _ in shown}) > 1 else row.label
            ends.append((known[-1], text, (colour, STYLES[0])))
    axes.set_xticks(range(len(table.benchmarks)), table.benchmarks)
    axes.set_xlim(-0.5, len(table.benchmarks) - 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.04 * (high - low), high)
    _label(axes, ends)
