"""Encoders that several tests build: a small recipe or more of each, a tiny CLIP, pictures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from toolkit import register

TINY = {"model": "vit_tiny_patch16_224", "image_size": 32, "weights": "random"}
TINY_CLIP = "tiny-clip-for-tests"

# One or more small recipes per registered encoder; a new encoder must be added here.
RECIPES: dict[str, list[dict[str, Any]]] = {
    "patch": [{"image_size": 32, "patch": 8, "width": 24}, {"image_size": 32, "positions": False}],
    "conv": [{"image_size": 48, "width": 32}],
    "timm": [
        TINY,
        {**TINY, "layer": -2, "class_token": True, "fit": "crop"},
        {
            **TINY,
            "model": "vit_small_patch14_reg4_dinov2",
            "image_size": 42,
            "class_token": True,
            "norm": True,
        },
        {**TINY, "model": "vit_base_patch16_siglip_224", "layer": 0},
        {**TINY, "model": "samvit_base_patch16", "layer": 0, "image_size": 64, "norm": True},
        {**TINY, "model": "convnext_atto", "image_size": 64, "norm": True},
        {**TINY, "model": "efficientnet_lite0", "image_size": 64, "layer": 3},
    ],
    "open_clip": [
        {"model": TINY_CLIP, "weights": "random"},
        {"model": TINY_CLIP, "weights": "random", "layer": -2, "class_token": False},
    ],
    "lite0": [{}, {"stride": 8}, {"image_size": 96, "stride": 32}],
    "colors": [{}, {"image_size": 80, "cell": 8, "detail": 2}],
    "fused": [
        {"members": [{"name": "patch", "image_size": 32}, {"name": "lite0", "stride": 8}], "grid": 4},
        {"members": [{"name": "conv"}, {"name": "timm", **TINY}, {"name": "blank"}]},
    ],
    "blank": [{}, {"grid": 3, "width": 5}],
}


CASES = [
    pytest.param(name, recipe, id=f"{name}{i}") for name, rs in RECIPES.items() for i, recipe in enumerate(rs)
]


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A CLIP of two blocks of width 48 on 4 x 4 patches, the size of the golden file's tower."""
    path = tmp_path_factory.mktemp("open_clip") / f"{TINY_CLIP}.json"
    vision = {
        "image_size": 56,
        "layers": 2,
        "width": 48,
        "head_width": 12,
        "patch_size": 14,
        "mlp_ratio": 2.0,
    }
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


def build(name: str, recipe: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return register.bind("encoder", {"name": name, **recipe})()


def picture(width: int = 70, height: int = 50, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def collate(samples: list[Any]) -> Any:
    if isinstance(samples[0], tuple):
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))
    return torch.stack(samples)


def leaves(pixels: Any) -> list[torch.Tensor]:
    return list(pixels) if isinstance(pixels, tuple) else [pixels]


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The golden file's vision tower (names of the original's library) in open_clip's naming."""
    prefix = "param/vit.vision_model."
    hf = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    out = {
        "class_embedding": hf["embeddings.class_embedding"],
        "positional_embedding": hf["embeddings.position_embedding.weight"],
        "conv1.weight": hf["embeddings.patch_embedding.weight"],
        "proj": torch.zeros(48, 16),
    }
    for kind in ("weight", "bias"):
        out[f"ln_pre.{kind}"] = hf[f"pre_layrnorm.{kind}"]
        out[f"ln_post.{kind}"] = hf[f"post_layernorm.{kind}"]
        for i in range(2):
            old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            qkv = [hf[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            out[f"{new}attn.in_proj_{kind}"] = torch.cat(qkv)
            out[f"{new}attn.out_proj.{kind}"] = hf[f"{old}self_attn.out_proj.{kind}"]
            out[f"{new}ln_1.{kind}"] = hf[f"{old}layer_norm1.{kind}"]
            out[f"{new}ln_2.{kind}"] = hf[f"{old}layer_norm2.{kind}"]
            out[f"{new}mlp.c_fc.{kind}"] = hf[f"{old}mlp.fc1.{kind}"]
            out[f"{new}mlp.c_proj.{kind}"] = hf[f"{old}mlp.fc2.{kind}"]
    return out
