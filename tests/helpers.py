"""Small models and batches that several tests build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit import register
from toolkit.contracts import IGNORE, NO_IMAGE, PAD_ID, Batch, ImageFeatures
from toolkit.model import VisualRWKV
from toolkit.trunk import LanguageModel


class Passthrough(nn.Module):
    """An encoder whose pixels are its features: patches [B, P, D] followed by extra [B, E, D]."""

    learned = False

    def __init__(self, grid: tuple[int, int], d_out: int, n_extra: int) -> None:
        super().__init__()
        self.grid, self.d_out, self.n_extra = grid, d_out, n_extra

    def forward(self, pixels: Tensor) -> ImageFeatures:
        patches = self.grid[0] * self.grid[1]
        return ImageFeatures(pixels[:, :patches], pixels[:, patches:], self.grid)


def component(kind: str, name: str, **options: Any) -> Any:
    """A bound factory, by registered name."""
    register.discover()
    return register.bind(kind, {"name": name, **options})


def small_model(
    *,
    recurrence: str = "rwkv6",
    scan: str = "2d",
    projector: str = "linear",
    grid: tuple[int, int] = (2, 3),
    n_extra: int = 1,
    d_model: int = 32,
    n_layer: int = 5,
    vocab: int = 19,
    seed: int = 0,
) -> VisualRWKV:
    """A model whose every parameter is random (published zeros would hide whole paths)."""
    torch.manual_seed(seed)
    encoder = Passthrough(grid, 6, n_extra)
    proj = component("projector", projector)(encoder.d_out, d_model, grid)
    mixers = component("recurrence", recurrence)(d_model, n_layer)
    rwkv = LanguageModel(mixers, d_model=d_model, n_layer=n_layer, vocab_size=vocab)
    model = VisualRWKV(encoder, proj, rwkv, table=component("scan", scan)(n_layer, *proj.grid))
    randomise(model)
    return model


def randomise(module: nn.Module) -> None:
    """Adds noise to every parameter, so that none is left at an initial zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def make_batch(
    model: VisualRWKV,
    texts: Sequence[tuple[int, int, int]],
    *,
    seed: int = 1,
    pad: int = 0,
    vocab: int = 19,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Random samples (before, after, answer): tokens before the image, after it, and of the answer.

    before < 0 makes a text-only sample. Each sample's numbers depend on its place and `seed` only.
    """
    rows, starts, pixels = [], [], []
    for i, (before, after, answer) in enumerate(texts):
        draw = torch.Generator().manual_seed(1000 * seed + i)
        text = torch.randint(1, vocab, (max(0, before) + after + answer,), generator=draw)
        image = model.n_image if before >= 0 else 0
        start = max(0, before)
        ids = torch.cat((text[:start], torch.full((image,), PAD_ID), text[start:]))
        labels = torch.full_like(ids, IGNORE)
        labels[len(ids) - answer :] = ids[len(ids) - answer :]
        rows.append((ids, labels))
        starts.append(before if before >= 0 else NO_IMAGE)
        if before >= 0:
            shape = (model.n_image, model.encoder.d_out)
            pixels.append(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype))
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    width = int(lengths.max()) + pad
    ids = torch.stack([nn.functional.pad(r, (0, width - len(r)), value=PAD_ID) for r, _ in rows])
    labels = torch.stack([nn.functional.pad(r, (0, width - len(r)), value=IGNORE) for _, r in rows])
    return Batch(
        ids,
        labels,
        lengths,
        torch.tensor(starts),
        torch.ones(len(rows)),
        [str(i) for i in range(len(rows))],
        pixels=torch.stack(pixels) if pixels else None,
    )


def take(batch: Batch, model: VisualRWKV, i: int) -> Batch:
    """Sample i alone, without the padding of its neighbours."""
    n = int(batch.lengths[i])
    has = batch.image_start[i] != NO_IMAGE
    at = int((batch.image_start[:i] != NO_IMAGE).sum())
    return Batch(
        batch.ids[i : i + 1, :n],
        batch.labels[i : i + 1, :n],
        batch.lengths[i : i + 1],
        batch.image_start[i : i + 1],
        batch.weight[i : i + 1],
        batch.keys[i : i + 1],
        pixels=batch.pixels[at : at + 1] if has else None,
    )


def refusal(call: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> str:
    """What a run that fails says, as an error or on stderr."""
    try:
        code = call()
    except ValueError as error:
        return str(error)
    assert code != 0
    return capsys.readouterr().err
