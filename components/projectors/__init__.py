"""Catalogue of projectors: image features [B, P, d_in] to model width [B, P', d_out].

Wired: d_in, d_out, grid. All pool the grid before they project, and project the class token as it is.
`tokens` is the number of patch vectors that reach the model: -1 keeps the grid, 0 keeps only the
extra tokens (the class token), a square number n averages the grid to sqrt(n) x sqrt(n).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from toolkit import register
from toolkit.register import Range

if TYPE_CHECKING:
    from toolkit.contracts import Projector

Tokens = Annotated[int, Range(-1)]


@register.projector("linear")
def linear(d_in: int, d_out: int, grid: tuple[int, int], *, tokens: Tokens = -1) -> Projector:
    """One matrix without bias; the paper's projector.

    tokens: patch vectors kept; -1 all, 0 only the class token, else a square number.
    """
    from components.projectors.forms import LinearProjector

    return LinearProjector(d_in, d_out, grid, tokens)


@register.projector("mlp")
def mlp(d_in: int, d_out: int, grid: tuple[int, int], *, tokens: Tokens = -1) -> Projector:
    """Two layers with GELU between and biases, as in LLaVA-1.5.

    tokens: patch vectors kept; -1 all, 0 only the class token, else a square number.
    """
    from components.projectors.forms import MlpProjector

    return MlpProjector(d_in, d_out, grid, tokens)


@register.projector("gated")
def gated(
    d_in: int, d_out: int, grid: tuple[int, int], *, form: Literal["hd", "v7"] = "hd", tokens: Tokens = -1
) -> Projector:
    """A sigmoid gate before the output matrix, as in VisualRWKV-HD or v7.

    form: `hd` gates after projecting, `v7` gates the features themselves and ends in a LayerNorm.
    tokens: patch vectors kept; -1 all, 0 only the class token, else a square number.
    """
    from components.projectors.forms import GatedProjectorHD, GatedProjectorV7

    return (GatedProjectorHD if form == "hd" else GatedProjectorV7)(d_in, d_out, grid, tokens)
