"""Encoders from timm and open_clip: layers, weights from files, published sizes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.encoding import TINY, TINY_CLIP, build, count, tiny_clip, to_open_clip

__all__ = ["tiny_clip"]  # fixtures of another file

GOLDEN = Path(__file__).parent / "golden" / "visualrwkv_v5.safetensors"


def test_timm_layers_against_the_blocks_by_hand() -> None:
    """DINOv2 with registers, second-to-last block, no final norm: what VisualRWKV-HD reads."""
    recipe = {"model": "vit_small_patch14_reg4_dinov2", "image_size": 42, "weights": "random"}
    last = build("timm", {**recipe, "class_token": True})
    before = build("timm", {**recipe, "layer": -2})
    normed = build("timm", {**recipe, "norm": True})
    x = torch.randn(2, 3, 42, 42)
    tower = last.tower
    with torch.no_grad():
        states = [tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(x))))]
        for block in tower.blocks:
            states.append(block(states[-1]))
        torch.testing.assert_close(last(x).patches, states[-1][:, 5:])  # class token, four registers
        torch.testing.assert_close(last(x).extra, states[-1][:, :1])
        torch.testing.assert_close(before(x).patches, states[-2][:, 5:])
        torch.testing.assert_close(normed(x).patches, normed.tower.norm(states[-1])[:, 5:])
    assert len(before.tower.blocks) == 11, "blocks behind the layer read are dropped"


def test_timm_without_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.VisionTransformer, "forward_intermediates")
    with pytest.raises(
        ValueError, match=r"encoder\.model: timm's 'vit_tiny_patch16_224' offers no feature grid"
    ):
        build("timm", TINY)


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_atto"])
def test_timm_weights_round_trip(model: str, place: str, tmp_path: Path) -> None:
    """A published file has a classifier (left out) and, for a ViT, another grid (resampled by timm)."""
    torch.manual_seed(3)
    published = timm.create_model(model, num_classes=10)
    save_file({k: v.contiguous() for k, v in published.state_dict().items()}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors" if place == "file" else tmp_path

    same = build("timm", {"model": model, "weights": str(path)})
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        (expected,) = published.eval().forward_intermediates(
            x, indices=[-1], norm=False, intermediates_only=True
        )
        torch.testing.assert_close(same(x).patches, expected.flatten(2).transpose(1, 2))
    resized = build("timm", {"model": model, "weights": str(path), "image_size": 64})
    assert resized.grid == ((4, 4) if model.startswith("vit") else (2, 2))
    if model.startswith("vit"):
        assert resized.tower.pos_embed.shape == (1, 17, 192)
        torch.testing.assert_close(resized.tower.pos_embed[:, 0], published.pos_embed[:, 0])


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    del state["blocks.0.attn.qkv.weight"]
    state["blocks.0.stranger"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(7)
    path = tmp_path / "wrong.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=r"encoder\.weights: .*does not fit") as error:
        build("timm", {"model": "vit_tiny_patch16_224", "weights": str(path)})
    said = str(error.value)
    assert "1 missing (blocks.0.attn.qkv.weight)" in said
    assert "1 unexpected (blocks.0.stranger)" in said
    assert "1 of another shape (norm.bias [7] for [192])" in said


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_weights(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b"not weights at all")
    said = {
        ".pth": rf"encoder\.weights: '{path}' is not converted.*`python -m toolkit\.convert {path} --to \S+`",
        ".safetensors": rf"encoder\.weights: {path}: not a whole safetensors file",
    }
    with pytest.raises(ValueError, match=said[suffix]):
        build("timm", {**TINY, "weights": str(path)})


@pytest.mark.parametrize(("name", "model", "said"), [
    ("open_clip", "ViT-L-14-336-quickgelu", "timm/vit_large_patch14_clip_336.openai, file open_clip_model"),
    ("timm", "vit_large_patch14_reg4_dinov2.lvd142m", "timm/vit_large_patch14_reg4_dinov2.lvd142m, file"),
])  # fmt: skip
def test_missing_weights_say_what_to_download(name: str, model: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"download .*python -m toolkit\.convert FILE --to FOLDER") as error:
        build(name, {"model": model, "weights": "/nowhere/tower.safetensors"})
    assert said in str(error.value)


@pytest.mark.parametrize("whole_clip", [False, True])
def test_open_clip_gives_the_features_of_the_original(whole_clip: bool, tmp_path: Path) -> None:
    golden = load_file(GOLDEN)
    state = to_open_clip(golden)
    if whole_clip:
        state = {f"visual.{k}": v for k, v in state.items()} | {"text_projection": torch.zeros(1)}
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    encoder = build("open_clip", {"model": TINY_CLIP, "weights": str(path)})
    with torch.no_grad():
        features = encoder(golden["in0/images"][:, 0])
    expected = golden["in0/vision_features"]  # class token first there
    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.extra, expected[:, :1], rtol=1e-4, atol=1e-5)


def test_open_clip_layers_against_the_blocks_by_hand() -> None:
    recipe = {"model": TINY_CLIP, "weights": "random"}
    last, before = build("open_clip", recipe), build("open_clip", {**recipe, "layer": -2})
    assert (last.d_out, last.grid, last.n_extra) == (48, (4, 4), 1)
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = [last.tower._embeds(x)]
        for block in last.tower.transformer.resblocks:
            states.append(block(states[-1]))
        for encoder, state in ((last, states[2]), (before, states[1])):
            torch.testing.assert_close(encoder(x).patches, state[:, 1:])
            torch.testing.assert_close(encoder(x).extra, state[:, :1])


def test_open_clip_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file({"visual.conv1.weight": torch.zeros(48, 3, 14, 14), "visual.stranger": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"\d+ missing \(class_embedding, .*1 unexpected \(stranger\)"):
        build("open_clip", {"model": TINY_CLIP, "weights": str(path)})


def test_open_clip_warns_of_the_wrong_activation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "empty.safetensors"
    save_file({}, path)
    for name, warns in (("RN50", True), ("RN50-quickgelu", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="missing"):
            build("open_clip", {"model": name, "class_token": False, "weights": str(path)})
        assert ("QuickGELU" in caplog.text) == warns


def test_paper_encoder() -> None:
    with torch.device("meta"):
        encoder = build("open_clip", {})
        features = encoder(torch.empty(1, 3, 336, 336))
    assert features.patches.shape == (1, 576, 1024) and features.extra.shape == (1, 1, 1024)
    # CLIP's vision model as the original loads it has 303,507,456; its final norm (2 x 1024) is not used.
    assert count(encoder) == 303_507_456 - 2_048
    assert encoder.transform().fit == "crop"


def test_hd_encoder() -> None:
    """DINOv2 + SigLIP at 448 px, SAM at 1024 px: 32 x 32 patches of 3200 channels."""
    members = [
        {"name": "timm", "model": "vit_large_patch14_reg4_dinov2.lvd142m", "image_size": 448, "layer": -2},
        {"name": "timm", "model": "vit_so400m_patch14_siglip_384", "image_size": 448, "layer": -2},
        {"name": "timm", "model": "samvit_base_patch16.sa1b", "norm": True},
    ]
    with torch.device("meta"):
        encoder = build("fused", {"members": members})
        pixels = tuple(torch.empty(1, 3, size, size) for size in (448, 448, 1024))
        assert encoder(pixels).patches.shape == (1, 1024, 3200)
    assert [m.d_out for m in encoder.members] == [1024, 1152, 256]
    assert [round(count(m) / 1e6) for m in encoder.members] == [291, 398, 90]
    imagenet = (0.485, 0.456, 0.406)
    assert [t.mean for t in encoder.transform().parts] == [imagenet, (0.5, 0.5, 0.5), imagenet]
