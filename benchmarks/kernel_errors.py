"""Errors of every implementation against an fp64 recurrence on the same rounded inputs.

All decay regimes ride in one call: each has its own heads (RWKV-5, -6) or channels (RWKV-4), which do not
mix. The loss is a random projection of the output plus one of the final state, so that every gradient,
the initial state's too, is met. RWKV-4's state (a, b, p) stands for a e^p and b e^p: both are compared, and
projected, at the reference's p.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernel_inputs import REGIMES, Shape, log_decay, random_inputs
from benchmarks.kernel_peers import Inputs, Run, leaves

PER_REGIME = {"wkv4": 64, "wkv5": 2, "wkv6": 2}  # channels or heads
LIMITS = "limits"
"""log_w drawn from {0, -1e-4, -1, -1e4}: only whether everything stays finite is asked."""
ALL = (*REGIMES, LIMITS)


def error_inputs(op: str, dtype: torch.dtype, steps: int, device: torch.device, *, small: bool) -> Inputs:
    """As `random_inputs`, with a state and all regimes side by side; B = 1."""
    each = 2 if small and op == "wkv4" else PER_REGIME[op]
    shape = Shape(op, 1, steps, each * len(ALL), 8 if small else 64)
    x = random_inputs(shape, dtype, device, state=True, seed=steps)
    log_w = x["log_w"].detach()
    axis = 0 if op in ("wkv4", "wkv5") else 2
    parts = []
    for regime, part in zip(ALL, log_w.chunk(len(ALL), axis), strict=True):
        if regime == LIMITS:
            values = torch.tensor((0.0, -1e-4, -1.0, -1e4), device=device)
            parts.append(values[torch.randint(0, 4, part.shape, device=device)])
        else:
            parts.append(log_decay(torch.empty(part.shape, device=device).uniform_(*REGIMES[regime])))
    x["log_w"] = torch.cat(parts, axis).to(dtype).requires_grad_()
    return x


def wkv6_loop(x: Inputs) -> tuple[Tensor, Tensor]:
    """RWKV-6 (and -5) step by step, in the inputs' own precision."""
    r, k, v, u, s = (x[name] for name in ("r", "k", "v", "u", "state"))
    w = torch.exp(x["log_w"]).expand_as(k)
    ys = []
    for rt, kt, vt, wt in zip(*(t.unbind(1) for t in (r, k, v, w)), strict=True):
        kv = kt.unsqueeze(-1) * vt.unsqueeze(-2)
        ys.append((rt.unsqueeze(-2) @ (u.unsqueeze(-1) * kv + s)).squeeze(-2))
        s = wt.unsqueeze(-1) * s + kv
    return torch.stack(ys, 1), s


def wkv4_loop(x: Inputs) -> tuple[Tensor, Tensor]:
    """RWKV-4 step by step; the running maximum p only scales, so no gradient goes through it."""
    k, v, log_w, u = (x[name] for name in ("k", "v", "log_w", "u"))
    a, b, p = x["state"].unbind(1)
    p = p.detach()
    ys = []
    for kt, vt in zip(k.unbind(1), v.unbind(1), strict=True):
        q = torch.maximum(p, u + kt).detach()
        old, new = torch.exp(p - q), torch.exp(u + kt - q)
        ys.append((old * a + new * vt) / (old * b + new))
        q = torch.maximum(p + log_w, kt).detach()
        old, new = torch.exp(p + log_w - q), torch.exp(kt - q)
        a, b, p = old * a + new * vt, old * b + new, q
    return torch.stack(ys, 1), torch.stack((a, b, p), 1)


def at_scale(state: Tensor, p: Tensor | None) -> Tensor:
    """RWKV-4's (a, b, p) as its two sums at scale e^p; other states as they are."""
    if p is None:
        return state
    factor = torch.exp(state[:, 2].to(p.dtype) - p)
    return torch.stack((state[:, 0] * factor, state[:, 1] * factor), 1)


def outputs_and_gradients(run: Run, x: Inputs, p: Tensor | None) -> dict[str, Tensor]:
    """Everything that is compared: o, state, and d-anything; p: the reference's scale for RWKV-4."""
    y, state = run(x, None)
    found = {"o": y.detach()}
    given = leaves(x)
    outputs, arriving = [y], [x["dy"]]
    if state is not None:
        state = at_scale(state, p)
        found["state"] = state.detach()
        outputs.append(state)
        arriving.append(x["dstate"][:, :2].to(state.dtype) if p is not None else x["dstate"].to(state.dtype))
    if y.requires_grad:
        gradients = torch.autograd.grad(outputs, list(given.values()), arriving, allow_unused=True)
        found |= {f"d{n}": g for n, g in zip(given, gradients, strict=True) if g is not None}
        if p is not None and "dstate" in found:
            found["dstate"] = found["dstate"][:, :2]
    return found


def truth(op: str, x: Inputs) -> tuple[dict[str, Tensor], Tensor | None]:
    """The fp64 answer on the same rounded inputs, and RWKV-4's scale p."""
    exact = {name: t.detach().double() for name, t in x.items()}
    for t in leaves(exact).values():
        t.requires_grad_()
    if op != "wkv4":
        return outputs_and_gradients(lambda z, _: wkv6_loop(z), exact, None), None
    with torch.no_grad():
        p = wkv4_loop(exact)[1][:, 2]
    return outputs_and_gradients(lambda z, _: wkv4_loop(z), exact, p), p


def parts(op: str, name: str, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The slice of each regime of a named tensor: along channels for RWKV-4, else along heads."""
    heads_first = 1 if name in ("state", "dstate") else 2
    axis = t.dim() - 1 if op == "wkv4" else (0 if t.dim() == 2 else heads_first)
    return zip(ALL, t.chunk(len(ALL), axis), strict=True)


def errors(op: str, found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, dict[str, object]]:
    """Regime -> {tensor: relative Frobenius error}; of the limits only whether all is finite.

    "<tensor>_rounded": the error of the exact answer once rounded to the tensor's type, which nobody who
    returns that type can pass under. Exact numbers beyond the type's range are counted ("beyond") and left
    out of the errors; "lost" counts what is not finite although the type could hold it.
    """
    rows: dict[str, dict[str, object]] = {regime: {"finite": True} for regime in ALL}
    for name, value in found.items():
        pairs = zip(parts(op, name, value), parts(op, name, exact[name]), strict=True)
        for (regime, a), (_, b) in pairs:
            row = rows[regime]
            rounded = b.to(a.dtype)
            held = rounded.isfinite()
            row["finite"] = bool(row["finite"]) and bool(a.isfinite().all())
            for what, where in (("beyond", ~held), ("lost", held & ~a.isfinite())):
                row[what] = int(str(row.get(what, 0))) + int(where.sum())
            if regime != LIMITS:
                size = b[held].norm().clamp(min=1e-300)
                row[name] = float((a.double() - b)[held].norm() / size)
                row[f"{name}_rounded"] = float((rounded.double() - b)[held].norm() / size)
    return rows
