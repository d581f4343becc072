"""RWKV-5 and RWKV-6 in chunks: matrix products over time, exact for any decay.

Inside a chunk the weight of step s in step t > s is the product of the decays strictly between them. It is
built by doubling: base blocks first, then pairs of neighbouring blocks, each product of decays split at the
border between the two blocks, so both parts lie in [0, 1] and nothing can overflow. Queries are carried
relative to their block's start, keys relative to its end; at chunk size they are what the state needs.
Inside a base block the split is at its start, which divides by decays: a base block is only as long as its
total decay stays above e^-RANGE (`_plan` reads the decays to choose), one step long if need be. Ordinary
decays make the base block the whole chunk. Between chunks the state is carried by a loop.

The gradient of log_w is summed at the level where each decay is used. It is never formed as a difference of
sums over all pairs (except inside base blocks), which loses all digits where decays are strong.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RANGE = 20.0  # largest total |log decay| of a base block: factors up to e^20, relative error about 1e-6
_WHOLE = 64  # longest chunk when it is one base block
_EXACT = 16  # chunk of several base blocks


def wkv5(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `wkv6` with log_w [H,N]; without padding the decay factors are formed once for the whole batch."""
    return wkv6(r, k, v, log_w.expand(1, *k.shape[1:]), u, state, valid)


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """r, k, v [B,T,H,N]; log_w [B or 1,T,H,N]; u [H,N]; state [B,H,N,N]; valid [B,T] -> y, state."""
    live = None if valid is None else valid[..., None, None]  # [B, T, 1, 1]
    if live is not None:
        r, k, v, log_w = (torch.where(live, x, 0.0) for x in (r, k, v, log_w))
    if r.shape[1] == 1 and not torch.is_grad_enabled():
        return _step(r, k, v, log_w, u, state)
    return _Chunked.apply(r, k, v, log_w, u, state, *_plan(log_w))


