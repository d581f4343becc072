"""One token of the built-in mixers: their own `forward` at T = 1, with the states updated in place.

Each function is the `step_` of a mixer (`contracts.TimeMix`: optional). It takes the residual stream
x [B, D] and what has still to be added to it, and returns its own output as the next such `Late` value, so
that the addition, the LayerNorm and the token shift are one kernel. Matrix products run in the type
autocast asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.products import Product, products_step
from kernels.step import (
    Ending,
    Late,
    LowRank,
    Norm,
    ddlerp_step,
    norm_shift_step_,
    wkv4_step_,
    wkv5_step_,
    wkv6_step_,
)

if TYPE_CHECKING:
    from components.recurrences import rwkv4, rwkv5, rwkv6, shared


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a Linear multiplies x here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def plain(norm: nn.LayerNorm) -> Norm:
    """A LayerNorm module as a value."""
    return Norm(norm.weight, norm.bias, norm.eps)


def by_row(*linears: nn.Linear, first: int = 0) -> tuple[Product, ...]:
    """The products of Linear modules (without bias) with the mixes from number `first` on."""
    return tuple(Product(first + i, one.weight) for i, one in enumerate(linears))


def one_product(x: Tensor, linear: nn.Linear) -> Tensor:
    """x [B, D_in] through a Linear without bias."""
    (y,) = products_step(x.unsqueeze(0), (Product(0, linear.weight),))
    return y


def time_mix4(
    mix: rwkv4.TimeMix, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: tuple[Tensor, ...]
) -> Late:
    """RWKV-4's time mix. x [B, D], state ([B, D], [B, 3, D]): both change."""
    previous, memory = state
    shares = (mix.time_mix_k, mix.time_mix_v, mix.time_mix_r)
    mixed, _ = norm_shift_step_(
        x, late, plain(norm), previous, shares, of_previous=False, dtype=product_dtype(x)
    )
    k, v, r = products_step(mixed, by_row(mix.key, mix.value, mix.receptance))
    y = wkv4_step_(k, v, None, mix.time_first, memory, base=mix.time_decay, gate=r)
    return Late(one_product(y, mix.output))


def time_mix5(
    mix: rwkv5.TimeMix, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: tuple[Tensor, ...]
) -> Late:
    """RWKV-5.2's time mix. x [B, D], state ([B, D], [B, H, N, N]): both change."""
    previous, memory = state
    shares = (mix.time_mix_k, mix.time_mix_v, mix.time_mix_r, mix.time_mix_g)
    mixed, _ = norm_shift_step_(
        x, late, plain(norm), previous, shares, of_previous=False, dtype=product_dtype(x)
    )
    heads = (x.shape[0], *mix.time_faaaa.shape)
    k, v, r, g = products_step(mixed, by_row(mix.key, mix.value, mix.receptance, mix.gate))
    ending = Ending(mix.ln_x.weight, mix.ln_x.bias, mix.ln_x.eps, g)
    y = wkv5_step_(
        r.view(heads),
        k.view(heads),
        v.view(heads),
        None,
        mix.time_faaaa,
        memory,
        base=mix.time_decay,
        ending=ending,
    )
    return Late(one_product(y.flatten(1), mix.output))


def time_mix6(
    mix: rwkv6.TimeMix, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: tuple[Tensor, ...]
) -> Late:
    """RWKV-6's time mix. x [B, D], state ([B, D], [B, H, N, N]): both change."""
    previous, memory = state
    dtype = product_dtype(x)
    mixed, change = norm_shift_step_(
        x, late, plain(norm), previous, (mix.time_maa_x,), of_previous=True, dtype=dtype, keep=True
    )
    assert change is not None
    (low,) = products_step(mixed, (Product(0, mix.time_maa_w1, turned=True),))  # [B, 5 * rank]
    shares = (mix.time_maa_w, mix.time_maa_k, mix.time_maa_v, mix.time_maa_r, mix.time_maa_g)
    mixed = ddlerp_step(previous, change, low, mix.time_maa_w2, shares, dtype=dtype)  # w, k, v, r, g
    decay = Product(0, mix.time_decay_w1, turned=True, then="tanh")
    linears = (mix.key, mix.value, mix.receptance, mix.gate)
    k, v, r, g, shift = products_step(mixed, (*by_row(*linears, first=1), decay))
    heads = (x.shape[0], *mix.time_faaaa.shape)
    y = wkv6_step_(
        r.view(heads),
        k.view(heads),
        v.view(heads),
        LowRank(shift, mix.time_decay_w2),
        mix.time_faaaa,
        memory,
        base=mix.time_decay.view(heads[1:]),
        ending=Ending(mix.ln_x.weight, mix.ln_x.bias, mix.ln_x.eps, g),
    )
    return Late(one_product(y.flatten(1), mix.output))


def channel_mix(
    mix: shared.ChannelMix, x: Tensor, late: Late | None, norm: nn.LayerNorm, state: Tensor
) -> Late:
    """The squared-ReLU channel mix. x [B, D], state [B, D]: both change."""
    shares = (getattr(mix, f"{mix.mix}_k"), getattr(mix, f"{mix.mix}_r"))
    mixed, _ = norm_shift_step_(
        x, late, plain(norm), state, shares, of_previous=mix.mix == "time_maa", dtype=product_dtype(x)
    )
    key = Product(0, mix.key.weight, then="relu2")
    hidden, gate = products_step(mixed, (key, Product(1, mix.receptance.weight)))  # [B, d_ffn], [B, D]
    return Late(one_product(hidden, mix.value), gate)
