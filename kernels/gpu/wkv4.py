"""RWKV-4 in Triton: torch operators around the kernels of wkv4_forward.py and wkv4_backward.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import wkv4_backward, wkv4_forward
from .launch import cdiv
from .ops import Launch, operator

_DENSE, _LENGTHS, _PACKED = 0, 1, 2
_COMBINE = {"G": 8, "BC": 32, "num_warps": 1}


class Plan(NamedTuple):
    """How a shape is cut: see `plan`."""

    length: int  # rows of a segment
    group: int  # rows of a group of the backward pass; a state is kept for each
    ahead: int  # rows the forward pass loads at once
    block: int  # channels of a program
    warps: int


# From this many channels of all samples on, one program per channel block walks the whole time; below,
# time is cut into as many segments as give _BUSY channels.
_ENOUGH = 12288
_BUSY = 32768


def plan(samples: int, time: int, width: int) -> Plan:
    """The configuration of a shape; `time` is the mean length of packed sequences."""
    group = next(g for g in (16, 8, 4, 2, 1) if time >= g)
    ahead = 2 * group if time >= 64 else group
    streams = samples * width
    segments = 1 if streams >= _ENOUGH else max(1, min(time // 128, -(-_BUSY // streams)))
    length = cdiv(cdiv(time, segments), ahead) * ahead
    return Plan(length, group, ahead, 32, 1)


class _Call(NamedTuple):
    """What the launches of one call share."""

    sizes: Tensor | None
    mode: int
    samples: int  # states
    time: int
    width: int
    segments: int  # of a dense sample
    slots: int
    marks: int
    chained: bool
    plan: Plan

    @property
    def blocks(self) -> int:
        return cdiv(self.width, self.plan.block)


def _call(k: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> _Call:
    batch, time, width = k.shape
    if cu_seqlens is None:
        cut = plan(batch, time, width)
        segments = cdiv(time, cut.length)
        mode = _DENSE if lengths is None else _LENGTHS
        marks = batch * cdiv(time, cut.group)
        return _Call(
            lengths, mode, batch, time, width, segments, batch * segments, marks, segments > 1, cut
        )  # fmt: skip
    samples = cu_seqlens.numel() - 1
    cut = plan(samples, cdiv(time, samples), width)
    if samples * width >= _ENOUGH:
        cut = cut._replace(length=cdiv(time, cut.ahead) * cut.ahead)
    slots, marks = time // cut.length + samples + 1, time // cut.group + samples + 2
    return _Call(cu_seqlens, _PACKED, samples, time, width, 0, slots, marks, cut.length < time, cut)


def _forward(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state and the marks (empty unless `save`)."""
    call = _call(k, lengths, cu_seqlens)
    y, last, marks = _outputs(k, call, save)
    state = None if state is None else state.contiguous()
    inputs = (k, v, log_w.contiguous(), u.contiguous(), state, call.sizes)
    sizes = (call.samples, call.time, call.plan.length, call.segments, k.stride(0), v.stride(0))
    carry = None
    grid = (call.slots * call.blocks,)
    with _device(k):
        if call.chained:
            carry = torch.empty(call.slots, 3, call.width, dtype=torch.float32, device=k.device)
            shape = _shape(call, k, v, U=call.plan.ahead, FULL=True)
            wkv4_forward.forward[grid](
                *inputs, carry, None, None, None, *sizes, LOCAL=True, CHAINED=False, **shape
            )  # fmt: skip
            wkv4_forward.combine_forward[_combine_grid(call)](
                inputs[2], state, call.sizes, carry, *sizes[:4], D=call.width, MODE=call.mode, **_COMBINE
            )
        full = call.mode == _DENSE and call.time % call.plan.ahead == 0
        shape = _shape(call, k, v, U=call.plan.ahead if full else call.plan.group, FULL=full)
        wkv4_forward.forward[grid](
            *inputs, carry, y, last, marks if save else None, *sizes,
            LOCAL=False, CHAINED=call.chained, **shape,
        )  # fmt: skip
    return y, last, marks


