"""How many positions every sample of a split takes: counted once, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.atomic import locked
from data.plan import Ints
from data.reader import DamagedSample, ShardReader
from data.records import IMAGE_TAG, BadRecord, Example
from data.tokens import WorldTokenizer
from toolkit.contracts import Prompt, Text, Turn
from toolkit.progress import Ticker

log = logging.getLogger("toolkit.data")

_PROBE = (
    Turn("human", f"{IMAGE_TAG}\nWhat is this?"),
    Turn("gpt", "A cat."),
    Turn("human", "Why?"),
    Turn("gpt", "Ears."),
)
"""What a prompt makes of it names the prompt, whatever its options or its code are."""


def positions(
    reader: ShardReader, prompt: Prompt, *, n_image: int, ctx_len: int, tolerant: bool, cache: Path
) -> Ints:
    """Positions of every example, [J], as `data.dataset.Examples` makes them, at most ctx_len.

    n_image: of an image. tolerant: an example whose text cannot be read counts as one position, which its
    slot then has. cache: folder in which the counts are kept, by data and prompt.
    """
    file = cache / "lengths" / f"{_name(reader, prompt)}.npy"
    with locked(file.with_suffix(".lock"), "counting tokens"):
        found = _stored(file, len(reader.examples.record))
        if found is None:
            found = _counted(reader, prompt, tolerant=tolerant)
            if found.min() >= 0:  # what could not be read may be repaired
                _store(file, found)
    tokens, images = found.astype(np.int64).T
    made: Ints = np.clip(tokens + n_image * images, 1, ctx_len)
    return made


def _name(reader: ShardReader, prompt: Prompt) -> str:
    text_only = (Turn("human", "What?"), *_PROBE[1:])
    shown = [[repr(segment) for segment in prompt(turns)] for turns in (_PROBE, text_only)]
    return hashlib.sha256(json.dumps([reader.manifest_hash, shown]).encode()).hexdigest()[:16]


def _stored(file: Path, n: int) -> NDArray[np.int32] | None:
    """The counts of an earlier run; None if there are none, or what is there is something else."""
    try:
        found: NDArray[np.int32] = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s cannot be read, tokens are counted again: %s", file, error)
        return None
    return found if found.shape == (n, 2) and found.dtype == np.int32 else None


def _store(file: Path, found: NDArray[np.int32]) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with part.open("wb") as out:
        np.save(out, found)
    part.replace(file)


def _counted(reader: ShardReader, prompt: Prompt, *, tolerant: bool) -> NDArray[np.int32]:
    """(tokens of text, images) of every example, [J, 2]; -1 for one that cannot be read."""
    n = len(reader.examples.record)
    progress, world = Ticker("counting tokens", n), WorldTokenizer()
    found = np.full((n, 2), -1, dtype=np.int32)
    for j, example in enumerate(_examples(reader, tolerant=tolerant)):
        if example is not None:
            segments = prompt(example.turns)
            texts = [s.text for s in segments if isinstance(s, Text)]
            found[j] = sum(len(world.encode(text)) for text in texts), len(segments) - len(texts)
        progress(j + 1)
    return found


def _examples(reader: ShardReader, *, tolerant: bool) -> Iterator[Example | None]:
    for j in range(len(reader.examples.record)):
        try:
            yield reader.example(j)
        except (DamagedSample, BadRecord):
            if not tolerant:
                raise
            yield None
