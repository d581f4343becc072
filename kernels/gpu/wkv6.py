"""WKV-5 and WKV-6 on Triton: launches, and the torch custom operators around them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import Launch, operator
from .wkv6_backward import backward, backward_strong
from .wkv6_forward import combine, local, strong_scores, walk

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"


class Tiles(NamedTuple):
    """Steps per chunk; value channels, warps and pipeline depth of a walk; key channels and warps of a
    backward program. Tuned on an H100 with `python -m benchmarks.tune_kernels`."""

    chunk: int
    values: int
    warps: int
    stages: int
    keys: int
    warps_back: int


TILES = {
    16: Tiles(32, 16, 4, 1, 16, 4),
    32: Tiles(32, 32, 4, 1, 32, 4),
    64: Tiles(64, 64, 4, 2, 32, 4),
    128: Tiles(32, 64, 4, 1, 32, 4),
}
"""Head size -> tiles."""

MILD = 60.0
"""Largest decay of a chunk, in powers of two, that one reference point serves (docs/kernels.md)."""

PROGRAMS = 264
"""Walks that run at once: two on each multiprocessor of an H100. Fewer or more are cut into segments."""

LOCAL = 0.5
"""What the pass that segments need first costs of the walk itself."""

SHORTEST = 8
"""Chunks that a segment has at least."""

LEAF = 3
"""Strong chunks: blocks of 2^LEAF steps that are mild in themselves take one reference."""


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
    longest = chunks if cu is None else -(-chunks // sequences)  # packed: the mean length
    per_segment = _segment(sequences * heads, longest, PROGRAMS, SHORTEST)
    if per_segment >= longest:
        return Plan(sequences, chunks if cu is None else chunks + sequences, chunks, 1)
    if cu is None:
        return Plan(sequences, chunks, per_segment, -(-chunks // per_segment))
    return Plan(sequences, chunks + sequences, per_segment, -(-chunks // per_segment) + sequences)


@functools.cache
def _segment(walks: int, chunks: int, programs: int, shortest: int) -> int:
    """Chunks per segment: what takes the fewest chunks one after another, in waves of `programs` walks."""

    def cost(pieces: int) -> float:
        length = -(-chunks // pieces)
        waves = -(-(walks * -(-chunks // length)) // programs)
        return waves * length * (1.0 if pieces == 1 else 1 + LOCAL)

    pieces = min(range(1, max(1, chunks // shortest) + 1), key=cost)
    return -(-chunks // pieces)


def _table(cu: Tensor, steps: int, programs: int) -> tuple[Tensor, Tensor]:
    """Packed: (sequence, piece of `steps` steps) of each program [P, 2], -1 if left over; first one [S].

    Made on the device: nothing waits for the lengths.
    """
    lengths = (cu[1:] - cu[:-1]).long()
    counts = ((lengths + steps - 1) // steps).clamp(min=1)  # [S]
    ends = counts.cumsum(0)
    return _pieces(ends, ends - counts, programs)


def _chunk_table(cu: Tensor, chunk: int, programs: int) -> Tensor:
    """(sequence, chunk) of each chunk state: sequence s has those from cu[s] // chunk + s on."""
    firsts = torch.div(cu[:-1].long(), chunk, rounding_mode="floor") + torch.arange(
        cu.shape[0] - 1, device=cu.device
    )
    last = firsts.new_full((1,), programs)
    return _pieces(torch.cat((firsts[1:], last)), firsts, programs)[0]


def _pieces(ends: Tensor, firsts: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    program = torch.arange(programs, device=ends.device)
    seq = torch.searchsorted(ends, program, right=True)
    inside = seq < ends.shape[0]
    seq = seq.clamp(max=ends.shape[0] - 1)
    piece = torch.where(inside, program - firsts[seq], -1)
    return torch.stack((seq, piece), 1).int().contiguous(), firsts.int()


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in (x.stride()[:3] if x.dim() == 4 else (0, 0, x.stride(0)))]


class _Launch(NamedTuple):
    """What all kernels of one call share."""

    plan: Plan
    grid: tuple[int, int]
    table: Tensor | None
    firsts: Tensor | None
    slots: int  # chunk states in all
    chunk_table: Tensor | None
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
        table, firsts = _table(cu, p.per_segment * tiles.chunk, p.segments)
        programs = p.segments
    flags = {
        "STATIC": w.dim() == 2,
        "PACKED": cu is not None,
        "HAS_LEN": lengths is not None,
        "SPLIT": r.dtype == torch.bfloat16 and not _INTERPRETED,
    }
    slots = p.sequences * p.slots if cu is None else p.slots
    chunk_table = None if cu is None else _chunk_table(cu, tiles.chunk, slots)
    return _Launch(p, (r.shape[2], programs), table, firsts, slots, chunk_table, flags, r.shape[3], tiles)


