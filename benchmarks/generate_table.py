"""The Markdown table and the plot of benchmarks.generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WAYS = ("ours", "recomputed", "rwkv package", "llama", "transformers")
COLORS = {
    "ours": "#2457c5",
    "recomputed": "#b3261e",
    "rwkv package": "#7b3fa0",
    "llama": "#1b7f4b",
    "transformers": "#c98a00",
}


def speed(row: dict[str, Any], way: str) -> float | None:
    """Tokens a second of the whole batch."""
    return 1e3 * row["batch"] / row["ms"][way] if way in row["ms"] else None


def table(result: dict[str, Any]) -> str:
    """Tokens a second by size, batch and position, and how far the text from the state agrees."""
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = ["# Generating from the state", "", f"`python -m benchmarks.generate`; {facts}.", ""]
    lines += ["Tokens a second of the whole batch, medians; how each is run: benchmarks/generate.py.", ""]
    lines += [f"| size | B | position | {' | '.join(WAYS)} |", "|---" * (3 + len(WAYS)) + "|"]
    for row in result["rows"]:
        cells = [_cell(speed(row, way)) for way in WAYS]
        lines.append(f"| {row['size']} | {row['batch']} | {row['position']:,} | {' | '.join(cells)} |")
    lines += ["", *_reasons(result), *_flat(result)]
    return "\n".join([*lines, *_agreement(result["agreement"])]) + "\n"


def _agreement(rows: list[dict[str, Any]]) -> list[str]:
    """Greedy tokens from the state beside one pass over the same text."""
    lines = ["Greedy in bfloat16, from the state beside one pass over the same text. Differences of"]
    lines += ["logits are in their standard deviations; the last column is what bfloat16 alone changes.", ""]
    lines += ["| size | head | tokens | agree | mean difference | largest | pass in bf16 as in fp32 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        numbers = [f"{row['agree']:.1%}", f"{row['mean_difference']:.4f}", f"{row['largest_difference']:.3f}"]
        numbers.append(f"{row['bf16_agrees_with_fp32']:.1%}")
        head = "taught a text" if row["taught"] else "random"
        lines.append(f"| {row['size']} | {head} | {row['tokens']} | {' | '.join(numbers)} |")
    lines += [
        "",
        "A random head leaves the two largest of its logits close; one that was taught a text",
    ]
    return [*lines, "is as sure of its next token as a trained one."]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _reasons(result: dict[str, Any]) -> list[str]:
    """Why a cell is empty, each reason once."""
    found: dict[str, list[str]] = {}
    for row in result["rows"]:
        for way, reason in row["reasons"].items():
            place = f"{row['size']} B={row['batch']} at {row['position']:,}"
            found.setdefault(f"{way}: {reason}", []).append(place)
    lines = [f"- {reason} ({', '.join(places)})" for reason, places in found.items()]
    lines += [f"- left out, the time was used up: {place}" for place in result["left_out"]]
    return [*lines, ""] if lines else []


def _flat(result: dict[str, Any]) -> list[str]:
    """Ours at the later positions over ours at the first, measured in turn."""
    lines = []
    for row in result["flat"]:
        first, *later = row["ms"]
        said = [f"{row['ms'][p] / row['ms'][first]:.3f} at {int(p):,}" for p in later]
        place = f"{row['size']} B={row['batch']}"
        lines.append(f"Cost of a token of ours over that at position {first}, {place}: {', '.join(said)}.")
    return [*lines, ""] if lines else []


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens a second over the position, a panel for each size and batch."""
    from matplotlib.figure import Figure

    groups = sorted({(row["size"], row["batch"]) for row in result["rows"]})
    figure = Figure(figsize=(4.2 * min(2, len(groups)), 3.3 * -(-len(groups) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(groups) // 2), min(2, len(groups)), squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, (size, batch) in zip(panels.flat, groups, strict=False):
        rows = [r for r in result["rows"] if (r["size"], r["batch"]) == (size, batch)]
        for way in WAYS:
            points = [(r["position"], speed(r, way)) for r in rows if speed(r, way) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=way, color=COLORS[way])
        axes.set(xscale="log", yscale="log", title=f"{size}, B = {batch}", xlabel="position")
        axes.set_xticks([r["position"] for r in rows], [f"{r['position']:,}" for r in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_ylabel("tokens / s")
    panels.flat[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
