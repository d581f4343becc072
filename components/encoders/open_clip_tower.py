"""The vision tower of any open_clip model as a frozen encoder."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from components.encoders.pixels import ImageTransform
from components.encoders.towers import TowerEncoder, unknown_model
from components.encoders.weights import load_strict, needs_file, read_state, require, shapes_of

NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
"""A text tower of next to nothing: open_clip's constructor builds one, and it is thrown away."""

PREFIX = "visual."


def open_clip_tower(name: str, *, layer: int, class_token: bool, weights: str) -> TowerEncoder:
    """Builds, loads and cuts the tower to the layer that is read; parameters as in the catalogue.

    Paper: the states are those of the block itself, before CLIP's final norm, and the class token,
    first in CLIP, follows the patches. Raises ValueError for an unknown name, a class token the
    tower does not have, and weights that are missing or do not fit.
    """
    if name not in open_clip.list_models():
        raise unknown_model(name, open_clip.list_models(), "open_clip")
    require(weights, _download(name))
    config = open_clip.get_model_config(name)
    # Filled from a file below, or random: only then is there anything to initialise.
    with torch.device("meta") if needs_file(weights) else contextlib.nullcontext():
        tower = _create(config)
    if class_token and not _has_class_token(tower):
        raise ValueError(f"encoder.class_token: open_clip's '{name}' has no class token; set it to false")
    whole, index = shapes_of(tower), layer
    if hasattr(tower, "prune_intermediate_layers"):
        (index,) = tower.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
    if needs_file(weights):
        _warn_of_activation(name, config)
        state = _vision_part(read_state(weights, library="open_clip"))
        load_strict(tower, state, whole=whole, source=weights)
    size = tower.image_size
    preprocess = _preprocess(name, size[0] if isinstance(size, tuple) else size)
    return TowerEncoder(tower, partial(read_layer, index=index, class_token=class_token), preprocess)


def read_layer(tower: Any, pixels: Tensor, *, index: int, class_token: bool) -> tuple[Tensor, Tensor | None]:
    """Feature map after block `index` without final norm, and the class token by option."""
    found = tower.forward_intermediates(
        pixels,
        indices=[index],
        stop_early=True,
        normalize_intermediates=False,
        intermediates_only=True,
        output_extra_tokens=class_token,
    )
    (feature_map,) = found["image_intermediates"]
    return feature_map, found["image_intermediates_prefix"][0][:, :1] if class_token else None


def _create(config: dict[str, Any]) -> Any:
    vision = dict(config["vision_cfg"])
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False  # weights come from a local file only
    clip = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(**vision),
        text_cfg=open_clip.CLIPTextCfg(**NO_TEXT),
        quick_gelu=config.get("quick_gelu", False),
    )
    return clip.visual


def _warn_of_activation(name: str, config: dict[str, Any]) -> None:
    """Says so if all published weights of this model want the other GELU: they load, and see badly."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    quick = [open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False) for tag in tags]
    if quick and all(quick) and not config.get("quick_gelu", False):
        logging.getLogger(__name__).warning(
            "encoder.model: published weights of '%s' were trained with QuickGELU; use '%s-quickgelu'",
            name,
            name,
        )


def _download(name: str) -> str:
    """What open_clip lists as the model's first published weights, by name."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    repository = open_clip.get_pretrained_cfg(name, tags[0]).get("hf_hub", "").strip("/") if tags else ""
    where = f" (repository {repository}, file open_clip_model.safetensors)" if repository else ""
    return f"the weights of open_clip's '{name}'{where}"


def _has_class_token(tower: nn.Module) -> bool:
    trunk = getattr(tower, "trunk", None)
    return hasattr(tower, "class_embedding") or getattr(trunk, "cls_token", None) is not None


def _vision_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's tensors of a whole CLIP file; a file of the tower alone as it is."""
    vision = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    if vision and len(vision) < len(state):
        logging.getLogger(__name__).info("left out %d tensors of the text tower", len(state) - len(vision))
    return vision or state


def _preprocess(name: str, size: int) -> ImageTransform:
    """Statistics and fit that open_clip lists for the model's first published weights, else CLIP's."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    return ImageTransform(
        size,
        tuple(published.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        tuple(published.get("std", open_clip.OPENAI_DATASET_STD)),
        "stretch" if published.get("resize_mode") == "squash" else "crop",
    )
