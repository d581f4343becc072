"""RWKV-4 without a loop over time: a doubling scan inside blocks, a short loop over blocks.

The running maximum exponent P_t = max(P_{t-1} + log_w, k_t) is scanned first. With it the sums are a linear
recurrence S_t = lam_t S_{t-1} + e_t (v_t, 1) whose factors lie in [0, 1] (one of lam_t, e_t is 1), so that
nothing can overflow whatever k and log_w are. Its gradient is the same recurrence run backwards. P is only
a choice of scale: no gradient passes through it, except where a caller reads the final exponent itself.

Rows 0..T of the buffers are the states before step 0, after step 0, ..., after step T-1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference

_BLOCK = 16
_EMPTY = -1e38


def wkv4(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k, v [B,T,D]; log_w, u [D]; state [B,3,D] or None; valid [B,T] -> y [B,T,D], state [B,3,D]."""
    if k.shape[1] == 1 and not torch.is_grad_enabled():  # decoding: one step is one step
        return reference.wkv4(k, v, log_w, u, state, valid)
    if valid is None:
        return _Scan.apply(k, v, log_w, u, state, None)
    live = valid.unsqueeze(-1)  # [B, T, 1]
    k, v = torch.where(live, k, 0.0), torch.where(live, v, 0.0)
    y, last = _Scan.apply(k, v, log_w, u, state, valid.sum(1))
    return torch.where(live, y, 0.0), last


