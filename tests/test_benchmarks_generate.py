"""The benchmarks of generation and loading run on a small size and write what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import generate, generate_table, loading
from benchmarks.generate_peers import HEAD, Llama


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "POSITIONS", {"cpu": (8, 24)})
    monkeypatch.setattr(generate, "BATCHES", {"cpu": (1, 2)})
    monkeypatch.setattr(generate, "ROUNDS", 1)
    monkeypatch.setattr(generate, "AGREE", 12)
    monkeypatch.setenv("RWKV_JIT_ON", "0")  # the package reads both when it is imported
    monkeypatch.setenv("RWKV_CUDA_ON", "0")


def test_generation_writes_table_and_plot(tmp_path: Path, quick: None) -> None:
    assert generate.main(["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "generate.json").read_text())
    assert [(r["batch"], r["position"]) for r in found["rows"]] == [(1, 8), (1, 24), (2, 8), (2, 24)]
    for row in found["rows"]:
        assert {"ours", "recomputed", "llama"} <= set(row["ms"])
        assert set(row["ms"]) | set(row["reasons"]) == set(generate_table.WAYS)
    assert "one sequence" in found["rows"][2]["reasons"]["rwkv package"]
    assert [list(row["ms"]) for row in found["flat"]] == [["8", "24"]] * 2
    random, taught = found["agreement"]
    assert random["agree"] >= 0.75 and taught["agree"] == taught["follows_the_text"] == 1
    said = (tmp_path / "generate.md").read_text()
    assert "| tiny | 2 | 24 |" in said and "over that at position 8" in said and "taught a text" in said
    assert (tmp_path / "generate.png").stat().st_size > 5000


def test_what_there_was_no_time_for_is_told() -> None:
    empty = {"machine": {}, "rows": [], "flat": [], "agreement": [], "left_out": [["3b", 16, 64]]}
    assert "left out, the time was used up: ['3b', 16, 64]" in generate_table.table(empty)


def test_a_way_that_fails_hides_no_other(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: object) -> None:
        raise RuntimeError("CUDA out of memory, for example\nand more")

    monkeypatch.setattr(generate, "Llama", failing)
    row = generate.Case("tiny", "cpu").row(1, 8)
    assert row["reasons"]["llama"] == "RuntimeError: CUDA out of memory, for example" and "ours" in row["ms"]


@torch.inference_mode()
def test_the_llama_is_one_of_that_size() -> None:
    """Parameters; and its attention over a cache, layer by layer, against plain sums."""
    wanted = 1_000_000
    llama = Llama("tiny", wanted, 512, 2, 5, "cpu")
    modules = [llama.emb, llama.head, llama.layers, llama.norm]
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert abs(count / wanted - 1) < 0.05
    layer, cache = llama.layers[0], llama.caches[0]
    x = torch.randn(2, 128)
    y = layer(x, cache, llama.turn)
    q, k, v = (t.view(2, -1, HEAD) for t in layer.qkv(layer.norms[0](x)).chunk(3, dim=-1))
    cos, sin = llama.turn
    turned = torch.complex(*k.chunk(2, dim=-1)) * torch.complex(cos, sin)
    torch.testing.assert_close(cache[0, :, :, -1], torch.cat((turned.real, turned.imag), -1))
    torch.testing.assert_close(cache[1, :, :, -1], v)
    turned = torch.complex(*q.chunk(2, dim=-1)) * torch.complex(cos, sin)
    q = torch.cat((turned.real, turned.imag), -1)
    share = torch.einsum("bhn,bhtn->bht", q, cache[0]).div(HEAD**0.5).softmax(-1)
    z = x + layer.out(torch.einsum("bht,bhtn->bhn", share, cache[1]).flatten(1))
    gate, up = layer.gate_up(layer.norms[1](z)).chunk(2, dim=-1)
    torch.testing.assert_close(y, z + layer.down(torch.nn.functional.silu(gate) * up))


def test_loading_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(loading.ways(1, "cuda")) == ["read", "bfloat16", "float32", "cuda"]
    monkeypatch.setattr(loading, "ways", lambda size, device: ["read", "float32"])  # one start of torch
    words = ["--size", "tiny", "--rounds", "1", "--out", str(tmp_path / "out"), "--folder", str(tmp_path)]
    assert loading.main(words) == 0
    found = json.loads((tmp_path / "out" / "loading-tiny.json").read_text())
    assert list(found["rows"]) == ["read", "float32"]
    assert 0 < found["bytes"] - found["rows"]["float32"]["bytes"] / 2 < 20_000  # the header
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bounds_decide_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {
        "read": {"seconds": 1.0, "peak": 0, "bytes": 100},
        "bfloat16": {"seconds": 1.4, "peak": 116, "bytes": 100},
        "float32": {"seconds": 9.0, "peak": 228, "bytes": 200},
    }
    monkeypatch.setattr(loading, "measured", lambda file, way: dict(rows[way]))
    (tmp_path / "f").write_bytes(b"")
    kept = {n: r["kept"] for n, r in loading.measure("x", tmp_path / "f", "cpu", 1)["rows"].items()}
    assert kept == {"read": True, "bfloat16": False, "float32": True}
    rows["bfloat16"] |= {"seconds": 1.6, "peak": 100}
    assert not loading.measure("x", tmp_path / "f", "cpu", 1)["rows"]["bfloat16"]["kept"]
