"""Examples of a shard folder as token ids, labels and a picture: what a batch is collated from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data.images import transformed
from data.reader import ShardReader
from data.records import IMAGE_TAG, BadRecord, Example
from data.tokens import Tokenizer, encode_segments
from toolkit.contracts import IGNORE, NO_IMAGE, Prompt, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

    from data.features import FeatureTable

_MAX_KEPT = 4096
_MAX_WORKERS = 256


Slot = tuple[int, float]
"""(example number, weight), one place in a batch."""


@dataclass(frozen=True)
class Sample:
    """One example ready for collating; its tensors are shared, so treat them as read-only.

    ids, labels: [T] long; image positions hold PAD_ID and IGNORE. image_start: NO_IMAGE for text.
    record: record index, the row of a feature cache. pixels: the transform's result, None for text
    only or with cached features. gold: the expected answer, "" in training.
    """

    ids: Tensor
    labels: Tensor
    image_start: int
    key: str
    record: int
    weight: float
    pixels: Any = None
    gold: str = ""


@dataclass(frozen=True)
class _Encoded:
    ids: Tensor
    labels: Tensor
    image_start: int
    length: int
    labelled: bool
    tags: int


class Examples(Dataset[Sample]):
    """Map-style data set over every dialog of a shard folder.

    prompt: turns -> segments. n_image: positions an image takes. ctx_len: longest sequence, image
    included. transform: PIL image -> pixels of one sample, see data.images.transformed; features: a
    cache that replaces it; with neither, only texts are read. answer=False leaves the last gpt turn out of
    the sequence and returns it as `gold`. keep_mb: transformed pictures are kept in memory up to this size.
    draft: see data.images.decode.

    overlong: what happens to a sample longer than ctx_len. "refuse": ValueError. "cut": the first
    ctx_len positions if they hold a label; otherwise the sample keeps its slot with weight 0 and is
    counted in `left_out`. A cut inside the image, and any cut with answer=False, is always refused.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        prompt: Prompt,
        tokenizer: Tokenizer,
        n_image: int,
        ctx_len: int,
        overlong: Literal["refuse", "cut"] = "refuse",
        transform: Callable[[Image], Any] | None = None,
        features: FeatureTable | None = None,
        answer: bool = True,
        keep_mb: int = 256,
        draft: int = 0,
    ) -> None:
        if transform is not None and features is not None:
            raise ValueError("Examples take a transform or cached features, not both")
        if overlong not in ("refuse", "cut"):
            raise ValueError(f"overlong={overlong!r} is unknown; use 'refuse' or 'cut'")
        self.reader, self.features, self.answer = reader, features, answer
        self.n_image, self.ctx_len = n_image, ctx_len
        self._prompt, self._tokenizer, self._overlong = prompt, tokenizer, overlong
        self._draft = draft
        self._transform, self._keep_bytes = transform, keep_mb << 20
        self._texts: dict[tuple[Turn, ...], _Encoded] = {}
        self._pictures: dict[int, Any] = {}
        self._kept_bytes = 0
        # One slot per process that reads: shared with loader workers, written without a lock.
        self._left_out = torch.zeros(_MAX_WORKERS + 1, dtype=torch.long)
        self._left_out.share_memory_()

    def __len__(self) -> int:
        return len(self.reader.examples.record)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_texts": {}, "_pictures": {}, "_kept_bytes": 0}

    @property
    def left_out(self) -> int:
        """Overlong samples served with weight 0 so far, in this process and its loader workers."""
        return int(self._left_out.sum())

    def example(self, j: int) -> Example:
        """Key, turns, type and gold answer of example j, without reading its picture."""
        return self.reader.example(j)

    def __getitems__(self, items: Sequence[Slot]) -> list[Sample]:
        """The samples of a batch; what lies behind a URL is fetched side by side first."""
        self.prefetch(j for j, _ in items)
        return [self[item] for item in items]

    def prefetch(self, items: Iterable[int]) -> None:
        """Brings examples nearer that are about to be read, if they are behind a URL."""
        self.reader.prefetch({int(self.reader.examples.record[j]) for j in items})

    def __getitem__(self, item: int | tuple[int, float]) -> Sample:
        """item: an example's number, or (number, weight) as the step sampler yields it."""
        j, weight = item if isinstance(item, tuple) else (item, 1.0)
        example = self.reader.example(j)
        gold = "" if self.answer else example.gold
        encoded = self._encoded(example, example.turns if self.answer else example.turns[:-1])
        if encoded.length > self.ctx_len:
            encoded = self._cut(example, encoded)
            weight = weight if encoded.labelled else self._count_left_out()
        elif self.answer and not encoded.labelled:
            raise BadRecord(f"{example.key}: no position carries a label, so there is nothing to learn")
        pixels = None if encoded.image_start == NO_IMAGE else self._pixels(example)
        return Sample(
            encoded.ids,
            encoded.labels,
            encoded.image_start,
            key=example.key,
            record=example.record,
            weight=weight,
            pixels=pixels,
            gold=gold,
        )

    def check(self, n: int = 0) -> None:
        """Raises ValueError if one of the first n samples (0: of all) cannot be served, by its text alone."""
        for j in range(min(n or len(self), len(self))):
            example = self.reader.example(j)
            encoded = self._encoded(example, example.turns if self.answer else example.turns[:-1])
            if encoded.length > self.ctx_len:
                self._cut(example, encoded)
            if not self.answer:
                _ = example.gold

    def _encoded(self, example: Example, turns: tuple[Turn, ...]) -> _Encoded:
        """Tokens of the turns; kept, because question sets repeat a few texts over many pictures."""
        found = self._texts.get(turns)
        if found is None:
            tags = self._counted_tags(example, turns)
            made = encode_segments(self._prompt(turns), self._tokenizer, self.n_image)
            ids, labels = (torch.tensor(values, dtype=torch.long) for values in (made.ids, made.labels))
            found = _Encoded(ids, labels, made.image_start, len(ids), _has_label(labels), tags)
            if len(self._texts) >= _MAX_KEPT:
                self._texts.clear()
            self._texts[turns] = found
        elif found.tags != int(example.has_image):
            self._counted_tags(example, turns)
        return found

    def _counted_tags(self, example: Example, turns: tuple[Turn, ...]) -> int:
        """The number of image tags; BadRecord naming the example if it is not that of the pictures."""
        tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
        pictures = self.reader.n_images(example.record)
        if pictures > 1:
            raise BadRecord(
                f"{example.key}: the record has {pictures} pictures; a training sample takes one, so leave "
                "such records out when converting"
            )
        if tags != pictures:
            held = "one picture" if pictures else "no picture"
            raise BadRecord(
                f"{example.key}: {tags} {IMAGE_TAG} tags in the turns, but {held}; a record with a picture "
                "has exactly one tag, a text-only record none"
            )
        return tags

    def _cut(self, example: Example, encoded: _Encoded) -> _Encoded:
        n, image_end = encoded.length, encoded.image_start + self.n_image
        where = f"{example.key}: the sequence has {n:,} positions, model.ctx_len={self.ctx_len}"
        if self._overlong == "refuse" or not self.answer:
            raise ValueError(f"{where}; set model.ctx_len={n} or more, or take the sample out of the data")
        if encoded.image_start != NO_IMAGE and image_end > self.ctx_len:
            raise ValueError(
                f"{where} would cut its image, which ends at {image_end}; set model.ctx_len={n} or more"
            )
        # Paper: its code keeps the last ctx_len positions where the first hold no label, losing the image.
        ids, labels = encoded.ids[: self.ctx_len], encoded.labels[: self.ctx_len]
        return replace(encoded, ids=ids, labels=labels, length=self.ctx_len, labelled=_has_label(labels))

    def _count_left_out(self) -> float:
        """Counts a sample that a cut left without a label; returns its weight."""
        worker = get_worker_info()
        self._left_out[0 if worker is None else 1 + worker.id % _MAX_WORKERS] += 1
        return 0.0

    def _pixels(self, example: Example) -> Any:
        if self._transform is None or not example.has_image:
            return None
        found = self._pictures.get(example.record)
        if found is None:
            data = self.reader.image_bytes(example.record)
            found = transformed(self._transform, data or b"", example.key, draft=self._draft)
            worker = get_worker_info()
            # Every loader worker keeps pictures of its own, so they share the limit.
            if self._kept_bytes < self._keep_bytes // (1 if worker is None else worker.num_workers):
                self._kept_bytes += n_bytes(found)
                self._pictures[example.record] = found
        return found


def n_bytes(pixels: Any) -> int:
    """Bytes of a tensor or of nested tuples of tensors."""
    return int(pixels.nbytes) if isinstance(pixels, Tensor) else sum(n_bytes(part) for part in pixels)


def _has_label(labels: Tensor) -> bool:
    return bool((labels != IGNORE).any())