class _Scan(torch.autograd.Function):
    """The scan and its gradient; `ends` [B] is the row of each sample's final state (None: row T)."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, ends: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        time = k.shape[1]
        p = _exponents(k, log_w, state)  # [B, rows, D]
        gap = k - p[:, :time] - log_w
        enter = gap.clamp(max=0).exp_()  # e_t [B, T, D]
        lam = torch.zeros_like(p)  # lam[:, t] leads from row t to row t + 1
        torch.exp(gap.neg_().clamp_(max=0), out=lam[:, :time])
        s = _states(v, enter, lam, state)  # [2, B, rows, D]
        gap = u + k - p[:, :time]
        new = gap.clamp(max=0).exp_()
        old = gap.neg_().clamp_(max=0).exp_()
        den = torch.addcmul(new, old, s[1, :, :time])
        y = torch.addcmul(new * v, old, s[0, :, :time]).div_(den)
        last = torch.stack((_row(s[0], ends, time), _row(s[1], ends, time), _row(p, ends, time)), 1)
        ctx.save_for_backward(k, v, log_w, state, ends, enter, lam, s, old, new, den, y, last)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        k, v, log_w, state, ends, enter, lam, s, old, new, den, y, last = ctx.saved_tensors
        time = k.shape[1]
        dy = torch.zeros_like(y) if dy is None else dy
        dnum = dy / den
        dden = -dnum * y
        g = torch.zeros_like(s)  # gradient of each row's (a, b)
        torch.mul(old, dnum, out=g[0, :, :time])
        torch.mul(old, dden, out=g[1, :, :time])
        if dlast is not None:
            _add_row(g, dlast[:, :2].transpose(0, 1), ends, time)
        _scan(g[:, :, 1:], lam[:, 1:].clone(), backwards=True)
        g[:, :, 0].addcmul_(lam[:, 0], g[:, :, 1])
        dv = new * dnum
        dk = torch.addcmul(new * dden, dv, v)
        du = dk.sum((0, 1))
        after, before = g[:, :, 1 : time + 1], s[:, :, :time]
        dv.addcmul_(enter, after[0])
        dk.addcmul_(enter, torch.addcmul(after[1], after[0], v))
        flow = (before[0] * after[0]).addcmul_(before[1], after[1])
        dw = flow.mul_(lam[:, :time]).sum((0, 1))
        dstate = None if state is None else _initial(g[:, :, 0], state)
        if dlast is not None:
            dw = dw + _through_exponent(dlast, last, k, log_w, state, ends, dk, dstate)
        return dk, dv, dw, du, dstate, None


def _exponents(k: Tensor, log_w: Tensor, state: Tensor | None) -> Tensor:
    """P of rows 0..T, padded so that the rows after 0 fill whole blocks: [B, 1 + blocks*block, D]."""
    batch, time, width = k.shape
    block = _block(time)
    p = k.new_full((batch, 1 + -(-time // block) * block, width), _EMPTY)
    p[:, 1 : time + 1] = k
    if state is not None:
        p[:, 0] = state[:, 2]
        p[:, 1] = torch.maximum(p[:, 1], p[:, 0] + log_w)
    steps = torch.arange(1, block + 1, device=k.device, dtype=k.dtype).unsqueeze(1) * log_w  # [block, D]
    blocks = p[:, 1:].unflatten(1, (-1, block))
    size = 1
    while size < block:
        pairs = blocks.unflatten(2, (-1, 2, size))
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        torch.maximum(second, first[..., -1:, :] + steps[:size], out=second)
        size *= 2
    for i in range(1, blocks.shape[1]):
        torch.maximum(blocks[:, i], blocks[:, i - 1, -1:] + steps, out=blocks[:, i])
    return p


def _states(v: Tensor, enter: Tensor, lam: Tensor, state: Tensor | None) -> Tensor:
    """The scaled sums (a, b) of all rows: [2, B, rows, D]."""
    time = v.shape[1]
    s = v.new_zeros(2, *lam.shape)
    torch.mul(enter, v, out=s[0, :, 1 : time + 1])
    s[1, :, 1 : time + 1] = enter
    if state is not None:
        s[:, :, 0] = state[:, :2].transpose(0, 1)
        s[:, :, 1].addcmul_(lam[:, 0], s[:, :, 0])
    _scan(s[:, :, 1:], lam[:, :-1].clone())
    return s


def _scan(x: Tensor, c: Tensor, *, backwards: bool = False) -> None:
    """In place x_t += c_t x_{t-1} from the front (or x_t += c_t x_{t+1} from the back); destroys c.

    x [2, B, rows, D], c [B, rows, D], whole blocks of rows. Pairs of runs double in length: the later run
    takes in the earlier one's last row, times the product of factors in between.
    """
    block = _block(x.shape[2])
    xs, cs = x.unflatten(2, (-1, block)), c.unflatten(1, (-1, block))
    done, todo, edge = (1, 0, slice(0, 1)) if backwards else (0, 1, slice(-1, None))
    size = 1
    while size < block:
        xp, cp = xs.unflatten(3, (-1, 2, size)), cs.unflatten(2, (-1, 2, size))
        factor = cp[:, :, :, todo]
        xp[:, :, :, :, todo].addcmul_(factor, xp[:, :, :, :, done, edge])
        factor.mul_(cp[:, :, :, done, edge])
        size *= 2
    order = range(xs.shape[2])
    for i in list(reversed(order) if backwards else order)[1:]:
        xs[:, :, i].addcmul_(cs[:, i], xs[:, :, i + 1 if backwards else i - 1, edge])


def _block(rows: int) -> int:
    """Rows a doubling scan covers: a power of two, no more than `_BLOCK` and not far above `rows`."""
    return min(_BLOCK, 1 << (rows - 1).bit_length())


def _row(x: Tensor, ends: Tensor | None, time: int) -> Tensor:
    """Row `ends[b]` (or `time`) of x [B, rows, D]: [B, D]."""
    return x[:, time] if ends is None else x[torch.arange(len(ends), device=x.device), ends]


def _add_row(g: Tensor, x: Tensor, ends: Tensor | None, time: int) -> None:
    """Adds x [2, B, D] to row `ends[b]` (or `time`) of g [2, B, rows, D]."""
    if ends is None:
        g[:, :, time] += x
    else:
        g[:, torch.arange(len(ends), device=g.device), ends] += x


def _initial(g: Tensor, state: Tensor) -> Tensor:
    """Gradient of the initial (a, b, p) from that of its scaled sums g [2, B, D]: [B, 3, D]."""
    return torch.stack((g[0], g[1], g[0] * state[:, 0] + g[1] * state[:, 1]), 1)


def _through_exponent(
    dlast: Tensor,
    last: Tensor,
    k: Tensor,
    log_w: Tensor,
    state: Tensor | None,
    ends: Tensor | None,
    dk: Tensor,
    dstate: Tensor | None,
) -> Tensor:
    """Sends the gradient of the final exponent p to the step that set it; returns its part of log_w's.

    Zero (to rounding) for a caller that uses the state as a whole, since (a, b, p) and (a e^c, b e^c, p - c)
    mean the same. Adds into dk and dstate.
    """
    dp = dlast[:, 2] - dlast[:, 0] * last[:, 0] - dlast[:, 1] * last[:, 1]  # [B, D]
    time = k.shape[1]
    n = torch.full_like(k[:, :1, 0], time, dtype=torch.int64) if ends is None else ends.unsqueeze(1)  # [B, 1]
    age = n - 1 - torch.arange(time, device=k.device)  # [B, T]
    level = torch.addcmul(k, age.unsqueeze(-1).to(k.dtype), log_w)
    best, step = level.masked_fill_((age < 0).unsqueeze(-1), -torch.inf).max(1)  # [B, D]
    start = state[:, 2] if state is not None else torch.full_like(best, _EMPTY)
    kept = start + n * log_w >= best  # the initial exponent is still the largest
    dk.scatter_add_(1, step.unsqueeze(1), torch.where(kept, 0.0, dp).unsqueeze(1))
    if dstate is not None:
        dstate[:, 2] += torch.where(kept, dp, 0.0)
    return (dp * torch.where(kept, n, n - 1 - step)).sum(0)
