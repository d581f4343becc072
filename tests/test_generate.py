"""Greedy generation: equal to recomputing everything for each token, for every recurrence and scan."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import make_batch, small_model, take
from toolkit import register
from toolkit.continuation import greedy
from toolkit.contracts import Batch
from toolkit.model import VisualRWKV

register.discover()
TEXTS = [(3, 5, 1), (0, 2, 1), (-1, 4, 1), (7, 1, 1)]


@torch.no_grad()
def recomputed(model: VisualRWKV, batch: Batch, steps: int) -> list[int]:
    """The original's way: the whole prefix again for every token. batch: one sample."""
    written: list[int] = []
    for _ in range(steps):
        token = int(model.logits(batch)[0, -1].argmax())
        written.append(token)
        ids = torch.cat((batch.ids, torch.tensor([[token]])), 1)
        labels = torch.full_like(ids, -100)
        batch = Batch(
            ids, labels, batch.lengths + 1, batch.image_start, batch.weight, batch.keys, batch.pixels
        )
    return written


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
@pytest.mark.parametrize("scan", sorted(register.components("scan")))
def test_generation_from_the_state_equals_recomputation(recurrence: str, scan: str) -> None:
    model = small_model(recurrence=recurrence, scan=scan, grid=(2, 2), n_layer=4).double()
    batch = make_batch(model, TEXTS, dtype=torch.float64)
    found = greedy(model, batch, max_new_tokens=6, end_id=-1)
    for i in range(len(TEXTS)):
        assert found[i] == recomputed(model, take(batch, model, i), 6)


def test_generation_stops_at_the_end_token_of_each_sample() -> None:
    model = small_model().double()
    batch = make_batch(model, TEXTS, dtype=torch.float64)
    free = greedy(model, batch, max_new_tokens=6, end_id=-1)
    end = free[0][2]
    for row, cut in zip(free, greedy(model, batch, max_new_tokens=6, end_id=end), strict=True):
        assert cut == (row[: row.index(end)] if end in row else row)
