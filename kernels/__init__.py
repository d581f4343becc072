"""The recurrences of RWKV-4, -5 and -6, one function each, with interchangeable backends.

    wkv4(k, v, log_w, u, state)       per channel, numerator over denominator
    wkv5(r, k, v, log_w, u, state)    per head a matrix state, one decay per channel
    wkv6(r, k, v, log_w, u, state)    the same with a decay per token and channel

All take `lengths` [B] long (right padding; None = all T steps) or `cu_seqlens` [S+1] int32 or int64 (packed:
B = 1, sample s holds the steps cu_seqlens[s] .. cu_seqlens[s+1]-1, states are [S, ...]), and `backend` (None:
the global default, see `use` and `set_backend`). The returned state is the state at each sample's own end, in
float32 (float64 for float64 inputs), and can be passed to the next call; gradients flow through it both ways.
Outputs at padded positions are zero, and what the padding holds, NaN included, does not matter.
`log_w` is the logarithm of the decay, -exp(time_decay) <= 0, never the decay itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import chunked, packing, reference, scan
from .checks import (
    check_cu_seqlens,
    check_lengths,
    check_log_w,
    check_sequence,
    check_state,
    check_weight,
    debug,
)
from .dispatch import (
    Kernel,
    backends,
    choose,
    chosen,
    function,
    interpreted,
    note,
    put_settings,
    register,
    reset_chosen,
    set_backend,
    settings,
    use,
)

__all__ = [
    "backends",
    "chosen",
    "debug",
    "note",
    "put_settings",
    "reset_chosen",
    "set_backend",
    "settings",
    "use",
    "wkv4",
    "wkv5",
    "wkv6",
]

_HEAD_SIZES = (16, 32, 64, 128)

# By place: Triton does not exist everywhere, and TRITON_INTERPRET must be set before it is imported.
register("wkv4", reference=reference.wkv4, torch=scan.wkv4, triton="kernels.gpu.wkv4:wkv4")
register("wkv5", reference=reference.wkv5, torch=chunked.wkv5, triton="kernels.gpu.wkv6:wkv5")
register("wkv6", reference=reference.wkv6, torch=chunked.wkv6, triton="kernels.gpu.wkv6:wkv6")


def wkv4(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-4: k, v [B,T,D]; log_w, u [D]; state [B,3,D] -> y [B,T,D] in k's dtype, state [B,3,D].

    y_t = (sum_{i<t} e^{(t-1-i) log_w + k_i} v_i + e^{u + k_t} v_t) / (the same without v).
    The state is (a, b, p): numerator a e^p, denominator b e^p, running maximum exponent p; None stands
    for (0, 0, -1e38). Raises ValueError for wrong shapes, dtypes, devices, lengths or backend names.
    """
    check_sequence("wkv4", ("k", "v"), (k, v), "BTD")
    width = k.shape[2]
    check_weight("wkv4", "log_w", log_w, (width,), "D", k)
    arguments = _Arguments((k, v), log_w, u, state, lengths, cu_seqlens)
    return _run("wkv4", arguments, (width,), "D", (3, width), "3, D", backend)


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-5.2: r, k, v [B,T,H,N]; log_w, u [H,N]; state [B,H,N,N] -> y [B,T,H,N] in r's dtype, state.

    y_t = r_t (diag(u) k_t' v_t + S_{t-1}),  S_t = diag(w) S_{t-1} + k_t' v_t;  rows of S are keys,
    columns values; None stands for zeros. Raises ValueError as `wkv4` does.
    """
    check_sequence("wkv5", ("r", "k", "v"), (r, k, v), "BTHN")
    heads, size = r.shape[2:]
    check_weight("wkv5", "log_w", log_w, (heads, size), "H, N", r)
    arguments = _Arguments((r, k, v), log_w, u, state, lengths, cu_seqlens)
    return _run("wkv5", arguments, (heads, size), "H, N", (heads, size, size), "H, N, N", backend)


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6: as `wkv5` with a decay per token, log_w [B,T,H,N] (its dtype may differ from r's)."""
    check_sequence("wkv6", ("r", "k", "v"), (r, k, v), "BTHN")
    heads, size = r.shape[2:]
    check_weight("wkv6", "log_w", log_w, r.shape, "B, T, H, N", r)
    arguments = _Arguments((r, k, v), log_w, u, state, lengths, cu_seqlens)
    return _run("wkv6", arguments, (heads, size), "H, N", (heads, size, size), "H, N, N", backend)


class _Arguments(NamedTuple):
    """What every backend is given."""

    sequences: tuple[Tensor, ...]
    log_w: Tensor
    u: Tensor
    state: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None


def _run(
    op: str,
    given: _Arguments,
    weight: tuple[int, ...],
    weight_axes: str,
    state: tuple[int, ...],
    state_axes: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Checks what all operators have and runs the picked backend outside autocast.

    weight: the shape of u; state: that of one sample's state.
    """
    x = given.sequences[0]
    check_weight(op, "u", given.u, weight, weight_axes, x)
    samples, letter = x.shape[0], "B"
    if given.cu_seqlens is not None:
        check_cu_seqlens(op, given.cu_seqlens, given.lengths, x)
        samples, letter = given.cu_seqlens.shape[0] - 1, "S"
    check_lengths(op, given.lengths, x)
    check_state(op, given.state, (samples, *state), f"{letter}, {state_axes}", x)
    check_log_w(op, given.log_w, given.lengths)
    name = choose(op, backend, x.device, _unfit(op, given.sequences, given.log_w))
    kernel = function(op, name)
    form = _native if name == "triton" else _cast if given.cu_seqlens is None else _unpacked
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return form(kernel, given)
    return form(kernel, given)


def _unfit(op: str, sequences: tuple[Tensor, ...], log_w: Tensor) -> str:
    """Why the Triton kernels cannot take these arguments; "" if they can."""
    x = sequences[0]
    if x.dtype == torch.float64 or log_w.dtype == torch.float64:
        return "the inputs are float64 and the kernels compute in float32"
    if op == "wkv4":
        return _strided(("k", "v"), sequences)
    if x.shape[-1] not in _HEAD_SIZES:
        return f"the head size is {x.shape[-1]}, not one of {', '.join(map(str, _HEAD_SIZES))}"
    if x.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 products wrongly (use float32 or float16 there)"
    return _strided(("r", "k", "v", "log_w"), (*sequences, log_w))


def _strided(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> str:
    """Which tensor's neighbouring channels lie apart in memory; "" if none's do."""
    for name, x in zip(names, tensors, strict=True):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"the last dimension of {name} has stride {x.stride(-1)} (call {name}.contiguous() first)"
    return ""


def _native(kernel: Kernel, given: _Arguments) -> tuple[Tensor, Tensor]:
    """Triton: every tensor as it is, nothing is read on the host."""
    sequences, log_w, u, state, *ragged = given
    state = None if state is None else state.float()
    y, state = kernel(*sequences, log_w, u, state, *ragged)
    return y, state


def _unpacked(kernel: Kernel, given: _Arguments) -> tuple[Tensor, Tensor]:
    """Packed sequences as a padded batch through `_cast`, and the output packed again."""
    sequences, log_w, u, state, _, cu_seqlens = given
    assert cu_seqlens is not None
    plan = packing.layout(cu_seqlens, sequences[0].shape[1])
    batch = tuple(packing.unpack(x, plan) for x in sequences)
    decay = packing.unpack(log_w, plan) if log_w.dim() == 4 else log_w
    y, state = _cast(kernel, _Arguments(batch, decay, u, state, plan.lengths, None))
    return packing.pack(y, plan), state


def _cast(kernel: Kernel, given: _Arguments) -> tuple[Tensor, Tensor]:
    """Padded batches in the computing type; the output goes back to the inputs' own."""
    sequences, log_w, u, state, lengths, _ = given
    x = sequences[0]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = None if state is None else state.to(kind)
    inputs = (*(s.to(kind) for s in sequences), log_w.to(kind), u.to(kind), state)
    y, state = kernel(*inputs, _valid(lengths, x))
    return y.to(x.dtype), state


def _valid(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """lengths [B] -> True where a sample has a token [B, T]; None if nothing is padded (read on CPUs)."""
    if lengths is None:
        return None
    if not lengths.is_cuda and not torch.compiler.is_compiling() and bool((lengths == x.shape[1]).all()):
        return None
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
