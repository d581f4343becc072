"""WKV-5 and WKV-6 on Triton: launches, and the torch custom operators around them."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .wkv6_backward import backward
from .wkv6_forward import combine, forward, local

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"


class Tiles(NamedTuple):
    """Tuned on an H100 (docs/kernels.md): steps per chunk, warps and pipeline depth of the two walks."""

    chunk: int
    warps: int
    stages: int
    warps_back: int
    stages_back: int


TILES = {
    16: Tiles(64, 4, 1, 4, 1),
    32: Tiles(64, 4, 1, 4, 1),
    64: Tiles(64, 4, 1, 8, 1),
    128: Tiles(32, 8, 1, 8, 1),
}
"""Head size -> tiles."""

MILD = 60.0
"""Largest decay of a chunk, in powers of two, that one reference point serves (docs/kernels.md)."""

PROGRAMS = 264
"""Walks wanted at least: two on each multiprocessor of an H100. Fewer heads than that are cut into segments."""

SHORTEST = 8
"""Chunks that a segment has at least."""


class Plan(NamedTuple):
    """How a call is cut up: sequences, chunks of the longest, chunks per segment, segments per sequence."""

    sequences: int
    slots: int  # chunk states kept per sequence; packed: in all
    per_segment: int
    segments: int  # per sequence; packed and more than one: programs in all


def plan(r: Tensor, cu: Tensor | None) -> Plan:
    """Chooses segments by the number of heads and steps alone, so equal shapes run alike."""
    batch, time, heads, size = r.shape
    chunk = TILES[size].chunk
    sequences = batch if cu is None else cu.shape[0] - 1
    chunks = -(-time // chunk)
    wanted = -(-PROGRAMS // (sequences * heads))
    longest = chunks if cu is None else -(-chunks // sequences)  # packed: the mean length
    per_segment = max(SHORTEST, -(-longest // wanted))
    if wanted == 1 or per_segment >= chunks:
        return Plan(sequences, chunks if cu is None else chunks + sequences, chunks, 1)
    if cu is None:
        return Plan(sequences, chunks, per_segment, -(-chunks // per_segment))
    return Plan(sequences, chunks + sequences, per_segment, -(-chunks // per_segment) + sequences)


def _table(cu: Tensor, p: Plan, chunk: int) -> tuple[Tensor, Tensor]:
    """Packed segments: (sequence, segment) of each program, -1 for programs left over [P, 2]; first one [S]."""
    lengths = (cu[1:] - cu[:-1]).long()
    steps = p.per_segment * chunk
    counts = ((lengths + steps - 1) // steps).clamp(min=1)  # [S]
    ends = counts.cumsum(0)
    program = torch.arange(p.segments, device=cu.device)
    seq = torch.searchsorted(ends, program, right=True)
    inside = seq < p.sequences
    seq = seq.clamp(max=p.sequences - 1)
    firsts = ends - counts
    segment = torch.where(inside, program - firsts[seq], -1)
    return torch.stack((seq, segment), 1).int().contiguous(), firsts.int()


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in (x.stride()[:3] if x.dim() == 4 else (0, 0, x.stride(0)))]


class _Launch(NamedTuple):
    """What all kernels of one call share."""

    plan: Plan
    grid: tuple[int, int]
    table: Tensor | None
    firsts: Tensor | None
    flags: dict[str, bool]
    n: int
    tiles: Tiles

    @property
    def carried(self) -> bool:
        return self.plan.segments > 1


def _launch(r: Tensor, w: Tensor, cu: Tensor | None, lengths: Tensor | None) -> _Launch:
    p, tiles = plan(r, cu), TILES[r.shape[3]]
    table = firsts = None
    programs = p.sequences * p.segments
    if cu is not None and p.segments > 1:
        table, firsts = _table(cu, p, tiles.chunk)
        programs = p.segments
    flags = {
        "STATIC": w.dim() == 2,
        "PACKED": cu is not None,
        "HAS_LEN": lengths is not None,
        "SPLIT": r.dtype == torch.bfloat16 and not _INTERPRETED,
    }
    return _Launch(p, (r.shape[2], programs), table, firsts, flags, r.shape[3], tiles)


def _carry(
    go: _Launch, a: Tensor, x: Tensor, w: Tensor, start: Tensor | None, end: Tensor | None,
    cu: Tensor | None, lengths: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The state each segment starts from [P, H, V, K]; with `end`, the backward walk's. None: one segment."""
    if not go.carried:
        return None
    time, heads = a.shape[1:3]
    p, n = go.plan, go.n
    carry = torch.empty(go.grid[1], heads, n, n, dtype=torch.float32, device=a.device)
    fades = torch.empty(go.grid[1], heads, n, dtype=torch.float32, device=a.device)
    back = {"REVERSE": end is not None}
    segments = p.segments
    local[go.grid](
        a, x, w, carry, fades, cu, lengths, go.table, time, heads, p.per_segment, segments,
        *_strides(a, x, w), N=n, L=go.tiles.chunk, **go.flags, **back,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    rows = min(n, 16)
    combine[(heads, p.sequences, n // rows)](
        carry, fades, start, end, cu, lengths, go.firsts, time, heads, p.per_segment, segments,
        N=n, ROWS=rows, L=go.tiles.chunk, PACKED=go.flags["PACKED"], HAS_LEN=go.flags["HAS_LEN"],
        HAS_START=start is not None, **back, num_warps=1,
    )  # fmt: skip
    return carry


def _output(like: Tensor, lengths: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, zero where rows past a sample's end stay unwritten."""
    make = torch.empty if lengths is None else torch.zeros
    return make(like.shape, dtype=dtype or like.dtype, device=like.device)


@torch.library.custom_op("visualrwkv::wkv6", mutates_args=())
def _wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None,
    lengths: Tensor | None, cu: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, final state, chunk states for the backward pass: empty without `save`); w [H,N] is RWKV-5."""
    go = _launch(r, w, cu, lengths)
    p, n, tiles = go.plan, go.n, go.tiles
    time, heads = r.shape[1:3]
    y = _output(r, lengths)
    final = torch.empty(p.sequences, heads, n, n, dtype=torch.float32, device=r.device)
    chunks = torch.empty(_chunk_shape(r, cu, save), dtype=torch.float32, device=r.device)
    state = None if state is None else state.contiguous()
    carry = _carry(go, k, v, w, state, None, cu, lengths)
    forward[go.grid](
        r, k, v, w, u.contiguous(), y, state, final, chunks, carry, cu, lengths, go.table,
        time, heads, p.per_segment, p.slots, p.segments, *_strides(r, k, v, w),
        N=n, L=tiles.chunk, LEVELS=tiles.chunk.bit_length() - 1, LIMIT=MILD, **go.flags,
        HAS_STATE=state is not None, CARRY=go.carried, SAVE=save,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y, final, chunks


def _chunk_shape(r: Tensor, cu: Tensor | None, save: bool) -> tuple[int, ...]:
    p, heads, n = plan(r, cu), r.shape[2], r.shape[3]
    slots = p.slots if cu is not None else p.sequences * p.slots
    return (slots if save else 0, heads, n, n)


@_wkv6.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None,
    lengths: Tensor | None, cu: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads, n = r.shape[2], r.shape[3]
    sequences = r.shape[0] if cu is None else cu.shape[0] - 1
    final = r.new_empty((sequences, heads, n, n), dtype=torch.float32)
    chunks = r.new_empty(_chunk_shape(r, cu, save), dtype=torch.float32)
    return r.new_empty(r.shape), final, chunks


@torch.library.custom_op("visualrwkv::wkv6_backward", mutates_args=())
def _wkv6_backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: Tensor | None, cu: Tensor | None,
    chunks: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r, k, v, w, u and the initial state."""
    go = _launch(r, w, cu, lengths)
    p, n, tiles = go.plan, go.n, go.tiles
    time, heads = r.shape[1:3]
    dy = dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dr, dk, dv = (_output(r, lengths) for _ in range(3))
    rows = (go.grid[1], heads, n)
    du = torch.zeros(rows, dtype=torch.float32, device=r.device)
    dw = torch.zeros_like(du) if go.flags["STATIC"] else _output(r, lengths, w.dtype)
    dstate = torch.empty(p.sequences, heads, n, n, dtype=torch.float32, device=r.device)
    carry = _carry(go, r, dy, w, dfinal, dstate, cu, lengths)
    backward[go.grid](
        r, k, v, w, u.contiguous(), dy, dfinal, dr, dk, dv, dw, du, dstate, chunks, carry, cu, lengths,
        go.table, time, heads, p.per_segment, p.slots, p.segments, *_strides(r, k, v, w),
        N=n, L=tiles.chunk, LEVELS=tiles.chunk.bit_length() - 1, LIMIT=MILD, **go.flags,
        HAS_FINAL=dfinal is not None, CARRY=go.carried,
        num_warps=tiles.warps_back, num_stages=tiles.stages_back,
    )  # fmt: skip
    if go.flags["STATIC"]:
        dw = dw.sum(0).to(w.dtype)
    return dr, dk, dv, dw, du.sum(0).to(u.dtype), dstate


@_wkv6_backward.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: Tensor | None, cu: Tensor | None,
    chunks: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sequences = r.shape[0] if cu is None else cu.shape[0] - 1
    like = [r.new_empty(x.shape, dtype=x.dtype) for x in (r, k, v, w, u)]
    state = r.new_empty((sequences, r.shape[2], r.shape[3], r.shape[3]), dtype=torch.float32)
    return (*like, state)  # type: ignore[return-value]


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    r, k, v, w, u, state, lengths, cu, _ = inputs
    ctx.save_for_backward(r, k, v, w, u, lengths, cu, output[2])
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dfinal, dchunks):  # type: ignore[no-untyped-def]
    r, k, v, w, u, lengths, cu, chunks = ctx.saved_tensors
    dy = torch.zeros_like(r) if dy is None else dy
    *most, dstate = torch.ops.visualrwkv.wkv6_backward(r, k, v, w, u, lengths, cu, chunks, dy, dfinal)
    return (*most, dstate if ctx.has_state else None, None, None, None)


_wkv6.register_autograd(_gradients, setup_context=_keep)


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """r, k, v, log_w [B,T,H,N] (log_w [H,N]: RWKV-5); u [H,N]; state [B or S,H,N,N] -> y, state in float32."""
    save = torch.is_grad_enabled() and any(
        x.requires_grad for x in (r, k, v, log_w, u, state) if x is not None
    )
    y, final, _ = _wkv6(r, k, v, log_w, u, state, lengths, cu_seqlens, save)
    return y, final


wkv5 = wkv6
"""RWKV-5 is the same with log_w [H,N]."""
