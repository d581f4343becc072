"""The projectors' matrices. Parameter names are those of released checkpoints below `proj.`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.projectors.pool import Grid, pool, pooled_grid
from toolkit.contracts import ImageFeatures


class GridProjector(nn.Module, ABC):
    """Pools the grid, then maps patches and extra tokens alike: [B, P, d_in] -> [B, P', d_out].

    grid: of the encoder; `self.grid` is the one after pooling. A subclass gives `project`.
    """

    def __init__(self, grid: Grid, tokens: int) -> None:
        super().__init__()
        self.grid_in = grid
        self.grid = pooled_grid(grid, tokens)

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """[B, P, d_in] -> [B, P, d_out]."""

    def forward(self, features: ImageFeatures) -> ImageFeatures:
        if features.grid not in (self.grid_in, self.grid):  # stored features may be pooled already
            raise ValueError(
                f"projector: built for a {self.grid_in[0]} x {self.grid_in[1]} grid, "
                f"got features on {features.grid[0]} x {features.grid[1]}; use the encoder it was built with"
            )
        # Paper: pooling comes before the projector in every version (v5.0, v6.20, v7.00).
        pooled = pool(features, self.grid)
        kept = next(self.parameters()).dtype  # stored features may be narrower
        patches, extra = pooled.patches.to(kept), pooled.extra.to(kept)
        return ImageFeatures(self.project(patches), self.project(extra), self.grid)


class LinearProjector(GridProjector):
    """y = W f, no bias. Checkpoint key: `proj.weight` [d_out, d_in]."""

    def __init__(self, d_in: int, d_out: int, grid: Grid, tokens: int) -> None:
        super().__init__(grid, tokens)
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # the initialisation of nn.Linear

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MlpProjector(GridProjector):
    """y = W_2 gelu(W_1 f + b_1) + b_2 (LLaVA-1.5, arXiv 2310.03744, `mlp2x_gelu`)."""

    def __init__(self, d_in: int, d_out: int, grid: Grid, tokens: int) -> None:
        super().__init__(grid, tokens)
        self.fc1 = nn.Linear(d_in, d_out)
        self.fc2 = nn.Linear(d_out, d_out)

    def project(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedProjectorHD(GridProjector):
    """p = W_p f, y = W_o (sigmoid(W_g p) * p), no biases (VisualRWKV-HD, arXiv 2410.11665)."""

    def __init__(self, d_in: int, d_out: int, grid: Grid, tokens: int) -> None:
        super().__init__(grid, tokens)
        self.proj = nn.Linear(d_in, d_out, bias=False)
        self.gate = nn.Linear(d_out, d_out, bias=False)
        self.o_proj = nn.Linear(d_out, d_out, bias=False)

    def project(self, x: Tensor) -> Tensor:
        p = self.proj(x)
        return self.o_proj(torch.sigmoid(self.gate(p)) * p)


class GatedProjectorV7(GridProjector):
    """y = LN(W_o (sigmoid(W_g f) * f)), gate at full input width (VisualRWKV v7.00)."""

    def __init__(self, d_in: int, d_out: int, grid: Grid, tokens: int) -> None:
        super().__init__(grid, tokens)
        self.gate = nn.Linear(d_in, d_in, bias=False)
        self.o_proj = nn.Linear(d_in, d_out, bias=False)
        self.ln_v = nn.LayerNorm(d_out)

    def project(self, x: Tensor) -> Tensor:
        return self.ln_v(self.o_proj(torch.sigmoid(self.gate(x)) * x))
