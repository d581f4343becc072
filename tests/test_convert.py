"""Foreign weights to safetensors and back: every layout, bit for bit; what is refused, and how it is told."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import toolkit.convert.convert as converter
from tests.test_encoders import TINY_CLIP, build, tiny_clip, to_open_clip
from tests.test_recurrences import language_model
from tests.test_rwkv_package import package
from toolkit.convert.__main__ import main
from toolkit.convert.convert import convert, to_pth
from toolkit.pretrained import load_language_model
from toolkit.weights import Weights

__all__ = ["package", "tiny_clip"]  # fixtures of other files

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = {"rwkv4": "4", "rwkv5": "5.2", "rwkv6": "6"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickles in this process: starting one for each of many harmless files takes seconds."""

    def without_a_child(path: Path, folder: Path, seconds: int, *, as_is: bool) -> dict[str, Any]:
        return converter.write_folder(path, folder, as_is=as_is)

    monkeypatch.setattr(converter, "_in_a_child", without_a_child)


def golden_file(version: int) -> dict[str, Tensor]:
    """A VisualRWKV checkpoint as its code saves it: rwkv.*, proj.*, vit.*."""
    stored = load_file(GOLDEN / f"visualrwkv_v{version}.safetensors")
    return {k.removeprefix("param/"): v for k, v in stored.items() if k.startswith("param/")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, names in the same order, types too."""
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def read_back(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


# --- there and back -----------------------------------------------------------------------------


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


def ghost_state(sizes: dict[str, Any]) -> dict[str, Tensor]:
    from toolkit.pretrained import ghost

    return dict(ghost(sizes).state_dict())


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


# --- towers -------------------------------------------------------------------------------------


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


def vit(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**{**small, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


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


# --- hostile files ------------------------------------------------------------------------------


class Marker:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def hostile(kind: str, path: Path, marker: Path) -> None:
    import pickle

    import numpy as np

    code = Marker(marker)
    if kind == "zip":
        torch.save({"emb.weight": torch.zeros(2), "x": code}, path)
    elif kind == "legacy":
        torch.save({"x": code}, path, _use_new_zipfile_serialization=False)
    elif kind == "trainer":
        torch.save({"state_dict": {"emb.weight": torch.zeros(2)}, "hyper_parameters": code}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(code))
    elif kind == "numpy":
        with path.open("wb") as file:
            np.save(file, np.array([code], dtype=object), allow_pickle=True)


HOSTILE = [("zip", ".pth"), ("legacy", ".pt"), ("trainer", ".ckpt"), ("pickle", ".bin"), ("numpy", ".npy")]


@pytest.mark.parametrize(("kind", "suffix"), HOSTILE)
def test_code_in_a_file_never_runs(
    kind: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, with its child process."""
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "marker"
    hostile(kind, path, marker)
    assert main([str(path), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and "Traceback" not in said, said
    assert "refused" in said or "NumPy" in said or "not a whole" in said, said
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    if kind in ("zip", "trainer"):  # the test itself can fail: the code would have run
        torch.load(path, weights_only=False)
        assert marker.exists()


def forge(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FORGED: dict[str, tuple[Any, int, int | None, str]] = {
    "past the end": ({"a": tensor([4], 0, 16)}, 8, None, "take 16 bytes, the file holds 8"),
    "overlap": ({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}, 24, None, "'b' begins at byte 8"),
    "hole": ({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, 12, None, "'b' begins at byte 8"),
    "surplus data": ({"a": tensor([1], 0, 4)}, 8, None, "take 4 bytes, the file holds 8"),
    "huge header": (b"{}", 0, 8 << 30, "its header claims"),
    "header over the limit": (b"{" + b" " * (33 << 20), 0, None, "its header claims"),
    "shape overflow": ({"a": tensor([1 << 40, 1 << 40], 0, 4)}, 4, None, "does not take 4 bytes"),
    "negative": ({"a": tensor([-1, -1], 0, 4)}, 4, None, "no count"),
    "negative offset": ({"a": tensor([1], -4, 0)}, 0, None, "no count"),
    "no number": ({"a": tensor([True], 0, 4)}, 4, None, "no count"),
    "type": ({"a": tensor([1], 0, 4, "OBJ")}, 4, None, "type 'OBJ'"),
    "type no text": ({"a": tensor([1], 0, 4, ["F32"])}, 4, None, "not a whole safetensors file"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}',
        0,
        None,
        "names a tensor twice",
    ),
    "deep": (b'{"a":' + b"[" * 100_000, 0, None, "not a whole safetensors file"),
    "no list": (b'{"a":{}}', 0, None, "not a whole safetensors file"),
    "text cut": (b'{"a":{"dtype"', 0, None, "not a whole safetensors file"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_safetensors(kind: str, tmp_path: Path) -> None:
    header, data, length, said = FORGED[kind]
    path = forge(tmp_path / "forged.safetensors", header, b"\0" * data, length=length)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        convert(path, tmp_path / "out")
    assert str(error.value).startswith(f"{path}: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_cut_files(suffix: str, keep: float, tmp_path: Path, here: None) -> None:
    path = tmp_path / f"cut{suffix}"
    state = language_model("rwkv6").state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"^{path}: not a whole"):
        convert(path, tmp_path / "out")


def test_archives_that_torch_never_writes(tmp_path: Path, here: None) -> None:
    import zipfile

    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
        with zipfile.ZipFile(tmp_path / "program.pt", "w") as program:
            program.writestr("archive/code/__torch__.py", "")
    torch.save({"a": torch.zeros(1).expand(1 << 30)}, tmp_path / "swollen.pth")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"_strategy": "cpu fp32", "emb.weight": torch.zeros(2)}, tmp_path / "strategy.pth")
    said = {
        "packed.pth": "never does",
        "program.pt": "TorchScript",
        "swollen.pth": "claim 4,294,967,296 bytes",
        "sparse.pth": "only plain ones",
        "list.pth": "holds a list",
        "strategy.pth": "give the original",
    }
    for name, words in said.items():
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: .*{words}"):
            convert(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"GGUF\x03\0\0\0", "GGUF"),
    (b"", "holds no weights"),
    (b"hello", "holds no weights"),
])  # fmt: skip
def test_files_that_are_no_weights(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: .*{said}"):
        convert(path, tmp_path / "out")


def test_the_child_is_stopped_after_its_time(tmp_path: Path) -> None:
    torch.save(language_model("rwkv4").state_dict(), tmp_path / "slow.pth")
    with pytest.raises(ValueError, match=r"slow\.pth: not converted within 1 s; --time-limit"):
        convert(tmp_path / "slow.pth", tmp_path / "out", seconds=1)
    assert [p.name for p in tmp_path.iterdir()] == ["slow.pth"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_file_that_asks_for_memory_it_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "swollen.pth"
    torch.save({"a": torch.zeros(1_000_003)}, path, _use_new_zipfile_serialization=False)
    sizes = [b"J" + n.to_bytes(4, "little") for n in (1_000_003, (1 << 31) - 1)]  # 4 MB say they are 8 GiB
    path.write_bytes(path.read_bytes().replace(*sizes))
    with pytest.raises(ValueError, match=f"^{path}: needs more memory than a file of its size"):
        convert(path, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_the_childs_limits(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "small").write_bytes(b"0" * 1000)
    script = (
        "import sys, resource; from pathlib import Path; from toolkit.convert import child\n"
        "child.limit(Path(sys.argv[1]), 7)\n"
        "print(resource.getrlimit(resource.RLIMIT_CPU)[0], resource.getrlimit(resource.RLIMIT_CORE)[0])\n"
        "for act in (lambda: bytearray(5 << 30), lambda: open(sys.argv[2], 'wb').write(bytes(80 << 20))):\n"
        "    try: act(); print('went through')\n"
        "    except (MemoryError, OSError) as error: print(type(error).__name__)\n"
    )
    script = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + script
    command = [sys.executable, "-c", script, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=GOLDEN.parent.parent)
    assert done.stdout.split() == ["7", "0", "MemoryError", "OSError"]


# --- keys that do not fit -----------------------------------------------------------------------


def without(state: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if not re.search(pattern, n)}


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Z = torch.zeros(1)

WRONG: dict[str, tuple[Change, tuple[str, ...]]] = {
    "cut": (lambda s: without(s, r"blocks\.1\."), ("missing (28): blocks.1.", "nothing of layer 1 is in it")),
    "no head": (
        lambda s: without(s, "head|ln_out"),
        ("missing (3): ln_out.weight", "one part of a checkpoint"),
    ),
    "one name gone": (
        lambda s: without(s, "time_maa_g"),
        ("missing (3): blocks.0-2.att.time_maa_g", "another version"),
    ),
    "other width": (
        lambda s: s | {"blocks.1.ffn.key.weight": torch.zeros(8, 32)},
        ("of another shape (1): blocks.1.ffn.key.weight [8, 32] for [96, 32]", "another size"),
    ),
    "state-tuned": (
        lambda s: s | {f"blocks.{i}.att.time_state": Z for i in range(3)},
        ("not known (3): blocks.0-2.att.time_state", "state-tuned"),
    ),
    "adapter": (lambda s: s | {"blocks.0.att.key.lora_A": Z}, ("not known (1)", "low-rank adapter")),
    "RWKV-7": (lambda s: {"emb.weight": torch.zeros(5, 4), "blocks.0.att.x_r": Z}, ("RWKV-7",)),
    "RWKV-5.0": (
        lambda s: {"blocks.0.att.ln_x.weight": Z, "blocks.0.att.time_decay": Z},
        ("RWKV-5.0 or 5.1",),
    ),
    "far layer": (lambda s: s | {"blocks.99999.att.time_decay": Z}, ("100000 layers",)),
    "none of ours": (lambda s: {"model.layers.0.mlp.weight": Z}, ("names no model that is known here",)),
    "control characters": (lambda s: {"\x1b[2J": Z, "a" * 5000: Z}, ("first tensors: ?[2J, aaa",)),
    "empty": (lambda s: {}, ("holds no tensors",)),
    "v5.2": (
        lambda s: {f"rwkv.{n}": t for n, t in s.items()} | {"rwkv.blocks.2.tiny_att.tiny_q.weight": Z},
        ("VisualRWKV v5.2 to v5.4",),
    ),
    "v6.21": (
        lambda s: {f"rwkv.{n}": t for n, t in s.items()} | {"state_encoder.ln0.weight": Z},
        ("not known (1): state_encoder.ln0.weight", "VisualRWKV v6.21"),
    ),
    "HD": (
        lambda s: {f"rwkv.{n}": t for n, t in s.items()} | {"vit.dino_featurizer.cls_token": Z},
        ("VisualRWKV-HD",),
    ),
    "wrong projector": (
        lambda s: {f"rwkv.{n}": t for n, t in s.items()} | {"proj.weight": torch.zeros(31, 48)},
        ("ends in 31 channels", "width 32"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_keys_are_told_by_group_with_the_cause(kind: str, tmp_path: Path, here: None) -> None:
    change, said = WRONG[kind]
    torch.save(change(dict(language_model("rwkv6").state_dict())), tmp_path / "model.pth")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "model.pth", tmp_path / "out")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'model.pth'}: ") and len(message.splitlines()) <= 6
    assert len(message) < 1000
    assert all(words in message for words in said), message


def test_a_tower_with_a_hole(tmp_path: Path) -> None:
    state = without(vit().state_dict(), r"blocks\.1\.mlp\.fc1\.weight")
    save_file(state, tmp_path / "tower.safetensors")
    with pytest.raises(
        ValueError, match=r"a timm tower of 2 layers\n  missing \(1\): blocks.1.mlp.fc1.weight"
    ):
        convert(tmp_path / "tower.safetensors", tmp_path / "out")


# --- the command --------------------------------------------------------------------------------


def test_the_command_says_how_to_use_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way with the child process, once."""
    state = golden_file(6)
    for end in ("emb", "head"):  # the golden files have 320 of them
        state[f"rwkv.{end}.weight"] = torch.zeros(65536, 64)
    torch.save(state, tmp_path / "visual.pth")
    out = tmp_path / "made" / "out"
    assert main([str(tmp_path / "visual.pth"), "--to", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"lm.weights={out} model.d_model=64 model.n_layer=6" in said
    assert "recurrence=rwkv6" in said and "recurrence.head_size=16" in said
    assert f"proj.weights={out} projector=linear" in said and f"encoder.weights={out}" in said
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert main([str(tmp_path / "visual.pth"), "--to", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([str(out), "--to-pth", str(tmp_path / "back.pth"), "--lm-only"]) == 0
    assert "emb.weight" in read_back(tmp_path / "back.pth")
    assert main([str(tmp_path / "nowhere"), "--to", str(tmp_path / "x")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_pile_model_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None) -> None:
    torch.save(language_model("rwkv4", vocab=50304).state_dict(), tmp_path / "pile.pth")
    assert main([str(tmp_path / "pile.pth"), "--to", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "this model has another (pile, 50,304 tokens)" in said and "lm.weights" not in said


def test_as_is_keeps_what_is_not_known(tmp_path: Path, here: None) -> None:
    state = {"stages.0.conv.weight": torch.randn(3, 3), "n": torch.tensor(3)}
    torch.save(state, tmp_path / "net.pth")
    convert(tmp_path / "net.pth", tmp_path / "out", as_is=True)
    assert same(dict(Weights(tmp_path / "out" / "model.safetensors")), state)


def test_mapped_tensors_never_change_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1 << 14), "b": torch.ones(3)}, tmp_path / "w.safetensors")
    weights = Weights(tmp_path / "w.safetensors")
    weights["a"].fill_(7)
    assert float(weights["a"][5]) == 7
    assert float(load_file(tmp_path / "w.safetensors")["a"].sum()) == 0
