"""Language models and VisualRWKV checkpoints to safetensors and back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.converting import VERSIONS, ghost_state, golden_file, here, read_back, same
from tests.test_recurrences import language_model
from tests.test_rwkv_package import package
from toolkit.convert.convert import convert, to_pth
from toolkit.pretrained import load_language_model

__all__ = ["here", "package"]  # fixtures of another file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_language_models_round_trip(name: str, dtype: torch.dtype, tmp_path: Path, here: None) -> None:
    model = language_model(name, d_model=64, n_layer=2, vocab=50277 if name == "rwkv4" else 96)
    state = {n: t.to(dtype) for n, t in model.state_dict().items()}
    torch.save(state, tmp_path / "original.pth")
    config = convert(tmp_path / "original.pth", tmp_path / "out")
    sizes = config["parts"]["rwkv"]
    assert (sizes["version"], sizes["n_layer"], sizes["d_model"]) == (VERSIONS[name], 2, 64)
    assert sizes["vocabulary"] == ("pile" if name == "rwkv4" else "unknown")
    assert to_pth(tmp_path / "out", tmp_path / "back.pth") == len(state)
    assert same(read_back(tmp_path / "back.pth"), state)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:  # the library reads what is written
        assert sorted(file.keys()) == sorted(f"rwkv.{n}" for n in state)
        assert torch.equal(file.get_tensor("rwkv.head.weight"), state["head.weight"])
    assert config["source"]["sha256"] and config["files"]["model.safetensors"]["sha256"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_sizes_come_from_the_file(tmp_path: Path, here: None) -> None:
    """Head size, ranks and channel width that no default would give."""
    options = {"head_size": 16, "shift_rank": 5, "decay_rank": 7, "d_ffn": 40}
    sizes = {
        "recurrence": {"name": "rwkv6", **options},
        "d_model": 48,
        "n_layer": 3,
        "vocab_size": 11,
    }
    state = {n: torch.randn(t.shape) for n, t in ghost_state(sizes).items()}
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, tmp_path / "7B.pth")
    config = convert(tmp_path / "7B.pth", tmp_path / "out")
    found = config["parts"]["rwkv"]
    assert {k: found[k] for k in sizes} == sizes
    assert (config["source"]["wrapper"], config["source"]["prefix"]) == ("state_dict", "module.")
    model, _ = load_language_model(str(tmp_path / "out"))
    assert same(dict(model.state_dict()), state)


@pytest.mark.parametrize("version", [5, 6])
def test_visualrwkv_round_trips(version: int, tmp_path: Path, here: None) -> None:
    state = golden_file(version)
    state["spiral_order"] = torch.arange(16)  # v5.1 stores its scan orders
    torch.save(state, tmp_path / "rwkv-0.pth")
    config = convert(tmp_path / "rwkv-0.pth", tmp_path / "out")
    assert config["parts"]["rwkv"]["version"] == {5: "5.2", 6: "6"}[version]
    assert config["parts"]["proj"] == {"name": "linear", "d_in": 48, "d_out": 64}
    facts = {"layout": "HF CLIP", "family": "clip", "width": 48, "n_layer": 2, "patch": 14, "image_size": 56}
    assert facts.items() <= config["parts"]["vit"].items()
    to_pth(tmp_path / "out", tmp_path / "back.pth")
    assert same(read_back(tmp_path / "back.pth"), state)
    to_pth(tmp_path / "out", tmp_path / "lm.pth", lm_only=True)
    lm = {n.removeprefix("rwkv."): t for n, t in state.items() if n.startswith("rwkv.")}
    assert same(read_back(tmp_path / "lm.pth"), lm)


def test_folders_are_the_same_bytes_again(tmp_path: Path, here: None) -> None:
    torch.save(golden_file(6), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a")
    to_pth(tmp_path / "a", tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "b")
    convert(tmp_path / "a" / "model.safetensors", tmp_path / "c")
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in "abc"]
    assert files[0] == files[1] == files[2]


def test_the_visual_half_of_an_exported_checkpoint(tmp_path: Path, here: None) -> None:
    state = {n: t for n, t in golden_file(5).items() if not n.startswith("rwkv.")}
    torch.save(state, tmp_path / "visual.pth")
    assert set(convert(tmp_path / "visual.pth", tmp_path / "out")["parts"]) == {"proj", "vit"}
    to_pth(tmp_path / "out", tmp_path / "back.pth")
    assert same(read_back(tmp_path / "back.pth"), state)


def test_files_of_torch_before_1_6(tmp_path: Path, here: None) -> None:
    state = dict(language_model("rwkv5").state_dict())
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "old.pth", tmp_path / "out")["source"]["kind"] == "torch before 1.6"
    model, _ = load_language_model(str(tmp_path / "out"))
    assert same(dict(model.state_dict()), state)


@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_the_rwkv_package_reads_the_way_back(name: str, tmp_path: Path, package: Any, here: None) -> None:
    state = language_model(name, d_model=128, n_layer=2, vocab=97).state_dict()
    torch.save(state, tmp_path / "original.pth")
    convert(tmp_path / "original.pth", tmp_path / "out")
    to_pth(tmp_path / "out", tmp_path / "back.pth")
    ids = torch.randint(0, 97, (12,), generator=torch.Generator().manual_seed(5)).tolist()
    logits = [
        package.RWKV(model=str(tmp_path / file), strategy="cpu fp32", verbose=False).forward(list(ids), None)[
            0
        ]
        for file in ("original", "back")
    ]
    assert torch.equal(*logits)
    model, _ = load_language_model(str(tmp_path / "out"))
    with torch.no_grad():
        hidden, _ = model(model.emb(torch.tensor([ids])))
        ours = model.head(hidden)[0, -1]
    assert float((ours - logits[0]).norm() / logits[0].norm()) < 1e-3