def _step(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token (T = 1), as in decoding; only without gradients."""
    rt, kt, vt = r[:, 0], k[:, 0], v[:, 0]  # [B, H, N]
    y = (rt * u * kt).sum(-1, keepdim=True) * vt
    kv = kt.unsqueeze(-1) * vt.unsqueeze(-2)  # [B, H, N, N]
    state = torch.zeros_like(kv) if state is None else state
    y = y + torch.matmul(rt.unsqueeze(-2), state).squeeze(-2)
    return y.unsqueeze(1), torch.addcmul(kv, log_w[:, 0].exp().unsqueeze(-1), state)


def _plan(log_w: Tensor) -> tuple[int, int]:
    """(chunk, base block) for these decays [B,T,H,N]: one base block a chunk if the range allows it."""
    log_w = log_w.detach()
    time, size = log_w.shape[1], log_w.shape[3]
    longest = _WHOLE if size <= 32 else _WHOLE // 2
    pieces = -(-time // longest)
    whole = -(-time // pieces)
    if float(log_w.amin()) * whole >= -RANGE or _fits(log_w, whole):
        return whole, whole
    base = next((b for b in (16, 8, 4, 2) if _fits(log_w, b)), 1)
    return _EXACT, base


def _fits(log_w: Tensor, block: int) -> bool:
    """Whether every aligned block of that many steps decays by no more than e^-RANGE."""
    time = log_w.shape[1]
    full = time // block * block
    worst = 0.0
    if full:
        worst = float(log_w[:, :full].unflatten(1, (-1, block)).sum(2).amin())
    if full < time:
        worst = min(worst, float(log_w[:, full:].sum(1).amin()))
    return worst >= -RANGE


class _Base(NamedTuple):
    """Factors inside base blocks: queries, inverse keys and what multiplies them, [B,H,C,n,b,N]."""

    q: Tensor
    inverse: Tensor
    rise: Tensor  # r -> q
    fall: Tensor  # k -> inverse
    total: Tensor  # decay of a whole block [.., n, 1, N]


class _Level(NamedTuple):
    """One doubling: queries of the second, keys of the first blocks, total decays of both [.., n/2, 1, N]."""

    q: Tensor
    k: Tensor
    first: Tensor
    second: Tensor


class _Tree(NamedTuple):
    """All that the doubling computes: levels, weights A [B,H,C,L,L] (below the diagonal), chunk factors."""

    base: _Base
    levels: list[_Level]
    weights: Tensor
    q: Tensor  # [B, H, C, L, N], relative to the chunk's start
    k: Tensor  # [B, H, C, L, N], relative to the chunk's end
    total: Tensor  # [.., C, 1, N]


class _Chunked(torch.autograd.Function):
    """The chunked form and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_w: Tensor,
        u: Tensor,
        state: Tensor | None,
        chunk: int,
        base: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        time = r.shape[1]
        r, k, v, log_w = (_split(x, chunk) for x in (r, k, v, log_w))  # [B, H, C, L, N]
        tree = _grow(r, k, log_w, base)
        bonus = torch.matmul(r * k, u[:, None, :, None]).squeeze(-1)  # [B, H, C, L]
        tree.weights.diagonal(dim1=-2, dim2=-1).copy_(bonus)
        y = torch.matmul(tree.weights, v)
        starts, last = _carry(torch.matmul(tree.k.mT, v), tree.total, state)
        if starts is not None:
            y += torch.matmul(tree.q, starts)
        ctx.save_for_backward(r, k, v, u, starts, *_flat(tree))
        ctx.sizes = (time, len(tree.levels), log_w.shape[0], state is not None)
        return _join(y, time), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing gives them away as they are read
        with torch.autocast(saved[0].device.type, enabled=False):  # called inside autocast, it would round
            return _Chunked.gradients(ctx, saved, dy, dlast)

    @staticmethod
    def gradients(
        ctx: Any, kept: tuple[Tensor, ...], dy: Tensor | None, dlast: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each input, in order; kept: what `forward` saved."""
        r, k, v, u, starts, *saved = kept
        time, n_levels, decay_batch, has_state = ctx.sizes
        tree = _unflat(saved, n_levels)
        dy = torch.zeros_like(v) if dy is None else _split(dy, v.shape[3])
        ends, dstate = _carry_back(tree, dy, dlast, has_state)
        dweights = torch.matmul(dy, v.mT)  # [B, H, C, L, L]
        dbonus = dweights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()  # [B, H, C, L, 1]
        dv = torch.matmul(tree.weights.mT, dy)
        dq = dk = dtotal = None
        if starts is not None:
            dq = torch.matmul(dy, starts.mT)
        if ends is not None:
            dv += torch.matmul(tree.k, ends)
            dk = torch.matmul(v, ends.mT)
            if starts is not None:
                dtotal = tree.total * (starts * ends).sum(-1).unsqueeze(-2)  # [B, H, C, 1, N]
        dr, dk, dlog_w = _shrink(tree, dweights.tril_(-1), dq, dk, dtotal, decay_batch)
        uk = u[:, None, None, :]
        du = (dbonus * r * k).sum((0, 2, 3))
        dr = dr.addcmul_(dbonus, uk * k)
        dk = dk.addcmul_(dbonus, uk * r)
        grads = (_join(x, time) for x in (dr, dk, dv, dlog_w))
        return *grads, du, dstate, None, None


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B,T,H,N] -> contiguous [B,H,C,L,N], zeros after T (a zero log decay keeps the state)."""
    batch, time, heads, size = x.shape
    padded = -(-time // chunk) * chunk
    x = x.transpose(1, 2)  # [B, H, T, N]
    if padded == time:
        return x.contiguous().view(batch, heads, -1, chunk, size)
    out = x.new_zeros(batch, heads, padded, size)
    out[:, :, :time] = x
    return out.view(batch, heads, -1, chunk, size)


def _join(x: Tensor, time: int) -> Tensor:
    """[B,H,C,L,N] -> contiguous [B,T,H,N]."""
    return x.flatten(2, 3)[:, :, :time].transpose(1, 2).contiguous()


def _grow(r: Tensor, k: Tensor, log_w: Tensor, base: int) -> _Tree:
    """Base blocks, then doublings up to the chunk."""
    chunk = r.shape[3]
    start, below, keys = _grow_base(r, k, log_w, base)
    weights = below
    if base < chunk:
        weights = r.new_zeros(*r.shape[:4], chunk)
        _blocks(weights, base).copy_(below)
    q, total = start.q, start.total
    levels = []
    while (n := q.shape[3]) > 1:
        size = chunk // n
        qp, kp, tp = (x.unflatten(3, (-1, 2)) for x in (q, keys, total))
        level = _Level(qp[..., 1, :, :], kp[..., 0, :, :], tp[..., 0, :, :], tp[..., 1, :, :])
        _blocks(weights, 2 * size)[..., size:, :size] = torch.matmul(level.q, level.k.mT)
        q = torch.stack((qp[..., 0, :, :], level.q * level.first), -3).flatten(-3, -2)
        keys = torch.stack((level.k * level.second, kp[..., 1, :, :]), -3).flatten(-3, -2)
        total = level.first * level.second
        levels.append(level)
    weights = weights.view(*r.shape[:4], chunk)
    return _Tree(start, levels, weights, q.squeeze(3), keys.squeeze(3), total.squeeze(3))


def _grow_base(r: Tensor, k: Tensor, log_w: Tensor, base: int) -> tuple[_Base, Tensor, Tensor]:
    """Factors of the base blocks, their weights [B,H,C,n,b,b] below the diagonal, keys to the block's end."""
    r, k, log_w = (x.unflatten(3, (-1, base)) for x in (r, k, log_w))  # [B, H, C, n, b, N]
    if base == 1:
        total = log_w.exp()
        one = torch.ones((), dtype=r.dtype, device=r.device)
        return _Base(r, k, one, one, total), r.new_zeros(*r.shape[:-1], 1), k
    decay = log_w.cumsum(-2).exp_()  # up to and with each step
    rise = torch.ones_like(decay)
    rise[..., 1:, :] = decay[..., :-1, :]
    fall = decay.reciprocal()
    total = decay[..., -1:, :]
    q, inverse = r * rise, k * fall
    below = torch.matmul(q, inverse.mT).tril_(-1)
    return _Base(q, inverse, rise, fall, total), below, inverse * total


def _blocks(weights: Tensor, size: int) -> Tensor:
    """View of the diagonal blocks of weights [B,H,C,L,L]: [B,H,C,L/size,size,size]."""
    n = weights.shape[-1] // size
    view = weights.unflatten(-1, (n, size)).unflatten(-3, (n, size))  # [B, H, C, n, size, n, size]
    return view.diagonal(dim1=3, dim2=5).movedim(-1, 3)


def _carry(kv: Tensor, total: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """States before each chunk [B,H,C,N,N] and after the last; None if the only one before is zero."""
    if kv.shape[2] == 1 and state is None:
        return None, kv[:, :, 0]
    starts = torch.empty_like(kv)
    decay = total.mT  # [.., C, N, 1]
    now = torch.zeros_like(kv[:, :, 0]) if state is None else state
    for c in range(kv.shape[2]):
        starts[:, :, c] = now
        now = torch.addcmul(kv[:, :, c], decay[:, :, c], now)
    return starts, now


def _carry_back(
    tree: _Tree, dy: Tensor, dlast: Tensor | None, has_state: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the states after each chunk [B,H,C,N,N] (None: zero) and of the initial state."""
    chunks = dy.shape[2]
    if chunks == 1 and not has_state:
        return (None if dlast is None else dlast.unsqueeze(2)), None
    into = torch.matmul(tree.q.mT, dy)  # [B, H, C, N, N]
    decay = tree.total.mT
    ends = torch.empty_like(into)
    now = torch.zeros_like(into[:, :, 0]) if dlast is None else dlast
    for c in reversed(range(chunks)):
        ends[:, :, c] = now
        now = torch.addcmul(into[:, :, c], decay[:, :, c], now)
    return ends, now if has_state else None


def _shrink(
    tree: _Tree,
    dweights: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dtotal: Tensor | None,
    decay_batch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of r, k and log_w from those of the weights, the chunk factors and log(total decay)."""
    if tree.levels or tree.base.q.shape[4] == 1:
        dq, dk, dtotal = (
            (torch.zeros_like(like) if x is None else x).unsqueeze(3)
            for x, like in ((dq, tree.q), (dk, tree.k), (dtotal, tree.q[..., :1, :]))
        )
        for level in reversed(tree.levels):
            dq, dk, dtotal = _shrink_level(level, dweights, dq, dk, dtotal)
        dweights = _blocks(dweights, tree.base.q.shape[4])
    else:
        dweights = dweights.unsqueeze(3)
        dq, dk, dtotal = (None if x is None else x.unsqueeze(3) for x in (dq, dk, dtotal))
    return _shrink_base(tree.base, dweights, dq, dk, dtotal, decay_batch)


def _shrink_level(
    level: _Level, dweights: Tensor, dq: Tensor, dk: Tensor, dtotal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One doubling backwards: gradients of the parts from those of the joined blocks."""
    size = level.q.shape[-2]
    dqp, dkp = dq.unflatten(-2, (2, size)), dk.unflatten(-2, (2, size))  # [B, H, C, n, 2, size, N]
    dq2 = dqp[..., 1, :, :] * level.first
    dk1 = dkp[..., 0, :, :] * level.second
    dfirst = dtotal + (level.q * dq2).sum(-2, keepdim=True)
    dsecond = dtotal + (level.k * dk1).sum(-2, keepdim=True)
    pair = _blocks(dweights, 2 * size)[..., size:, :size]
    dq2 += torch.matmul(pair, level.k)
    dk1 += torch.matmul(pair.mT, level.q)
    return (
        torch.stack((dqp[..., 0, :, :], dq2), -3).flatten(3, 4),
        torch.stack((dk1, dkp[..., 1, :, :]), -3).flatten(3, 4),
        torch.stack((dfirst, dsecond), -3).flatten(3, 4),
    )


def _shrink_base(
    base: _Base,
    dweights: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dtotal: Tensor | None,
    decay_batch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Base blocks backwards: gradients of r, k and log_w, all [B,H,C,L,N] (log_w's B may be 1)."""
    if base.q.shape[-2] == 1:
        assert dq is not None and dk is not None and dtotal is not None
        return dq.flatten(3, 4), dk.flatten(3, 4), _reduce(dtotal, decay_batch).flatten(3, 4)
    din = torch.matmul(dweights, base.inverse)
    dq = din if dq is None else dq.add_(din)
    dinverse = torch.matmul(dweights.mT, base.q)
    if dk is not None:
        dk = dk * base.total
        dkeys = _reduce((base.inverse * dk).sum(-2, keepdim=True), decay_batch)
        dinverse += dk
    flow = _reduce(base.inverse * dinverse, decay_batch).neg_()
    flow[..., :-1, :] += _reduce(base.q * dq, decay_batch)[..., 1:, :]
    dlog_w = flow.flip(-2).cumsum(-2).flip(-2)  # what reaches past step t, without what starts later
    if dk is not None:
        dlog_w += dkeys
    if dtotal is not None:
        dlog_w += _reduce(dtotal, decay_batch)
    return (dq * base.rise).flatten(3, 4), (dinverse * base.fall).flatten(3, 4), dlog_w.flatten(3, 4)


def _reduce(x: Tensor, batch: int) -> Tensor:
    """x, summed over the batch where one decay serves it all."""
    return x if x.shape[0] == batch else x.sum(0, keepdim=True)


def _flat(tree: _Tree) -> list[Tensor]:
    """The tensors of a tree in a fixed order, for `save_for_backward`."""
    levels = (x for level in tree.levels for x in level)
    return [*tree.base, *levels, tree.weights, tree.q, tree.k, tree.total]


def _unflat(saved: list[Tensor], n_levels: int) -> _Tree:
    """Undoes `_flat`."""
    levels = [_Level(*saved[5 + 4 * i : 9 + 4 * i]) for i in range(n_levels)]
    return _Tree(_Base(*saved[:5]), levels, *saved[5 + 4 * n_levels :])
