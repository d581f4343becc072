"""A control arm: causal attention in the place of a recurrence, everything else of the model as it is.

`python -m toolkit.run plugins=[attention] recurrence=attention`, from this folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from toolkit import register
from toolkit.register import Range

if TYPE_CHECKING:
    from toolkit.contracts import Recurrence


@register.recurrence("attention")
def attention(
    d_model: int,
    n_layer: int,
    *,
    head_size: Annotated[int, Range(0)] = 0,
    d_ffn: Annotated[int, Range(0)] = 0,
    window: Annotated[int, Range(1)] = 128,
) -> Recurrence:
    """A transformer's layers: causal attention with rotary positions, and a GELU network.

    head_size: 0 is 64, or half of d_model where d_model is below 128. d_ffn: 0 is 4 * d_model. window: how
    many tokens a token can see, itself included; keys and values of so many are the state.
    """
    from attention_layers import Attention

    return Attention(d_model, head_size=head_size, d_ffn=d_ffn, window=window)
