"""Greedy generation from the recurrent state: one parallel prefill, then O(1) per token."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from toolkit.contracts import Batch
from toolkit.decode import Decoder
from toolkit.model import VisualRWKV
from toolkit.trunk import State

_CHECK_EVERY = 16  # tokens; the host waits for the device when it looks whether all have ended
_DECODERS: WeakKeyDictionary[VisualRWKV, Decoder] = WeakKeyDictionary()


@torch.inference_mode()
def greedy(model: VisualRWKV, batch: Batch, *, max_new_tokens: int, end_id: int) -> list[list[int]]:
    """The most likely continuation of each sample, without `end_id`, at most max_new_tokens ids each.

    The prompt is read once, in the run's own scan order; each new token then costs one step from the
    state, for every scan, because text after the image is never reordered. Paper: the original runs
    the whole prefix again for every token.
    """
    hidden, state = model.prefill(batch)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    token = model.rwkv.head(hidden[rows, batch.lengths - 1]).argmax(dim=-1)  # [B]
    written = [token]
    ended = token == end_id
    decoder: Decoder | None = None
    for count in range(1, max_new_tokens):
        if _looks(count) and bool(ended.all()):
            break
        if decoder is None:
            decoder = _decoder(model, state)
            decoder.load(token, state)
        token = decoder.step().clone()
        ended |= token == end_id
        written.append(token)
    return [_until(row, end_id) for row in torch.stack(written, dim=1).tolist()]


def _looks(count: int) -> bool:
    """Whether to look for the end after so many tokens: often at first, for most answers are short."""
    return count % _CHECK_EVERY == 0 or (count < _CHECK_EVERY and count & (count - 1) == 0)


def _decoder(model: VisualRWKV, state: State) -> Decoder:
    """The model's decoder, built anew when the batch size, the precision or the weights' place changed."""
    found = _DECODERS.get(model)
    if found is None or not found.fits(model.rwkv, state):
        _DECODERS.pop(model, None)  # its memory goes before the next one's is taken
        found = _DECODERS[model] = Decoder(model.rwkv, state)
    return found


def _until(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids
