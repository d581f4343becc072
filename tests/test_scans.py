"""Every registered scan is permutations on any grid; each one's own order; the picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from components import scans
from toolkit import register
from toolkit.scan_plot import draw

GRIDS = [(1, 1), (1, 7), (6, 1), (2, 2), (2, 5), (3, 3), (3, 4), (5, 3), (4, 4), (7, 7), (9, 16), (24, 24)]
NAMES = sorted(register.components("scan"))


def table(name: str, n_layer: int, height: int, width: int) -> Sequence[Sequence[int]]:
    return register.bind("scan", {"name": name})(n_layer, height, width)


def step(a: int, b: int, width: int) -> int:
    return abs(a // width - b // width) + abs(a % width - b % width)


def test_all_named_scans_are_registered() -> None:
    assert {"uni", "bi", "2d", "spiral", "snake", "zigzag", "rotation", "hilbert"} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "2d"])
def test_no_patches_where_the_class_token_stands_alone(name: str) -> None:
    assert [list(row) for row in table(name, 3, 0, 0)] == [[]] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_layer_reads_every_patch_once(name: str, height: int, width: int) -> None:
    if name == "2d" and 1 in (height, width):
        with pytest.raises(ValueError, match=f"scan=2d: .* {height} x {width}, .* both sides > 1"):
            table(name, 2, height, width)
        return
    for n_layer in (1, 2, 5):
        rows = table(name, n_layer, height, width)
        assert len(rows) == n_layer
        for row in rows:
            assert sorted(row) == list(range(height * width))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uni", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("spiral", [0, 1, 2, 5, 8, 7, 6, 3, 4]),
        ("snake", [0, 1, 2, 5, 4, 3, 6, 7, 8]),
        ("zigzag", [0, 1, 3, 6, 4, 2, 5, 7, 8]),
    ],
)
def test_static_orders_of_the_original(name: str, expected: list[int]) -> None:
    assert [list(row) for row in table(name, 3, 3, 3)] == [expected] * 3


def test_static_orders_on_a_rectangle() -> None:
    assert list(table("spiral", 1, 2, 4)[0]) == [0, 1, 2, 3, 7, 6, 5, 4]
    assert list(table("snake", 1, 3, 2)[0]) == [0, 1, 3, 2, 4, 5]
    assert list(table("zigzag", 1, 2, 3)[0]) == [0, 1, 3, 4, 2, 5]


def test_two_directions_in_turn() -> None:
    assert [list(row) for row in table("bi", 3, 2, 2)] == [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]


def test_four_directions_in_the_order_of_the_original() -> None:
    four = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [3, 1, 2, 0]]
    assert [list(row) for row in table("2d", 6, 2, 2)] == [*four, *four[:2]]
    assert list(table("2d", 3, 2, 3)[2]) == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("height", "width"), [(1, 4), (3, 5)])
def test_2d_without_columns_is_bi(height: int, width: int) -> None:
    assert scans.rows_and_columns(5, height, width, columns=False) == scans.bi(5, height, width)


def test_rotation_starts_a_third_later_in_every_layer() -> None:
    rows = table("rotation", 5, 2, 5)
    assert [row[0] for row in rows] == [0, 3, 6, 9, 2]
    assert list(rows[1]) == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


@pytest.mark.parametrize("name", ["spiral", "snake"])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_spiral_and_snake_move_to_a_neighbour(name: str, height: int, width: int) -> None:
    row = table(name, 1, height, width)[0]
    assert {step(a, b, width) for a, b in pairwise(row)} <= {1}


@pytest.mark.parametrize("height", range(1, 20))
def test_hilbert_moves_to_a_neighbour_on_every_grid(height: int) -> None:
    for width in range(1, 20):
        for row in set(scans.hilbert(4, height, width)):
            assert sorted(row) == list(range(height * width))
            assert {step(a, b, width) for a, b in pairwise(row)} <= {1}


def test_hilbert_is_the_hilbert_curve_on_a_power_of_two() -> None:
    """Each aligned square block of side 2, 4, 8 is read in one go."""
    for row in scans.hilbert(4, 16, 16):
        for side in (2, 4, 8):
            blocks = [(p // 16 // side, p % 16 // side) for p in row]
            entered = sum(a != b for a, b in pairwise(blocks)) + 1
            assert entered == (16 // side) ** 2


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 4), (4, 5), (5, 5), (8, 3), (24, 24)])
def test_hilbert_alternates_by_layer(height: int, width: int) -> None:
    rows = scans.hilbert(5, height, width)
    assert len(set(rows)) == 4
    assert rows[4] == rows[0]
    assert rows[1] == rows[0][::-1]
    assert rows[3] == rows[2][::-1]
    assert scans.hilbert(5, height, width, alternate=False) == [rows[0]] * 5


@pytest.mark.parametrize(
    ("name", "titles"), [("uni", ["all 4 layers"]), ("bi", ["layers 0, 2", "layers 1, 3"])]
)
def test_picture_has_one_panel_per_distinct_order(tmp_path: Path, name: str, titles: list[str]) -> None:
    path = tmp_path / "new" / f"{name}.svg"
    assert draw(name, table(name, 4, 3, 5), 3, 5, path) == path
    svg = path.read_text(encoding="utf-8")
    for text in [*titles, f"scan={name}, 3 × 5 patches"]:
        assert f"<!-- {text} -->" in svg
    assert svg.count("layers") == len(titles)


def test_picture_of_a_single_patch_and_of_a_large_grid(tmp_path: Path) -> None:
    for side in (1, 24):
        path = draw("hilbert", table("hilbert", 2, side, side), side, side, tmp_path / f"{side}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
