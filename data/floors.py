"""What a score must beat: answering without looking, and without even reading."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from data.records import Example


def majority(examples: Iterable[Example]) -> float:
    """Share of the most frequent gold answer: the score of always giving that one."""
    counts = Counter(example.gold for example in examples)
    if not counts:
        raise ValueError("a floor needs at least one example")
    return max(counts.values()) / counts.total()


def blind(train: Iterable[Example], test: Iterable[Example], *, times: Sequence[int] | None = None) -> float:
    """Score on `test` of the answer most frequent in `train` for the same question text, pictures unseen.

    times: how often each example of `train` occurs, None for once. Questions that `train` does not have get
    its overall most frequent answer. Ties go to the answer that is first in alphabetical order.
    """
    by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    counted = zip(train, itertools.repeat(1)) if times is None else zip(train, times, strict=True)
    for example, n in counted:
        by_question[example.question][example.gold] += n
        overall[example.gold] += n
    best = {question: _most_frequent(counts) for question, counts in by_question.items()}
    hits = [best.get(e.question, _most_frequent(overall)) == e.gold for e in test]
    if not hits or not best:
        raise ValueError("the blind floor needs at least one train and one test example")
    return sum(hits) / len(hits)


def chance(train: Iterable[Example], test: Iterable[Example]) -> float:
    """Score on `test` of drawing, for each question text, from its different answers in `train` alike.

    For a question that `train` does not have, from all answers. Raises ValueError without examples.
    """
    by_question: defaultdict[str, set[str]] = defaultdict(set)
    for example in train:
        by_question[example.question].add(example.gold)
    overall = set[str]().union(*by_question.values())
    found = [(by_question.get(e.question, overall), e.gold) for e in test]
    if not found or not overall:
        raise ValueError("chance needs at least one train and one test example")
    return sum((gold in answers) / len(answers) for answers, gold in found) / len(found)


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")
