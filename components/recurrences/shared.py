"""What the recurrences share: sizes, published initial values, token shift, channel mix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.recurrences import steps
from kernels.mix import lerp
from kernels.norm import head_norm
from kernels.pointwise import relu_squared, sigmoid_gate
from kernels.step import Late


def head_size_of(d_model: int, head_size: int) -> int:
    """The head size N in use; raises ValueError if it does not divide d_model."""
    size = head_size or (64 if d_model >= 128 else d_model // 2)
    if size < 1 or d_model % size:
        divisors = [n for n in (16, 32, 64, 128) if d_model % n == 0] or [d_model]
        raise ValueError(
            f"recurrence.head_size={size} does not divide model.d_model={d_model}; "
            f"write recurrence.head_size={' or '.join(map(str, divisors))}"
        )
    return size


def ffn_width(d_model: int, d_ffn: int) -> int:
    """Channel-mix width of RWKV-5 and 6: 3.5 d_model, rounded down to a multiple of 32."""
    return d_ffn or max(32, int(d_model * 3.5) // 32 * 32)


@dataclass(frozen=True)
class Ramps:
    """Per-channel and per-layer ratios of the published initial values (RWKV-LM)."""

    d_model: int
    n_layer: int
    layer: int

    @property
    def up(self) -> float:
        """0 in the first layer, 1 in the last. One layer counts as the first (RWKV-LM divides by 0)."""
        return self.layer / max(1, self.n_layer - 1)

    @property
    def down(self) -> float:
        """1 in the first layer, 1/L in the last."""
        return 1.0 - self.layer / self.n_layer

    def channel(self, power: float) -> Tensor:
        """(i / D) ** power as a token-shift mix, [1, 1, D]."""
        return (torch.arange(self.d_model) / self.d_model).pow(power).view(1, 1, -1)

    def edge(self) -> Tensor:
        """i / (D - 1), [D]."""
        return torch.arange(self.d_model) / max(1, self.d_model - 1)

    def decay(self, low: float, span: float) -> Tensor:
        """low + span * edge ** (0.7 + 1.3 up), [D]."""
        return low + span * self.edge() ** (0.7 + 1.3 * self.up)

    def zigzag(self) -> Tensor:
        """-1, 0, 1 in turn, [D]."""
        return ((torch.arange(self.d_model) + 1) % 3 - 1).float()

    def bonus(self) -> Tensor:
        """`time_faaaa` of RWKV-5 and 6, [D]."""
        return self.up * (1 - self.edge()) + 0.1 * self.zigzag()


def linear(d_in: int, d_out: int, *, scale: float) -> nn.Linear:
    """Bias-free Linear, orthogonal with gain scale * sqrt(d_out / d_in) if it widens; scale 0 is zeros.

    Source: RWKV-LM's weight generator. Left alone on the meta device, where there is nothing to fill.
    """
    layer = nn.Linear(d_in, d_out, bias=False)
    if not layer.weight.is_meta:
        if scale == 0:
            nn.init.zeros_(layer.weight)
        else:
            nn.init.orthogonal_(layer.weight, gain=scale * max(1.0, d_out / d_in) ** 0.5)
    return layer


def last_token(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sample's own last token of x [B, T, D]: the state of a token shift, [B, D]."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1]


class ChannelMix(nn.Module):
    """Squared-ReLU channel mix with a receptance gate: sigmoid(W_r x_r) * W_v relu(W_k x_k)^2.

    mix: name stem of the two token-shift parameters; RWKV-4 and 5 store the share of the current
    token (`time_mix`), RWKV-6 the share of the previous one (`time_maa`).
    """

    def __init__(self, ramps: Ramps, d_ffn: int, *, mix: str) -> None:
        super().__init__()
        d = ramps.d_model
        share = ramps.channel(ramps.down)
        stored = share if mix == "time_mix" else 1 - share
        self.mix = mix
        self.register_parameter(f"{mix}_k", nn.Parameter(stored.clone()))
        self.register_parameter(f"{mix}_r", nn.Parameter(stored.clone()))
        self.key = linear(d, d_ffn, scale=1)
        self.receptance = linear(d, d, scale=0)
        self.value = linear(d_ffn, d, scale=0)

    def forward(self, x: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], state [B, D] or None -> (y [B, T, D], state [B, D])."""
        shares = (getattr(self, f"{self.mix}_k"), getattr(self, f"{self.mix}_r"))
        xk, xr = lerp(x, state, shares, current=self.mix == "time_mix")
        hidden = relu_squared(self.key(xk))  # [B, T, d_ffn]
        return sigmoid_gate(self.receptance(xr), self.value(hidden)), last_token(x, lengths)

    def step_(self, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: Tensor) -> Late:
        """One token in place, for generation; see `steps`."""
        return steps.channel_mix(self, x, late, norm, state)


class HeadNorm(nn.GroupNorm):
    """Group norm over each head's N channels of y [B, T, H, N], with eps 64e-5, times silu(gate).

    RWKV-5 divides y by 8 and uses eps 1e-5, which is the same function.
    """

    def __init__(self, n_head: int, d_model: int) -> None:
        super().__init__(n_head, d_model, eps=64e-5)

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """y [B, T, H, N], gate [B, T, D] -> [B, T, D]."""
        return head_norm(y, gate, self.weight, self.bias, self.eps)
