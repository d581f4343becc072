"""The recurrences, as a menu: which time mix and channel mix make up a language model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from toolkit import register
from toolkit.register import Range

if TYPE_CHECKING:
    from toolkit.contracts import Recurrence

Size = Annotated[int, Range(0)]


@register.recurrence("rwkv4")
def rwkv4(d_model: int, n_layer: int, *, d_ffn: Size = 0) -> Recurrence:
    """RWKV-4: a decaying weighted average per channel, with a vector state.

    d_ffn: width of the channel mix; 0 is the published 4 * d_model. Source: Peng et al. 2023
    (arXiv 2305.13048), equations 11 to 18.
    """
    from components.recurrences.rwkv4 import Rwkv4

    return Rwkv4(d_model, n_layer, d_ffn=d_ffn)


@register.recurrence("rwkv5")
def rwkv5(d_model: int, n_layer: int, *, head_size: Size = 0, d_ffn: Size = 0) -> Recurrence:
    """RWKV-5.2 (Eagle): matrix-valued state per head, one decay per channel.

    head_size: N; 0 is 64, or half of d_model where d_model is below 128. d_ffn: width of the channel
    mix; 0 is the published 3.5 * d_model, rounded down to a multiple of 32. Source: Peng et al. 2024
    (arXiv 2404.05892), section 3.1.
    """
    from components.recurrences.rwkv5 import Rwkv5

    return Rwkv5(d_model, n_layer, head_size=head_size, d_ffn=d_ffn)


@register.recurrence("rwkv6")
def rwkv6(
    d_model: int,
    n_layer: int,
    *,
    head_size: Size = 0,
    d_ffn: Size = 0,
    shift_rank: Size = 0,
    decay_rank: Size = 0,
) -> Recurrence:
    """RWKV-6 (Finch): matrix-valued state, data-dependent token shift and decay.

    head_size and d_ffn as for rwkv5. shift_rank, decay_rank: ranks of the two low-rank maps; 0 is the
    published 32 and 64, or 64 and 128 from d_model 4096 on. Source: Peng et al. 2024 (arXiv
    2404.05892), section 3.2.
    """
    from components.recurrences.rwkv6 import Rwkv6

    return Rwkv6(
        d_model, n_layer, head_size=head_size, d_ffn=d_ffn, shift_rank=shift_rank, decay_rank=decay_rank
    )
