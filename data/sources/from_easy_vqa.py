"""easy-VQA (Victor Zhou, MIT licence), read from the installed package `easy_vqa`."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from data.records import IMAGE_TAG, dump_json
from data.shards import Record
from data.sources.convert import converted

_CONVERTER = 2  # raise it when records change
_INSTRUCTION = "Answer the question using a single word or phrase."
_COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
_SHAPES = frozenset({"circle", "rectangle", "triangle"})

Split = Literal["train", "test"]
Question = tuple[str, str, int]
"""(question, answer, picture number)"""


def prepare(cache: Path, *, limit: int, short_answer: bool) -> dict[str, Path]:
    """Split -> folder, converted into `cache` at first use."""
    if importlib.util.find_spec("easy_vqa") is None:
        raise ValueError("the data source easy_vqa needs its package: pip install 'visualrwkv-toolkit[demo]'")
    questions = {split: _questions(split) for split in ("train", "test")}
    content = dump_json([_CONVERTER, limit, short_answer, questions])
    folder = cache / f"easy_vqa-{hashlib.sha256(content).hexdigest()[:12]}"
    return {
        split: converted(folder / split, partial(_records, split, asked, limit, short_answer), _about(limit))
        for split, asked in questions.items()
    }


def question_type(question: str) -> str:
    """What a question is about: shape, color, or yes/no about one of them, `not` where it is negated.

    One of shape, color, yesno_shape, yesno_color, yesno_not_shape, yesno_not_color, other.
    """
    words = set(re.findall("[a-z]+", question.lower()))
    if "what" in words:
        return "color" if words & {"color", "colour"} else "shape"
    negated = "not_" if words & {"not", "no"} else ""
    for about, names in (("color", _COLORS), ("shape", _SHAPES)):
        if words & names:
            return f"yesno_{negated}{about}"
    return "other"


def _about(limit: int) -> dict[str, Any]:
    return {
        "source": "easy_vqa",
        "converter": _CONVERTER,
        "limit": limit,
        "licence": "MIT, Victor Zhou, package easy-vqa",
    }


def _questions(split: str) -> list[Question]:
    """All questions of a split, ordered by picture."""
    import easy_vqa

    read = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    return sorted(zip(*read(), strict=True), key=lambda question: question[2])


def _records(split: str, questions: list[Question], limit: int, short_answer: bool) -> Iterator[Record]:
    """One record per picture that has questions."""
    import easy_vqa

    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    for number, (picture, asked) in enumerate(groupby(questions, key=lambda question: question[2])):
        if limit and number == limit:
            return
        dialogs = [_dialog(question, answer, short_answer) for question, answer, _ in asked]
        meta = {"id": f"{split}-{picture}", "source": "easy_vqa", "dialogs": dialogs}
        yield meta, Path(paths[picture]).read_bytes()


def _dialog(question: str, answer: str, short_answer: bool) -> dict[str, Any]:
    text = f"{IMAGE_TAG}\n{question}\n{_INSTRUCTION}" if short_answer else f"{IMAGE_TAG}\n{question}"
    asked = {"from": "human", "value": text}
    return {"type": question_type(question), "conversations": [asked, {"from": "gpt", "value": answer}]}
