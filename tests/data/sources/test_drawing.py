"""Random numbers, shapes and PNG: exact, whatever library versions are installed."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from data.images import decode
from data.sources import raster
from data.sources.stream import Stream


def test_draws_are_these():
    stream = Stream("a", 1)
    assert [stream.below(1000) for _ in range(6)] == GOLDEN
    assert [Stream("a", 2).below(1000) for _ in range(6)] != GOLDEN


GOLDEN = [954, 674, 696, 875, 876, 153]


def test_draws_are_uniform_and_in_range():
    stream = Stream("b")
    found = Counter(stream.between(3, 7) for _ in range(10_000))
    assert set(found) == {3, 4, 5, 6, 7} and min(found.values()) > 1850


def test_a_sample_has_no_repeats_and_every_order():
    stream = Stream("c")
    found = Counter(tuple(stream.sample("abc", 2)) for _ in range(6000))
    assert len(found) == 6 and min(found.values()) > 850
    assert sorted(stream.sample(range(9), 9)) == list(range(9))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (75, 3), (1, 7), (512, 300)])
@pytest.mark.parametrize("shades", [2, 16, 17, 200])
def test_png_is_read_back_exactly(width, height, shades):
    colors = [(i, 255 - i, 7 * i % 256) for i in range(shades)]
    pixels = (np.arange(width * height) % shades).astype(np.uint8).reshape(height, width)
    read = np.asarray(decode(raster.png(pixels, colors), "x"))
    assert (read == np.array(colors, dtype=np.uint8)[pixels]).all()


def test_png_bytes_are_these():
    pixels = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    data = raster.png(pixels, [(255, 255, 255), (1, 2, 3), (4, 5, 6)])
    assert hashlib.sha256(data).hexdigest()[:16] == "b6131817645a474e"


def test_shapes_differ_touch_the_border_and_mirror():
    drawn = {name: raster.shape(name, 12) for name in raster.SHAPES}
    assert len({levels.tobytes() for levels in drawn.values()}) == len(raster.SHAPES)
    for name, levels in drawn.items():
        assert (levels == levels[:, ::-1]).all(), name
        assert set(np.unique(levels)) == {0, raster.LEVELS}
        assert levels.any(axis=1).sum() >= 10 and levels.any(axis=0).sum() >= 10
    assert drawn["ring"][6, 6] == 0 and drawn["square"][1, 1] and not drawn["circle"][1, 1]


@pytest.mark.parametrize("size", [9, 14, 22, 30])
def test_shrinking_keeps_the_share_of_ink(size):
    whole = np.zeros((22, 22), dtype=np.uint8)
    whole[:, :11] = 255
    levels = raster.shrunk(whole, size)
    assert levels.shape == (size, size)
    assert (levels[:, : size // 2] == raster.LEVELS).all()
    assert (levels[:, -(size // 2) :] == 0).all()


def test_a_palette_is_white_then_shades_up_to_the_full_color():
    assert raster.palette(["red"], levels=1) == [raster.WHITE, raster.COLORS["red"]]
    shades = raster.palette(["black", "red"], levels=raster.LEVELS)
    assert len(shades) == 9 and shades[4] == raster.COLORS["black"] and shades[8] == raster.COLORS["red"]
    assert [s[0] for s in shades[:5]] == sorted((s[0] for s in shades[:5]), reverse=True)
