"""Samples to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from toolkit.contracts import IGNORE, NO_IMAGE, PAD_ID, Batch

if TYPE_CHECKING:
    from data.dataset import Sample
    from data.features import FeatureTable


def collate(samples: Sequence[Sample], *, features: FeatureTable | None = None, multiple: int = 1) -> Batch:
    """Samples padded on the right to the longest, T rounded up to a multiple of `multiple`.

    features: the cache that holds the samples' rows; without it their pixels are stacked.
    """
    ids = pad_sequence([s.ids for s in samples], batch_first=True, padding_value=PAD_ID)  # [B, T]
    labels = pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE)
    extra = -ids.shape[1] % multiple
    if extra:
        ids, labels = pad(ids, (0, extra), value=PAD_ID), pad(labels, (0, extra), value=IGNORE)
    pictured = [s for s in samples if s.image_start != NO_IMAGE]
    batch = Batch(
        ids=ids,
        labels=labels,
        lengths=torch.tensor([len(s.ids) for s in samples]),
        image_start=torch.tensor([s.image_start for s in samples]),
        weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
        keys=[s.key for s in samples],
    )
    if pictured and features is not None:
        batch.features = features.gather([s.record for s in pictured])
    elif pictured and pictured[0].pixels is not None:
        batch.pixels = stack([s.pixels for s in pictured])
    return batch


def stack(pixels: Sequence[Any]) -> Any:
    """Stacks per-sample tensors, or nested tuples of tensors part by part, along a new first axis."""
    if isinstance(pixels[0], torch.Tensor):
        return torch.stack(list(pixels))
    return tuple(stack(parts) for parts in zip(*pixels, strict=True))
