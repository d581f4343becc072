"""Reads local weight files for pretrained towers and loads them strictly."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANDOM = "random"
KEY = "encoder.weights"


def on_meta() -> bool:
    """Whether modules are being built without memory, under `torch.device("meta")`."""
    return torch.get_default_device().type == "meta"


def require(weights: str) -> None:
    """Raises ValueError unless `weights` is `random` or an existing file; on meta anything goes."""
    if on_meta() or weights == RANDOM:
        return
    if not weights:
        raise ValueError(f"{KEY} is empty: give a local .safetensors or .pth file, or the word '{RANDOM}'")
    if not Path(weights).expanduser().is_file():
        raise ValueError(f"{KEY}: no file '{weights}'; give a local .safetensors or .pth file, or '{RANDOM}'")


def needs_file(weights: str) -> bool:
    return not on_meta() and weights != RANDOM


def read_state(weights: str) -> dict[str, Tensor]:
    """Tensors by name, on the CPU. Nested `state_dict`/`model` and a `module.` prefix are taken off."""
    path = Path(weights).expanduser()
    try:
        state = _read(path)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{KEY}: cannot read '{path}' as plain tensors ({_first_line(error)}); "
            "convert it to .safetensors, files that hold code are refused"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}, not tensors by name")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str, ignore: Collection[str] = ()
) -> None:
    """Loads `state` into `module`; every name and shape must fit.

    ignore: prefixes of tensors the file may have in excess (a classifier). Raises ValueError that
    lists what is missing, what is unexpected and which shapes differ.
    """
    own = module.state_dict()
    kept = {k: v for k, v in state.items() if k in own or not any(_under(k, prefix) for prefix in ignore)}
    missing = [k for k in own if k not in kept]
    unexpected = [k for k in kept if k not in own]
    shapes = [
        f"{k} {list(kept[k].shape)} for {list(own[k].shape)}"
        for k in own
        if k in kept and kept[k].shape != own[k].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    said = [f"{len(names)} {what} ({_few(names)})" for what, names in faults.items() if names]
    if said:
        raise ValueError(f"{KEY}: '{source}' does not fit {KEY.split('.')[0]}.model: {'; '.join(said)}")
    module.load_state_dict(kept)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _few(names: Collection[str], limit: int = 4) -> str:
    return ", ".join(list(names)[:limit]) + (", ..." if len(names) > limit else "")
