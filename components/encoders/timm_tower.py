"""Any timm model with a feature grid as a frozen encoder."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from components.encoders.pixels import ImageTransform
from components.encoders.towers import TowerEncoder, unknown_model
from components.encoders.weights import load_strict, needs_file, read_state, require, shapes_of


def timm_tower(
    name: str, *, image_size: int, layer: int, norm: bool, class_token: bool, fit: str, weights: str
) -> TowerEncoder:
    """Builds, loads and cuts the tower to the layer that is read; parameters as in the catalogue.

    Raises ValueError for an unknown name, a model without feature grid, a layer it does not have, a
    class token it does not have, and weights that are missing or do not fit.
    """
    settings = _settings(name)
    require(weights, _download(name, settings))
    own_size = settings.input_size[-1]
    size = image_size or own_size
    tower = _built(name, size, resizable=not settings.fixed_input_size, empty=needs_file(weights))
    if size != own_size:  # some published models lose a border at their own size (SigLIP: 384 = 27 x 14 + 6)
        _check_patches(name, tower, size)
    index = _layer_index(name, tower, layer)
    if class_token and getattr(tower, "cls_token", None) is None:
        raise ValueError(f"encoder.class_token: timm's '{name}' has no class token; set it to false")
    state = _named(tower, weights) if needs_file(weights) else None
    whole = shapes_of(tower)
    # The layers behind the one that is read would only cost memory.
    tower.prune_intermediate_layers([index], prune_norm=not norm, prune_head=True)
    if state is not None:
        load_strict(tower, state, whole=whole, source=weights, ignore=_classifiers(settings.classifier))
    # Paper: HD resizes to the exact square (aspect lost) and gives SAM the ImageNet statistics;
    # both are this encoder's defaults (`fit`, timm's own statistics).
    preprocess = ImageTransform(size, tuple(settings.mean), tuple(settings.std), fit)
    return TowerEncoder(
        tower, partial(read_layer, index=index, norm=norm, class_token=class_token), preprocess
    )


def read_layer(
    tower: Any, pixels: Tensor, *, index: int, norm: bool, class_token: bool
) -> tuple[Tensor, Tensor | None]:
    """Feature map after block or stage `index` of a timm model, and its class token by option."""
    wanted: dict[str, Any] = {"return_prefix_tokens": True} if class_token else {}
    (found,) = tower.forward_intermediates(
        pixels,
        indices=[index],
        norm=norm,
        stop_early=True,
        intermediates_only=True,
        output_fmt="NCHW",
        **wanted,
    )
    if not class_token:
        return found, None
    feature_map, prefix = found
    return feature_map, prefix[:, :1]  # registers, if any, stand behind the class token


def _settings(name: str) -> Any:
    """timm's description of the model: input size, statistics, classifier name."""
    try:
        settings = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # a known architecture with an unknown weight tag
        settings = None
    if settings is None:
        known = timm.list_pretrained() if "." in name else timm.list_models()
        raise unknown_model(name, known, "timm")
    return settings


def _built(name: str, size: int, *, resizable: bool, empty: bool) -> Any:
    """The model, `empty` without memory to be filled from a file.

    A model with buffers that no file holds (tables computed when it is built) is built with memory.
    """
    if not empty:
        return _create(name, size, resizable=resizable)
    with torch.device("meta"):
        tower = _create(name, size, resizable=resizable)
    stored = tower.state_dict()
    if all(buffer in stored for buffer, _ in tower.named_buffers()):
        return tower
    return _create(name, size, resizable=resizable)


def _create(name: str, size: int, *, resizable: bool) -> Any:
    options: dict[str, Any] = {} if resizable else {"img_size": size}
    try:
        tower = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"encoder.image_size: timm cannot build '{name}' for {size} px: {error}") from error
    return tower


def _check_patches(name: str, tower: Any, size: int) -> None:
    """Raises ValueError if patches of the model's size do not fill the image."""
    patch = getattr(getattr(tower, "patch_embed", None), "patch_size", 1)
    side = patch if isinstance(patch, int) else patch[0]
    if size % side:
        raise ValueError(
            f"encoder.image_size: {size} is no multiple of the {side} px patches of timm's '{name}'; "
            f"use {max(side, size - size % side)}"
        )


def _layer_index(name: str, tower: Any, layer: int) -> int:
    """A recipe's layer counted from the front; raises ValueError where there is no such grid."""
    if not hasattr(tower, "forward_intermediates") or not hasattr(tower, "feature_info"):
        raise ValueError(
            f"encoder.model: timm's '{name}' offers no feature grid (it lacks forward_intermediates); "
            "choose a model that does, such as vit_base_patch16_224 or convnext_tiny"
        )
    count = len(tower.feature_info)
    if not -count <= layer < count:
        raise ValueError(f"encoder.layer: {layer}, but timm's '{name}' has layers {-count} to {count - 1}")
    return layer % count


def _named(tower: nn.Module, weights: str) -> dict[str, Tensor]:
    """The file's tensors by the model's names, its position table resampled to the model's grid."""
    state = read_state(weights, library="timm")
    # timm keeps beside each model how its published files are brought to its naming and how a
    # position table is resampled to another grid.
    convert = getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else dict(convert(state, tower))


def _classifiers(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _download(name: str, settings: Any) -> str:
    """timm's own published weights of the model, by name."""
    where = (
        f" (repository {settings.hf_hub_id.strip('/')}, file model.safetensors)" if settings.hf_hub_id else ""
    )
    return f"the weights of timm's '{name}'{where}"
