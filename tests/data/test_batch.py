"""A batch on its way from a loader's worker: the same tensors, the small ones without a file each."""

from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from toolkit.contracts import Batch, ImageFeatures, Whole


def batch(**more: Any) -> Batch:
    ids = torch.arange(12).view(3, 4)
    weight, lengths = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4, 2, 3])
    start = torch.tensor([0, -1, 1])
    return Batch(ids, ids - 100, lengths, start, weight, keys=["a", "b", "c"], **more)


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    value.mapped(lambda tensor: found.append(tensor) or tensor)
    return found


def test_every_tensor_arrives_as_it_was() -> None:
    features = ImageFeatures(torch.randn(2, 4, 3).bfloat16(), torch.randn(2, 0, 3), (2, 2))
    large = torch.randn(2, 3, 200, 200)
    for sent in (
        batch(features=features, whole=Whole(answers=5, samples=3, positions=12)),
        batch(pixels=(large, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), answers=torch.tensor([1, 5])),
    ):
        found = pickle.loads(pickle.dumps(sent))
        assert (found.keys, found.whole) == (sent.keys, sent.whole)
        assert len(tensors(found)) == len(tensors(sent)) >= 7
        for mine, wanted in zip(tensors(found), tensors(sent), strict=True):
            assert mine.dtype == wanted.dtype and mine.shape == wanted.shape and torch.equal(mine, wanted)
        tensors(found)[0].add_(1)  # what arrives may be written to


def test_small_tensors_take_no_shared_memory() -> None:
    sent, out = batch(pixels=torch.randn(2, 3, 200, 200)), io.BytesIO()
    ForkingPickler(out, pickle.HIGHEST_PROTOCOL).dump(sent)
    assert sent.pixels.is_shared() and not any(tensor.is_shared() for tensor in tensors(sent)[:5])
