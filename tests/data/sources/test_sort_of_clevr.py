"""Sort-of-CLEVR: sizes as published, and every answer read off the picture itself."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from data import sources
from data.images import decode
from data.reader import ShardReader
from data.sources import expected, from_sort_of_clevr, generated, raster


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folders = sources.sort_of_clevr(tmp_path_factory.mktemp("cache"))
    assert next(iter(folders.values())).parent.name in expected.MANIFESTS
    return {split: ShardReader(folder) for split, folder in folders.items()}


def seen(data: bytes) -> dict[str, tuple[float, float, str]]:
    """Color -> centre and shape of what has this color in the picture."""
    pixels = np.asarray(decode(data, "x"))
    assert pixels.shape == (75, 75, 3)
    names = {raster.COLORS[name]: name for name in raster.COLORS}
    found = {}
    for shade in {tuple(p) for p in pixels.reshape(-1, 3).tolist()} - {raster.WHITE}:
        ys, xs = np.nonzero((pixels == shade).all(axis=-1))
        corner = (ys == ys.min()) & (xs == xs.min())
        middle = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
        found[names[shade]] = (*middle, "square" if corner.any() else "circle")
    return found


def answered(text: str, objects: dict[str, tuple[float, float, str]]) -> str:
    (color,) = re.findall(rf"\b({'|'.join(objects)})\b", text)
    x, y, shape = objects[color]
    others = {c: (x - a) ** 2 + (y - b) ** 2 for c, (a, b, _) in objects.items() if c != color}
    if "closest" in text:
        return objects[min(others, key=others.__getitem__)][2]
    if "furthest" in text:
        return objects[max(others, key=others.__getitem__)][2]
    if "how many" in text:
        return str([o[2] for o in objects.values()].count(shape))
    if "left" in text:
        return "yes" if x < 37 else "no"
    if "top" in text:
        return "yes" if y < 37 else "no"
    return shape


def test_sizes_are_the_published_ones(readers):
    assert {split: len(r) for split, r in readers.items()} == {"train": 9800, "test": 200}
    for i in range(200):
        kinds = Counter(d["type"].split("_")[0] for d in readers["test"].record(i)["dialogs"])
        assert kinds == {"relational": 10, "plain": 10}


def test_every_answer_can_be_read_off_the_picture(readers):
    kinds = set()
    for i in range(200):
        objects = seen(readers["test"].image_bytes(i))
        assert set(objects) == {"red", "green", "blue", "orange", "gray", "yellow"}
        meta = readers["test"].record(i)
        assert {c: (x, y, s) for x, y, c, s in meta["things"]} == objects
        for dialog in meta["dialogs"]:
            human, gpt = dialog["conversations"]
            kinds.add(dialog["type"])
            assert gpt["value"] == answered(human["value"], objects), human["value"]
    assert len(kinds) == 6


def test_yes_and_no_and_shapes_come_about_equally_often(readers):
    golds = {}
    for example in readers["train"].all_examples():
        golds.setdefault(example.kind, Counter())[example.gold] += 1
    for kind, answers in golds.items():
        if kind != "relational_count":
            assert max(answers.values()) / answers.total() < 0.51, kind


def test_no_picture_is_in_both_splits(readers):
    train = {readers["train"].image_bytes(i) for i in range(len(readers["train"]))}
    assert len(train) == 9800
    assert not train & {readers["test"].image_bytes(i) for i in range(200)}


def test_fewer_pictures_are_the_beginning_of_more():
    few, many = (list(from_sort_of_clevr.records("train", n, 0)) for n in (3, 5))
    assert many[:3] == few
    assert list(from_sort_of_clevr.records("train", 3, 1)) != few


def test_a_generator_that_draws_differently_is_noticed(tmp_path, monkeypatch):
    name, records = from_sort_of_clevr.probe()
    assert generated.digest(records()) == expected.PROBES[name]
    monkeypatch.setattr(from_sort_of_clevr, "_SIZE", 10)
    with pytest.raises(ValueError, match=r"the sample 'sort_of_clevr' has hash"):
        sources.sort_of_clevr(tmp_path, train_pictures=2)
