"""How released vision towers name their tensors, and those names in the two libraries that run them.

A leaf like `contracts`: `components.encoders` reads towers through it, `toolkit.convert` recognises them.
The open_clip encoder takes open_clip's names, the timm encoder what timm's own filter understands (its
models' names, open_clip's, and those of the published DINOv2 files).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


DERIVED = ("spiral_order", "snake_order", "zigzag_order")
"""Scan orders that VisualRWKV v5.1 stores although they follow from the size; kept for the way back."""


@dataclass(frozen=True)
class Layout:
    """One way to name a tower. `layers` stands before a layer's number, `probe` is always there."""

    name: str
    family: str
    probe: str
    layers: str
    heads: tuple[str, ...] = ("",)
    """Prefixes that whole models put before the tower's names."""
    fixed: tuple[tuple[str, str], ...] = ()
    """Names outside the layers -> ours."""
    layer: tuple[tuple[str, str], ...] = ()
    """Modules within a layer -> ours, weight and bias alike."""
    ours: str = ""
    """Our name before a layer's number."""
    qkv: tuple[str, str] = ("", "")
    """Their three projections, `{}` for the letter or word -> our one."""


_CLIP_LAYER = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
_SIGLIP_LAYER = (
    ("self_attn.out_proj", "attn.proj"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
_DINO_LAYER = (
    ("attention.output.dense", "attn.proj"),
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
    ("mlp.weights_in", "mlp.w12"),
    ("mlp.weights_out", "mlp.w3"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)

LAYOUTS = (
    Layout(
        "HF CLIP",
        "clip",
        "embeddings.class_embedding",
        "encoder.layers.",
        ("vision_model.",),
        (
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.patch_embedding.weight", "conv1.weight"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layrnorm.weight", "ln_pre.weight"),
            ("pre_layrnorm.bias", "ln_pre.bias"),
            ("post_layernorm.weight", "ln_post.weight"),
            ("post_layernorm.bias", "ln_post.bias"),
        ),
        _CLIP_LAYER,
        "transformer.resblocks.",
        ("self_attn.{}_proj.", "attn.in_proj_"),
    ),
    Layout(
        "HF SigLIP",
        "siglip",
        "embeddings.patch_embedding.bias",
        "encoder.layers.",
        ("vision_model.",),
        (
            ("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
            ("embeddings.patch_embedding.bias", "patch_embed.proj.bias"),
            ("embeddings.position_embedding.weight", "pos_embed"),
            ("post_layernorm.weight", "norm.weight"),
            ("post_layernorm.bias", "norm.bias"),
            ("head.probe", "attn_pool.latent"),
            ("head.attention.out_proj.weight", "attn_pool.proj.weight"),
            ("head.attention.out_proj.bias", "attn_pool.proj.bias"),
            ("head.layernorm.weight", "attn_pool.norm.weight"),
            ("head.layernorm.bias", "attn_pool.norm.bias"),
            ("head.mlp.fc1.weight", "attn_pool.mlp.fc1.weight"),
            ("head.mlp.fc1.bias", "attn_pool.mlp.fc1.bias"),
            ("head.mlp.fc2.weight", "attn_pool.mlp.fc2.weight"),
            ("head.mlp.fc2.bias", "attn_pool.mlp.fc2.bias"),
        ),
        _SIGLIP_LAYER,
        "blocks.",
        ("self_attn.{}_proj.", "attn.qkv."),
    ),
    Layout(
        "HF DINOv2",
        "dinov2",
        "encoder.layer.0.layer_scale1.lambda1",  # the hub's plain ViTs have the rest of these names too
        "encoder.layer.",
        ("", "dinov2.", "dinov2_with_registers."),
        (
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.mask_token", "mask_token"),
            ("embeddings.register_tokens", "register_tokens"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
            ("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
            ("layernorm.weight", "norm.weight"),
            ("layernorm.bias", "norm.bias"),
        ),
        _DINO_LAYER,
        "blocks.",
        ("attention.attention.{}.", "attn.qkv."),
    ),
    Layout("open_clip", "clip", "class_embedding", "transformer.resblocks.", ("visual.", "")),
    Layout("open_clip with a timm tower", "timm", "patch_embed.proj.weight", "blocks.", ("visual.trunk.",)),
    Layout("timm", "timm", "patch_embed.proj.weight", "blocks."),
)


@dataclass(frozen=True)
class Found:
    """A layout and what stands before its names in a file."""

    layout: Layout
    head: str


def layout_of(names: Collection[str]) -> Found | None:
    """The layout of a tower's names, or None; a head like `vit.` must have been taken off."""
    for layout in LAYOUTS:
        for head in layout.heads:
            if head + layout.probe in names:
                return Found(layout, head)
    return None


def inside(names: Collection[str], found: Found) -> dict[str, str]:
    """Name within the tower -> name in the file, for the tensors of the tower alone."""
    return {n.removeprefix(found.head): n for n in names if n.startswith(found.head)}


def layer_of(name: str, layout: Layout) -> tuple[int, str] | None:
    """(layer, rest of the name), or None for a tensor outside the layers."""
    match = re.fullmatch(re.escape(layout.layers) + r"(\d{1,4})\.(.+)", name)
    return (int(match[1]), match[2]) if match else None


def in_library_names(state: Mapping[str, Tensor], *, library: str) -> dict[str, Tensor]:
    """A tower's tensors as `library` ("open_clip" or "timm") names them; other towers as they are.

    Query, key and value are joined as the libraries keep them; nothing else is computed.
    """
    vision = {n.removeprefix("vit."): t for n, t in state.items() if n.startswith("vit.")}
    state = vision or dict(state)
    found = layout_of(state)
    if found is None:
        return state
    if not found.layout.fixed:
        named = found.layout.name == "open_clip" and library == "open_clip"
        return {n: state[f] for n, f in inside(state, found).items()} if named else state
    tower = {n: state[f] for n, f in inside(state, found).items()}
    renamed = _renamed(tower, found.layout)
    if found.layout.family == "clip":
        if "visual_projection.weight" in state:
            renamed["proj"] = state["visual_projection.weight"].t()
        if library == "timm":  # timm knows open_clip's naming by this head
            renamed = {f"visual.{n}": t for n, t in renamed.items()}
    return renamed


def _renamed(tower: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    import torch

    made: dict[str, Tensor] = {}
    for name, tensor in tower.items():
        place = layer_of(name, layout)
        if place is None:
            made.update(_outside(name, tensor, layout))
            continue
        number, rest = place
        joined, piece = _projection(rest, layout)
        if joined:
            if piece == 0:
                others = [f"{layout.layers}{number}.{other}" for other in _siblings(rest, layout)]
                if all(other in tower for other in others):
                    made[f"{layout.ours}{number}.{joined}"] = torch.cat([tower[n] for n in others])
        else:
            made[f"{layout.ours}{number}.{_module(rest, layout)}"] = tensor
    if layout.family == "dinov2":
        made.setdefault("mask_token", torch.zeros(1))  # by which timm knows the published naming
    return made


def _outside(name: str, tensor: Tensor, layout: Layout) -> dict[str, Tensor]:
    if name.endswith("position_ids"):  # a count that older files of the hub carry
        return {}
    ours = dict(layout.fixed).get(name, name)
    if layout.family == "siglip" and name.startswith("head.attention.in_proj_"):
        kind, width = name.rsplit("_", 1)[1], tensor.shape[0] // 3
        return {f"attn_pool.q.{kind}": tensor[:width], f"attn_pool.kv.{kind}": tensor[width:]}
    return {ours: tensor[None] if layout.family == "siglip" and ours == "pos_embed" else tensor}


_LETTERS, _WORDS = ("q", "k", "v"), ("query", "key", "value")


def _siblings(rest: str, layout: Layout) -> list[str]:
    """Names of query, key and value beside one of them, in this order; empty for another tensor."""
    words = _WORDS if layout.family == "dinov2" else _LETTERS
    kind = rest.rsplit(".", 1)[-1]
    return [layout.qkv[0].format(word) + kind for word in words]


def _projection(rest: str, layout: Layout) -> tuple[str, int]:
    names = _siblings(rest, layout)
    return (layout.qkv[1] + rest.rsplit(".", 1)[-1], names.index(rest)) if rest in names else ("", -1)


def _module(rest: str, layout: Layout) -> str:
    for theirs, ours in layout.layer:
        if rest == theirs or rest.startswith(theirs + "."):
            return ours + rest[len(theirs) :]
    return rest
