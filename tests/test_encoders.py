"""Every registered encoder: shapes, order, transforms, weights, errors, and the published sizes on meta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import components.encoders as catalogue
from tests.encoding import CASES, RECIPES, TINY, TINY_CLIP, build, collate, count, leaves, picture, tiny_clip
from toolkit import register
from toolkit.contracts import ImageFeatures

__all__ = ["tiny_clip"]  # fixtures of another file


def test_every_encoder_is_tested() -> None:
    assert set(RECIPES) == set(register.components("encoder"))


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_contract(name: str, recipe: dict[str, Any]) -> None:
    encoder = build(name, recipe)
    transform = encoder.transform()
    one = transform(picture())
    assert all(t.dtype == torch.float32 for t in leaves(one))
    assert all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(transform(picture())), strict=True))

    pixels = collate([one, transform(picture(seed=1).convert("RGBA"))])
    with torch.no_grad():
        features = encoder(pixels)
        alone = encoder(collate([one]))
    height, width = encoder.grid
    assert isinstance(features, ImageFeatures) and features.grid == encoder.grid
    assert features.patches.shape == (2, height * width, encoder.d_out)
    assert features.extra.shape == (2, encoder.n_extra, encoder.d_out)
    torch.testing.assert_close(features.patches[:1], alone.patches, rtol=1e-4, atol=1e-4)
    assert (
        encoder.learned
        or name == "fused"
        or not any(m.training for m in encoder.modules() if m is not encoder)
    )


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_builds_without_memory(name: str, recipe: dict[str, Any]) -> None:
    real = build(name, recipe)
    with torch.device("meta"):
        ghost = build(name, {k: v for k, v in recipe.items() if k != "weights"})
    assert all(t.is_meta for t in ghost.parameters())
    assert (ghost.d_out, ghost.grid, ghost.n_extra) == (real.d_out, real.grid, real.n_extra)
    assert {k: v.shape for k, v in ghost.state_dict().items()} == {
        k: v.shape for k, v in real.state_dict().items()
    }


@pytest.mark.parametrize(("name", "recipe"), [c for c in CASES if c.values[0] != "blank"])
def test_patches_are_row_major(name: str, recipe: dict[str, Any]) -> None:
    """Changing one corner of the image changes the feature at the same corner of the grid most."""
    encoder = build(name, recipe)
    dark = Image.new("RGB", (64, 64))
    for row, column in ((0, 1), (1, 0)):
        bright = dark.copy()
        bright.paste((255, 255, 255), (56 * column, 56 * row, 56 * column + 8, 56 * row + 8))
        with torch.no_grad():
            a, b = (encoder(collate([encoder.transform()(image)])) for image in (dark, bright))
        change = (b.patches - a.patches).norm(dim=-1)[0].view(encoder.grid)
        height, width = encoder.grid
        corners = change[[0, 0, -1, -1], [0, -1, 0, -1]]
        wanted = 2 * row + column
        assert corners.argmax() == wanted, f"{(row, column)} of {height} x {width}: {change}"


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_wrong_pixels(name: str, recipe: dict[str, Any]) -> None:
    encoder = build(name, recipe)
    wrong = torch.zeros(1, 3, 40, 40)
    with pytest.raises(ValueError, match=r"encoder: .*transform\(\)"):
        encoder(wrong)
    if name == "fused":
        with pytest.raises(ValueError, match="encoder: pixels have shape"):
            encoder((wrong,) * len(encoder.members))


def test_stretch_uses_the_whole_image() -> None:
    image = picture(70, 50)
    pixels = build("conv", {"image_size": 32}).transform()(image)
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
    expected = torch.from_numpy(resized).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "height", "resized", "box"), [
    (100, 60, (93, 56), (18, 0, 74, 56)),
    (60, 101, (56, 94), (0, 19, 56, 75)),
    (56, 56, (56, 56), (0, 0, 56, 56)),
])  # fmt: skip
def test_clip_crop(width: int, height: int, resized: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """Shortest side to 56, longest truncated, margins rounded down: as the CLIP processor does."""
    image = picture(width, height)
    pixels = build("open_clip", {"model": TINY_CLIP, "weights": "random"}).transform()(image)
    cut = image.resize(resized, Image.Resampling.BICUBIC).crop(box)
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    expected = ((torch.from_numpy(np.array(cut)) / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(pixels, expected)


def test_blank_sees_nothing() -> None:
    encoder = build("blank", {"grid": 2, "width": 3})
    pixels = collate([encoder.transform()(picture(seed=s)) for s in range(2)])
    assert pixels.shape == (2, 1) and not pixels.any()
    assert torch.equal(encoder(pixels).patches, torch.zeros(2, 4, 3))
    assert count(encoder) == 0


def test_patch_is_one_matrix_per_patch() -> None:
    encoder = build("patch", {"image_size": 32, "patch": 16, "width": 5})
    pixels = torch.randn(2, 3, 32, 32)
    cells = F.unfold(pixels, 16, stride=16).transpose(1, 2)  # [B, P, 3 * 16 * 16], row-major
    expected = cells @ encoder.embed.weight.flatten(1).T + encoder.embed.bias
    expected = expected + encoder.positions.flatten(1).T
    torch.testing.assert_close(encoder(pixels).patches, expected, rtol=1e-4, atol=1e-5)
    assert build("patch", {"positions": False}).positions is None


@pytest.mark.parametrize("name", ["patch", "conv"])
def test_learned_stems_learn(name: str) -> None:
    encoder = build(name, {})
    assert encoder.learned and encoder.grid == (4, 4) and encoder.d_out == 128
    encoder(torch.randn(2, 3, 64, 64)).patches.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize(("name", "recipe", "said"), [
    ("patch", {"image_size": 50}, r"encoder\.image_size: 50 .*use 48"),
    ("conv", {"image_size": 72}, r"encoder\.image_size: 72 .*use 64"),
    ("conv", {"width": 20}, r"encoder\.width: 20 .*use 16"),
    ("colors", {"image_size": 72}, r"encoder\.image_size: 72 .*encoder\.cell=16; use 64"),
    ("colors", {"detail": 5}, r"encoder\.detail: 5 does not divide encoder\.cell=16; use 4"),
    ("lite0", {"stride": 12}, r"encoder\.stride: 12 .*8, 16 or 32"),
    ("lite0", {"image_size": 72}, r"encoder\.image_size: 72 .*use 64"),
    ("timm", {"model": "vit_tinny_patch16_224"}, r"closest: vit_tiny_patch16_224, \S+, \S+$"),
    ("timm", {"model": "vit_tiny_patch16_224.nonsense"}, r"encoder\.model: .*closest: "),
    ("timm", {"model": "hf-hub:someone/something"}, r"encoder\.model: timm has no model"),
    ("timm", {**TINY, "weights": ""}, r"encoder\.weights is empty: .*'random'"),
    ("timm", {**TINY, "weights": "/nowhere/vit.pth"}, r"encoder\.weights: no file '/nowhere/vit\.pth'"),
    ("timm", {**TINY, "layer": 12}, r"encoder\.layer: 12, .*-12 to 11"),
    ("timm", {**TINY, "image_size": 50}, r"encoder\.image_size: 50 .*use 48"),
    ("timm", {**TINY, "model": "convnext_atto", "class_token": True}, r"\.class_token: .*no class token"),
    ("open_clip", {"model": "ViT-L-14-33"}, r"encoder\.model: .*closest: ViT-L-14-336, "),
    ("open_clip", {"model": TINY_CLIP}, r"encoder\.weights is empty"),
    ("fused", {"members": []}, r"encoder\.members: list at least one"),
    ("fused", {"members": [{"name": "fused", "members": [{"name": "blank"}]}]}, r"members\[0\]: fused"),
    ("fused", {"members": [{"name": "blank"}, {"name": "blank", "grid": 6}], "resample": "space_to_depth"},
     r"encoder\.members\[1\]: its 6 x 6 grid .*4 x 4"),
])  # fmt: skip
def test_wrong_recipes(name: str, recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(name, recipe)


def test_factories_stay_where_they_are() -> None:
    """Importing an implementing file must not put a module in the place of a factory of its name."""
    for name, component in register.components("encoder").items():
        build(name, RECIPES[name][0])
        assert getattr(catalogue, name) is component.factory


def test_catalogue_imports_nothing_heavy() -> None:
    source = Path(catalogue.__file__).read_text()
    heads = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    allowed = ("from __future__", "from collections", "from typing", "from toolkit")
    assert heads and all(line.startswith(allowed) for line in heads)


def test_colors_counts_pixels_and_places_cells() -> None:
    """Left half of the first cell red, the rest of the picture white: shares, ink and place by hand."""
    pixels = torch.ones(1, 3, 32, 32)
    pixels[0, 1:, :16, :8] = 0.2
    encoder = build("colors", {"image_size": 32, "detail": 2})
    with torch.no_grad():
        found = encoder(pixels).patches[0]
    red, paper = 4, 7
    colors = torch.zeros(4, 8)
    colors[:, paper], colors[0, paper], colors[0, red] = 1.0, 0.5, 1.0
    torch.testing.assert_close(found[:, :8], colors)
    ink = torch.zeros(4, 4)
    ink[0] = 0.5 * torch.tensor([0.8, 0.0, 0.8, 0.0])
    torch.testing.assert_close(found[:, 8:12], ink)
    places = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]])
    torch.testing.assert_close(found[:, 12:], places)


def test_a_cell_of_colors_sees_no_other() -> None:
    encoder = build("colors", {})
    pixels = torch.rand(1, 3, 64, 64)
    other = pixels.clone()
    other[:, :, :, 16:] = torch.rand(1, 3, 64, 48)
    first, second = encoder(pixels).patches[0], encoder(other).patches[0]
    same = (first == second).all(dim=1).view(4, 4)
    assert same[:, 0].all() and not same[:, 1:].any()
