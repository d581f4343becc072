"""What training carries from step to step beside the weights: AdamW's moments and the random generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit import ranks

_KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
"""Types of the tensors of a state."""


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer on the CPU: `exp_avg/rwkv.head.weight` and so on."""
    return {
        f"{kind}/{name}": tensor.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def put_moments(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Gives an optimizer the moments that a checkpoint holds of its parameters.

    Tensors that it has already are written in their places, where a captured step reads them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"{kind}/{names[parameter]}")
                if value is None:
                    continue
                mine = optimizer.state[parameter]
                if kind in mine:
                    mine[kind].copy_(value)
                elif kind == "step" and not on_device:  # AdamW counts on the CPU then
                    mine[kind] = value.clone()
                else:
                    mine[kind] = value.clone().to(parameter.device)


def generators() -> tuple[dict[str, Tensor], list[Any]]:
    """Random generators of torch, its GPU and NumPy as tensors, and Python's as JSON."""
    _, keys, place, has_gauss, gauss = np.random.get_state()
    tensors = {
        "random/torch": torch.get_rng_state(),
        "random/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "random/numpy_place": torch.tensor([place, has_gauss]),
        "random/numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors, list(random.getstate())


def put_generators(state: Mapping[str, Tensor], python: list[Any]) -> None:
    """Puts random generators back to where `generators` found them; a GPU's, if there is one now."""
    version, words, gauss = python
    random.setstate((version, tuple(words), gauss))
    place, has_gauss = state["random/numpy_place"].tolist()
    keys = state["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, place, has_gauss, float(state["random/numpy_gauss"])))
    torch.set_rng_state(state["random/torch"])
    if torch.cuda.is_available() and "random/cuda" in state:
        torch.cuda.set_rng_state(state["random/cuda"])


def over_ranks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that rank 0 has, on every rank: only its node need see the file."""
    kinds: list[tuple[str, list[int], int]] = ranks.shared(
        lambda: [(n, list(t.shape), _KINDS.index(t.dtype)) for n, t in state.items()]
    )
    if not ranks.main():
        state = {name: torch.empty(size, dtype=_KINDS[kind]) for name, size, kind in kinds}
    ranks.same(state.values())
    return dict(state)
