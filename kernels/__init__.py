"""The recurrences of RWKV-4, -5 and -6, one function each, with interchangeable backends.

    wkv4(k, v, log_w, u, state)       per channel, numerator over denominator
    wkv5(r, k, v, log_w, u, state)    per head a matrix state, one decay per channel
    wkv6(r, k, v, log_w, u, state)    the same with a decay per token and channel

All take `lengths` [B] long (right padding; None = all T steps) and `backend` (None = the global default,
see `use` and `set_backend`). The returned state is the state at each sample's own end, in float32 (float64
for float64 inputs), and can be passed to the next call; gradients flow through it both ways. Outputs at
padded positions are zero, and what the padding holds, NaN included, does not matter.
`log_w` is the logarithm of the decay, -exp(time_decay) <= 0, never the decay itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked, reference, scan
from .checks import check_lengths, check_log_w, check_sequence, check_state, check_weight, debug
from .dispatch import backends, chosen, pick, register, reset_chosen, set_backend, use

__all__ = ["backends", "chosen", "debug", "reset_chosen", "set_backend", "use", "wkv4", "wkv5", "wkv6"]

register("wkv4", "reference", reference.wkv4)
register("wkv5", "reference", reference.wkv5)
register("wkv6", "reference", reference.wkv6)
register("wkv4", "torch", scan.wkv4)
register("wkv5", "torch", chunked.wkv5)
register("wkv6", "torch", chunked.wkv6)


def wkv4(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-4: k, v [B,T,D]; log_w, u [D]; state [B,3,D] -> y [B,T,D] in k's dtype, state [B,3,D].

    y_t = (sum_{i<t} e^{(t-1-i) log_w + k_i} v_i + e^{u + k_t} v_t) / (the same without v).
    The state is (a, b, p): numerator a e^p, denominator b e^p, running maximum exponent p; None stands
    for (0, 0, -1e38). Raises ValueError for wrong shapes, dtypes, devices, lengths or backend names.
    """
    check_sequence("wkv4", ("k", "v"), (k, v), "BTD")
    batch, _, width = k.shape
    _check_rest("wkv4", k, log_w, u, (width,), "D", state, (batch, 3, width), "B, 3, D", lengths)
    return _run("wkv4", (k, v), log_w, u, state, lengths, backend)


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-5.2: r, k, v [B,T,H,N]; log_w, u [H,N]; state [B,H,N,N] -> y [B,T,H,N] in r's dtype, state.

    y_t = r_t (diag(u) k_t' v_t + S_{t-1}),  S_t = diag(w) S_{t-1} + k_t' v_t;  rows of S are keys,
    columns values; None stands for zeros. Raises ValueError as `wkv4` does.
    """
    check_sequence("wkv5", ("r", "k", "v"), (r, k, v), "BTHN")
    batch, _, heads, size = r.shape
    square = (batch, heads, size, size)
    _check_rest("wkv5", r, log_w, u, (heads, size), "H, N", state, square, "B, H, N, N", lengths)
    return _run("wkv5", (r, k, v), log_w, u, state, lengths, backend)


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6: as `wkv5` with a decay per token, log_w [B,T,H,N] (its dtype may differ from r's)."""
    check_sequence("wkv6", ("r", "k", "v"), (r, k, v), "BTHN")
    batch, _, heads, size = r.shape
    check_weight("wkv6", "log_w", log_w, r.shape, "B, T, H, N", r)
    square = (batch, heads, size, size)
    _check_rest("wkv6", r, None, u, (heads, size), "H, N", state, square, "B, H, N, N", lengths)
    return _run("wkv6", (r, k, v), log_w, u, state, lengths, backend)


def _check_rest(
    op: str,
    x: Tensor,
    log_w: Tensor | None,
    u: Tensor,
    weight: tuple[int, ...],
    weight_axes: str,
    state: Tensor | None,
    square: tuple[int, ...],
    state_axes: str,
    lengths: Tensor | None,
) -> None:
    """Checks what all operators have: per-channel weights, state and lengths."""
    if log_w is not None:
        check_weight(op, "log_w", log_w, weight, weight_axes, x)
    check_weight(op, "u", u, weight, weight_axes, x)
    check_state(op, state, square, state_axes, x)
    check_lengths(op, lengths, x)


def _run(
    op: str,
    sequences: tuple[Tensor, ...],
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Casts to the computing type, runs the picked backend outside autocast, casts the output back."""
    x = sequences[0]
    valid = _valid(lengths, x)
    check_log_w(op, log_w, valid)
    kernel = pick(op, backend, x.device)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = None if state is None else state.to(kind)
    inputs = (*(s.to(kind) for s in sequences), log_w.to(kind), u.to(kind), state, valid)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            y, state = kernel(*inputs)
    else:
        y, state = kernel(*inputs)
    return y.to(x.dtype), state


def _valid(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """lengths [B] -> True where a sample has a token [B, T]; None if nothing is padded (read on CPUs)."""
    if lengths is None or (not lengths.is_cuda and bool((lengths == x.shape[1]).all())):
        return None
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
