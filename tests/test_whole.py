"""A step cut into micro batches: its loss and gradient are those of the step as one batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers import make_batch, small_model, take
from toolkit import ranks
from toolkit.contracts import Batch, Whole
from toolkit.loss import lm_loss
from toolkit.whole import WholeSteps, total

TEXTS = [(3, 5, 2), (-1, 4, 6), (2, 9, 1), (1, 2, 4)]


def step() -> tuple[torch.nn.Module, Batch, list[Batch]]:
    """A model in fp64, a batch whose third sample counts for nothing, and its samples one by one."""
    model = small_model().double()
    batch = make_batch(model, TEXTS, dtype=torch.float64)
    batch.weight[2] = 0
    return model, batch, [take(batch, model, i) for i in range(len(TEXTS))]


def gradients(model: torch.nn.Module, losses: Iterator[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("l2", ["none", "answers"])
def test_parts_sum_to_the_whole(reduction: str, l2: str) -> None:
    model, batch, parts = step()
    losses: list[Tensor] = []

    def loss(part: Batch) -> Tensor:
        made = lm_loss(model(part, l2=l2), reduction=reduction, whole=part.whole)
        losses.append(made.detach())
        return made

    expected = gradients(model, map(loss, [batch]))
    found = gradients(model, map(loss, WholeSteps(parts, len(parts), "test")))
    assert float(sum(losses[1:])) == pytest.approx(float(losses[0]), rel=1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_totals_of_a_step() -> None:
    _, batch, parts = step()
    assert total(parts) == Whole(samples=4, answers=2 + 6 + 4, positions=4 * batch.ids.shape[1])
    assert total([batch]) == total(parts)


def test_steps_are_cut_as_they_come_and_named_if_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, parts = step()
    told: list[str] = []
    monkeypatch.setattr(ranks, "doing", told.append)
    loader = WholeSteps(parts, 2, "stage tune", 7)
    assert len(loader) == 4
    wholes = [part.whole for part in loader]
    assert wholes == [total(parts[:2])] * 2 + [total(parts[2:])] * 2
    assert told[:2] == ["stage tune, step 7", "stage tune, step 8"]
    assert parts[0].whole is None  # the loader's own batches stay as they are
