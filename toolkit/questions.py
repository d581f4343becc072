"""Questions from a JSON-lines file, answered in batches; an output file that was cut goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data.records import IMAGE_TAG
from toolkit.explain import closest, fail

if TYPE_CHECKING:
    from toolkit.sampling import Sampling
    from toolkit.session import Answerer

FIELDS = ("id", "image", "prompt")
EXAMPLE = '{"image": "a.jpg", "prompt": "What is it?"}'
_MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Question:
    """One line: what is asked, of which picture ("" for none), under which id."""

    id: str
    prompt: str
    image: str = ""


def read(path: Path) -> list[Question]:
    """The questions of a file. BadRecipe, with file and line, for what is none; pictures must exist.

    image: a path, relative to the file's own folder. id: the line's number where it is not given.
    """
    try:
        texts = path.expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise fail("command line", "file", f"{str(path)!r} cannot be read: {error}") from error
    found: dict[str, Question] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        question = _question(text, f"{path}:{number}", path.expanduser().parent, str(number))
        if question.id in found:
            raise fail(f"{path}:{number}", "id", f"{question.id!r} is given twice", fix="give each its own")
        found[question.id] = question
    if not found:
        raise fail(str(path), "", "holds no questions", fix=f"write lines like {EXAMPLE}")
    return list(found.values())


def _question(text: str, place: str, folder: Path, number: str) -> Question:
    try:
        row: Any = json.loads(text) if len(text) <= _MAX_LINE else None
    except (ValueError, RecursionError) as error:
        raise fail(place, "", f"not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise fail(place, "", "a question is one JSON object on a line", fix=f"write {EXAMPLE}")
    for key in row:
        if key not in FIELDS:
            fix = f"a question has the fields {', '.join(FIELDS)}"
            raise fail(place, str(key), "no such field", matches=closest(str(key), FIELDS), fix=fix)
    prompt, image = row.get("prompt"), row.get("image") or ""
    if not isinstance(prompt, str) or not prompt.strip():
        raise fail(place, "prompt", "not given" if prompt is None else f"takes text, given {prompt!r}")
    if IMAGE_TAG in prompt and not image:
        fix = f'add "image": "FILE", or take {IMAGE_TAG} out'
        raise fail(place, "prompt", f"holds {IMAGE_TAG}, but there is no image", fix=fix)
    if image and not (folder / str(image)).is_file():
        raise fail(place, "image", f"{str(image)!r} is no file in {folder}")
    return Question(str(row.get("id", number)), prompt, str(folder / str(image)) if image else "")


def answer_file(
    model: Answerer, questions: Sequence[Question], options: Sampling, out: Path | None, *, batch: int
) -> Iterator[dict[str, str]]:
    """Answers in the file's order, written to `out` as they come; yields each line written anew.

    A line of `out`: id, image, prompt, answer, and `by`, which names model, precision and options. Lines
    that are there are kept. Raises ValueError if they answer other questions, or with other settings.
    """
    by = _signature(model, options)
    try:
        done = 0 if out is None else resumed(out, questions, by)
        file = None if out is None else out.expanduser().open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"out={out}: answers cannot be written there: {error}") from error
    try:
        for start in range(done, len(questions), batch):
            some = questions[start : start + batch]
            texts = model.answers([(q.image or None, q.prompt) for q in some], options)
            rows = [_row(q, text, by) for q, text in zip(some, texts, strict=True)]
            if file is not None:
                _write(file, rows)
            yield from rows
    finally:
        if file is not None:
            file.close()


def _row(question: Question, answer: str, by: str) -> dict[str, str]:
    return {
        "id": question.id,
        "image": question.image,
        "prompt": question.prompt,
        "answer": answer,
        "by": by,
    }


def _write(file: TextIO, rows: Sequence[dict[str, str]]) -> None:
    file.write("".join(dumped(row) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def dumped(row: dict[str, str]) -> str:
    """One line of JSON."""
    return json.dumps(row, ensure_ascii=False)


def _signature(model: Answerer, options: Sampling) -> str:
    """Names what decides an answer besides the question."""
    said = f"{model.name} {model.weights_id} {model.precision} {options}"
    return hashlib.sha256(said.encode()).hexdigest()[:10]


def resumed(out: Path, questions: Sequence[Question], by: str) -> int:
    """How many answers `out` holds already; what a cut left of a line is taken off."""
    out = out.expanduser()
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return 0
    held = out.read_bytes()
    whole = held[: held.rfind(b"\n") + 1]
    # Not splitlines(): an answer may hold characters that it takes for line ends.
    rows = whole.decode("utf-8", errors="replace").split("\n")[:-1]
    for number, (text, question) in enumerate(zip(rows, questions, strict=False), 1):
        _check_row(text, question, by, f"{out}:{number}")
    if len(rows) > len(questions):
        raise ValueError(
            f"{out}: holds {len(rows)} answers to {len(questions)} questions; write another out="
        )
    if len(whole) < len(held):
        os.truncate(out, len(whole))
    return len(rows)


def _check_row(text: str, question: Question, by: str, place: str) -> None:
    try:
        row = json.loads(text)
        same = Question(row["id"], row["prompt"], row["image"]) == question
        other = row["by"] != by
    except (ValueError, KeyError, TypeError, RecursionError):
        same, other = False, False
    if not same:
        raise ValueError(f"{place}: is no answer to question {question.id!r}; write another out=")
    if other:
        raise ValueError(f"{place}: was answered by another model or with other options; write another out=")
