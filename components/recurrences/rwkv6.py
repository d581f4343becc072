"""RWKV-6, Finch (Peng et al. 2024, arXiv 2404.05892); parameter names of the released checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.recurrences import steps
from components.recurrences.shared import (
    ChannelMix,
    HeadNorm,
    Ramps,
    ffn_width,
    head_size_of,
    last_token,
    linear,
)
from kernels import wkv6
from kernels.mix import lerp, mix6
from kernels.pointwise import log_decay
from kernels.step import Late


class TimeMix(nn.Module):
    """Matrix state per head with a decay per token; state: (previous token [B, D], wkv [B, H, N, N])."""

    matrices = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
    """Parameters that are multiplied as matrices although they are no Linear's."""

    def __init__(self, ramps: Ramps, head_size: int, shift_rank: int, decay_rank: int) -> None:
        super().__init__()
        d, heads = ramps.d_model, ramps.d_model // head_size
        share = 1 - ramps.channel(ramps.down)
        half = 1 - ramps.channel(0.5 * ramps.down)
        self.time_maa_x = nn.Parameter(share.clone())
        self.time_maa_w = nn.Parameter(share.clone())
        self.time_maa_k = nn.Parameter(share.clone())
        self.time_maa_v = nn.Parameter(share - 0.3 * ramps.up)
        self.time_maa_r = nn.Parameter(half.clone())
        self.time_maa_g = nn.Parameter(half.clone())
        self.time_maa_w1 = nn.Parameter(torch.zeros(d, 5 * shift_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, shift_rank, d).uniform_(-0.01, 0.01))
        self.time_decay = nn.Parameter(ramps.decay(-6, 5).view(1, 1, d))
        self.time_decay_w1 = nn.Parameter(torch.zeros(d, decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay_rank, d).uniform_(-0.01, 0.01))
        self.time_faaaa = nn.Parameter(ramps.bonus().view(heads, head_size))
        self.receptance = linear(d, d, scale=1)
        self.key = linear(d, d, scale=0.1)
        self.value = linear(d, d, scale=1)
        self.gate = linear(d, d, scale=0.1)
        self.output = linear(d, d, scale=0)
        self.ln_x = HeadNorm(heads, d)
        # RWKV-LM's generator: deeper layers start with a larger output scale.
        nn.init.constant_(self.ln_x.weight, ((1 + ramps.layer) / ramps.n_layer) ** 0.7)

    def mixed(self, x: Tensor, before: Tensor | None) -> list[Tensor]:
        """Data-dependent token shift ("ddlerp"): x as seen by w, k, v, r and g, each [B, T, D]."""
        (mean,) = lerp(x, before, (self.time_maa_x,))
        low = torch.tanh(mean @ self.time_maa_w1.to(mean.dtype))  # [B, T, 5 * rank]
        shares = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        return mix6(x, before, low, self.time_maa_w2, shares)

    def log_decay(self, xw: Tensor) -> Tensor:
        """log w = -exp(d + tanh(x_w A) B), [B, T, D], in fp32 (or fp64)."""
        shift = torch.tanh(xw @ self.time_decay_w1.to(xw.dtype)) @ self.time_decay_w2.to(xw.dtype)
        return log_decay(self.time_decay, shift)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """x [B, T, D] -> (y [B, T, D], state, stream unchanged)."""
        before, memory = state or (None, None)
        xw, xk, xv, xr, xg = self.mixed(x, before)
        heads = (*x.shape[:2], *self.time_faaaa.shape)
        r = self.receptance(xr).view(heads)  # [B, T, H, N]
        k = self.key(xk).view(heads)
        v = self.value(xv).view(heads)
        log_w = self.log_decay(xw).view(heads)
        y, memory = wkv6(r, k, v, log_w, self.time_faaaa, memory, lengths=lengths)
        return self.output(self.ln_x(y, self.gate(xg))), (last_token(x, lengths), memory), stream

    def step_(self, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: tuple[Tensor, ...]) -> Late:
        """One token in place, for generation; see `steps`."""
        return steps.time_mix6(self, x, late, norm, state)


class Rwkv6:
    """The pair of mixers of RWKV-6."""

    def __init__(
        self, d_model: int, n_layer: int, *, head_size: int, d_ffn: int, shift_rank: int, decay_rank: int
    ) -> None:
        self.d_model, self.n_layer = d_model, n_layer
        self.head_size = head_size_of(d_model, head_size)
        self.d_ffn = ffn_width(d_model, d_ffn)
        self.shift_rank = shift_rank or (64 if d_model >= 4096 else 32)
        self.decay_rank = decay_rank or (128 if d_model >= 4096 else 64)

    def time_mix(self, layer: int) -> nn.Module:
        ramps = Ramps(self.d_model, self.n_layer, layer)
        return TimeMix(ramps, self.head_size, self.shift_rank, self.decay_rank)

    def channel_mix(self, layer: int) -> nn.Module:
        return ChannelMix(Ramps(self.d_model, self.n_layer, layer), self.d_ffn, mix="time_maa")
