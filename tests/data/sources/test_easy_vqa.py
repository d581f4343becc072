"""easy-VQA: counts, types, floors, and what happens without the package."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest

from data import sources
from data.floors import blind, majority
from data.images import decode
from data.reader import ShardReader
from data.sources.from_easy_vqa import question_type

installed = pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None, reason="needs the package easy-vqa"
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folders = sources.easy_vqa(tmp_path_factory.mktemp("cache"))
    return {split: ShardReader(folder) for split, folder in folders.items()}


@installed
def test_all_pictures_and_questions_are_there(readers):
    assert {split: len(r) for split, r in readers.items()} == {"train": 4000, "test": 1000}
    assert {split: len(r.examples.record) for split, r in readers.items()} == {"train": 38_575, "test": 9_673}


@installed
def test_questions_come_in_llava_convention_with_their_type(readers):
    import easy_vqa

    questions, answers, pictures = easy_vqa.get_test_questions()
    expected = Counter(zip(questions, answers, pictures, strict=True))
    found = Counter()
    for example in readers["test"].all_examples():
        human, _ = example.turns
        assert human.text.startswith("<image>\n")
        question = human.text.removeprefix("<image>\n")
        assert example.kind == question_type(question)
        found[question, example.gold, example.record] += 1
    assert found == expected


@installed
def test_short_answer_sentence_is_an_option_with_a_folder_of_its_own(tmp_path):
    plain = sources.easy_vqa(tmp_path, limit=2)
    asked = sources.easy_vqa(tmp_path, limit=2, short_answer=True)
    assert plain["test"] != asked["test"]
    sentence = "\nAnswer the question using a single word or phrase."
    for a, b in zip(
        ShardReader(plain["test"]).all_examples(), ShardReader(asked["test"]).all_examples(), strict=True
    ):
        assert b.turns[0].text == a.turns[0].text + sentence


@installed
def test_types_agree_with_answers(readers):
    by_kind: dict[str, set[str]] = {}
    for example in readers["train"].all_examples():
        by_kind.setdefault(example.kind, set()).add(example.gold)
    yesno = {f"yesno_{n}{about}" for n in ("", "not_") for about in ("shape", "color")}
    assert set(by_kind) == {"shape", "color"} | yesno
    assert by_kind["shape"] == {"circle", "rectangle", "triangle"}
    assert len(by_kind["color"]) == 8
    assert all(by_kind[kind] == {"yes", "no"} for kind in yesno)


@installed
def test_the_published_floors(readers):
    assert majority(readers["test"].all_examples()) == pytest.approx(0.373, abs=5e-4)
    assert blind(readers["train"].all_examples(), readers["test"].all_examples()) == pytest.approx(
        0.670, abs=1e-3
    )


@installed
def test_pictures_are_the_packages_own_bytes(readers):
    import easy_vqa

    paths = easy_vqa.get_train_image_paths()
    for i in (0, 7, 3999):
        with open(paths[i], "rb") as file:
            assert readers["train"].image_bytes(i) == file.read()
    assert decode(readers["train"].image_bytes(0), "x").size == (64, 64)


@installed
def test_a_limit_makes_its_own_small_folder(tmp_path):
    first = sources.easy_vqa(tmp_path, limit=3)
    assert {split: len(ShardReader(f)) for split, f in first.items()} == {"train": 3, "test": 3}
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.tar")}
    assert sources.easy_vqa(tmp_path, limit=3) == first
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.tar")} == stamps
    assert sources.easy_vqa(tmp_path, limit=2) != first


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'visualrwkv-toolkit\[demo\]'"):
        sources.easy_vqa(tmp_path)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what is the blue shape?", "shape"),
        ("what is the color of the triangle?", "color"),
        ("is there a red shape in the image?", "yesno_color"),
        ("is no circle present?", "yesno_not_shape"),
        ("does the image not contain a gray shape?", "yesno_not_color"),
        ("is a square present?", "other"),
    ],
)
def test_question_types_by_rule(question, kind):
    assert question_type(question) == kind
