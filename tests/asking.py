"""Small models that can be asked, with a vocabulary and pictures of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.tokens import CompactTokenizer, WorldTokenizer, encode_segments
from tests.helpers import component, small_model
from toolkit.contracts import Batch, Segment
from toolkit.session import Answerer

QUESTIONS = ("is it red?", "what color is the shape, and where is it?", "is there a circle?")
TOKENIZER = CompactTokenizer.collect(
    [f"User: {q}\n{q}\n\n" for q in QUESTIONS] + [f"\n{q}\n\n" for q in QUESTIONS] + [" yes\n\n", " no"],
    WorldTokenizer(),
)


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (number, 7, 9))


def transform(shape: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """Pixels of `Passthrough`: numbers that a picture's color decides."""

    def pixels(image: Image.Image) -> Tensor:
        color: Any = image.getpixel((0, 0))
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(color[0])))

    return pixels


def answerer(
    recurrence: str = "rwkv6",
    scan: str = "2d",
    prompt: str = "sandwich",
    *,
    seed: int = 0,
    name: str = "run a",
    bf16: bool = False,
    of: type[Answerer] = Answerer,
) -> Answerer:
    """A random model of four layers; seeds change the weights."""
    model = small_model(
        recurrence=recurrence, scan=scan, grid=(2, 2), n_layer=4, vocab=TOKENIZER.size, seed=seed
    ).eval()
    pixels = transform((model.n_image, model.encoder.d_out))
    model.encoder.transform = lambda: pixels
    return of(
        model.rwkv, TOKENIZER, component("prompt", prompt), model, name, bf16, 200, scan=scan, layout=prompt
    )


def ids_of(model: Answerer, segments: list[Segment]) -> list[int]:
    return encode_segments(segments, TOKENIZER, model.n_image).ids


def whole(model: Answerer, segments: list[Segment], image: Image.Image, later: list[int]) -> Tensor:
    """Logits [T, V] of one pass over a first turn about `image` and the ids that followed."""
    assert model.vision is not None
    made = encode_segments(segments, TOKENIZER, model.n_image)
    ids = torch.tensor([made.ids + later])
    pixels = model.vision.encoder.transform()(image).unsqueeze(0)
    start, length = torch.tensor([made.image_start]), torch.tensor([ids.shape[1]])
    batch = Batch(ids, torch.full_like(ids, -100), length, start, torch.ones(1), ["0"], pixels)
    with torch.no_grad():
        return model.vision.logits(batch)[0]
