"""Makes fresh memory poisonous: whatever reads it before writing turns NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = make(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return filled


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like and new_empty return NaN."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
