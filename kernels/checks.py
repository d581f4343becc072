"""Argument checks of the operators: one clear ValueError before any number is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_debug = os.environ.get("TOOLKIT_DEBUG", "") == "1"


def debug(on: bool) -> None:
    """Turns on or off what reads values (log_w > 0, lengths on a GPU). Off unless TOOLKIT_DEBUG=1."""
    global _debug
    _debug = on


def check_sequence(op: str, names: Sequence[str], tensors: Sequence[Tensor], axes: str) -> None:
    """All `tensors` share the first one's shape (one size per letter of `axes`), dtype and device."""
    first, *others = tensors
    shape, kind, device = first.shape, first.dtype, first.device
    same = all(x.shape == shape and x.dtype == kind and x.device == device for x in others)
    if same and kind in _FLOATS and len(shape) == len(axes) and 0 not in shape:
        return  # nothing to tell; what follows finds the words
    for name, x in zip(names, tensors, strict=True):
        if x.dim() != len(axes):
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}; expected [{', '.join(axes)}]")
        if x.shape != first.shape:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)} but {names[0]} has {list(first.shape)}")
        if x.dtype not in _FLOATS:
            raise ValueError(f"{op}: {name} is {_name(x.dtype)}; use bfloat16, float16, float32 or float64")
        if x.dtype != first.dtype:
            raise ValueError(
                f"{op}: {name} is {_name(x.dtype)} but {names[0]} is {_name(first.dtype)}; cast one of them"
            )
        check_device(op, name, x, first)
    if 0 in first.shape:
        axis = axes[list(first.shape).index(0)]
        raise ValueError(f"{op}: {names[0]} has shape {list(first.shape)}; {axis} must be 1 or more")


def check_weight(op: str, name: str, x: Tensor, shape: Sequence[int], axes: str, like: Tensor) -> None:
    """`x` is a floating tensor of exactly `shape` on the inputs' device; its dtype may differ from theirs."""
    if list(x.shape) != list(shape):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; expected [{axes}] = {list(shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: {name} is {_name(x.dtype)}; use bfloat16, float16, float32 or float64")
    check_device(op, name, x, like)


def check_log_w(op: str, log_w: Tensor, lengths: Tensor | None) -> None:
    """In debug mode: the decay is a logarithm, so no entry (of a step within `lengths`) is above zero."""
    if not _debug:
        return
    seen = log_w.detach()
    if lengths is not None and seen.dim() == 4:
        seen = seen[torch.arange(seen.shape[1], device=seen.device) < lengths.unsqueeze(1)]
    if bool((seen > 0).any()):
        raise ValueError(
            f"{op}: log_w has an entry of {float(seen.max()):.4g}; it is the logarithm of the decay "
            "and must be <= 0: write log_w = -exp(time_decay)"
        )


def check_state(op: str, state: Tensor | None, shape: Sequence[int], axes: str, like: Tensor) -> None:
    """`state` is None or a float32/float64 tensor of exactly `shape`."""
    if state is None:
        return
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: state is {_name(state.dtype)}; keep states in float32 (or float64)")
    check_weight(op, "state", state, shape, axes, like)


def check_lengths(op: str, lengths: Tensor | None, like: Tensor) -> None:
    """`lengths` is None or a long [B] tensor with values in 0..T (read on CPUs and in debug mode only)."""
    if lengths is None:
        return
    batch, time = like.shape[:2]
    if lengths.dtype != torch.int64 or list(lengths.shape) != [batch]:
        raise ValueError(
            f"{op}: lengths is {_name(lengths.dtype)} of shape {list(lengths.shape)}; "
            f"expected int64 [{batch}]"
        )
    check_device(op, "lengths", lengths, like)
    if _readable(lengths) and bool(((lengths < 0) | (lengths > time)).any()):
        raise ValueError(f"{op}: lengths holds {lengths.tolist()}; each must lie in 0..{time}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, lengths: Tensor | None, like: Tensor) -> None:
    """`cu_seqlens` [S+1] holds the borders 0 <= ... <= T of packed sequences, `like` is [1, T, ...].

    The values are read on CPUs and in debug mode only.
    """
    batch, time = like.shape[:2]
    if lengths is not None:
        raise ValueError(f"{op}: both lengths and cu_seqlens are given; packed sequences have no padding")
    if batch != 1:
        raise ValueError(f"{op}: cu_seqlens needs packed inputs [1, T, ...]; the batch size is {batch}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{op}: cu_seqlens is {_name(cu_seqlens.dtype)} of shape {list(cu_seqlens.shape)}; "
            "expected int32 or int64 [S + 1] with S >= 1"
        )
    check_device(op, "cu_seqlens", cu_seqlens, like)
    if not _readable(cu_seqlens):
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != time or borders != sorted(borders):
        raise ValueError(f"{op}: cu_seqlens holds {borders}; expected rising borders from 0 to T = {time}")


def _readable(x: Tensor) -> bool:
    """Whether checking values costs nothing that matters: never while tracing, on GPUs in debug mode."""
    return not torch.compiler.is_compiling() and (_debug or not x.is_cuda)


def check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """`x` lives where the inputs live."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device} but the inputs are on {like.device}; move it there")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
