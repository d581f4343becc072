"""Vision towers of timm, open_clip and the hub to safetensors and back, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.converting import GOLDEN, golden_file, here, read_back, same, vit
from tests.encoding import TINY_CLIP, build, tiny_clip, to_open_clip
from toolkit.convert.convert import convert, to_pth

__all__ = ["here", "tiny_clip"]  # fixtures of another file


def hub_dinov2(timm_state: dict[str, Tensor], registers: int) -> dict[str, Tensor]:
    """A timm DINOv2's tensors as the HF library names them, by hand."""
    width = timm_state["cls_token"].shape[-1]
    table, cls = timm_state["pos_embed"], timm_state["cls_token"]
    if registers:  # timm adds the class token's position to the token itself
        first = torch.randn(1, 1, width)
        table, cls = torch.cat((first, table), dim=1), cls - first
    out = {"embeddings.cls_token": cls, "embeddings.position_embeddings": table}
    if registers:
        out["embeddings.register_tokens"] = timm_state["reg_token"]
    out["embeddings.mask_token"] = torch.zeros(1, width)
    for kind in ("weight", "bias"):
        out[f"embeddings.patch_embeddings.projection.{kind}"] = timm_state[f"patch_embed.proj.{kind}"]
        out[f"layernorm.{kind}"] = timm_state[f"norm.{kind}"]
        for i in range(2):
            old, new = f"blocks.{i}.", f"encoder.layer.{i}."
            for word, piece in zip(
                ("query", "key", "value"), timm_state[f"{old}attn.qkv.{kind}"].chunk(3), strict=True
            ):
                out[f"{new}attention.attention.{word}.{kind}"] = piece.clone()
            out[f"{new}attention.output.dense.{kind}"] = timm_state[f"{old}attn.proj.{kind}"]
            for module in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                out[f"{new}{module}.{kind}"] = timm_state[f"{old}{module}.{kind}"]
            for n in "12":
                out[f"{new}layer_scale{n}.lambda1"] = timm_state[f"{old}ls{n}.gamma"]
    return out


def hub_siglip(timm_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm SigLIP's tensors as the HF library names them, by hand."""
    out = {
        "embeddings.position_embedding.weight": timm_state["pos_embed"][0],
        "head.probe": timm_state["attn_pool.latent"],
    }
    for kind in ("weight", "bias"):
        pool = [timm_state[f"attn_pool.{part}.{kind}"] for part in ("q", "kv")]
        out[f"head.attention.in_proj_{kind}"] = torch.cat(pool)
        out[f"head.attention.out_proj.{kind}"] = timm_state[f"attn_pool.proj.{kind}"]
        out[f"head.layernorm.{kind}"] = timm_state[f"attn_pool.norm.{kind}"]
        out[f"embeddings.patch_embedding.{kind}"] = timm_state[f"patch_embed.proj.{kind}"]
        out[f"post_layernorm.{kind}"] = timm_state[f"norm.{kind}"]
        for n in "12":
            out[f"head.mlp.fc{n}.{kind}"] = timm_state[f"attn_pool.mlp.fc{n}.{kind}"]
        for i in range(2):
            old, new = f"blocks.{i}.", f"encoder.layers.{i}."
            for letter, piece in zip("qkv", timm_state[f"{old}attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"{new}self_attn.{letter}_proj.{kind}"] = piece.clone()
            out[f"{new}self_attn.out_proj.{kind}"] = timm_state[f"{old}attn.proj.{kind}"]
            for n in "12":
                out[f"{new}layer_norm{n}.{kind}"] = timm_state[f"{old}norm{n}.{kind}"]
                out[f"{new}mlp.fc{n}.{kind}"] = timm_state[f"{old}mlp.fc{n}.{kind}"]
    return {f"vision_model.{n}": t for n, t in out.items()}


@pytest.mark.parametrize("family", ["siglip", "dinov2", "dinov2 with registers"])
def test_towers_of_the_hub_in_timms_names(family: str, tmp_path: Path, here: None) -> None:
    """Through convert, the names of the encoder's library and timm's own filter: the tower's very tensors."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    from components.encoders.weights import read_state

    registers = 4 if "registers" in family else 0
    if family == "siglip":
        model = vit(class_token=False, global_pool="map")
        state = {**hub_siglip(model.state_dict()), "text_model.head.weight": torch.zeros(2, 2)}
    else:
        model = vit(init_values=1e-5, reg_tokens=registers, no_embed_class=bool(registers))
        state = hub_dinov2(model.state_dict(), registers)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = convert(tmp_path / "pytorch_model.bin", tmp_path / "out")
    assert config["parts"]["vit"]["family"] == family.split()[0]
    assert config["source"]["left_out"]["count"] == (family == "siglip")
    found = checkpoint_filter_fn(read_state(str(tmp_path / "out"), library="timm"), model)
    own = model.state_dict()
    assert set(found) == set(own)
    for name in own:
        torch.testing.assert_close(found[name], own[name], rtol=0, atol=1e-6)
    to_pth(tmp_path / "out", tmp_path / "back.bin")
    assert same(read_back(tmp_path / "back.bin"), {n: t for n, t in state.items() if "text_" not in n})


def test_a_clip_of_the_hub_in_timm(tmp_path: Path, here: None) -> None:
    """The golden tower in timm's architecture: features of the original."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    from components.encoders.weights import read_state

    golden = load_file(GOLDEN / "visualrwkv_v5.safetensors")
    torch.save({n: t for n, t in golden_file(5).items() if n != "proj.weight"}, tmp_path / "visual.pth")
    convert(tmp_path / "visual.pth", tmp_path / "out")
    clip = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 2.0}
    model = vit(
        **clip, pre_norm=True, act_layer="quick_gelu", norm_layer=partial(torch.nn.LayerNorm, eps=1e-5)
    )
    model.load_state_dict(checkpoint_filter_fn(read_state(str(tmp_path / "out"), library="timm"), model))
    pixels, expected = golden["in0/images"][:, 0], golden["in0/vision_features"]
    with torch.no_grad():
        (found,) = model.eval().forward_intermediates(
            pixels, indices=[-1], norm=False, intermediates_only=True, output_fmt="NLC"
        )
    torch.testing.assert_close(found, expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_open_clip_and_timm_towers_as_they_are(tmp_path: Path, here: None) -> None:
    whole = {
        f"visual.{k}": v for k, v in to_open_clip(load_file(GOLDEN / "visualrwkv_v5.safetensors")).items()
    }
    whole |= {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "logit_scale": torch.ones(())}
    torch.save(whole, tmp_path / "open_clip_pytorch_model.bin")
    config = convert(tmp_path / "open_clip_pytorch_model.bin", tmp_path / "clip")
    assert config["parts"]["vit"]["layout"] == "open_clip" and config["source"]["left_out"]["count"] == 2
    assert config["parts"]["vit"]["image_size"] == 56
    encoder = build("open_clip", {"model": TINY_CLIP, "weights": str(tmp_path / "clip")})
    assert torch.equal(encoder.tower.conv1.weight, whole["visual.conv1.weight"])

    save_file(vit().state_dict(), tmp_path / "timm.safetensors")
    config = convert(tmp_path / "timm.safetensors", tmp_path / "timm")
    assert {"layout": "timm", "n_layer": 2, "width": 24, "image_size": 32}.items() <= config["parts"][
        "vit"
    ].items()
