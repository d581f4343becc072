"""Pictures of scans: the path on which each layer reads the patches of the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4  # panels side by side
_NUMBERED = 10  # longest side of a grid whose patches carry their index
_INK, _FAINT = "#222222", "#d9d9d9"


def draw(name: str, table: Sequence[Sequence[int]], height: int, width: int, path: Path) -> Path:
    """Draws the reading order of each layer to an image file and returns its path.

    table: what a scan returns for this grid, [n_layer][height * width]. One panel per distinct
    order, titled with its layers: neighbouring steps as a line that darkens from the first patch
    (circle) to the last (square), jumps faint and dotted. The suffix of `path` decides the format.
    """
    from matplotlib.figure import Figure

    panels = _panels(table)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    patch = 2.4 / max(height, width)  # inches
    panel = max(patch * width, 1.4), patch * height + 0.3
    figure = Figure(figsize=(max(panel[0] * columns, 3.2), panel[1] * rows + 0.65), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (order, layers) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(_title(layers, len(table)), fontsize=9, color=_INK)
        _panel(axes, order, height, width)
    figure.suptitle(f"scan={name}, {height} × {width} patches", fontsize=12, color=_INK)
    _legend(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _panels(table: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Distinct order -> the layers that read in it."""
    panels: dict[tuple[int, ...], list[int]] = {}
    for layer, order in enumerate(table):
        panels.setdefault(tuple(order), []).append(layer)
    return panels


def _title(layers: Sequence[int], n_layer: int) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) == n_layer:
        return f"all {n_layer} layers"
    shown = [str(layer) for layer in layers]
    if len(shown) > 5:
        shown = [*shown[:3], "…", shown[-1]]
    return "layers " + ", ".join(shown)


def _panel(axes: Axes, order: Sequence[int], height: int, width: int) -> None:
    _cells(axes, height, width)
    points = [(patch % width, patch // width) for patch in order]
    _steps(axes, points)
    size = 170 / max(height, width) ** 0.8
    for (x, y), marker in ((points[0], "o"), (points[-1], "s")):
        axes.scatter([x], [y], s=size, marker=marker, facecolor="white", edgecolor=_INK, zorder=4)


def _cells(axes: Axes, height: int, width: int) -> None:
    """An empty grid, patches numbered if there is room."""
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])
    for x in range(width - 1):
        axes.axvline(x + 0.5, color=_FAINT, linewidth=0.6, zorder=0)
    for y in range(height - 1):
        axes.axhline(y + 0.5, color=_FAINT, linewidth=0.6, zorder=0)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    if max(height, width) > _NUMBERED:
        return
    font = min(8.0, 40 / max(height, width))
    for patch in range(height * width):
        left, top = patch % width - 0.45, patch // width - 0.45
        axes.text(left, top, str(patch), fontsize=font, color="#8c8c8c", va="top", ha="left", zorder=2.5)


def _steps(axes: Axes, points: Sequence[tuple[int, int]]) -> None:
    """The path through cell centres: lines with a head in the middle of each step."""
    import matplotlib
    import numpy as np
    from matplotlib.collections import LineCollection

    if len(points) < 2:
        return
    ends = np.array(points, dtype=np.float64)  # [P, 2]
    start, step = ends[:-1], np.diff(ends, axis=0)  # [P-1, 2]
    length = np.linalg.norm(step, axis=1)
    near = length < 1.5
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0.25, 1.0, len(step)))  # [P-1, 4]
    thick = max(1.0, 2.0 - 0.04 * ends.max())
    lines = np.stack([start, start + step], axis=1)  # [P-1, 2, 2]
    axes.add_collection(LineCollection(lines[near], colors=colours[near], linewidths=thick, zorder=2))
    axes.add_collection(
        LineCollection(lines[~near], colors=colours[~near], linewidths=thick / 2, linestyles=":", zorder=2)
    )
    size = min(0.1 + 0.02 * ends.max(), 0.4)  # of a head, in patches
    head = step / length[:, None] * size
    tail = start + (step - head) / 2
    axes.quiver(
        *tail.T, *head.T, color=colours, units="xy", angles="xy", scale_units="xy", scale=1,
        width=size / 4.8, headwidth=4.6, headlength=4.8, headaxislength=4.0, minlength=0, zorder=3,
    )  # fmt: skip


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    first, last = (Line2D([], [], marker=m, color=_INK, mfc="white", linestyle="none") for m in "os")
    jump = Line2D([], [], color=_INK, linestyle=":", linewidth=0.9)
    handles = {"first": first, "last": last, "jump": jump}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
