"""The trunk that runs every model: blocks, the layer loop with its reordering, the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.contracts import NO_IMAGE, Recurrence

LayerState = tuple[tuple[Tensor, ...], Tensor]
"""State of one layer: (time mix state, channel mix state)."""

State = list[LayerState]
"""State of the whole trunk, one entry per layer; constant size whatever was read before."""


class Permute(torch.autograd.Function):
    """Reorders the rows of x [R, D]; the gradient is reordered back by the inverse permutation.

    Autograd's own backward of an index is a scatter-add, whose atomics are not reproducible on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return Permute.apply(grad, inverse, index), None, None


class ScanSteps(nn.Module):
    """The scan of a whole trunk as one gather between layers.

    A scan says in which order layer l reads the patches; undoing layer l's order and applying layer
    l+1's fuse into one permutation, and none where two rows are alike (a unidirectional scan costs
    nothing). Equal to reordering before and undoing after each block, as the original does.

    table: [n_layer][P] patch indices in reading order (`contracts.Scan`).
    """

    steps: Tensor
    inverses: Tensor

    def __init__(self, table: Sequence[Sequence[int]]) -> None:
        super().__init__()
        orders = torch.as_tensor(table, dtype=torch.long, device="cpu")  # [L, P]
        self.n_patches = orders.shape[1]
        plain = torch.arange(self.n_patches, device="cpu")
        current = plain
        unique: list[Tensor] = []
        self.use: list[int | None] = []  # before each layer, and after the last: which step, or none
        for wanted in (*orders, plain):
            step = torch.argsort(current)[wanted]
            current = wanted
            if torch.equal(step, plain):
                self.use.append(None)
                continue
            known = next((i for i, u in enumerate(unique) if torch.equal(u, step)), None)
            if known is None:
                unique.append(step)
            self.use.append(len(unique) - 1 if known is None else known)
        steps = torch.stack(unique) if unique else plain.new_empty(0, self.n_patches)
        # Not persistent: derived from the recipe. The original stores its orders in some checkpoints.
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("inverses", torch.argsort(steps, dim=-1), persistent=False)

    def indices(self, image_start: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
        """Row indices over a flattened [B*T] for each distinct step, and their inverses.

        image_start: [B], NO_IMAGE where a sample has no image; each sample has its own position.
        """
        where = torch.arange(length, device=image_start.device)
        offset = where - image_start.unsqueeze(1)  # [B, T]
        inside = (offset >= 0) & (offset < self.n_patches) & (image_start.unsqueeze(1) != NO_IMAGE)
        offset = offset.clamp(0, max(0, self.n_patches - 1))
        base = torch.arange(image_start.shape[0], device=image_start.device).unsqueeze(1) * length

        def rows(step: Tensor) -> Tensor:
            moved = torch.where(inside, image_start.unsqueeze(1) + step[offset], where)
            return (base + moved).flatten()  # [B*T]

        return [(rows(s), rows(i)) for s, i in zip(self.steps, self.inverses, strict=True)]


class Block(nn.Module):
    """x + time mix, x + channel mix, each on its own LayerNorm; the first block also normalises its input."""

    def __init__(self, recurrence: Recurrence, layer: int, d_model: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(d_model)
        self.ln1 = nn.LayerNorm(d_model)
        self.ln2 = nn.LayerNorm(d_model)
        self.att = recurrence.time_mix(layer)
        self.ffn = recurrence.channel_mix(layer)

    def forward(
        self, x: Tensor, state: LayerState | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """x [B, T, D] -> (x [B, T, D], state, stream)."""
        time_state, channel_state = state or (None, None)
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, time_state, stream = self.att(self.ln1(x), time_state, stream, lengths)
        x = x + y
        y, channel_state = self.ffn(self.ln2(x), channel_state, lengths)
        return x + y, (time_state, channel_state), stream


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm and head; parameter names of the released RWKV checkpoints."""

    def __init__(self, recurrence: Recurrence, *, d_model: int, n_layer: int, vocab_size: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(recurrence, layer, d_model) for layer in range(n_layer))
        self.ln_out = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if not self.emb.weight.is_meta:
            # Source: RWKV-LM's weight generator.
            nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
            nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, vocab_size / d_model) ** 0.5)

    def forward(
        self,
        x: Tensor,
        *,
        scan: ScanSteps | None = None,
        image_start: Tensor | None = None,
        state: State | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Embedded sequence x [B, T, D] -> (normalised hidden states [B, T, D], state).

        With `scan`, the P patches that begin at image_start [B] are read in the scan's order by each
        layer; text is never moved, so generation after the image needs no scan. The state is the one
        at each sample's own end (`lengths` [B], None: T), in reading order of plain text.
        """
        moves = scan.indices(image_start, x.shape[1]) if scan is not None and image_start is not None else []
        stream: Tensor | None = None
        after: State = []
        for layer, block in enumerate(self.blocks):
            x, stream = self._reorder(x, stream, scan, moves, layer)
            x, new, stream = block(x, None if state is None else state[layer], stream, lengths)
            after.append(new)
        x, _ = self._reorder(x, None, scan, moves, len(self.blocks))
        return self.ln_out(x), after

    @staticmethod
    def _reorder(
        x: Tensor, stream: Tensor | None, scan: ScanSteps | None, moves: list[tuple[Tensor, Tensor]], at: int
    ) -> tuple[Tensor, Tensor | None]:
        which = scan.use[at] if scan is not None and moves else None
        if which is None:
            return x, stream
        index, inverse = moves[which]

        def moved(t: Tensor) -> Tensor:
            return Permute.apply(t.flatten(0, 1), index, inverse).view(t.shape)

        return moved(x), None if stream is None else moved(stream)
