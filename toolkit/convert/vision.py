"""Recognises a vision tower and a projector by their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from toolkit.convert.faults import Shape, cause_of, compare, few
from toolkit.naming import Found, inside, layer_of, layout_of

PROJECTORS: tuple[tuple[str, dict[str, Any], dict[str, tuple[str, ...]]], ...] = (
    ("linear", {}, {"weight": ("out", "in")}),
    (
        "gated",
        {"form": "hd"},
        {"proj.weight": ("out", "in"), "gate.weight": ("out", "out"), "o_proj.weight": ("out", "out")},
    ),
    (
        "gated",
        {"form": "v7"},
        {
            "gate.weight": ("in", "in"),
            "o_proj.weight": ("out", "in"),
            "ln_v.weight": ("out",),
            "ln_v.bias": ("out",),
        },
    ),
    (
        "mlp",
        {},
        {
            "fc1.weight": ("out", "in"),
            "fc1.bias": ("out",),
            "fc2.weight": ("out", "out"),
            "fc2.bias": ("out",),
        },
    ),
)
"""Name and options in a recipe, and the tensors below `proj.` with their axes."""


def projector(path: object, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The projector as config.json keeps it; ValueError if its tensors are none of the known forms."""
    for name, options, wanted in PROJECTORS:
        if set(shapes) != set(wanted) or any(len(shapes[n]) != len(axes) for n, axes in wanted.items()):
            continue
        sizes: dict[str, set[int]] = {"in": set(), "out": set()}
        for tensor, axes in wanted.items():
            for axis, size in zip(axes, shapes[tensor], strict=True):
                sizes[axis].add(size)
        if all(len(found) == 1 for found in sizes.values()):
            return {"name": name, **options, "d_in": min(sizes["in"]), "d_out": min(sizes["out"])}
    listed = ", ".join(f"proj.{n} {list(s)}" for n, s in list(shapes.items())[:6])
    raise ValueError(f"{path}: its projector is none of linear, gated (hd, v7), mlp: {listed}")


def tower(path: object, shapes: Mapping[str, Shape]) -> tuple[dict[str, Any], set[str]]:
    """(the tower as config.json keeps it, names of the file that are its tensors).

    A text tower beside it is left out. ValueError for a tower not known, or with layers that differ.
    """
    found = layout_of(shapes)
    if found is None:
        other = cause_of(shapes)
        raise ValueError(
            f"{path}: {'is ' + other if other else 'names no model that is known here'} (first tensors: "
            f"{few(list(shapes)[:4])}); known are RWKV-4, 5.2 and 6, VisualRWKV v5.x and v6.0, and "
            "CLIP, SigLIP and DINOv2 towers in the naming of timm, open_clip and the HF libraries"
        )
    names = inside(shapes, found)
    kept = {n: shapes[f] for n, f in names.items()}
    _check_layers(path, kept, found)
    taken = set(names.values())
    taken |= {n for n in ("visual_projection.weight",) if n in shapes}
    return _facts(kept, found), taken


def _check_layers(path: object, shapes: Mapping[str, Shape], found: Found) -> None:
    """Every layer must hold what the most complete one holds, in the same shapes."""
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        place = layer_of(name, found.layout)
        if place is not None:
            layers.setdefault(place[0], {})[place[1]] = shape
    if not layers:
        raise ValueError(f"{path}: a {found.layout.name} tower without layers ({found.layout.layers}0...)")
    model = max(layers.values(), key=len)
    count, prefix = max(layers) + 1, found.layout.layers
    if count > len(layers) + 512:
        raise ValueError(f"{path}: its layers are numbered up to {count - 1:,}, and there are {len(layers)}")
    wanted = {f"{prefix}{i}.{rest}": shape for i in range(count) for rest, shape in model.items()}
    wanted |= {n: shapes.get(n, ()) for n, _ in found.layout.fixed if n in shapes or _needed(n, found)}
    have = {n: s for n, s in shapes.items() if n in wanted or layer_of(n, found.layout) is not None}
    faults = compare(have, wanted)
    if faults:
        raise ValueError(faults.message(path, f"a {found.layout.name} tower of {count} layers"))


def _needed(name: str, found: Found) -> bool:
    """Names that every file of the layout has."""
    optional = ("mask_token", "register_tokens", "post_layernorm", "head.", "layernorm")
    return not any(word in name for word in optional)


def _facts(shapes: Mapping[str, Shape], found: Found) -> dict[str, Any]:
    patches = next((s for n, s in shapes.items() if len(s) == 4 and "patch" in n), ())
    patches = patches or next((s for s in shapes.values() if len(s) == 4), (0, 0, 0, 0))
    tables = ("positional_embedding", "pos_embed", "position_embedding.weight", "position_embeddings")
    table = next((s for n, s in shapes.items() if n.endswith(tables)), (0, 0))
    rows, side = table[-2], math.isqrt(table[-2])
    places = [layer_of(n, found.layout) for n in shapes]
    return {
        "layout": found.layout.name,
        "family": found.layout.family,
        "width": patches[0],
        "n_layer": 1 + max(place[0] for place in places if place),
        "patch": patches[2],
        "positions": rows,
        "image_size": patches[2] * side if rows in (side * side, side * side + 1) else 0,
    }
