"""Token shift with its mixes: what a layer sees of this token and of the one before it.

    lerp(x, before, shares)             n mixes with constant shares (RWKV-4, -5, all channel mixes)
    mix6(x, before, low, w2, shares)    the five data-dependent mixes of RWKV-6 ("ddlerp")

Both read x [B, T, D] and `before` [B, D], the token that stood before the first (None: zeros), and compute
x_t + (x_{t-1} - x_t) s in float32 (float64 for float64 inputs), rounding once: to autocast's type where
autocast is on, else to x's type. The gradient reaches x, `before` and every weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import interpreted, pick, register

__all__ = ["activation_dtype", "lerp", "mix6"]

_LARGEST_RANK = 64  # of the low-rank shares that the Triton kernels hold in registers


def activation_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products give activations like x: autocast's, or x's own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def unfit(*tensors: Tensor) -> str:
    """Why Triton cannot take these tensors; the empty string if it can."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "float64 tensors"
    return ""


def wide(x: Tensor) -> Tensor:
    """x in the computing type: float32, or float64 as it was given."""
    return x if x.dtype == torch.float64 else x.float()


def lerp(
    x: Tensor,
    before: Tensor | None,
    shares: Sequence[Tensor],
    *,
    current: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """x_t + (x_{t-1} - x_t) s_i for up to four shares s_i (D elements each) -> as many tensors [B, T, D].

    current: the weights are shares of the current token, 1 - s_i, as RWKV-4 and 5 store them. Source:
    Peng et al. 2023 (arXiv 2305.13048) equations 11 to 13; Peng et al. 2024 (arXiv 2404.05892) equation 3.
    """
    _check("lerp", x, before)
    if not 1 <= len(shares) <= 4:
        raise ValueError(f"lerp: {len(shares)} shares; give one to four")
    rows = [s.reshape(1, -1) for s in shares]
    if any(r.shape[1] != x.shape[2] for r in rows):
        found = [r.shape[1] for r in rows]
        raise ValueError(f"lerp: shares have {found} elements; expected D = {x.shape[2]} each")
    table = rows[0] if len(rows) == 1 else torch.cat(rows)  # [n, D]
    before = None if before is None else before.to(x.dtype)
    run = pick("lerp", backend, x.device, unfit(x, table))
    return run(x, before, table, current, activation_dtype(x))


def mix6(
    x: Tensor,
    before: Tensor | None,
    low: Tensor,
    w2: Tensor,
    shares: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """x_t + (x_{t-1} - x_t) (m_i + low_i W_i), i = 0..4 -> five tensors [B, T, D].

    low [B, T, 5 * rank]: rows of the five low-rank maps, one after the other; w2 [5, rank, D]: W_i (cast to
    low's type); shares: five m_i of D elements. Source: Peng et al. 2024 (arXiv 2404.05892), equations 14
    to 16.
    """
    _check("mix6", x, before)
    batch, time, width = x.shape
    if w2.dim() != 3 or w2.shape[0] != 5 or w2.shape[2] != width:
        raise ValueError(f"mix6: w2 has shape {list(w2.shape)}; expected [5, rank, {width}]")
    if list(low.shape) != [batch, time, 5 * w2.shape[1]]:
        wanted = [batch, time, 5 * w2.shape[1]]
        raise ValueError(f"mix6: low has shape {list(low.shape)}; expected [B, T, 5 * rank] = {wanted}")
    if len(shares) != 5 or any(s.numel() != width for s in shares):
        raise ValueError(f"mix6: shares must be five tensors of D = {width} elements")
    table = torch.cat([s.reshape(1, -1) for s in shares])  # [5, D]
    before = None if before is None else before.to(x.dtype)
    why = unfit(x, low, table) or (f"a rank of {w2.shape[1]}" if w2.shape[1] > _LARGEST_RANK else "")
    if interpreted() and low.dtype == torch.bfloat16:
        why = "Triton's interpreter computes bfloat16 products wrongly"
    run = pick("mix6", backend, x.device, why)
    return run(x, before, low, w2.to(low.dtype), table, activation_dtype(x))


def _check(op: str, x: Tensor, before: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected [B, T, D] with T of 1 or more")
    if before is not None and list(before.shape) != [x.shape[0], x.shape[2]]:
        wanted = [x.shape[0], x.shape[2]]
        raise ValueError(f"{op}: before has shape {list(before.shape)}; expected [B, D] = {wanted}")


def shifted(x: Tensor, before: Tensor | None) -> Tensor:
    """The previous token of each position of x [B, T, D]; `before` [B, D] or zeros in front of the first."""
    first = torch.zeros_like(x[:, :1]) if before is None else before.unsqueeze(1)
    return first if x.shape[1] == 1 else torch.cat((first, x[:, :-1]), dim=1)


def _lerp(
    x: Tensor, before: Tensor | None, shares: Tensor, current: bool, dtype: torch.dtype
) -> list[Tensor]:
    """The definition of `lerp` in plain PyTorch."""
    now, previous, shares = wide(x), wide(shifted(x, before)), wide(shares)
    if current:
        return [torch.lerp(previous, now, s).to(dtype) for s in shares]
    change = previous - now
    return [torch.addcmul(now, change, s).to(dtype) for s in shares]


def _mix6(
    x: Tensor, before: Tensor | None, low: Tensor, w2: Tensor, maa: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The definition of `mix6` in plain PyTorch."""
    now = wide(x)
    change = wide(shifted(x, before)) - now
    rows = low.unflatten(-1, (5, -1)).flatten(0, 1).transpose(0, 1)  # [5, B*T, rank]
    shares = wide(torch.bmm(rows, w2)).view(5, *x.shape)  # [5, B, T, D]
    return [torch.addcmul(now, change, m + s).to(dtype) for m, s in zip(wide(maa), shares, strict=True)]


register("lerp", reference=_lerp, torch=_lerp, triton="kernels.gpu.lerp:lerp")
register("mix6", reference=_mix6, torch=_mix6, triton="kernels.gpu.mix:mix6")
