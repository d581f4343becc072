"""The trunk that runs every model: blocks, the layer loop with its reordering, the language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.embedding import embedding
from kernels.norm import add_norm, reorder
from toolkit.contracts import NO_IMAGE, Recurrence

LayerState = tuple[tuple[Tensor, ...], Tensor]
"""State of one layer: (time mix state, channel mix state)."""

State = list[LayerState]
"""State of the whole trunk, one entry per layer; constant size whatever was read before."""


class ScanSteps(nn.Module):
    """The scan of a whole trunk as one gather between layers.

    A scan says in which order layer l reads the patches; undoing layer l's order and applying layer
    l+1's fuse into one permutation, and none where two rows are alike (a unidirectional scan costs
    nothing). Equal to reordering before and undoing after each block, as the original does. The gather
    itself happens where the next block forms its residual sum and LayerNorm (`kernels.norm.add_norm`).

    table: [n_layer][P] patch indices in reading order (`contracts.Scan`).
    """

    steps: Tensor

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

    def indices(self, image_start: Tensor, length: int) -> list[Tensor | None]:
        """Before each layer and after the last: row indices over a flattened [B*T], None for no move.

        image_start: [B], NO_IMAGE where a sample has no image; each sample has its own position. Once per
        batch, and nothing waits for the device.
        """
        if len(self.steps) == 0:
            return [None] * len(self.use)
        where = torch.arange(length, device=image_start.device)
        start = image_start.unsqueeze(1)  # [B, 1]
        offset = where - start  # [B, T]
        inside = (offset >= 0) & (offset < self.n_patches) & (start != NO_IMAGE)
        offset = offset.clamp(0, max(0, self.n_patches - 1))
        base = torch.arange(image_start.shape[0], device=image_start.device).unsqueeze(1) * length
        moved = torch.where(inside, start + self.steps[:, offset], where) + base  # [steps, B, T]
        rows = moved.flatten(1).unbind()
        return [None if which is None else rows[which] for which in self.use]


class Block(nn.Module):
    """x + time mix, x + channel mix, each on its own LayerNorm; the first block also normalises its input.

    The last sum is left to the next block, where it is one kernel with the reordering and the LayerNorm.
    """

    def __init__(self, recurrence: Recurrence, layer: int, d_model: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(d_model)
        self.ln1 = nn.LayerNorm(d_model)
        self.ln2 = nn.LayerNorm(d_model)
        self.att = recurrence.time_mix(layer)
        self.ffn = recurrence.channel_mix(layer)

    def forward(
        self,
        x: Tensor,
        late: Tensor | None = None,
        state: LayerState | None = None,
        stream: Tensor | None = None,
        lengths: Tensor | None = None,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, LayerState, Tensor | None]:
        """x + late [B,T,D], its rows moved by `index` [B*T] -> (x, late, state, stream), the same sum."""
        time_state, channel_state = state or (None, None)
        if stream is not None and index is not None:
            stream = reorder(stream, index)
        if hasattr(self, "ln0"):
            x, late, index = self.ln0(_settled(x, late, index)), None, None
        x, normed = summed(x, late, index, self.ln1)
        y, time_state, stream = self.att(normed, time_state, stream, lengths)
        x, normed = summed(x, y, None, self.ln2)
        y, channel_state = self.ffn(normed, channel_state, lengths)
        return x, y, (time_state, channel_state), stream


def summed(x: Tensor, late: Tensor | None, index: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(x + late with its rows moved by `index`, the LayerNorm of that), [B, T, D] each."""
    if late is None and index is None:
        return x, norm(x)
    return add_norm(x, late, norm.weight, norm.bias, norm.eps, index=index)


def _settled(x: Tensor, late: Tensor | None, index: Tensor | None) -> Tensor:
    x = x if late is None else x + late
    return x if index is None else reorder(x, index)


class Embedding(nn.Embedding):
    """torch's, with a gradient that is reproducible on a GPU."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D]."""
        return embedding(ids, self.weight)


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm and head; parameter names of the released RWKV checkpoints."""

    def __init__(self, recurrence: Recurrence, *, d_model: int, n_layer: int, vocab_size: int) -> None:
        super().__init__()
        self.emb = Embedding(vocab_size, d_model)
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
        moves: list[Tensor | None] = [None] * (len(self.blocks) + 1)
        if scan is not None and image_start is not None:
            moves = scan.indices(image_start, x.shape[1])
        late: Tensor | None = None
        stream: Tensor | None = None
        after: State = []
        for layer, block in enumerate(self.blocks):
            before = None if state is None else state[layer]
            x, late, new, stream = block(x, late, before, stream, lengths, moves[layer])
            after.append(new)
        _, normed = summed(x, late, moves[-1], self.ln_out)
        return normed, after
