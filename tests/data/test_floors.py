"""Floors on made-up examples; those of easy-VQA stand with its source."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.floors import blind, chance, majority
from data.records import Different, Example
from toolkit.contracts import Turn


def said(*pairs):
    return [
        Example(str(i), (Turn("human", f"<image>\n{q}"), Turn("gpt", a)), "", i, True)
        for i, (q, a) in enumerate(pairs)
    ]


def test_majority_is_the_share_of_the_most_frequent_answer():
    assert majority(said(("a", "yes"), ("b", "yes"), ("c", "no"), ("d", "red"))) == 0.5


def test_blind_learns_the_best_answer_per_question_from_train_only():
    train = said(("a", "yes"), ("a", "yes"), ("a", "no"), ("b", "no"), ("b", "no"), ("b", "no"))
    test = said(("a", "yes"), ("a", "no"), ("b", "no"), ("new", "no"))
    assert blind(train, test) == 0.75
    assert blind(said(("a", "x"), ("a", "b")), said(("a", "b"))) == 1.0


def test_floors_of_nothing_are_errors():
    with pytest.raises(ValueError, match=r"at least one example"):
        majority([])
    with pytest.raises(ValueError, match=r"one train and one test example"):
        blind([], said(("a", "b")))


def test_chance_counts_the_answers_that_training_gives_to_the_same_words():
    train = said(("q", "a"), ("q", "a"), ("q", "b"), ("p", "c"))
    assert chance(train, said(("q", "a"), ("p", "c"))) == pytest.approx((1 / 2 + 1) / 2)
    assert chance(train, said(("q", "z"))) == 0
    assert chance(train, said(("new", "b"))) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"at least one train and one test example"):
        chance(train, [])


def test_dialogs_without_repeats_have_the_floors_of_all_of_them():
    train = said(*(4 * [("a", "yes")]), *(3 * [("b", "no")]), ("b", "yes"), *(5 * [("c", "no")]), ("a", "no"))
    test = said(("a", "yes"), ("b", "no"), ("b", "yes"), ("new", "no"), ("new", "yes"))
    found = Different.of(iter(train))
    assert [(e.key, n) for e, n in zip(*found, strict=True)] == [
        ("0", 4), ("4", 3), ("7", 1), ("8", 5), ("13", 1)
    ]  # fmt: skip
    assert blind(found.examples, test, times=found.times) == blind(train, test)
    assert blind(found.examples, test) != blind(train, test)  # how often each occurs does matter


def test_dialogs_of_different_types_are_different():
    first, second = said(("a", "yes"))[0], said(("a", "yes"))[0]
    assert len(Different.of([first, replace(second, kind="count")]).examples) == 2
    assert Different.of([first, second]).times == [2]
