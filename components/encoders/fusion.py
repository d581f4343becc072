"""Several encoders on one grid, channels concatenated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.encoders.pixels import from_map, to_map
from toolkit.contracts import Encoder, ImageFeatures

if TYPE_CHECKING:
    from PIL.Image import Image

Grid = tuple[int, int]


@dataclass(frozen=True)
class TupleTransform:
    """PIL image -> one tensor per member, each by the member's own transform."""

    parts: tuple[Callable[[Image], Any], ...]

    def __call__(self, image: Image) -> tuple[Any, ...]:
        return tuple(part(image) for part in self.parts)


class FusedEncoder(nn.Module):
    """Members' feature maps brought to one grid and concatenated on channels, in order.

    Takes a tuple of pixel tensors, one per member. Paper: VisualRWKV-HD (arXiv 2410.11665) fuses
    DINOv2, SigLIP and SAM this way, 1024 + 1152 + 1024 channels on 32 x 32. Class tokens are dropped.
    """

    n_extra = 0

    def __init__(self, members: Sequence[Encoder], *, grid: int, resample: str) -> None:
        super().__init__()
        if not members:
            raise ValueError("encoder.members: list at least one encoder node")
        self.grid = (grid, grid) if grid else members[0].grid
        self.factors = [_factor(i, m.grid, self.grid, resample) for i, m in enumerate(members)]
        self.d_out = sum(m.d_out * max(1, k) ** 2 for m, k in zip(members, self.factors, strict=True))
        self.learned = any(m.learned for m in members)
        self._transform = TupleTransform(tuple(m.transform() for m in members))
        self.members = nn.ModuleList(cast("Sequence[nn.Module]", members))

    def transform(self) -> TupleTransform:
        return self._transform

    def forward(self, pixels: Sequence[Tensor]) -> ImageFeatures:
        if isinstance(pixels, Tensor) or len(pixels) != len(self.members):
            raise ValueError(
                f"encoder: pixels must be {len(self.members)} tensors, one per member; "
                "make them with the encoder's own transform()"
            )
        parts = zip(self.members, pixels, self.factors, strict=True)
        maps = [_resample(to_map(member(part)), self.grid, k) for member, part, k in parts]
        return from_map(torch.cat(maps, dim=1))


def _factor(index: int, own: Grid, target: Grid, resample: str) -> int:
    """Side k of the cells that move into channels; 1: nothing to do, 0: interpolate."""
    if own == target:
        return 1
    k = own[0] // target[0]
    whole = k > 1 and own == (k * target[0], k * target[1])
    if resample == "space_to_depth" and not whole:
        raise ValueError(
            f"encoder.members[{index}]: its {own[0]} x {own[1]} grid is no whole multiple of the common "
            f"{target[0]} x {target[1]}; set encoder.resample=bilinear or another encoder.grid"
        )
    return k if whole and resample != "bilinear" else 0


def _resample(feature_map: Tensor, grid: Grid, factor: int) -> Tensor:
    """[B, D, h, w] -> [B, D', height, width]."""
    if factor == 1:
        return feature_map
    if factor:
        # Paper: the "lossless down-sampler", output channel 4c + 2dy + dx for 2 x 2 cells.
        return F.pixel_unshuffle(feature_map, factor)
    return _bilinear(feature_map, grid)


def _bilinear(feature_map: Tensor, grid: Grid) -> Tensor:
    """torch's own interpolation as a product for each axis: [B, D, h, w] -> [B, D, height, width].

    Its backward pass adds by atomics on a GPU, so that equal runs would drift apart by rounding.
    """
    smooth = feature_map.shape[2] > grid[0]
    with torch.autocast(feature_map.device.type, enabled=False):
        x = feature_map.float()
        rows, columns = (_weights(x, axis, n, smooth) for axis, n in zip((2, 3), grid, strict=True))
        return (rows.T @ x @ columns).to(feature_map.dtype)


def _weights(x: Tensor, axis: int, n: int, smooth: bool) -> Tensor:
    """What each position along an axis gives to each of n new ones [n_old, n]."""
    old = x.shape[axis]
    each = torch.eye(old, device=x.device).view(1, 1, old, old)  # a row for each position
    return F.interpolate(each, (old, n), mode="bilinear", align_corners=False, antialias=smooth)[0, 0]
