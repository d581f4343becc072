"""`python -m toolkit.listing [kind] [--plot DIR]`: every component, recipe and scale, with its parameters."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import recipes, register
from toolkit.explain import closest, fail, guarded
from toolkit.layers import scales
from toolkit.lines import shown
from toolkit.register import Component, Parameter
from toolkit.values import type_text

KINDS = (*register.KINDS, "recipe", "scale")


@dataclass(frozen=True)
class Entry:
    """One line of the listing."""

    name: str
    parameters: tuple[str, ...]
    summary: str
    place: str


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an unknown kind."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m toolkit.listing", description=__doc__)
    parser.add_argument("kind", nargs="?", help=", ".join(KINDS))
    parser.add_argument(
        "--plot", metavar="DIR", type=Path, help="with `scan`: draw each scan into this folder"
    )
    parser.add_argument("--grid", default="4x4", metavar="HxW", help="grid of the drawings (default 4x4)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the drawings (default 4)")
    parser.add_argument("--plugins", default="", metavar="A,B", help="modules to import first")
    args = parser.parse_args(words)
    if args.kind and args.kind not in KINDS:
        raise fail(
            "command line",
            "kind",
            f"no kind {args.kind!r}; kinds: {', '.join(KINDS)}",
            matches=closest(args.kind, KINDS),
        )
    try:
        register.discover([name for name in args.plugins.split(",") if name])
    except register.PluginError as error:
        raise fail("command line", "--plugins", str(error)) from error
    if args.plot is not None:
        return _plot(args.plot, args.grid, args.layers, args.kind)
    show = _rich if sys.stdout.isatty() else _plain
    for kind in [args.kind] if args.kind else KINDS:
        show(kind, list(entries(kind)))
    return 0


def entries(kind: str) -> Iterator[Entry]:
    """What a kind offers, by name."""
    if kind == "recipe":
        for name, files in sorted(recipes.names().items()):
            yield from (_of_file(name, file) for file in files)
    elif kind == "scale":
        yield from (_of_file(name, recipes.SCALES / f"{name}.yaml") for name in scales())
    else:
        for _, component in sorted(register.components(kind).items()):
            yield _of_component(component)


def _of_file(name: str, file: Path) -> Entry:
    lines = [line for line in recipes.header(file) if not line.startswith("python ")]
    return Entry(name, (), re.split(r"(?<=\.)\s", " ".join(lines))[0], f"{shown(file)}:1")


def _of_component(component: Component) -> Entry:
    texts = tuple(_parameter(p) for p in component.parameters.values())
    return Entry(component.name, texts, component.summary, f"{shown(Path(component.file))}:{component.line}")


def _parameter(p: Parameter) -> str:
    """`head_size: int = 64 (at least 1)`."""
    default = "required" if p.required else repr(p.default)
    bounds = "; ".join(str(c) for c in p.constraints)
    return f"{p.name}: {type_text(p.type)} = {default}{f' ({bounds})' if bounds else ''}"


def _plain(kind: str, found: list[Entry]) -> None:
    print(kind)
    for entry in found:
        print(f"  {entry.name}  {entry.summary}  [{entry.place}]")
        for text in entry.parameters:
            print(f"      {text}")


def _rich(kind: str, found: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=kind, title_justify="left", show_lines=any(e.parameters for e in found))
    for heading in ("name", "what", "parameters", "where"):
        table.add_column(heading)
    for e in found:
        table.add_row(*(Text(cell) for cell in (e.name, e.summary, "\n".join(e.parameters), e.place)))
    Console().print(table)


def _plot(folder: Path, grid: str, layers: int, kind: str | None) -> int:
    """Draws every scan on one grid; a scan that refuses the grid is told and left out."""
    match = re.fullmatch(r"(\d+)x(\d+)", grid)
    if match is None or kind not in (None, "scan"):
        what = f"drawings are of scans, on a grid like 4x4 (given kind {kind!r}, grid {grid!r})"
        raise fail("command line", "--plot", what, fix="python -m toolkit.listing scan --plot DIR --grid 4x4")
    from toolkit.scan_plot import draw

    height, width = int(match[1]), int(match[2])
    for name, component in sorted(register.components("scan").items()):
        if any(p.required for p in component.parameters.values()):
            print(f"{name}: left out, it has required parameters")
            continue
        try:
            table = component.factory(layers, height, width)
        except ValueError as error:
            print(f"{name}: left out: {error}")
            continue
        print(
            draw(name, [[int(i) for i in row] for row in table], height, width, folder / f"scan_{name}.png")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
