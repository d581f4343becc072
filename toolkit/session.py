"""Asking a model: one question, many at once, or a conversation that keeps the recurrent state."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from data.batch import collate, stack
from data.dataset import Sample
from data.images import decode
from data.records import IMAGE_TAG
from data.tokens import Encoded, Tokenizer, encode_segments, trim_answer
from toolkit.checkpoint import fingerprint
from toolkit.continuation import continued, last_logits, until
from toolkit.contracts import Batch, ImageFeatures, ImageSlot, Prompt, Segment, Turn, mapped
from toolkit.conversation import GREEDY, Conversation
from toolkit.memory import load_conversation
from toolkit.model import VisualRWKV
from toolkit.sampling import Sampling
from toolkit.stream import ends
from toolkit.trunk import LanguageModel, State

log = logging.getLogger("toolkit.generate")

Picture = str | Path | bytes | Image
"""A picture to ask about: a path, the bytes of a JPEG, PNG or WebP file, or a PIL image."""

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Asked = tuple[Picture | None, str]


@dataclass(frozen=True, eq=False)
class Answerer:
    """A model with what it takes to ask it; `toolkit.load` makes one.

    tokenizer: None for a vocabulary that is not offered; only `logits` works then. vision: None for a
    language model alone. name: what it calls itself in messages and saved states (a run's id). bf16: whether
    it multiplies in bfloat16 (autocast). ctx_len: longest sequence in training, 0 where that is unknown.
    scan, layout: names of the scan and the prompt layout, to be shown.
    """

    rwkv: LanguageModel
    tokenizer: Tokenizer | None
    prompt: Prompt
    vision: VisualRWKV | None
    name: str
    bf16: bool = False
    ctx_len: int = 0
    scan: str = ""
    layout: str = ""

    @property
    def device(self) -> torch.device:
        return self.rwkv.emb.weight.device

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16: what the language model multiplies in."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return "bf16" if self.bf16 else names.get(self.rwkv.emb.weight.dtype, "fp32")

    @property
    def words(self) -> Tokenizer:
        """The tokenizer; ValueError if there is none."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name}: its vocabulary is not RWKV World; only logits(ids) works")
        return self.tokenizer

    def answer(self, image: Picture | None, question: str, options: Sampling = GREEDY) -> str:
        """The answer to a question about an image, or about none."""
        return "".join(self.stream(image, question, options))

    def stream(self, image: Picture | None, question: str, options: Sampling = GREEDY) -> Iterator[str]:
        """The answer in pieces, as they are written."""
        return self.chat(image).stream(question, options)

    def answers(self, asked: Sequence[Asked], options: Sampling = GREEDY) -> list[str]:
        """Answers to several questions in one batch, each as if asked alone."""
        if not asked:
            return []
        words = self.words
        with torch.inference_mode(), self.cast():
            turns = [self.first_turn(text, image=image is not None) for image, text in asked]
            logits, state = self.read_first(turns, asked)
            done = partial(ends, words)
            rows = continued(self.rwkv, logits, state, options, owner=self, ended=done)
        return [trim_answer(words.decode(until(row, words.end_id))) for row in rows]

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Text alone: ids [B, T] -> logits [B, T, V]. Raises ValueError for another shape or unknown ids."""
        rows = self.rwkv.emb.num_embeddings
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in WHOLE:
            raise ValueError(f"ids are whole numbers [B, T], given {ids.dtype} {list(ids.shape)}")
        ids = ids.to(self.device, torch.long)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise ValueError(f"ids reach from {low} to {high}, the model has 0 to {rows - 1}")
        with self.cast():
            found: Tensor = self.rwkv.head(self.rwkv(self.rwkv.emb(ids))[0])
        return found

    def chat(self, image: Picture | None = None) -> Conversation:
        """A conversation, about an image if one is given: it is read with the first question."""
        return Conversation(self, image)

    def look(self, image: Picture) -> Conversation:
        """A conversation that has read the image and no question yet, so that many can be asked of it.

        Only for layouts with the image in front of the question. Raises ValueError for others.
        """
        one, other = (upto_image(self.first_turn(text, image=True)) for text in ("a", "b"))
        if one != other:
            raise ValueError(
                f"{self.name}: its prompt puts the question before the image, so the image cannot be read "
                "without one; ask a first question, and the others after it (chat)"
            )
        conversation = Conversation(self, image)
        with torch.inference_mode(), self.cast():
            made = encode_segments(one, self.words, self.n_image)
            _, conversation.state = self._prefill([made], [image])
        conversation.looked = True
        return conversation

    def resume(self, path: str | Path) -> Conversation:
        """The conversation that `Conversation.save` wrote. ValueError if it belongs to another model."""
        return load_conversation(self, Path(path))

    @property
    def n_image(self) -> int:
        return 0 if self.vision is None else self.vision.n_image

    def cast(self) -> AbstractContextManager[Any]:
        """The precision it computes in. Never held over a `yield`: the caller would compute in it too."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def first_turn(self, question: str, *, image: bool) -> list[Segment]:
        """Segments that ask a conversation's first question, with an image or without."""
        text = check_question(question)
        if IMAGE_TAG in text and not image:
            raise ValueError(
                f"the question holds {IMAGE_TAG}, but there is no image; give one or take it out"
            )
        if image and self.vision is None:
            raise ValueError(f"{self.name} has no vision parts; ask it without an image")
        if image and IMAGE_TAG not in text:
            text = f"{IMAGE_TAG}\n{text}"
        return self.prompt([Turn("human", text)])

    def read_first(self, turns: Sequence[list[Segment]], asked: Sequence[Asked]) -> tuple[Tensor, State]:
        """Reads first turns in one parallel pass: (logits [B, V] after each, state)."""
        made = [encode_segments(segments, self.words, self.n_image) for segments in turns]
        longest = max(len(one.ids) for one in made)
        if self.ctx_len and longest > self.ctx_len:
            log.warning("a prompt of %d positions; training saw at most %d", longest, self.ctx_len)
        return self._prefill(made, [image for image, _ in asked])

    def _prefill(self, made: Sequence[Encoded], images: Sequence[Picture | None]) -> tuple[Tensor, State]:
        batch = _collated(made).mapped(lambda tensor: tensor.to(self.device))
        if self.vision is None:
            hidden, state = self.rwkv(self.rwkv.emb(batch.ids), lengths=batch.lengths)
        else:
            shown = [image for image in images if image is not None]
            batch.features = self._features(shown) if shown else None
            hidden, state = self.vision.prefill(batch)
        return last_logits(self.rwkv, hidden, batch.lengths), state

    def _features(self, images: Sequence[Picture]) -> ImageFeatures:
        """Features of the images in order; one that comes again is encoded once."""
        assert self.vision is not None
        keys = [str(i) if isinstance(i, (str, Path)) else id(i) for i in images]
        unique = dict(zip(keys, images, strict=True))
        pixels = mapped(stack([self._transform(opened(i)) for i in unique.values()]), self._placed)
        features = self.vision.encode(pixels)
        places = list(unique)
        rows = torch.tensor([places.index(key) for key in keys], device=self.device)
        return ImageFeatures(features.patches[rows], features.extra[rows], features.grid)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    @cached_property
    def _transform(self) -> Any:
        assert self.vision is not None
        return self.vision.encoder.transform()

    def read_on(self, state: State, ids: Sequence[int]) -> tuple[Tensor, State]:
        """Reads text after a state in one parallel pass: (logits [1, V], state)."""
        x = self.rwkv.emb(torch.tensor([list(ids)], device=self.device))  # [1, T, D]
        hidden, after = self.rwkv(x, state=state)
        logits: Tensor = self.rwkv.head(hidden[:, -1])
        return logits, after

    @cached_property
    def weights_id(self) -> str:
        """Names the weights: their shapes and 64 values of each tensor.

        Those of tower and projector too: a stage may train the projector and nothing else.
        """
        return fingerprint((self.vision or self.rwkv).state_dict())


def upto_image(segments: Sequence[Segment]) -> list[Segment]:
    """The segments up to the image, which stays in."""
    return list(segments[: 1 + next(i for i, s in enumerate(segments) if isinstance(s, ImageSlot))])


def check_question(question: str) -> str:
    """The question; ValueError for an empty one."""
    if not question.replace(IMAGE_TAG, "").strip():
        raise ValueError('the question is empty; write one, for example "Describe the image."')
    return question


def opened(image: Picture) -> Image:
    """A picture in RGB. Raises ValueError, naming the file, for what is no JPEG, PNG or WebP."""
    if isinstance(image, Image):
        return image.convert("RGB")
    if isinstance(image, bytes):
        return decode(image, "image")
    try:
        return decode(Path(image).expanduser().read_bytes(), str(image))
    except OSError as error:
        raise ValueError(f"{image}: no picture can be read from it: {error.strerror}") from error


def _collated(made: Sequence[Encoded]) -> Batch:
    return collate(
        [
            Sample(torch.tensor(one.ids), torch.tensor(one.labels), one.image_start, str(i), i, 1.0)
            for i, one in enumerate(made)
        ]
    )
