"""Head and cross entropy over a large vocabulary: ours against PyTorch's plain form and Liger's.

    python -m benchmarks.cross_entropy [--rows 2048 8192 16384] [--out benchmarks/results]

Time by device events, medians, implementations taking turns; peak memory above what the inputs take (the
gradients it returns included); relative error of loss, dh and dW against fp64 on the same rounded inputs.
"bf16": all tensors in bf16. "amp": float32 parameters and hidden states under bf16 autocast, as trained.
Writes cross_entropy.json and cross_entropy.md. Liger is measured where `liger_kernel` is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_timing import ceilings, medians, peak_mib
from kernels.cross_entropy import linear_cross_entropy

RESULTS = Path(__file__).parent / "results"
L2 = 1e-4
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(rows: int, l2: bool) -> Form:
    """Our operator with `rows` rows in a block (0: its own choice)."""

    def run(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        share = torch.full((len(h),), 1 / len(h), device=h.device)
        return linear_cross_entropy(h, weight, targets, share, share * L2 if l2 else None, rows=rows)

    return run


def plain(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(h, weight).float(), targets)


def liger(sums: torch.dtype | None, scale: int) -> Form | None:
    """Liger's fused form (it has no L2 term); sums: dtype that dW is summed in (None: the weight's);
    scale: its factor on the logits held at a time."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None

    def run(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Its defaults by position, but for the last one and `sums`.
        rest: tuple[Any, ...] = (None, None, -100, 0.0, 0.0, "mean", None, False, sums)
        rest = (*rest, False, False, False, None, None, scale)
        return LigerFusedLinearCrossEntropyFunction.apply(h, weight, targets, *rest)[0]

    return run


def forms() -> dict[str, Form]:
    """What is compared."""
    found: dict[str, Form | None] = {
        "ours": ours(0, False),
        "ours + L2": ours(0, True),
        "ours + L2, blocks of 1024": ours(1024, True),
        "ours + L2, blocks of 2048": ours(2048, True),
        "ours + L2, blocks of 8192": ours(8192, True),
        "plain": plain,
        "Liger": liger(None, 1),
        "Liger, float32 sums, 8 times its logits": liger(torch.float32, 8),
    }
    return {name: form for name, form in found.items() if form is not None}


def inputs(m: int, d: int, v: int, *, amp: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a LayerNorm's size, a head whose logits have deviation 2, random targets."""
    torch.manual_seed(0)
    kind = torch.float32 if amp else torch.bfloat16
    h = torch.randn(m, d, device=device, dtype=kind).requires_grad_()
    weight = (torch.randn(v, d, device=device) * (2 / d**0.5)).to(kind).requires_grad_()
    return h, weight, torch.randint(0, v, (m,), device=device)


def call(
    form: Form, given: tuple[Tensor, Tensor, Tensor], *, amp: bool, backward: bool
) -> Callable[[int], Any]:
    """The timed unit."""
    h, weight, targets = given

    def once(turn: int) -> Any:
        with torch.set_grad_enabled(backward), torch.autocast(h.device.type, torch.bfloat16, enabled=amp):
            loss = form(h, weight, targets)
        return (loss, *torch.autograd.grad(loss, [h, weight])) if backward else (loss,)

    return once


def exact(given: tuple[Tensor, Tensor, Tensor], *, block: int = 512) -> list[Tensor]:
    """loss, dh, dW in fp64, in blocks of rows, without the L2 term."""
    h, w = (x.detach().double() for x in given[:2])
    loss, dh, dw = h.new_zeros(()), torch.empty_like(h), torch.zeros_like(w)
    for i in range(0, len(h), block):
        p = (h[i : i + block] @ w.t()).log_softmax(1)
        at = given[2][i : i + block].unsqueeze(1)
        loss -= p.gather(1, at).sum() / len(h)
        g = p.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=p.dtype)) / len(h)
        dh[i : i + block] = g @ w
        dw.addmm_(g.t(), h[i : i + block])
    return [loss, dh, dw]


def errors(
    form: Form, given: tuple[Tensor, Tensor, Tensor], wanted: list[Tensor], *, amp: bool
) -> dict[str, float]:
    """Relative Frobenius error of each result."""
    found = [x.detach() for x in call(form, given, amp=amp, backward=True)(0)]
    pairs = zip(("loss", "dh", "dw"), found, wanted, strict=True)
    return {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}


def measure(m: int, d: int, v: int, *, amp: bool, device: torch.device, check: bool) -> list[dict[str, Any]]:
    """One row per implementation."""
    given = inputs(m, d, v, amp=amp, device=device)
    wanted = exact(given) if check else []
    rows: dict[str, dict[str, Any]] = {}
    for name, form in forms().items():
        shape = {"kind": "bf16" if not amp else "amp", "M": m, "D": d, "V": v}
        try:
            peak = peak_mib(call(form, given, amp=amp, backward=True), device)
            found = errors(form, given, wanted, amp=amp) if check and "L2" not in name else {}
            rows[name] = {**shape, "impl": name, "peak_mib": round(peak), **found}
        except Exception as error:  # one implementation's failure is a row of the table
            print(name, m, "failed:", repr(error)[:300], flush=True)
    for key, backward in (("fwd_ms", False), ("fwd_bwd_ms", True)):
        calls = {name: call(forms()[name], given, amp=amp, backward=backward) for name in rows}
        for name, ms in medians(calls, device, mode="eager", reps=12, budget_ms=300).items():
            rows[name][key] = round(ms, 3)
    return list(rows.values())


def machine(device: torch.device, rate: float) -> dict[str, Any]:
    """What the times depend on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bf16_tflops": round(rate / 1e12),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
    }


def table(where: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The Markdown form. x products: against 6 M V D operations at the measured matrix rate."""
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = ["# Head and cross entropy", "", f"`python -m benchmarks.cross_entropy`; medians; {head}.", ""]
    lines += [
        "Errors: relative to fp64 on the same inputs. Peak: above the inputs, returned gradients included.",
        "",
        "| dtypes | M | implementation | fwd ms | fwd+bwd ms | x products | peak MiB | loss, dh, dW error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        floor = 6e3 * r["M"] * r["D"] * r["V"] / (where["bf16_tflops"] * 1e12) if where["bf16_tflops"] else 0
        ratio = f"{r['fwd_bwd_ms'] / floor:.2f}" if floor else "-"
        wrong = ", ".join(f"{r[k]:.1e}" for k in ("loss", "dh", "dw") if k in r) or "-"
        lines.append(
            f"| {r['kind']} | {r['M']} | {r['impl']} | {r['fwd_ms']:.2f} | {r['fwd_bwd_ms']:.2f} | {ratio} "
            f"| {r['peak_mib']} | {wrong} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192, 16384], help="values of M")
    parser.add_argument("--width", type=int, default=2048, help="D")
    parser.add_argument("--vocab", type=int, default=65536, help="V")
    parser.add_argument("--kinds", nargs="+", default=["bf16", "amp"], choices=["bf16", "amp"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = machine(device, ceilings(device).flop_per_s)
    rows: list[dict[str, Any]] = []
    for kind in asked.kinds:
        for m in asked.rows:
            check = m == min(asked.rows)
            rows += measure(m, asked.width, asked.vocab, amp=kind == "amp", device=device, check=check)
    asked.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": where, "rows": rows}, indent=1)
    (asked.out / "cross_entropy.json").write_text(text + "\n")
    (asked.out / "cross_entropy.md").write_text(table(where, rows))
    print(table(where, rows))


if __name__ == "__main__":
    main()
