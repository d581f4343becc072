"""Golden parity: logits, loss and gradients of the original code, strictly loaded weights, both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import toolkit.convert.convert as converter
from tests import parity

FILES = sorted((Path(__file__).parent / "golden").glob("visualrwkv_v*.safetensors"))
CASES = [(path, scan) for path in FILES for scan in parity.Golden.open(path).scans]


def test_all_scans_of_the_golden_files_are_compared() -> None:
    assert [path.stem for path in FILES] == ["visualrwkv_v5", "visualrwkv_v6", "visualrwkv_v6_pooled"]
    assert len(CASES) == 6 + 1 + 1


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("path", "scan"), CASES, ids=lambda v: getattr(v, "stem", v))
def test_parity(path: Path, scan: str, backend: str) -> None:
    found = parity.errors(parity.Golden.open(path), scan, backend)
    assert all(found[what] <= bound for what, bound in parity.BOUNDS.items()), found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Golden file -> its checkpoint through `toolkit.convert`."""

    def without_a_child(path: Path, folder: Path, seconds: int, *, as_is: bool) -> dict[str, Any]:
        return converter.write_folder(path, folder, as_is=as_is)  # starting one takes seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "_in_a_child", without_a_child)
        places = {path: tmp_path_factory.mktemp(path.stem) for path in FILES}
        return {path: parity.converted(parity.Golden.open(path), place) for path, place in places.items()}


@pytest.mark.parametrize(("path", "scan"), CASES, ids=lambda v: getattr(v, "stem", v))
def test_parity_from_pixels_through_convert(path: Path, scan: str, folders: dict[Path, Path]) -> None:
    """One checkpoint file gives all three parts; its own CLIP tower sees the stored pixels."""
    found = parity.errors(parity.Golden.open(path), scan, "torch", folder=folders[path])
    assert all(found[what] <= bound for what, bound in parity.BOUNDS.items()), found
    assert found["gradients"] > 0 and found["logits"] > 0  # they were compared


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("path", "scan"), CASES, ids=lambda v: getattr(v, "stem", v))
def test_parity_on_the_gpu(path: Path, scan: str, backend: str) -> None:
    found = parity.errors(parity.Golden.open(path), scan, backend, "cuda")
    assert all(found[what] <= bound for what, bound in parity.BOUNDS.items()), found


def test_command_reports_and_fails_above_the_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = FILES[1]
    assert parity.main([str(good), "--backend", "torch"]) == 0
    golden = parity.Golden.open(good)
    golden.tensors["param/rwkv.blocks.2.ffn.key.weight"] += 0.01
    import json

    bad = tmp_path / "bad.safetensors"
    save_file(golden.tensors, bad, metadata={"args": json.dumps(golden.args)})
    assert parity.main([str(bad), "--backend", "torch"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok") and lines[-1].startswith("FAIL"), lines


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"# text", "deserializing"), ({}, "'args'"), ({"args": "{}"}, "no input")],
)
def test_what_is_no_golden_file_is_told_by_name(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"param/rwkv.emb.weight": torch.zeros(1)}, path, metadata=content)
    assert parity.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: ") and message in said


def test_a_scan_off_by_one_layer_is_seen() -> None:
    golden = parity.Golden.open(FILES[0])
    model = parity.build(golden, "bidirection")
    batch = parity.batch_of(golden, 0, model.n_image)
    wrong = parity.build(golden, "multidirection").logits(batch)
    assert parity.relative(wrong, golden.tensors["out0/bidirection/logits"]) > 1e-2
    assert torch.isfinite(wrong).all()
