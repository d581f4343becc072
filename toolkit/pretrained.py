"""Models filled from converted weights: built without memory, then mapped straight to dtype and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from toolkit import register
from toolkit.trunk import LanguageModel
from toolkit.weights import DOWNLOADS, Weights, absent, config_of, open_weights, part, settings_of


def ghost(sizes: Mapping[str, Any]) -> LanguageModel:
    """A language model of these sizes (config.json, `parts.rwkv`) on the meta device."""
    register.discover()
    with torch.device("meta"):
        mixers = register.bind("recurrence", sizes["recurrence"])(sizes["d_model"], sizes["n_layer"])
        return LanguageModel(
            mixers, d_model=sizes["d_model"], n_layer=sizes["n_layer"], vocab_size=sizes["vocab_size"]
        )


def fill(
    module: nn.Module,
    weights: Weights,
    names: Mapping[str, str],
    *,
    key: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Gives a module (on meta, or not) the tensors of a file in its place, strictly by name and shape.

    names: name in the module -> name in the file. A tensor that already has the type and device stays
    mapped: it is never copied. Others are copied one at a time, and what was read is given back.
    dtype: of floating-point tensors; None keeps the file's. device: None is torch's default device.
    """
    own = check_fit(module, weights, names, key=key)
    target = torch.get_default_device() if device is None else torch.device(device)
    filled = {}
    for name in own:
        tensor = weights[names[name]]
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        filled[name] = tensor.to(target, wanted)
        if filled[name] is not tensor:
            weights.release(names[name])
    module.load_state_dict(filled, strict=True, assign=True)


def check_fit(
    module: nn.Module, weights: Weights, names: Mapping[str, str], *, key: str
) -> dict[str, torch.Tensor]:
    """The module's own tensors; ValueError if those of the file differ in name or shape."""
    own: dict[str, torch.Tensor] = module.state_dict()
    wrong = misfits({n: tuple(t.shape) for n, t in own.items()}, weights.shapes(), names)
    if wrong:
        raise ValueError(f"{key}: {weights.path} does not fit the model: {wrong}")
    return own


def misfits(
    own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> str:
    """What is missing, surplus or of another shape, few of each; empty if all fits."""
    faults = {
        "missing": [n for n in own if n not in names],
        "not in the model": [n for n in names if n not in own],
        "of another shape": [
            f"{n} {list(found[names[n]])} for {list(shape)}"
            for n, shape in own.items()
            if n in names and found[names[n]] != shape
        ],
    }
    return "; ".join(f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in faults.items() if n)


def fill_part(
    module: nn.Module,
    given: str,
    *,
    prefix: str,
    key: str,
    download: str,
    device: torch.device | None = None,
    dtype: torch.dtype | str | None = "default",
) -> None:
    """Fills a part of a run's model from the weights that a recipe names.

    Where the default device is meta, nothing is read but the header, and a file that is not there is let
    pass: counting parameters needs no weights, but those that are there must fit.

    dtype: "default" for torch's default type; else as in `fill`.
    """
    empty = torch.get_default_device().type == "meta"
    if empty and absent(given, key=key, download=download):
        return
    weights = open_weights(given, key=key, download=download)
    names = part(weights, prefix)
    if not names:
        held = ", ".join(sorted({n.split(".")[0] for n in weights}))
        raise ValueError(f"{key}: {weights.path} holds no {prefix}* tensors, only {held}")
    try:
        if empty:
            check_fit(module, weights, names, key=key)
            return
        kind = torch.get_default_dtype() if isinstance(dtype, str) else dtype
        fill(module, weights, names, key=key, dtype=kind, device=device)
    except ValueError as error:
        wanted = " ".join(f"{k}={v}" for k, v in settings_of(given, prefix[:-1]).items())
        raise ValueError(f"{error}" + (f"; these weights want {wanted}" if wanted else "")) from error


def load_language_model(
    given: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LanguageModel, dict[str, Any]]:
    """(language model in eval mode, its part of config.json) from a converted folder.

    given: folder that `toolkit.convert` wrote. dtype, device: as in `fill`; dtype None keeps the file's
    type, and on a CPU nothing is copied then.
    """
    weights = open_weights(given, key="weights", download=DOWNLOADS["lm"])
    sizes = checked_parts(given, weights).get("rwkv")
    if sizes is None:
        raise ValueError(
            f"{given}: no config.json with the sizes of a language model beside the weights; convert the "
            "original with `python -m toolkit.convert FILE --to FOLDER`"
        )
    model = ghost(sizes)
    fill(model, weights, part(weights, "rwkv."), key="weights", dtype=dtype, device=device)
    return model.eval(), dict(sizes)


def checked_parts(given: str, weights: Weights) -> dict[str, Any]:
    """`parts` of the config.json beside the weights, empty without one.

    Raises ValueError if the tensors are not what it tells: sizes from a file that anyone may have written
    would otherwise decide how much is built.
    """
    from toolkit.convert.plan import understand

    told = config_of(given).get("parts", {})
    if told and understand(weights.path, weights.shapes()).parts != told:
        raise ValueError(
            f"{given}: its config.json does not tell what its weights hold; convert the original again"
        )
    return dict(told)
