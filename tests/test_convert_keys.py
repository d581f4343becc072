"""Weights that fit no model are told by their names and shapes; what the command says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.converting import golden_file, here, read_back, same, vit, without
from tests.test_recurrences import language_model
from toolkit.convert.__main__ import main
from toolkit.convert.convert import convert
from toolkit.weights import Weights

__all__ = ["here"]  # fixtures of another file

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
    assert (
        f"proj.weights={out} projector=linear" in said and f"encoder=open_clip encoder.weights={out}" in said
    )
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
