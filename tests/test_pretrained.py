"""Recipes that name weights: what is checked before torch, what is told, and that nothing is copied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.compositions import composed, one
from toolkit.build import build_model, from_dict, on_meta
from toolkit.convert.convert import convert
from toolkit.explain import BadRecipe
from toolkit.pretrained import fill, ghost, load_language_model
from toolkit.rundir import run_id
from toolkit.weights import Weights, part

SIZES: dict[str, Any] = {
    "recurrence": {"name": "rwkv6", "head_size": 16, "shift_rank": 4, "decay_rank": 8, "d_ffn": 64},
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 65536,
}
WORDS = ["recurrence=rwkv6", "model.d_model=32", "model.n_layer=2", "model.vocab=world"]
WORDS += [f"recurrence.{k}={v}" for k, v in SIZES["recurrence"].items() if k != "name"]
BLANK = ["encoder=blank", "encoder.width=24", "encoder.grid=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted VisualRWKV file of bfloat16 weights: language model and projector."""
    place = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = {f"rwkv.{n}": torch.randn(t.shape).bfloat16() for n, t in ghost(SIZES).state_dict().items()}
    save_file({**state, "proj.weight": torch.randn(32, 24).bfloat16()}, place / "visual.safetensors")
    convert(place / "visual.safetensors", place / "out")
    return place / "out"


def problems(*words: str, complete: bool = False) -> str:
    with pytest.raises(BadRecipe) as error:
        composed(*words, complete=complete)
    return str(error.value)


def test_a_recipe_starts_from_converted_weights(folder: Path) -> None:
    weights = Weights(folder / "model.safetensors")
    conf = from_dict(one(f"lm.weights={folder}", f"proj.weights={folder}", *WORDS, *BLANK))
    model = build_model(conf, vocab_size=65536)
    for name, parameter in {
        **model.rwkv.state_dict(prefix="rwkv."),
        "proj.weight": model.proj.weight,
    }.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, weights[name].float()), name
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    with on_meta():  # counting parameters reads no weights
        assert build_model(conf, vocab_size=65536).rwkv.head.weight.is_meta


def test_tensors_of_the_same_type_stay_mapped(folder: Path) -> None:
    weights = Weights(folder / "model.safetensors")
    names = part(weights, "rwkv.")
    model = ghost(SIZES)
    fill(model, weights, names, key="weights")
    assert model.head.weight.data_ptr() == weights["rwkv.head.weight"].data_ptr()
    loaded, sizes = load_language_model(str(folder), dtype=torch.float64)
    assert loaded.head.weight.dtype == torch.float64 and sizes["vocabulary"] == "world"
    assert torch.equal(loaded.head.weight.bfloat16(), model.head.weight)
    assert not loaded.training


def test_a_language_model_file_without_prefix(folder: Path, tmp_path: Path) -> None:
    """What other tools write as safetensors can be given as it is."""
    weights = Weights(folder / "model.safetensors")
    plain = {n.removeprefix("rwkv."): t for n, t in weights.items() if n.startswith("rwkv.")}
    save_file(plain, tmp_path / "plain.safetensors")
    conf = from_dict(one(f"lm.weights={tmp_path / 'plain.safetensors'}", *WORDS, *BLANK))
    model = build_model(conf, vocab_size=65536)
    assert torch.equal(model.rwkv.ln_out.weight, weights["rwkv.ln_out.weight"].float())


@pytest.mark.parametrize(("word", "key", "fix"), [
    ("model.d_model=64", "model.d_model", "model.d_model=32"),
    ("model.n_layer=3", "model.n_layer", "model.n_layer=2"),
    ("recurrence.shift_rank=8", "recurrence.shift_rank", "recurrence.shift_rank=4"),
    ("model.vocab=dataset", "model.vocab", "model.vocab=world"),
])  # fmt: skip
def test_other_sizes_are_told_before_torch(word: str, key: str, fix: str, folder: Path) -> None:
    words = [w for w in WORDS if not w.startswith(f"{key}=")]
    said = problems(f"lm.weights={folder}", *words, word)
    assert f"command line: {key}: {word.split('=')[1]}" in said and f"fix: {fix}" in said


def test_another_recurrence_and_projector_are_told(folder: Path) -> None:
    said = problems(f"lm.weights={folder}", "recurrence=rwkv5", *WORDS[1:4])
    assert "made for rwkv6" in said and "fix: recurrence=rwkv6" in said
    said = problems(f"proj.weights={folder}", "projector=mlp")
    assert "mlp does not fit proj.weights" in said and "fix: projector=linear" in said


def test_defaults_that_do_not_fit_are_told_with_what_does(folder: Path) -> None:
    words = [w for w in WORDS if "shift_rank" not in w]
    conf = from_dict(one(f"lm.weights={folder}", *words, *BLANK))
    with pytest.raises(ValueError, match=r"lm\.weights: .*time_maa_w2 .*these weights want .*shift_rank=4"):
        build_model(conf, vocab_size=65536)


