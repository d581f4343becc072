"""Packed sequences [1, T, ...] with borders `cu_seqlens` [S+1] as a padded batch [S, L, ...], and back.

For the backends that know padded batches only. Both ways are differentiable copies; the longest length
is read on the host, which the Triton backend, taking packed sequences as they are, never does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where each packed token lies in the padded batch."""

    lengths: Tensor  # [S] int64
    longest: int
    rows: Tensor  # [T] int64: index into the padded batch's S * L rows


def layout(cu_seqlens: Tensor, time: int) -> Layout:
    """The layout of `time` packed tokens with borders `cu_seqlens` [S+1]."""
    borders = cu_seqlens.long()
    lengths = borders.diff()  # [S]
    longest = int(lengths.max())
    sample = torch.arange(len(lengths), device=borders.device).repeat_interleave(lengths, output_size=time)
    offset = torch.arange(time, device=borders.device) - borders[sample]
    return Layout(lengths, longest, sample * longest + offset)


def unpack(x: Tensor, plan: Layout) -> Tensor:
    """[1, T, ...] -> [S, L, ...] with zeros behind each sample's end."""
    samples = plan.lengths.shape[0]
    rows = x.new_zeros(samples * plan.longest, *x.shape[2:]).index_copy(0, plan.rows, x[0])
    return rows.unflatten(0, (samples, plan.longest))


def pack(x: Tensor, plan: Layout) -> Tensor:
    """[S, L, ...] -> [1, T, ...]."""
    return x.flatten(0, 1).index_select(0, plan.rows).unsqueeze(0)
