"""Average pooling of the patch grid, shared by all projectors."""

from __future__ import annotations

import math

import torch.nn.functional as F

from toolkit.contracts import ImageFeatures

Grid = tuple[int, int]

KEEP = -1
EXTRA_ONLY = 0


def pooled_grid(grid: Grid, tokens: int) -> Grid:
    """The grid that `tokens` leaves of `grid`; (0, 0) for tokens = 0.

    Raises ValueError unless tokens is -1, 0 or a square whose root divides both sides.
    Paper: the original pools with stride floor(n / g), which silently keeps more tokens than asked
    where g does not divide n (24 -> 5 gives 6 x 6); here that is an error.
    """
    if tokens == KEEP:
        return grid
    if tokens == EXTRA_ONLY:
        return (0, 0)
    side = math.isqrt(max(tokens, 0))
    if side == 0 or side * side != tokens or grid[0] % side or grid[1] % side:
        fit = [str(s * s) for s in range(1, min(grid) + 1) if not (grid[0] % s or grid[1] % s)]
        raise ValueError(
            f"projector.tokens: {tokens} does not divide the {grid[0]} x {grid[1]} grid; "
            f"use {', '.join(fit)}, or -1 for the whole grid, 0 for the class token alone"
        )
    return (side, side)


def pool(features: ImageFeatures, grid: Grid) -> ImageFeatures:
    """Patches [B, P, D] averaged to `grid`; extra tokens stay. Raises ValueError if nothing is left.

    Kernel = stride, as in the original (v5.0 and later).
    """
    if grid == features.grid:
        return features
    if grid == (0, 0):
        if features.extra.shape[1] == 0:
            raise ValueError(
                "projector.tokens: 0 keeps only the class token, and the encoder gives none; "
                "set encoder.class_token=true or projector.tokens=1"
            )
        return ImageFeatures(features.patches[:, :0], features.extra, grid)
    kernel = (features.grid[0] // grid[0], features.grid[1] // grid[1])
    maps = features.patches.transpose(1, 2).unflatten(2, features.grid)  # [B, D, height, width]
    patches = F.avg_pool2d(maps, kernel).flatten(2).transpose(1, 2)
    return ImageFeatures(patches, features.extra, grid)