@pytest.mark.parametrize(("words", "message"), [
    (["lm.weights=HALF", *WORDS], r"lm\.weights: .* holds no rwkv\.\* tensors, only proj"),
    (["proj.weights=FOLDER", "model.d_model=32", "encoder.width=23"], r"proj\.weights: .*\[32, 24\] for "),
    (["lm.weights=FOLDER", *(w for w in WORDS if "d_ffn" not in w)], r"lm\.weights: .* another shape"),
])  # fmt: skip
def test_check_compares_sizes_with_the_header(
    words: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    """`--check` builds without memory and reads no weights: what does not fit must be told all the same."""
    save_file({"proj.weight": torch.zeros(32, 24)}, tmp_path / "half.safetensors")
    given = [
        w.replace("HALF", str(tmp_path / "half.safetensors")).replace("FOLDER", str(folder)) for w in words
    ]
    with on_meta(), pytest.raises(ValueError, match=message):
        build_model(from_dict(one(*BLANK, *given)), vocab_size=65536)


def test_no_image_tokens_at_all_are_refused_when_built() -> None:
    conf = from_dict(one("encoder=colors", "projector.tokens=0", "scan=bi"))
    with on_meta(), pytest.raises(ValueError, match=r"projector\.tokens=0 .* encoder=colors gives none"):
        build_model(conf, vocab_size=9)


def test_a_projector_of_another_width_is_told_before_torch(folder: Path) -> None:
    said = problems(f"proj.weights={folder}", "projector=linear", "model.d_model=64")
    assert "model.d_model: 64 does not fit proj.weights" in said and "fix: model.d_model=32" in said


def test_weights_of_an_encoder_that_has_none_name_the_encoders_that_do() -> None:
    said = problems("encoder=lite0", "encoder.weights=somewhere")
    assert "encoder=timm (which has it)" in said and "fix: choose encoder=" in said and "fix: lm." not in said


def test_missing_weights_say_what_to_download(tmp_path: Path) -> None:
    said = problems("lm.weights=nowhere", complete=True)
    assert "lm.weights: no file 'nowhere'" in said
    assert "RWKV-x060-World-1B6-v2.1" in said and "BlinkDL/rwkv-6-world" in said
    assert "python -m toolkit.convert FILE --to FOLDER" in said
    assert "howard-hou/visualrwkv-6" in problems("proj.weights=nowhere", complete=True)
    raw = tmp_path / "RWKV-x060.pth"
    torch.save({}, raw)
    for given in (raw, tmp_path):
        said = problems(f"lm.weights={given}", complete=True)
        assert f"`python -m toolkit.convert {raw} --to {raw.with_suffix('')}`" in said, said
    assert composed("lm.weights=nowhere", "model.vocab=world")  # counting parameters needs no weights


def test_weights_without_that_part(folder: Path, tmp_path: Path) -> None:
    save_file({"proj.weight": torch.zeros(32, 24)}, tmp_path / "half.safetensors")
    conf = from_dict(one(f"lm.weights={tmp_path / 'half.safetensors'}", *WORDS, *BLANK))
    with pytest.raises(ValueError, match=r"holds no rwkv\.\* tensors, only proj"):
        build_model(conf, vocab_size=65536)
    with pytest.raises(ValueError, match=r"no config\.json with the sizes"):
        load_language_model(str(tmp_path / "half.safetensors"))


def test_a_run_from_scratch_keeps_its_name(folder: Path) -> None:
    plain, pretrained = one(*WORDS), one(*WORDS, f"lm.weights={folder}")
    older = {k: v for k, v in plain.items() if k not in ("lm", "proj")}
    assert run_id(plain) == run_id(older) != run_id(pretrained)


def test_missing_towers_are_told_before_torch(tmp_path: Path) -> None:
    said = problems("encoder=open_clip", "encoder.weights=nowhere", complete=True)
    assert "command line: encoder.weights: no file 'nowhere'" in said
    assert "ViT-L-14-336-quickgelu" in said and "openai/clip-vit-large-patch14-336" in said
    assert "python -m toolkit.convert FILE --to FOLDER" in said
    said = problems("encoder=timm", "encoder.model=vit_tiny_patch16_224", complete=True)
    assert "encoder.weights: is empty" in said and "timm's 'vit_tiny_patch16_224'" in said
    torch.save({}, tmp_path / "clip.bin")
    said = problems("encoder=open_clip", f"encoder.weights={tmp_path}", complete=True)
    assert f"`python -m toolkit.convert {tmp_path / 'clip.bin'} --to {tmp_path / 'clip'}`" in said
    members = "[{name:conv},{name:timm,model:vit_tiny_patch16_224,weights:gone}]"
    said = problems("encoder=fused", f"encoder.members={members}", complete=True)
    assert "encoder.members[1].weights: no file 'gone'" in said
    composed("encoder=open_clip", "encoder.weights=random", complete=True)


def test_check_finds_missing_weights_without_torch() -> None:
    """`--check` needs no weights, but those that are named must be there."""
    words = ["encoder=open_clip", "encoder.weights=gone", "lm.weights=away", "proj.weights=lost"]
    code = (
        "import sys\nfrom toolkit.run import main\n"
        f"code = main(['recipe=quickstart', '--check', 'model.vocab=world', *{words}])\n"
        "assert code == 2 and 'torch' not in sys.modules, code"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in (
        "lm.weights: no file 'away'",
        "proj.weights: no file 'lost'",
        "encoder.weights: no file 'gone'",
    ):
        assert f"command line: {line}" in done.stderr
    assert composed("encoder=open_clip", complete=False)
