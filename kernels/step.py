"""One token at a time, in place: what generation runs instead of the whole-sequence operators.

    wkv4_step_(k, v, log_w, u, state)          the recurrences: the state is overwritten, y returned
    wkv5_step_(r, k, v, log_w, u, state)
    wkv6_step_(r, k, v, log_w, u, state)
    norm_shift_step_(x, late, norm, previous, mixes)   residual, LayerNorm and token shift
    ddlerp_step(x, delta, low, weight, mixes)          RWKV-6's data-dependent token shift

At T = 1 a layer is bound by launches and by the bytes of its state, so each function does all that lies
between two matrix products: decay from its parameter, head norm, gate. The trailing underscore says that
arguments change. No gradients. Nothing here waits for the device: all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_weight
from .dispatch import backends, interpreted, pick, register
from .mix import wide
from .step_checks import check_decay, check_low_rank, check_rows, check_shares, check_step, check_token


@contextmanager
def overlapped(device: torch.device) -> Iterator[None]:
    """Inside, Triton's steps may be launched before the kernel in front of them has ended.

    They then load parameters (norms, shares, decay, u) before they wait for it: those must not be what it
    writes. For capturing a model's step, where they never change. Nothing where the GPU cannot do it.
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    if not able or backends()["triton"]:
        yield
        return
    from .gpu import one_token

    before, one_token.early = one_token.early, True
    try:
        yield
    finally:
        one_token.early = before


SIZES = 128
"""The largest head size and, times 64, the largest width that the Triton kernels hold in registers."""


class Norm(NamedTuple):
    """A LayerNorm: weight [D], bias [D], eps."""

    weight: Tensor
    bias: Tensor
    eps: float


class Ending(NamedTuple):
    """What follows a head's output: group norm over its N channels (weight, bias [D]), times silu(gate)."""

    weight: Tensor
    bias: Tensor
    eps: float
    gate: Tensor


class LowRank(NamedTuple):
    """A number per token and channel as a product: low [B,R] times weight [R,D]."""

    low: Tensor
    weight: Tensor


class Late(NamedTuple):
    """What has still to be added to the residual: a mixer's value [B,D], times sigmoid(gate) if any."""

    value: Tensor
    gate: Tensor | None = None


