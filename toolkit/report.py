"""`python -m toolkit.report ablation/scan`: a table recipe's results beside the paper's.

The table recipe is the plan: every row and seed is composed, its run directory is looked up by what
was asked, and what is missing is said with the command for it. Writes Markdown, CSV and a figure.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit import compose
from toolkit.explain import fail, guarded
from toolkit.layers import parse, resolve
from toolkit.rundir import RunDir, write_text


@dataclass
class Row:
    """One row of a table: its name, its title and the results of its seeds."""

    name: str
    results: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        return [r["accuracy"] for r in self.results]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def kind(self, kind: str) -> float | None:
        """Mean accuracy over seeds on one question type."""
        found = [r["by_kind"][kind]["accuracy"] for r in self.results if kind in r["by_kind"]]
        return statistics.fmean(found) if found else None


@dataclass
class Table:
    """Everything a report shows of one table recipe."""

    recipe: str
    title: str
    caption: str
    published: dict[str, dict[str, float]]
    rows: list[Row]

    @property
    def results(self) -> list[dict[str, Any]]:
        return [result for row in self.rows for result in row.results]

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for r in self.results for kind in r["by_kind"]})

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(b for values in self.published.values() for b in values))


def collect(recipe: str, overrides: Sequence[str]) -> Table:
    """Composes every row and seed of a table recipe and looks its results up by run id."""
    request = compose.understand([f"recipe={recipe}", *overrides])
    fixed = tuple(g for g in parse(request.arguments) if not g.override.is_sweep_override())
    asked = compose.compose(compose.Job(fixed, resolve(fixed)), complete=False)
    report = asked["report"]
    rows: dict[str, Row] = {}
    if not report["rows"]:
        raise fail(recipe, "report.rows", "this recipe is no table", fix="name one, e.g. ablation/scan")
    for job in request.jobs:
        cfg = compose.compose(job)
        name = job.recipe if report["rows"] == "recipe" else str(row_value(cfg, report["rows"]))
        row = rows.setdefault(name, Row(name))
        result = RunDir(Path(cfg["paths"]["runs"]).expanduser(), cfg).finished()
        if result is None:
            row.missing.append("python -m toolkit.run " + " ".join(dict.fromkeys(job.overrides)))
        else:
            row.results.append(result)
    return Table(recipe, asked["title"], report["caption"], report["published"], list(rows.values()))


def row_value(cfg: dict[str, Any], key: str) -> Any:
    """The value of the key that rows vary: a component's name, or a setting by its dotted path."""
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value["name"] if isinstance(value, dict) else value


def markdown(table: Table) -> str:
    """The report as Markdown; percentages."""
    lines = [f"# {table.title or table.recipe}", "", table.caption, ""]
    lines += _grid(_header(table), [_cells(table, row) for row in table.rows])
    lines += ["", *notes(table)]
    missing = [command for row in table.rows for command in row.missing]
    if missing:
        lines += ["", "Missing:", "", *(f"    {command}" for command in missing)]
    return "\n".join(lines) + "\n"


def _header(table: Table) -> list[str]:
    paper = [f"paper: {b}" for b in table.benchmarks]
    return ["row", "accuracy", "seeds", *table.kinds, *paper]


def _cells(table: Table, row: Row) -> list[str]:
    published = table.published.get(row.name, {})
    paper = [f"{published[b]:.2f}" if b in published else "-" for b in table.benchmarks]
    if not row.results:
        return [row.name, "missing", "0", *["-"] * len(table.kinds), *paper]
    spread = f" ± {100 * row.spread:.2f}" if row.spread is not None else ""
    kinds = [_percent(row.kind(kind)) for kind in table.kinds]
    return [row.name, f"{100 * row.mean:.2f}{spread}", str(len(row.results)), *kinds, *paper]


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
    if not table.results:
        return ["No results yet."]
    first = table.results[0]
    widest = max(r["ci95"] for r in table.results)
    told = [
        f"Accuracy in percent on {first['n']:,} questions, exact match; ± is the standard deviation over "
        f"seeds. The 95 % interval of one run, clustered by image, is at most ± {100 * widest:.2f}.",
        f"Floors: majority answer {100 * first['majority']:.2f}, question only {100 * first['blind']:.2f}.",
        "Parameters that train or read the sequence: "
        + ", ".join(
            f"{row.name} {row.results[0]['parameters']['rwkv']:,}" for row in table.rows if row.results
        )
        + f"; {first['steps']:,} optimizer steps each.",
    ]
    commits = {r["commit"] for r in table.results}
    if len(commits) > 1:
        told.append(
            f"Rows come from {len(commits)} different commits: {', '.join(sorted(c[:10] for c in commits))}."
        )
    return told


