"""Catalogue of data sources: each gives, per split, a folder of shards that is made at first use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from toolkit import register
from toolkit.register import FilePath, Range


@register.data("easy_vqa")
def easy_vqa(
    cache: Path, *, limit: Annotated[int, Range(0)] = 0, short_answer: bool = False
) -> dict[str, Path]:
    """Easy-VQA from its Python package: 48,248 questions about 5,000 pictures of one coloured shape.

    limit: pictures per split, 0 for all. short_answer: each question ends with LLaVA's sentence
    "Answer the question using a single word or phrase."; all answers here are one word, so the
    sentence only makes sequences a quarter longer. Splits: train, test.
    Raises ValueError if the package is missing.
    """
    from data.sources.from_easy_vqa import prepare

    return prepare(cache, limit=limit, short_answer=short_answer)


@register.data("llava")
def llava(
    cache: Path,
    *,
    images: Annotated[str, FilePath(folder=True)],
    train: Annotated[str, FilePath()],
    test: Annotated[str, FilePath()] = "",
    align: Annotated[str, FilePath()] = "",
    allow_rejects: Annotated[int, Range(0)] = 0,
    repeated_ids: Literal["refuse", "keep"] = "refuse",
    verify: Literal["header", "full"] = "header",
) -> dict[str, Path]:
    """LLaVA conversations, one JSON or JSON-lines file per split, over a folder of pictures.

    Every record is checked and rejects are listed in a file; more than `allow_rejects` in a split
    raise ValueError. repeated_ids: LLaVA's own mixes use one id for several conversations about a
    picture; "keep" allows it. verify: "full" decodes every picture, "header" only its header.
    """
    from data.sources.from_llava import Checks, prepare

    files = {"train": train, "test": test, "align": align}
    checks = Checks(Path(images), allow_rejects, repeated_ids == "keep", verify == "full")
    return prepare(cache, {split: Path(file) for split, file in files.items() if file}, checks)


@register.data("shards")
def shards(
    cache: Path,
    *,
    train: Annotated[str, FilePath(folder=True)],
    test: Annotated[str, FilePath(folder=True)] = "",
    align: Annotated[str, FilePath(folder=True)] = "",
) -> dict[str, Path]:
    """Folders of shards converted earlier, one per split; nothing is copied."""
    from data.index import read_manifest

    folders = {"train": train, "test": test, "align": align}
    found = {split: Path(folder) for split, folder in folders.items() if folder}
    for folder in found.values():
        read_manifest(folder)
    return found