def wkv4_step_(
    k: Tensor,
    v: Tensor,
    log_w: Tensor | None,
    u: Tensor,
    state: Tensor,
    *,
    base: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of `wkv4`: k, v [B,D]; log_w, u [D]; state [B,3,D] overwritten -> y [B,D] in k's dtype.

    base: the decay's parameter: the log decay is then -exp(base + log_w), log_w None standing for 0.
    gate: [B,D]; y is multiplied by its sigmoid. Raises ValueError for wrong shapes, dtypes and layouts.
    """
    check_token("wkv4_step", "k", k, "B, D")
    batch, width = k.shape
    check_step("wkv4_step", k, u, (width,), state, (batch, 3, width), (k, v, gate))
    check_decay("wkv4_step", log_w, base, k, (width,))
    return _run("wkv4_step", backend, k, v, log_w, base, u, state, gate)


def wkv5_step_(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor | None,
    u: Tensor,
    state: Tensor,
    *,
    base: Tensor | None = None,
    ending: Ending | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of `wkv5`: r, k, v [B,H,N]; log_w, u [H,N]; state [B,H,N,N] overwritten -> y [B,H,N].

    base [H,N] as in `wkv4_step_`. ending: head norm and gate, applied to the unrounded y.
    """
    check_token("wkv5_step", "r", r, "B, H, N")
    batch, heads, size = r.shape
    check_step("wkv5_step", r, u, (heads, size), state, (batch, heads, size, size), (r, k, v))
    check_decay("wkv5_step", log_w, base, r, (heads, size))
    return _run("wkv5_step", backend, r, k, v, log_w, base, u, state, ending)


def wkv6_step_(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor | LowRank,
    u: Tensor,
    state: Tensor,
    *,
    base: Tensor | None = None,
    ending: Ending | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of `wkv6`: as `wkv5_step_` with log_w [B,H,N], whose dtype may differ from r's.

    A `LowRank` log_w [B,R], [R,H*N] is multiplied here, and rounded to the type of its left side.
    """
    check_token("wkv6_step", "r", r, "B, H, N")
    batch, heads, size = r.shape
    if isinstance(log_w, LowRank):
        check_low_rank("wkv6_step", *log_w, batch, heads * size)
    else:
        check_weight("wkv6_step", "log_w", log_w, r.shape, "B, H, N", r)
    check_step("wkv6_step", r, u, (heads, size), state, (batch, heads, size, size), (r, k, v))
    check_decay("wkv6_step", None, base, r, (heads, size))
    return _run("wkv6_step", backend, r, k, v, log_w, base, u, state, ending)


def norm_shift_step_(
    x: Tensor,
    late: Late | None,
    norm: Norm,
    previous: Tensor,
    mixes: Sequence[Tensor],
    *,
    of_previous: bool,
    dtype: torch.dtype,
    keep: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x [B,D] += late; n = LayerNorm(x); -> (the mixes of n and `previous` [M,B,D] in `dtype`, a change).

    mixes: up to four tensors of D elements, shares of the current token, or of the previous one with
    `of_previous`. previous [B,D] becomes n. The change, with `keep`: previous - n [B,D] in float32 (or
    float64), which `ddlerp_step` reads; without it None.
    """
    if len(mixes) > 4:
        raise ValueError(f"norm_shift_step: {len(mixes)} mixes; give at most four")
    check_rows("norm_shift_step", x=x, previous=previous)
    check_shares("norm_shift_step", mixes, x.shape[1])
    kernel = pick("norm_shift_step", backend, x.device, _unfit(x, x.shape[-1] / 64))
    mixed: tuple[Tensor, Tensor | None] = kernel(x, late, norm, previous, mixes, of_previous, dtype, keep)
    return mixed


def ddlerp_step(
    x: Tensor,
    delta: Tensor,
    low: Tensor,
    weight: Tensor,
    mixes: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    """x + delta (mix_m + tanh(low)_m weight_m) for five m -> [5,B,D] in `dtype`; changes nothing.

    x [B,D]; delta [B,D], the previous token minus x, in float32 (or float64); low [B,5R]; weight [5,R,D];
    mixes five tensors of D elements. Source: arXiv 2404.05892, equations 14 to 16.
    """
    rank = weight.shape[1] if weight.dim() == 3 else 0
    wanted = ([x.shape[0], 5 * rank], [5, rank, x.shape[-1]])
    if len(mixes) != 5 or (list(low.shape), list(weight.shape)) != wanted:
        raise ValueError(
            f"ddlerp_step: {len(mixes)} mixes, low {list(low.shape)}, weight {list(weight.shape)}; expected "
            f"5, [B, 5 * R] and [5, R, D] for x {list(x.shape)}"
        )
    check_rows("ddlerp_step", x=x, delta=delta)
    check_shares("ddlerp_step", mixes, x.shape[1])
    unfit = _unfit(x, weight.shape[1])
    if interpreted() and low.dtype == torch.bfloat16:
        unfit = "Triton's interpreter computes bfloat16 products wrongly"
    kernel = pick("ddlerp_step", backend, x.device, unfit)
    mixed: Tensor = kernel(x, delta, low, weight, mixes, dtype)
    return mixed


def _run(op: str, backend: str | None, *inputs: Any) -> Tensor:
    """Runs the picked backend of a recurrence outside autocast."""
    x: Tensor = inputs[0]
    kernel = pick(op, backend, x.device, _unfit(x, x.shape[-1] if op != "wkv4_step" else 1))
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = kernel(*inputs)
    return y


def _unfit(x: Tensor, size: float) -> str:
    """Why Triton cannot take this ("" if it can)."""
    if x.dtype == torch.float64:
        return "float64 runs on the torch backend"
    return f"a size above {SIZES} does not fit one program's registers" if size > SIZES else ""


def _log_decay(log_w: Tensor | None, base: Tensor | None, kind: torch.dtype) -> Tensor:
    """The log decay from itself or from its parameter."""
    if base is None:
        if log_w is None:
            raise ValueError("a step needs log_w, or the decay's parameter as `base`")
        return log_w.to(kind)
    shifted = base.to(kind) if log_w is None else base.to(kind) + log_w.to(kind)
    return -torch.exp(shifted)


def _wkv4(
    k: Tensor,
    v: Tensor,
    log_w: Tensor | None,
    base: Tensor | None,
    u: Tensor,
    state: Tensor,
    gate: Tensor | None,
) -> Tensor:
    kind, out = state.dtype, k.dtype
    k, v, u = k.to(kind), v.to(kind), u.to(kind)
    a, b, p = state.unbind(1)  # each [B, D]
    top = torch.maximum(p, u + k)
    old, new = torch.exp(p - top), torch.exp(u + k - top)
    y = (old * a + new * v) / (old * b + new)
    decayed = p + _log_decay(log_w, base, kind)
    top = torch.maximum(decayed, k)
    old, new = torch.exp(decayed - top), torch.exp(k - top)
    state.copy_(torch.stack((old * a + new * v, old * b + new, top), dim=1))
    return (y if gate is None else y * torch.sigmoid(gate.to(kind))).to(out)


def _heads(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor | LowRank | None,
    base: Tensor | None,
    u: Tensor,
    state: Tensor,
    ending: Ending | None,
) -> Tensor:
    kind, out, shape = state.dtype, r.dtype, r.shape
    if isinstance(log_w, LowRank):
        log_w = (log_w.low @ log_w.weight.to(log_w.low.dtype)).view(shape)
    r, k, v = r.to(kind), k.to(kind), v.to(kind)
    bonus = (r * u.to(kind) * k).sum(-1, keepdim=True)  # [B, H, 1]
    y = (r.unsqueeze(-2) @ state).squeeze(-2) + bonus * v  # [B, H, N]
    decay = torch.exp(_log_decay(log_w, base, kind)).unsqueeze(-1)  # [B, H, N, 1] or [H, N, 1]
    state.mul_(decay).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    if ending is not None:
        weight, bias, eps, gate = ending
        y = F.group_norm(y.flatten(1), shape[1], weight.to(kind), bias.to(kind), eps)
        y = (y * F.silu(gate.to(kind))).view(shape)
    return y.to(out)


def _norm_shift(
    x: Tensor,
    late: Late | None,
    norm: Norm,
    previous: Tensor,
    mixes: Sequence[Tensor],
    of_previous: bool,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    if late is not None:
        x += late.value if late.gate is None else torch.sigmoid(wide(late.gate)) * late.value
    weight, bias = wide(norm.weight), wide(norm.bias)
    # As the prefill keeps it: rounded to the type of the state.
    n = F.layer_norm(wide(x), x.shape[-1:], weight, bias, norm.eps).to(previous.dtype)
    first, second = (wide(n), wide(previous)) if of_previous else (wide(previous), wide(n))
    mixed = torch.empty(len(mixes), *x.shape, dtype=dtype, device=x.device)
    for out, share in zip(mixed, mixes, strict=True):
        out.copy_(torch.lerp(first, second, wide(share).flatten()))
    change = wide(previous) - wide(n) if keep else None
    previous.copy_(n)
    return mixed, change


def _ddlerp(
    x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, mixes: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    low = torch.tanh(low).unflatten(-1, (5, -1)).transpose(0, 1)  # [5, B, R]
    shares = torch.bmm(low, weight.to(low.dtype))  # [5, B, D]
    mixed = torch.empty(5, *x.shape, dtype=dtype, device=x.device)
    for out, mix, share in zip(mixed, mixes, shares, strict=True):
        out.copy_(torch.addcmul(wide(x), delta, wide(mix).flatten() + share))
    return mixed


_PLAIN: dict[str, Callable[..., Any]] = {
    "wkv4_step": _wkv4,
    "wkv5_step": _heads,
    "wkv6_step": _heads,
    "norm_shift_step": _norm_shift,
    "ddlerp_step": _ddlerp,
}
for _op, _function in _PLAIN.items():
    # One step is its own definition: the reference is the same function.
    register(_op, reference=_function, torch=_function, triton=f"kernels.gpu.step:{_op}")
