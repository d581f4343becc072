"""Greedy generation from the recurrent state: one parallel prefill, then O(1) per token."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.contracts import Batch
from toolkit.model import VisualRWKV


@torch.inference_mode()
def greedy(model: VisualRWKV, batch: Batch, *, max_new_tokens: int, end_id: int) -> list[list[int]]:
    """The most likely continuation of each sample, without `end_id`, at most max_new_tokens ids each.

    The prompt is read once, in the run's own scan order; each new token then costs one step from the
    state, for every scan, because text after the image is never reordered. Paper: the original runs
    the whole prefix again for every token.
    """
    hidden, state = model.prefill(batch)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    token = _most_likely(model, hidden[rows, batch.lengths - 1])  # [B]
    written = [token]
    ended = token == end_id
    for _ in range(max_new_tokens - 1):
        if bool(ended.all()):
            break
        hidden, state = model.rwkv(model.rwkv.emb(token).unsqueeze(1), state=state)
        token = _most_likely(model, hidden[:, 0])
        ended |= token == end_id
        written.append(token)
    return [_until(row, end_id) for row in torch.stack(written, dim=1).tolist()]


def _most_likely(model: VisualRWKV, hidden: Tensor) -> Tensor:
    return model.rwkv.head(hidden).argmax(dim=-1)


def _until(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids
