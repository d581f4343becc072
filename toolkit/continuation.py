"""Continues a batch from its recurrent state: one parallel prefill, then O(1) per token."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from toolkit.contracts import Batch
from toolkit.decode import Decoder
from toolkit.model import VisualRWKV
from toolkit.sampling import Picker, Sampling
from toolkit.trunk import LanguageModel, State

_CHECK_EVERY = 16  # tokens; the host waits for the device when it looks whether all have ended
# By whom it was last used: never by a module that the decoder itself holds, which would live for ever.
_DECODERS: WeakKeyDictionary[object, Decoder] = WeakKeyDictionary()


class Writer:
    """Writes one token per sample and step; a context, which borrows the owner's kept decoder.

    token: [B], the ids chosen last, which the next step reads. Two writers of one owner at a time have a
    decoder each.
    """

    def __init__(
        self, rwkv: LanguageModel, logits: Tensor, state: State, picker: Picker, *, owner: object
    ) -> None:
        """logits [B, V] of the last position read; state after it, which is not changed.

        owner: what the decoder is kept for and dropped with; holds the language model.
        """
        self._rwkv, self._picker, self._before, self._owner = rwkv, picker, state, owner
        self._decoder: Decoder | None = None
        self.token = picker(logits)

    def step(self) -> Tensor:
        """Reads `token` and chooses the next ids [B]."""
        if self._decoder is None:
            self._decoder = _borrowed(self._owner, self._rwkv, self._before)
            self._decoder.load(self.token, self._before)
        token = self._decoder.step()
        if not self._picker.plain:
            token.copy_(self._picker(self._decoder.logits))
        self.token = token.clone()
        return self.token

    def state(self) -> State:
        """A copy of the state after every token read, so without the last one chosen."""
        if self._decoder is None:
            return self._before
        return [(tuple(t.clone() for t in time), channel.clone()) for time, channel in self._decoder.state]

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._decoder is not None:
            _DECODERS[self._owner] = self._decoder
            self._decoder = None


def _borrowed(owner: object, rwkv: LanguageModel, state: State) -> Decoder:
    """The owner's decoder, built anew when the batch size, the precision or the weights' place changed."""
    found = _DECODERS.pop(owner, None)
    if found is not None and found.fits(rwkv, state):
        return found
    del found  # its memory goes before the next one's is taken
    return Decoder(rwkv, state)


@torch.inference_mode()
def greedy(model: VisualRWKV, batch: Batch, *, max_new_tokens: int, end_id: int) -> list[list[int]]:
    """The most likely continuation of each sample, without `end_id`, at most max_new_tokens ids each.

    The prompt is read once, in the run's own scan order; each new token then costs one step from the
    state, for every scan, because text after the image is never reordered. Paper: the original runs
    the whole prefix again for every token.
    """
    hidden, state = model.prefill(batch)
    logits = last_logits(model.rwkv, hidden, batch.lengths)
    options = Sampling(max_new_tokens=max_new_tokens)
    rows = continued(model.rwkv, logits, state, options, owner=model, ended=lambda ids: end_id in ids)
    return [until(row, end_id) for row in rows]


def last_logits(rwkv: LanguageModel, hidden: Tensor, lengths: Tensor) -> Tensor:
    """Logits [B, V] at each sample's own last position; hidden [B, T, D], lengths [B]."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    logits: Tensor = rwkv.head(hidden[rows, lengths - 1])
    return logits


@torch.inference_mode()
def continued(
    rwkv: LanguageModel,
    logits: Tensor,
    state: State,
    options: Sampling,
    *,
    owner: object,
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """At most options.max_new_tokens ids for each sample, written until all have `ended`.

    It is looked only now and then, so a row goes on after its end.
    """
    with Writer(rwkv, logits, state, Picker(options), owner=owner) as writer:
        written = [writer.token]
        for count in range(1, options.max_new_tokens):
            if _looks(count) and all(map(ended, torch.stack(written, dim=1).tolist())):
                break
            written.append(writer.step())
    rows: list[list[int]] = torch.stack(written, dim=1).tolist()
    return rows


def _looks(count: int) -> bool:
    """Whether to look for the end after so many tokens: often at first, for most answers are short."""
    return count % _CHECK_EVERY == 0 or (count < _CHECK_EVERY and count & (count - 1) == 0)


def until(ids: list[int], end_id: int) -> list[int]:
    """The ids before the first `end_id`."""
    return ids[: ids.index(end_id)] if end_id in ids else ids