def _outputs(k: Tensor, call: _Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = k.new_empty(k.shape)
    last = k.new_empty(call.samples, 3, call.width, dtype=torch.float32)
    marks = k.new_empty(call.marks if save else 0, 3, call.width, dtype=torch.float32)
    return y, last, marks


def _backward(
    dy: Tensor,
    dlast: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    marks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, log_w, u and the initial state (empty if there is none)."""
    call = _call(k, lengths, cu_seqlens)
    dk, dv, dw, du, dstate = gradients = _gradients(k, log_w, u, state)
    dy = dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    log_w, u = log_w.contiguous(), u.contiguous()
    state = None if state is None else state.contiguous()
    inputs = (dy, dlast, k, v, log_w, u, state, call.sizes, last, marks)
    sizes = (call.samples, call.time, call.plan.length, call.segments, k.stride(0), v.stride(0))
    parts = torch.empty(call.slots, 2, call.width, dtype=torch.float32, device=k.device)
    full = call.mode == _DENSE and call.time % call.plan.group == 0
    shape = _shape(call, k, v, FULL=full, PASS_P=dlast is not None)
    carry = None
    grid = (call.slots * call.blocks,)
    with _device(k):
        if call.chained:
            carry = torch.empty(call.slots, 4, call.width, dtype=torch.float32, device=k.device)
            wkv4_backward.backward[grid](
                *inputs, carry, None, None, None, None, *sizes, LOCAL=True, CHAINED=False, **shape
            )  # fmt: skip
            wkv4_backward.combine_backward[_combine_grid(call)](
                dlast, log_w, call.sizes, last, carry, *sizes[1:4], D=call.width, MODE=call.mode, **_COMBINE
            )
        wkv4_backward.backward[grid](
            *inputs, carry, dk, dv, None if state is None else dstate, parts, *sizes,
            LOCAL=False, CHAINED=call.chained, **shape,
        )  # fmt: skip
        wkv4_backward.add_parts[(cdiv(call.width, 32),)](
            parts, dw, du, call.slots, D=call.width, G=8, BC=32, num_warps=1
        )
    return gradients


def _gradients(
    k: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dstate = k.new_empty(0 if state is None else state.shape, dtype=torch.float32)
    dw, du = log_w.new_empty(log_w.shape), u.new_empty(u.shape)
    return k.new_empty(k.shape), k.new_empty(k.shape), dw, du, dstate


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _y, last, marks = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(marks)
    ctx.save_for_backward(*inputs[:7], last, marks)


def _differentiate(
    ctx: Any, run: Callable[..., Any], dy: Tensor | None, dlast: Tensor | None, _dmarks: None
) -> tuple[Any, ...]:
    k, v, log_w, u, state, lengths, cu_seqlens, last, marks = ctx.saved_tensors
    if dy is None:
        dy = k.new_zeros(k.shape)
    dk, dv, dw, du, dstate = run(dy, dlast, k, v, log_w, u, state, lengths, cu_seqlens, last, marks)
    return dk, dv, dw, du, None if state is None else dstate, None, None, None


_INPUTS = "Tensor k, Tensor v, Tensor log_w, Tensor u, Tensor? state, Tensor? lengths, Tensor? cu_seqlens"
_wkv4 = operator(
    "wkv4",
    Launch(
        _forward,
        lambda k, v, w, u, state, lengths, cu, save: _outputs(k, _call(k, lengths, cu), save),
        f"({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor)",
    ),
    Launch(
        _backward,
        lambda dy, dlast, k, v, w, u, state, *_: _gradients(k, w, u, state),
        f"(Tensor dy, Tensor? dlast, {_INPUTS}, Tensor last, Tensor marks)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    keep=_keep,
    gradients=_differentiate,
)


def wkv4(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """k, v [B,T,D]; log_w, u [D]; state [B,3,D] float32 -> y [B,T,D] in k's dtype, state [B,3,D].

    Packed sequences: B = 1, states [S,3,D]. Keys are taken to lie within +-1e38.
    """
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, log_w, u, state) if x is not None)
    y, last, _marks = _wkv4(k, v, log_w, u, state, lengths, cu_seqlens, save)
    return y, last


def _shape(call: _Call, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
    """The compile-time arguments that forward and backward kernels have in common."""
    cut = call.plan
    kt, vt = (call.width if call.time == 1 else x.stride(1) for x in (k, v))
    common = {"KT": kt, "VT": vt, "D": call.width, "C": cut.group, "BC": cut.block, "MODE": call.mode}
    return {**common, "num_warps": cut.warps, **more}


def _combine_grid(call: _Call) -> tuple[int]:
    return (call.samples * cdiv(call.width, _COMBINE["BC"]),)


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
