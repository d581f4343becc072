"""Local weights of pretrained towers: found, mapped, and loaded strictly."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from toolkit.naming import in_library_names
from toolkit.weights import absent, how_to_get, open_weights

RANDOM = "random"
KEY = "encoder.weights"


def on_meta() -> bool:
    """Whether modules are being built without memory, under `torch.device("meta")`."""
    return torch.get_default_device().type == "meta"


def require(weights: str, download: str) -> None:
    """Raises ValueError unless `weights` is `random` or can be read; on meta anything goes.

    download: what to fetch, by name, for whoever has no such file.
    """
    if on_meta() or weights == RANDOM:
        return
    if not weights:
        raise ValueError(f"{KEY} is empty: write '{RANDOM}', or {how_to_get(KEY, download)}")
    wrong = absent(weights, key=KEY, download=download)
    if wrong:
        raise ValueError(wrong)


def needs_file(weights: str) -> bool:
    return not on_meta() and weights != RANDOM


def read_state(weights: str, *, library: str) -> dict[str, Tensor]:
    """Tensors of the vision tower by the names of `library` (timm or open_clip), mapped from the file.

    weights: a converted folder (of a tower, or of a VisualRWKV checkpoint) or a .safetensors file.
    """
    return in_library_names(open_weights(weights, key=KEY, download="the tower's weights"), library=library)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """What `module` may load: to be taken before layers that are not read are cut off."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    whole: Mapping[str, tuple[int, ...]],
    source: str,
    ignore: Collection[str] = (),
) -> None:
    """Loads `state` into `module`, in torch's default dtype; every name and shape must fit.

    whole: shapes before layers were cut off, which the file may have in excess, as it may tensors under
    the prefixes `ignore` (a classifier). A tensor of that type stays mapped: nothing is copied. Raises
    ValueError that lists what is missing, what is unexpected and which shapes differ.
    """
    own = module.state_dict()
    kept = {k: v for k, v in state.items() if k in whole or not any(_under(k, prefix) for prefix in ignore)}
    missing = [k for k in own if k not in kept]
    unexpected = [k for k in kept if k not in whole]
    shapes = [
        f"{k} {list(kept[k].shape)} for {list(shape)}"
        for k, shape in whole.items()
        if k in kept and tuple(kept[k].shape) != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    said = [f"{len(names)} {what} ({_few(names)})" for what, names in faults.items() if names]
    if said:
        raise ValueError(f"{KEY}: '{source}' does not fit {KEY.split('.')[0]}.model: {'; '.join(said)}")
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    filled = {k: kept[k].to(device, dtype if kept[k].is_floating_point() else None) for k in own}
    module.load_state_dict(filled, assign=True)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _few(names: Collection[str], limit: int = 4) -> str:
    return ", ".join(list(names)[:limit]) + (", ..." if len(names) > limit else "")
