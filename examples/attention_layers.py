"""The layers of `attention.py`: a transformer whose keys and values are a state of constant size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention:
    """A pair of mixers per layer (`toolkit.contracts.Recurrence`)."""

    def __init__(self, d_model: int, *, head_size: int, d_ffn: int, window: int) -> None:
        self.d_model, self.d_ffn, self.window = d_model, d_ffn or 4 * d_model, window
        self.head_size = head_size or (64 if d_model >= 128 else d_model // 2)
        if d_model % self.head_size or self.head_size % 2:
            raise ValueError(
                f"recurrence.head_size={self.head_size} must be even and divide model.d_model={d_model}; "
                f"write recurrence.head_size={d_model // 2}"
            )

    def time_mix(self, layer: int) -> nn.Module:
        return TimeMix(self.d_model, self.head_size, self.window)

    def channel_mix(self, layer: int) -> nn.Module:
        return ChannelMix(self.d_model, self.d_ffn)


class TimeMix(nn.Module):
    """Causal attention over the last `window` tokens (Vaswani et al. 2017; positions: Su et al. 2021).

    state: (keys [B, W, D], values [B, W, D], tokens read so far [B]). Token p of a sample lies at p % W, so
    a state keeps its shape whatever was read.
    """

    def __init__(self, d_model: int, head_size: int, window: int) -> None:
        super().__init__()
        self.head_size, self.window = head_size, window
        self.query, self.key, self.value, self.output = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        batch, time, _ = x.shape
        read = x.new_zeros(batch, dtype=torch.long) if state is None else state[2]
        at = read.unsqueeze(1) + torch.arange(time, device=x.device)  # [B, T]
        q, k, v = self.query(x), self.rotated(self.key(x), at), self.value(x)  # [B, T, D]
        where, keys, values = at, k, v
        if state is not None:
            where = torch.cat((self.kept(read), at), dim=1)  # [B, W + T]
            keys = torch.cat((state[0].to(k.dtype), k), dim=1)  # [B, W + T, D]
            values = torch.cat((state[1].to(v.dtype), v), dim=1)
        back = at.unsqueeze(2) - where.unsqueeze(1)  # [B, T, W + T]: how far back a key is
        seen = (back >= 0) & (back < self.window) & (where >= 0).unsqueeze(1)
        y = F.scaled_dot_product_attention(
            self.heads(self.rotated(q, at)), self.heads(keys), self.heads(values), seen.unsqueeze(1)
        )  # [B, H, T, N]
        last = read + (time if lengths is None else lengths)
        after = self.store(keys, values, read, last, first=state is None)
        return self.output(y.transpose(1, 2).flatten(2)), after, stream

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, N]."""
        return x.unflatten(2, (-1, self.head_size)).transpose(1, 2)

    def rotated(self, x: Tensor, at: Tensor) -> Tensor:
        """Channels in pairs turned by angles that grow with the position; x [B, T, D], at [B, T]."""
        half = self.head_size // 2
        exact = torch.promote_types(x.dtype, torch.float32)  # an angle of hundreds needs more than bf16
        rates = 10000.0 ** (-torch.arange(half, device=x.device, dtype=exact) / half)
        angle = (at.unsqueeze(2) * rates).unsqueeze(2)  # [B, T, 1, N/2]
        a, b = x.unflatten(2, (-1, self.head_size)).chunk(2, dim=3)  # [B, T, H, N/2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=3).flatten(2)

    def kept(self, read: Tensor) -> Tensor:
        """Which token lies in each place of the state, negative for none: [B, W]."""
        newest = read.unsqueeze(1) - 1
        return newest - (newest - torch.arange(self.window, device=read.device)) % self.window

    def store(
        self, keys: Tensor, values: Tensor, read: Tensor, last: Tensor, *, first: bool
    ) -> tuple[Tensor, ...]:
        """The state after each sample's own last token; first: keys and values hold no old state."""
        tokens = self.kept(last)  # [B, W]
        old = torch.arange(self.window, device=read.device).expand_as(tokens)
        new = tokens - read.unsqueeze(1) + (0 if first else self.window)
        source = torch.where(tokens < read.unsqueeze(1), 0 if first else old, new)
        filled = (tokens >= 0).unsqueeze(2)
        index = source.clamp(min=0).unsqueeze(2).expand(-1, -1, keys.shape[2])
        return (keys.gather(1, index) * filled, values.gather(1, index) * filled, last)


class ChannelMix(nn.Module):
    """Two layers with GELU between; its state is empty, for it looks at one token only."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.key = nn.Linear(d_model, d_ffn)
        self.value = nn.Linear(d_ffn, d_model)

    def forward(self, x: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        y: Tensor = self.value(F.gelu(self.key(x)))
        return y, x.new_zeros(x.shape[0], 0)
