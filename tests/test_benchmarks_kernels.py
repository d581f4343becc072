"""The benchmark scripts' logic on a CPU: floors as counted by hand, errors that can fail, whole tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks import kernel_errors, kernel_models, kernel_table, whole_model
from benchmarks import kernels as bench
from benchmarks.kernel_inputs import REGIMES, Ceilings, Shape, budget_mib, floor_ms, moved
from benchmarks.kernel_peers import leaves, ours

CPU = torch.device("cpu")
H100 = Ceilings(3.0e12, 798e12)


@pytest.mark.parametrize(
    ("shape", "forward", "both"),
    [
        (Shape("wkv4", 8, 1024, 2048), 0.034, 0.089),
        (Shape("wkv5", 8, 4096, 32), 0.179, 0.492),
        (Shape("wkv6", 16, 512, 8), 0.014, 0.039),
        (Shape("wkv6", 1, 16384, 40), 0.140, 0.391),
    ],
)
def test_floors_are_the_counted_ones(shape: Shape, forward: float, both: float) -> None:
    found = [floor_ms(shape, torch.bfloat16, H100, state=False, backward=b) for b in (False, True)]
    assert found == pytest.approx([forward, both], abs=6e-4)


def test_state_adds_its_bytes_and_memory_budget_counts_chunk_states() -> None:
    shape = Shape("wkv6", 2, 128, 3)
    one_state = 2 * 3 * 64 * 64 * 4
    plain, with_state = (moved(shape, torch.bfloat16, state=s, backward=True) for s in (False, True))
    assert with_state - plain == 4 * one_state
    sequences = 10 * shape.elements * 2  # r k v log_w and dy held, y and four gradients made
    expected = 1.2 * (sequences + one_state + 2 * one_state) - sequences / 2
    assert budget_mib(shape, torch.bfloat16, state=False) == pytest.approx(expected / 2**20)


@pytest.mark.parametrize("op", ["wkv4", "wkv5", "wkv6"])
def test_truth_agrees_with_the_reference_backend(op: str) -> None:
    x = kernel_errors.error_inputs(op, torch.float32, 9, CPU, small=True)
    exact, _ = kernel_errors.truth(op, x)
    wide = {name: t.detach().double() for name, t in leaves(x).items()}
    y, _ = getattr(kernels, op)(**wide, backend="reference")
    torch.testing.assert_close(exact["o"], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["wkv4", "wkv5", "wkv6"])
def test_every_tensor_and_regime_gets_its_own_error(op: str) -> None:
    x = kernel_errors.error_inputs(op, torch.float32, 9, CPU, small=True)
    exact, p = kernel_errors.truth(op, x)
    found = kernel_errors.outputs_and_gradients(ours(op, "torch"), x, p)
    rows = kernel_errors.errors(op, found, exact)
    names = {"o", "state", "dk", "dv", "dlog_w", "du", "dstate"}
    names |= set() if op == "wkv4" else {"dr"}
    for regime in REGIMES:
        assert set(rows[regime]) == names | {f"{name}_rounded" for name in names} | {
            "finite",
            "beyond",
            "lost",
        }
        assert max(float(str(rows[regime][name])) for name in names - {"dlog_w"}) < 1e-4
    assert rows["limits"] == {"finite": True, "beyond": 0, "lost": 0}
    spoilt = dict(found, dv=found["dv"].clone())
    spoilt["dv"][..., 0, 0 if op == "wkv4" else slice(None)] = torch.nan
    again = kernel_errors.errors(op, spoilt, exact)
    assert not again["near_one"]["finite"]
    assert again["typical"] == rows["typical"]


def test_numbers_beyond_a_type_are_counted_and_left_out() -> None:
    exact = {"o": torch.ones(1, 3, 12, 8, dtype=torch.float64)}
    exact["o"][0, 0, 0, 0] = 1e5  # fp16 ends at 65,504
    found = {"o": exact["o"].half()}
    row = kernel_errors.errors("wkv6", found, exact)["near_one"]
    assert row == {"finite": False, "beyond": 1, "lost": 0, "o": 0.0, "o_rounded": 0.0}
    found["o"][0, 0, 0, 1] = torch.inf
    assert kernel_errors.errors("wkv6", found, exact)["near_one"]["lost"] == 1


def test_a_tiny_run_writes_rows_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--device cpu --tiny --impls ours,naive --ops wkv6,wkv4 --out"
    bench.main([*arguments.split(), str(tmp_path)])
    assert "FAILED" not in capsys.readouterr().out
    rows = bench.read(tmp_path / "kernels.jsonl")
    seen = {(r["op"], r["mode"], r["state"]) for r in rows if r["kind"] == "time" and r["impl"] == "ours"}
    modes = {("stream", False), ("stream", True), ("packed", False), ("eager", False), ("graph", False)}
    assert seen == {(op, *mode) for op in ("wkv6", "wkv4") for mode in modes}
    for row in rows:
        if row["kind"] == "time" and row["impl"] == "ours":
            assert row["fwd_bwd_ms"] > 0 and row["floor_fwd_bwd_ms"] > row["floor_fwd_ms"] > 0
    page = (tmp_path / "kernels.md").read_text()
    assert "## Targets" in page and "| wkv6 | (2, 20, 2) | yes | fwd+bwd |" in page


def test_rows_measured_again_replace_the_old_ones() -> None:
    base = {"kind": "time", "op": "wkv6", "impl": "ours", "mode": "stream"}
    old = [{"kind": "machine", "run": "a"}, base | {"run": "a", "fwd_ms": 2.0}]
    new = [{"kind": "machine", "run": "b"}, base | {"run": "b", "fwd_ms": 1.0}]
    assert bench.merged(old, new) == new
    other = base | {"impl": "peer", "run": "a"}
    assert bench.merged([*old, other], new) == [old[0], other, *new]


def test_targets_fail_when_missed() -> None:
    shape = "(8, 4096, 32)"
    fixed = {"kind": "time", "op": "wkv6", "shape": shape, "dtype": "bf16", "state": False, "mode": "stream"}
    floors = {"floor_fwd_ms": 0.2, "floor_fwd_bwd_ms": 0.6}
    rows = [
        fixed | floors | {"impl": "ours", "fwd_ms": 0.5, "fwd_bwd_ms": 3.0, "peak_mib": 9.0,
         "budget_mib": 8.0},
        fixed | floors | {"impl": "peer", "fwd_ms": 1.0, "fwd_bwd_ms": 5.0},
        {"kind": "error", "op": "wkv6", "dtype": "bf16", "T": 512, "impl": "ours", "regime": "mixed",
         "o": 1.7e-3, "dk": 1.9e-3, "finite": True},
    ]  # fmt: skip
    lines = kernel_table.target_list(json.loads(json.dumps(rows)))
    assert "half of the best peer's: 1 of 2; not: wkv6 (8, 4096, 32) stream fwd_bwd" in lines[0]
    assert "floor: 1 of 2" in lines[1]
    assert "budget: 0 of 1" in lines[2]
    assert "errors: 0 of 1" in lines[3]
    rows[-1] |= {"lost": 0, "dk_rounded": 1.89e-3}  # no bf16 number is nearer
    assert "errors: 0 of 1; not: wkv6 bf16 T=512 mixed (rounding alone)" in kernel_table.target_list(rows)[3]
    rows[-1]["dk_rounded"] = 1.7e-3
    assert "rounding alone" not in kernel_table.target_list(rows)[3]


def test_a_tiny_whole_model_run_counts_flop_and_tokens(tmp_path: Path) -> None:
    arguments = "--device cpu --tiny --no-fla --scans --graphs --batches 2 --rounds 2 --out"
    whole_model.main([*arguments.split(), str(tmp_path)])
    rows = json.loads((tmp_path / "whole_model.json").read_text())["rows"]
    assert [row["recompute"] for row in rows] == [False, True, False, False, False, False]
    assert [row["how"] for row in rows[2:]] == [
        "captured", "eager, scan uni", "eager, scan bi", "eager, scan 2d"
    ]  # fmt: skip
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * 32 * 1e3 / row["step_ms"], rel=0.01)
        assert 5.0 < row["loss"] < 6.5  # log 256 = 5.55 for an untrained model


def test_whole_model_flop_are_six_a_parameter_and_token_and_the_recurrence() -> None:
    sizes = kernel_models.TINY
    with torch.device("meta"):
        model = kernel_models.Ours(sizes)
    d, wide = 128, 448
    per_layer = 5 * d * d + d * 160 + 5 * 32 * d + 2 * d * 64 + 2 * d * wide + d * d + 2 * 64
    assert whole_model.matrix_parameters(model) == 2 * per_layer + 256 * d
    flop = whole_model.step_flop(10, sizes, 3)
    assert flop == 3 * 32 * (60 + 2 * 2 * 14 * 64 * (64 + 64))
