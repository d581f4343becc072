"""The definition of each recurrence: one readable step at a time, differentiable by autograd.

Equations: RWKV-4 arXiv 2305.13048 (stable form of its appendix), RWKV-5 and RWKV-6 arXiv 2404.05892.
All functions take tensors of one computing type (float32 or float64) and keep it. Padded steps
(`valid` [B, T] False) keep the state and give zero output; their inputs are replaced, not multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wkv4(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k, v [B,T,D]; log_w, u [D]; state [B,3,D] = (a, b, p) -> y [B,T,D], state.

    The sums are a e^p (numerator) and b e^p (denominator); p is the running maximum exponent.
    """
    if state is None:
        a, b = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])  # [B, D]
        p = torch.full_like(a, -1e38)
    else:
        a, b, p = state.unbind(1)
    ys = []
    for t in range(k.shape[1]):
        live = None if valid is None else valid[:, t, None]  # [B, 1]
        kt, vt = clean(k[:, t], live), clean(v[:, t], live)
        q = torch.maximum(p, u + kt)
        old, new = torch.exp(p - q), torch.exp(u + kt - q)
        ys.append(clean((old * a + new * vt) / (old * b + new), live))
        q = torch.maximum(p + log_w, kt)
        old, new = torch.exp(p + log_w - q), torch.exp(kt - q)
        a, b, p = keep(old * a + new * vt, a, live), keep(old * b + new, b, live), keep(q, p, live)
    return torch.stack(ys, 1), torch.stack((a, b, p), 1)


def wkv5(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `wkv6`, with one decay for all time steps: log_w [H,N]."""
    return wkv6(r, k, v, log_w.expand_as(k), u, state, valid)


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """r, k, v, log_w [B,T,H,N]; u [H,N]; state [B,H,N,N] (key, value) -> y [B,T,H,N], state.

    y_t = r_t (diag(u) k_t' v_t + S_{t-1}),  S_t = diag(w_t) S_{t-1} + k_t' v_t.
    """
    s = k.new_zeros(*k[:, 0].shape, k.shape[-1]) if state is None else state  # [B, H, N, N]
    ys = []
    for t in range(k.shape[1]):
        live = None if valid is None else valid[:, t, None, None]  # [B, 1, 1]
        rt, kt, vt = (clean(x[:, t], live) for x in (r, k, v))
        w = torch.exp(clean(log_w[:, t], live))  # [B, H, N]
        kv = kt.unsqueeze(-1) * vt.unsqueeze(-2)  # [B, H, N, N]
        ys.append((rt.unsqueeze(-1) * (u.unsqueeze(-1) * kv + s)).sum(-2))
        s = w.unsqueeze(-1) * s + kv
    return torch.stack(ys, 1), s


def clean(x: Tensor, live: Tensor | None) -> Tensor:
    """x, with zeros where a sample has ended: a NaN there reaches neither results nor gradients."""
    return x if live is None else torch.where(live, x, 0.0)


def keep(new: Tensor, old: Tensor, live: Tensor | None) -> Tensor:
    """The new value where a sample still runs, else the old one."""
    return new if live is None else torch.where(live, new, old)
