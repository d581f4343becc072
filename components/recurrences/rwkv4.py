"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048); parameter names of the released checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.recurrences import steps
from components.recurrences.shared import ChannelMix, Ramps, last_token, linear
from kernels import wkv4
from kernels.mix import lerp
from kernels.pointwise import log_decay, sigmoid_gate
from kernels.step import Late


class TimeMix(nn.Module):
    """Decaying weighted average per channel; state: (previous token [B, D], wkv [B, 3, D])."""

    def __init__(self, ramps: Ramps) -> None:
        super().__init__()
        d = ramps.d_model
        share = ramps.channel(ramps.down)
        self.time_decay = nn.Parameter(-5 + 8 * ramps.edge() ** (0.7 + 1.3 * ramps.up))
        self.time_first = nn.Parameter(torch.full((d,), 0.3).log() + 0.5 * ramps.zigzag())
        self.time_mix_k = nn.Parameter(share.clone())
        self.time_mix_v = nn.Parameter(share + 0.3 * ramps.up)
        self.time_mix_r = nn.Parameter(ramps.channel(0.5 * ramps.down))
        self.key = linear(d, d, scale=0)
        self.value = linear(d, d, scale=1)
        self.receptance = linear(d, d, scale=0)
        self.output = linear(d, d, scale=0)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """x [B, T, D] -> (y [B, T, D], state, stream unchanged)."""
        before, memory = state or (None, None)
        xk, xv, xr = lerp(x, before, (self.time_mix_k, self.time_mix_v, self.time_mix_r), current=True)
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)  # [B, T, D]
        y, memory = wkv4(k, v, log_decay(self.time_decay), self.time_first, memory, lengths=lengths)
        return self.output(sigmoid_gate(r, y)), (last_token(x, lengths), memory), stream

    def step_(self, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: tuple[Tensor, ...]) -> Late:
        """One token in place, for generation; see `steps`."""
        return steps.time_mix4(self, x, late, norm, state)


class Rwkv4:
    """The pair of mixers of RWKV-4."""

    def __init__(self, d_model: int, n_layer: int, *, d_ffn: int) -> None:
        self.d_model, self.n_layer, self.d_ffn = d_model, n_layer, d_ffn or 4 * d_model

    def time_mix(self, layer: int) -> nn.Module:
        return TimeMix(Ramps(self.d_model, self.n_layer, layer))

    def channel_mix(self, layer: int) -> nn.Module:
        return ChannelMix(Ramps(self.d_model, self.n_layer, layer), self.d_ffn, mix="time_mix")
