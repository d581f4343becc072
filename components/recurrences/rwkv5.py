"""RWKV-5.2, Eagle (Peng et al. 2024, arXiv 2404.05892); parameter names of the released checkpoints."""

from __future__ import annotations

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
from kernels import wkv5
from kernels.mix import lerp
from kernels.pointwise import log_decay
from kernels.step import Late


class TimeMix(nn.Module):
    """Matrix state per head; state: (previous token [B, D], wkv [B, H, N, N])."""

    def __init__(self, ramps: Ramps, head_size: int) -> None:
        super().__init__()
        d, heads = ramps.d_model, ramps.d_model // head_size
        share = ramps.channel(ramps.down)
        half = ramps.channel(0.5 * ramps.down)
        self.time_mix_k = nn.Parameter(share.clone())
        self.time_mix_v = nn.Parameter(share + 0.3 * ramps.up)
        self.time_mix_r = nn.Parameter(half.clone())
        self.time_mix_g = nn.Parameter(half.clone())
        self.time_decay = nn.Parameter(ramps.decay(-6, 5).view(heads, head_size))
        self.time_faaaa = nn.Parameter(ramps.bonus().view(heads, head_size))
        self.receptance = linear(d, d, scale=1)
        self.key = linear(d, d, scale=0.1)
        self.value = linear(d, d, scale=1)
        self.gate = linear(d, d, scale=0.1)
        self.output = linear(d, d, scale=0)
        self.ln_x = HeadNorm(heads, d)
        # RWKV-LM's generator: deeper layers start with a larger output scale.
        nn.init.constant_(self.ln_x.weight, ((1 + ramps.layer) / ramps.n_layer) ** 0.7)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """x [B, T, D] -> (y [B, T, D], state, stream unchanged)."""
        before, memory = state or (None, None)
        shares = (self.time_mix_r, self.time_mix_k, self.time_mix_v, self.time_mix_g)
        xr, xk, xv, xg = lerp(x, before, shares, current=True)
        heads = (*x.shape[:2], *self.time_decay.shape)
        r = self.receptance(xr).view(heads)  # [B, T, H, N]
        k = self.key(xk).view(heads)
        v = self.value(xv).view(heads)
        log_w = log_decay(self.time_decay)  # [H, N]
        y, memory = wkv5(r, k, v, log_w, self.time_faaaa, memory, lengths=lengths)
        return self.output(self.ln_x(y, self.gate(xg))), (last_token(x, lengths), memory), stream

    def step_(self, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: tuple[Tensor, ...]) -> Late:
        """One token in place, for generation; see `steps`."""
        return steps.time_mix5(self, x, late, norm, state)


class Rwkv5:
    """The pair of mixers of RWKV-5.2."""

    def __init__(self, d_model: int, n_layer: int, *, head_size: int, d_ffn: int) -> None:
        self.d_model, self.n_layer = d_model, n_layer
        self.head_size = head_size_of(d_model, head_size)
        self.d_ffn = ffn_width(d_model, d_ffn)

    def time_mix(self, layer: int) -> nn.Module:
        return TimeMix(Ramps(self.d_model, self.n_layer, layer), self.head_size)

    def channel_mix(self, layer: int) -> nn.Module:
        return ChannelMix(Ramps(self.d_model, self.n_layer, layer), self.d_ffn, mix="time_mix")