def _carry(
    go: _Launch, a: Tensor, x: Tensor, w: Tensor, start: Tensor | None, cu: Tensor | None,
    lengths: Tensor | None, *, reverse: bool,
) -> Tensor | None:  # fmt: skip
    """The state each segment starts from [P, H, V, K], from `start` on. None: there is one segment."""
    if not go.carried:
        return None
    time, heads = a.shape[1:3]
    p, n = go.plan, go.n
    carry = torch.empty(go.grid[1], heads, n, n, dtype=torch.float32, device=a.device)
    fades = torch.empty(go.grid[1], heads, n, dtype=torch.float32, device=a.device)
    local[go.grid](
        a, x, w, carry, fades, cu, lengths, go.table, time, heads, p.per_segment, p.segments,
        *_strides(a, x, w), N=n, L=go.tiles.chunk, **go.flags, REVERSE=reverse,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    rows = min(n, 16)
    combine[(heads, p.sequences, n // rows)](
        carry, fades, start, cu, lengths, go.firsts, time, heads, p.per_segment, p.segments,
        N=n, ROWS=rows, L=go.tiles.chunk, PACKED=go.flags["PACKED"], HAS_LEN=go.flags["HAS_LEN"],
        HAS_START=start is not None, REVERSE=reverse, num_warps=1,
    )  # fmt: skip
    return carry


def _output(like: Tensor, lengths: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, zero where rows past a sample's end stay unwritten."""
    make = torch.empty_like if lengths is None else torch.zeros_like
    return make(like, dtype=dtype, memory_format=torch.contiguous_format)


def _forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None,
    lengths: Tensor | None, cu: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, final state, chunk states and flags for the backward pass); without `save` no chunk states.

    w [H,N] is RWKV-5.
    """
    go = _launch(r, w, cu, lengths)
    p, n, heads = go.plan, go.n, r.shape[2]
    y = _output(r, lengths)
    final = torch.empty(p.sequences, heads, n, n, dtype=torch.float32, device=r.device)
    chunks = torch.empty(_chunk_shape(r, cu, save), dtype=torch.float32, device=r.device)
    state = None if state is None else state.contiguous()
    carry = _carry(go, k, v, w, state, cu, lengths, reverse=False)
    ragged = cu is not None or lengths is not None  # then some slots have no chunk, and stay unflagged
    make = torch.zeros if ragged else torch.empty
    flags = make(go.slots, heads, dtype=torch.int32, device=r.device)
    scores = _strong(go, r, k, w, flags, cu, lengths, known=False)
    _walk(go, r, k, v, w, u, y, state, final, chunks if save else None, scores, flags, carry, cu, lengths)
    return y, final, chunks, flags


def _strong(
    go: _Launch, r: Tensor, k: Tensor, w: Tensor, flags: Tensor, cu: Tensor | None,
    lengths: Tensor | None, *, known: bool,
) -> Tensor:  # fmt: skip
    """Scores of the strong chunks [slots, H, L, L], the others left unwritten; fills or reads the flags."""
    chunk, heads = go.tiles.chunk, r.shape[2]
    scores = torch.empty(go.slots, heads, chunk, chunk, dtype=torch.float32, device=r.device)
    strong_scores[(heads, go.slots)](
        r, k, w, scores, flags, cu, lengths, go.chunk_table, r.shape[1], heads, go.plan.slots,
        *_strides(r, k, w), N=go.n, L=chunk, LEVELS=chunk.bit_length() - 1, LEAF=LEAF, LIMIT=MILD,
        **go.flags, KNOWN=known, num_warps=4, num_stages=1,
    )  # fmt: skip
    return scores


def _walk(
    go: _Launch, r: Tensor, k: Tensor, x: Tensor, w: Tensor, u: Tensor, y: Tensor, state: Tensor | None,
    final: Tensor, chunks: Tensor | None, scores: Tensor, flags: Tensor, carry: Tensor | None,
    cu: Tensor | None, lengths: Tensor | None, *, reverse: bool = False,
) -> None:  # fmt: skip
    p, n, tiles = go.plan, go.n, go.tiles
    walk[(go.grid[0] * (n // tiles.values), go.grid[1])](
        r, k, x, w, u.contiguous(), y, state, final, chunks, scores, flags, carry, cu, lengths, go.table,
        r.shape[1], r.shape[2], p.per_segment, p.slots, p.segments, *_strides(r, k, x, w),
        N=n, BV=tiles.values, L=tiles.chunk, LIMIT=MILD, **go.flags,
        HAS_STATE=state is not None, CARRY=go.carried, SAVE=chunks is not None, REVERSE=reverse,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _chunk_shape(r: Tensor, cu: Tensor | None, save: bool) -> tuple[int, ...]:
    """Of the chunk states; as `plan` has it, but for any kind of integer (torch.compile's symbols too)."""
    batch, time, heads, size = r.shape
    chunks = -(-time // TILES[size].chunk)
    slots = batch * chunks if cu is None else chunks + cu.shape[0] - 1
    return (slots if save else 0, heads, size, size)


def _forward_shapes(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None,
    lengths: Tensor | None, cu: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads, n = r.shape[2], r.shape[3]
    sequences = r.shape[0] if cu is None else cu.shape[0] - 1
    final = r.new_empty((sequences, heads, n, n), dtype=torch.float32)
    chunks = r.new_empty(_chunk_shape(r, cu, save), dtype=torch.float32)
    flags = r.new_empty(_chunk_shape(r, cu, True)[:2], dtype=torch.int32)
    return r.new_empty(r.shape), final, chunks, flags


def _backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: Tensor | None, cu: Tensor | None,
    chunks: Tensor, flags: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r, k, v, w, u and the initial state."""
    go = _launch(r, w, cu, lengths)
    p, n, tiles = go.plan, go.n, go.tiles
    time, heads = r.shape[1:3]
    dy = dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dv = _output(r, lengths)
    dstate = torch.empty(p.sequences, heads, n, n, dtype=torch.float32, device=r.device)
    dchunks = torch.empty_like(chunks)
    carry = _carry(go, r, dy, w, dfinal, cu, lengths, reverse=True)
    scores = _strong(go, r, k, w, flags, cu, lengths, known=True)
    _walk(go, r, k, dy, w, u, dv, dfinal, dstate, dchunks, scores, flags, carry, cu, lengths, reverse=True)
    del scores, carry  # their memory serves the gradients
    dr, dk = (_output(r, lengths) for _ in range(2))
    du = torch.empty(go.slots, heads, n, dtype=torch.float32, device=r.device)
    dw = torch.empty_like(du) if go.flags["STATIC"] else _output(r, lengths, w.dtype)
    tensors = (r, k, v, w, u.contiguous(), dy, dr, dk, dw, du, chunks, dchunks)
    ragged = (cu, lengths, go.chunk_table, time, heads, p.slots)
    shape = {"N": n, "BK": tiles.keys, "L": tiles.chunk, "num_warps": tiles.warps_back, **go.flags}
    columns = heads * (n // tiles.keys)
    backward[(columns, go.slots)](*tensors, *ragged, *_strides(r, k, v, w), num_stages=1, **shape)
    backward_strong[(columns, go.slots)](
        *tensors, flags, *ragged, *_strides(r, k, v, w),
        LEVELS=tiles.chunk.bit_length() - 1, LEAF=LEAF, LIMIT=MILD, num_stages=1, **shape,
    )  # fmt: skip
    if go.flags["STATIC"]:
        dw = dw.sum(0).to(w.dtype)
    return dr, dk, dv, dw, du.sum(0).to(u.dtype), dstate


def _backward_shapes(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: Tensor | None, cu: Tensor | None,
    chunks: Tensor, flags: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sequences = r.shape[0] if cu is None else cu.shape[0] - 1
    like = [r.new_empty(x.shape, dtype=x.dtype) for x in (r, k, v, w, u)]
    state = r.new_empty((sequences, r.shape[2], r.shape[3], r.shape[3]), dtype=torch.float32)
    return (*like, state)  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, k, v, w, u, state, lengths, cu, _ = inputs
    ctx.save_for_backward(r, k, v, w, u, lengths, cu, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, run: Callable[..., Any], dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> Any:
    r, k, v, w, u, lengths, cu, chunks, flags = ctx.saved_tensors
    dy = torch.zeros_like(r) if dy is None else dy
    *most, dstate = run(r, k, v, w, u, lengths, cu, chunks, flags, dy, dfinal)
    return (*most, dstate if ctx.has_state else None, None, None, None)


_INPUTS = "Tensor r, Tensor k, Tensor v, Tensor w, Tensor u"
_RAGGED = "Tensor? lengths, Tensor? cu"
_wkv6 = operator(
    "wkv6",
    Launch(
        _forward,
        _forward_shapes,
        f"({_INPUTS}, Tensor? state, {_RAGGED}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    Launch(
        _backward,
        _backward_shapes,
        f"({_INPUTS}, {_RAGGED}, Tensor chunks, Tensor flags, Tensor dy, Tensor? dfinal)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    keep=_keep,
    gradients=_gradients,
)


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """r, k, v, log_w [B,T,H,N] (RWKV-5: log_w [H,N]); u [H,N]; state [B or S,H,N,N] -> y, float32 state."""
    save = torch.is_grad_enabled() and any(
        x.requires_grad for x in (r, k, v, log_w, u, state) if x is not None
    )
    y, final, _, _ = _wkv6(r, k, v, log_w, u, state, lengths, cu_seqlens, save)
    return y, final


wkv5 = wkv6
"""RWKV-5 is the same with log_w [H,N]."""
