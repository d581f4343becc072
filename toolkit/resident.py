"""A data set that lies on the device whole: a batch is a gather there, and no step waits for the host."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from toolkit import kept
from toolkit.contracts import IGNORE, NO_IMAGE, PAD_ID, Batch, ImageFeatures, mapped

_SHARE = 8
"""A data set may take one part in so many of the device's memory: other runs may share it."""


class Unfit(RuntimeError):
    """A sample that fixed shapes cannot hold; the message says why."""


@dataclass(frozen=True)
class Texts:
    """The texts of every sample of a split, n of them, padded to the longest; S different ones.

    text: [n] row of a sample in ids, labels [S, T], lengths, image_start [S] and answers [S, A]: the
    positions before a label; the last position, which has none after it, fills shorter rows.
    row: [n] its picture, counted in the order in which pictures occur.
    """

    text: Tensor
    ids: Tensor
    labels: Tensor
    lengths: Tensor
    image_start: Tensor
    answers: Tensor
    row: Tensor


@dataclass(frozen=True)
class Resident(Texts):
    """Texts with the features of the pictures: patches [n_images, P, D] and extra [n_images, E, D]."""

    features: ImageFeatures

    def batch(self, items: Tensor, weight: Tensor) -> Batch:
        """The samples items [B] with weights [B], every shape fixed; reads nothing back from the device."""
        text = self.text.index_select(0, items)  # [B]
        ids = self.ids.index_select(0, text)  # [B, T]
        lengths = self.lengths.index_select(0, text)
        rows, every = self.row.index_select(0, items), self.features
        samples = torch.arange(len(items), device=items.device)
        answers = self.answers.index_select(0, text) + samples.unsqueeze(1) * ids.shape[1]  # [B, A]
        return Batch(
            ids,
            self.labels.index_select(0, text),
            lengths,
            self.image_start.index_select(0, text),
            weight,
            keys=(),
            features=ImageFeatures(every.patches[rows], every.extra[rows], every.grid),
            answers=answers.flatten(),
            images=samples,
            longest=lengths.max(),
        )


def load(examples: Any, device: torch.device, *, key: Hashable | None = None) -> Resident:
    """Puts every example on the device. Raises Unfit where that cannot be.

    examples: a data set of samples with `features`, a table of pictures that gathers by record. key: names
    its texts for the next run of this process that asks for them (`kept.once`).
    """
    texts, records = (
        kept.once(key, lambda: read(examples), size=_bytes) if key is not None else read(examples)
    )
    return moved(Resident(**vars(texts), features=table(examples.features, records, device)), device)


def _bytes(made: tuple[Texts, list[int]]) -> int:
    return sum(tensor.nbytes for tensor in vars(made[0]).values())


def read(examples: Any) -> tuple[Texts, list[int]]:
    """Reads every example once: texts, and the record of each picture. Unfit for what cannot be held."""
    texts: dict[int, tuple[int, Tensor, Tensor, int]] = {}  # by the ids' address: equal texts share a tensor
    pictures: dict[int, int] = {}  # record -> row
    text: list[int] = []
    row: list[int] = []
    for j in range(len(examples)):
        sample = examples[j]
        if sample.weight == 0 or sample.image_start == NO_IMAGE:
            raise Unfit(f"sample {sample.key} has no picture, is damaged, or is cut before its answer")
        known = texts.setdefault(id(sample.ids), (len(texts), sample.ids, sample.labels, sample.image_start))
        text.append(known[0])
        row.append(pictures.setdefault(sample.record, len(pictures)))
    _, ids, labels, starts = zip(*texts.values(), strict=True)
    padded = pad_sequence(list(labels), batch_first=True, padding_value=IGNORE)  # [S, T]
    made = Texts(
        text=torch.tensor(text),
        ids=pad_sequence(list(ids), batch_first=True, padding_value=PAD_ID),
        labels=padded,
        lengths=torch.tensor([len(one) for one in ids]),
        image_start=torch.tensor(starts),
        answers=answer_positions(padded),
        row=torch.tensor(row),
    )
    return made, list(pictures)


def table(features: Any, records: list[int], device: torch.device) -> ImageFeatures:
    """The features of so many pictures, [n, P, D] and [n, E, D]; Unfit if the device has no room for them."""
    one = features.gather(records[:1])
    size = (one.patches.nbytes + one.extra.nbytes) * len(records)
    room = size
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory // _SHARE
    if size > room:
        raise Unfit(
            f"the features take {size >> 20:,} MiB, more than the {room >> 20:,} MiB set aside for them"
        )
    found: ImageFeatures = features.gather(records)
    return found


def answer_positions(labels: Tensor) -> Tensor:
    """Positions before a label, of labels [S, T]: [S, A], filled with the last position."""
    asked = [(row[1:] != IGNORE).nonzero().flatten() for row in labels]
    return pad_sequence(asked, batch_first=True, padding_value=labels.shape[1] - 1)


def moved(data: Resident, device: torch.device) -> Resident:
    """All of it on the device."""

    def there(value: Any) -> Any:
        return mapped(value, lambda tensor: tensor.to(device))

    return Resident(**{name: there(value) for name, value in vars(data).items()})