def as_csv(table: Table) -> str:
    """One line per row and seed, shares between 0 and 1; the paper's values as published."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kinds, paper = table.kinds, [f"paper_{b}" for b in table.benchmarks]
    writer.writerow(["row", "seed", "accuracy", "ci95", "n", "majority", "blind", "seconds", *kinds, *paper])
    for row in table.rows:
        published = table.published.get(row.name, {})
        for r in row.results:
            own = [r[k] for k in ("seed", "accuracy", "ci95", "n", "majority", "blind", "seconds")]
            by_kind = [r["by_kind"].get(k, {}).get("accuracy", "") for k in kinds]
            writer.writerow([row.name, *own, *by_kind, *(published.get(b, "") for b in table.benchmarks)])
    return out.getvalue()


def figure(table: Table, path: Path) -> Path:
    """Left: ours, a dot per seed and a bar at the mean, floors dashed. Right: the paper's benchmarks."""
    from matplotlib.figure import Figure

    done = [row for row in table.rows if row.results]
    panels = 2 if table.published else 1
    drawing = Figure(figsize=(4.6 * panels, 3.6), layout="constrained")
    axes = drawing.subplots(1, panels, squeeze=False)[0]
    names = [row.name.rsplit("/", 1)[-1] for row in done]
    _draw_ours(axes[0], done, names)
    if table.published:
        _draw_paper(axes[1], table)
    drawing.suptitle(table.title or table.recipe, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)
    return path


def _draw_ours(axes: Any, rows: list[Row], names: list[str]) -> None:
    for at, row in enumerate(rows):
        axes.bar(at, 100 * row.mean, width=0.6, color="#9ecae1", zorder=1)
        axes.scatter(
            [at] * len(row.results), [100 * a for a in row.accuracies], s=22, color="#08519c", zorder=3
        )
        axes.annotate(
            f"{100 * row.mean:.1f}",
            (at, 100 * row.mean),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
        )
    for key, label in (("majority", "majority"), ("blind", "question only")):
        level = 100 * rows[0].results[0][key]
        axes.axhline(level, linestyle="--", linewidth=1, color="#636363", zorder=2)
        axes.annotate(
            label,
            (len(rows) - 0.45, level),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=8,
            ha="right",
        )
    axes.set_xticks(range(len(rows)), names)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, 108)
    axes.set_ylabel("exact match (%)")
    axes.set_title("ours", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_paper(axes: Any, table: Table) -> None:
    shown = [row.name for row in table.rows if row.name in table.published]
    width = 0.8 / max(1, len(shown))
    for at, name in enumerate(shown):
        values = [table.published[name].get(b, float("nan")) for b in table.benchmarks]
        places = [i + (at - (len(shown) - 1) / 2) * width for i in range(len(values))]
        shade = str(0.75 - 0.5 * at / max(1, len(shown) - 1))
        axes.bar(places, values, width=width * 0.92, color=shade, label=name.rsplit("/", 1)[-1])
    axes.set_xticks(range(len(table.benchmarks)), table.benchmarks)
    axes.set_title("published (other data and size)", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=len(shown), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)


def write(table: Table, folder: Path) -> list[Path]:
    """Markdown, CSV, JSON lines of the results and, once there is one, the figure."""
    stem = folder / table.recipe.replace("/", "-")
    made = [stem.with_suffix(".md"), stem.with_suffix(".csv"), stem.with_suffix(".jsonl")]
    write_text(made[0], markdown(table))
    write_text(made[1], as_csv(table))
    write_text(made[2], "".join(json.dumps(r) + "\n" for r in table.results))
    if table.results:
        made.append(figure(table, stem.with_suffix(".png")))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 complete, 1 rows are missing, 2 the request is wrong."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m toolkit.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", help="a table recipe, e.g. ablation/scan")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as given to toolkit.run")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="default: reports")
    options = parser.parse_args(words)
    table = collect(options.recipe.removeprefix("recipe="), options.overrides)
    made = write(table, options.out)
    print(markdown(table))
    print("written: " + ", ".join(str(path) for path in made))
    return 1 if any(row.missing for row in table.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
