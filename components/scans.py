"""Scans: the order in which each layer reads the patches of the image.

A scan is a table of permutations: per layer the row-major patch indices in reading order, any grid.
The model gathers the image positions into that order before a layer and undoes it after, around the
whole block; text and extra image tokens never move.

Source: VisualRWKV, table 4 (uni, bi, 2d); rotation, spiral, snake and zigzag are in
its code (version 5.1) only; hilbert is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit import register

Order = Sequence[int]
"""Row-major patch indices in reading order, each index once."""


@register.scan("uni")
def uni(n_layer: int, height: int, width: int) -> list[Order]:
    """Every layer reads the rows forward."""
    return [_rows(height, width)] * n_layer


@register.scan("bi")
def bi(n_layer: int, height: int, width: int) -> list[Order]:
    """Rows forward in even layers, backward in odd ones."""
    rows = _rows(height, width)
    return _in_turn(n_layer, rows, rows[::-1])


@register.scan("2d")
def rows_and_columns(n_layer: int, height: int, width: int, *, columns: bool = True) -> list[Order]:
    """Rows, reversed rows, columns, reversed columns, in turn by layer.

    columns false leaves the columns out, as `bi` does. Raises ValueError for columns of a grid
    with a side of 1, where they are the rows.

    Paper: its text names the column directions upward, downward; this is the order of its code.
    """
    if columns and min(height, width) == 1:
        raise ValueError(
            f"scan=2d: the image grid is {height} x {width}, a 2D scan needs both sides > 1; "
            "write scan=bi, or choose an encoder and a projector that keep a grid"
        )
    rows = _rows(height, width)
    down = _transposed(_rows(width, height), height, width)
    return _in_turn(n_layer, rows, rows[::-1], *((down, down[::-1]) if columns else ()))


@register.scan("rotation")
def rotation(n_layer: int, height: int, width: int) -> list[Order]:
    """Rows forward, starting a third of the image later in every layer.

    Paper: its code shifts the batch instead of the image by mistake, which exchanges samples, and
    never undoes it; this is what it meant: layer l starts at patch l * floor(P/3), modulo P.
    """
    rows = _rows(height, width)
    starts = [layer * (len(rows) // 3) % max(1, len(rows)) for layer in range(n_layer)]
    return [(*rows[start:], *rows[:start]) for start in starts]


@register.scan("spiral")
def spiral(n_layer: int, height: int, width: int) -> list[Order]:
    """Clockwise inwards from the top left corner, the same in every layer."""
    top, left, bottom, right = 0, 0, height - 1, width - 1
    cells: list[tuple[int, int]] = []
    while top <= bottom and left <= right:
        cells += [(top, c) for c in range(left, right + 1)]
        cells += [(r, right) for r in range(top + 1, bottom + 1)]
        if top < bottom and left < right:
            cells += [(bottom, c) for c in range(right - 1, left - 1, -1)]
            cells += [(r, left) for r in range(bottom - 1, top, -1)]
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1
    return [tuple(r * width + c for r, c in cells)] * n_layer


@register.scan("snake")
def snake(n_layer: int, height: int, width: int) -> list[Order]:
    """Even rows from the left, odd rows from the right, the same in every layer."""
    rows = _rows(height, width)
    runs = (rows[r * width : (r + 1) * width][:: -1 if r % 2 else 1] for r in range(height))
    return [tuple(patch for run in runs for patch in run)] * n_layer


@register.scan("zigzag")
def zigzag(n_layer: int, height: int, width: int) -> list[Order]:
    """Anti-diagonals, even ones upwards and odd ones downwards, the same in every layer."""

    def place(patch: int) -> tuple[int, int]:
        row, column = divmod(patch, width)
        diagonal = row + column
        return diagonal, row if diagonal % 2 else column

    return [tuple(sorted(range(height * width), key=place))] * n_layer


@register.scan("hilbert")
def hilbert(n_layer: int, height: int, width: int, *, alternate: bool = True) -> list[Order]:
    """A Hilbert-like curve over any grid: every step goes to a neighbour, near patches stay near.

    The curve of layer 0 joins the two ends of one side of the grid. alternate takes by layer the
    curve, its reverse, the curve along the other side, its reverse; else every layer reads the first.
    """
    if not height * width:  # projector.tokens=0: the class token alone
        return [()] * n_layer
    curve = _curve(height, width)
    if not alternate:
        return [curve] * n_layer
    other = _transposed(_curve(width, height), height, width)
    if other == curve:
        # Only one side of this grid has such a curve: give the grid a half turn.
        other = tuple(height * width - 1 - patch for patch in curve)
    return _in_turn(n_layer, curve, curve[::-1], other, other[::-1])


def _rows(height: int, width: int) -> tuple[int, ...]:
    return tuple(range(height * width))


def _in_turn(n_layer: int, *orders: Order) -> list[Order]:
    return [orders[layer % len(orders)] for layer in range(n_layer)]


def _transposed(order: Order, height: int, width: int) -> tuple[int, ...]:
    """An order of the width x height grid, as the patches of the height x width grid."""
    return tuple(patch % height * width + patch // height for patch in order)


def _curve(height: int, width: int) -> tuple[int, ...]:
    """A path through all patches from the top left corner to another end of one of its sides.

    Neighbours alternate in colour as on a chess board, so such a path along a side of n patches,
    m patches deep, exists only if n is even or m is odd; one of the two sides always will do.
    """
    if height == 1 or (width > 1 and (width % 2 == 0 or height % 2 == 1)):
        return tuple(_fill(0, 1, width, width, height))
    return tuple(_fill(0, width, height, 1, width))


def _fill(start: int, along: int, n: int, across: int, m: int) -> list[int]:
    """Path over n x m patches from `start` to `start + (n - 1) * along`; n is even or m is odd.

    `along` and `across` are the index steps of the two axes. Every cut is even where the parts need
    it, so that each part is such a path again and the parts meet in neighbours.
    """
    if m == 1:
        return [start + i * along for i in range(n)]
    if n == 2:
        out = [start + i * across for i in range(m)]
        return out + [patch + along for patch in reversed(out)]
    if m == 2 or 2 * n > 3 * m:
        cut = _even_half(n)
        rest = _fill(start + cut * along, along, n - cut, across, m)
        return _fill(start, along, cut, across, m) + rest
    cut, half = _even_half(m), n // 2
    end = start + (n - 1) * along
    rise = _fill(start, across, cut, along, half)
    bridge = _fill(start + cut * across, along, n, across, m - cut)
    fall = _fill(end + (cut - 1) * across, -across, cut, -along, n - half)
    return rise + bridge + fall


def _even_half(n: int) -> int:
    """The even number next to n / 2."""
    return n // 2 + n // 2 % 2
