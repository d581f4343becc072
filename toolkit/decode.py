"""Decoding: one token of the whole model, states updated in place, replayed as a CUDA graph on a GPU.

At one token a layer is some twenty small kernels whose launches cost more than their work; a graph makes
them one launch. On a CPU, and where a model cannot be captured, the same step runs eagerly.

Under autocast the matrices are cast once per answer, not once per token: reading float32 weights and
writing bfloat16 ones would triple a token's memory traffic. The values are those autocast multiplies by.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels.products import Product, products_step
from kernels.step import Late, overlapped
from toolkit import turns
from toolkit.trunk import Block, LanguageModel, LayerState, State

_LOG = logging.getLogger("toolkit.decode")
_WARM_UP = 3  # steps before a capture: kernels compile and libraries choose their algorithms in them


class OneToken(nn.Module):
    """Token ids [B] -> logits [B, V], one step of every layer; the states given change in place."""

    def __init__(self, rwkv: LanguageModel) -> None:
        super().__init__()
        self.rwkv = rwkv

    def forward(self, token: Tensor, state: State) -> Tensor:
        """A mixer with `step_` runs that (contracts.TimeMix); any other its forward with T = 1."""
        x: Tensor = self.rwkv.emb(token)  # [B, D]
        late: Late | None = None
        stream: Tensor | None = None
        blocks: Iterable[Any] = self.rwkv.blocks
        for block, (time_state, channel_state) in zip(blocks, state, strict=True):
            if hasattr(block, "ln0"):
                x = block.ln0(x)
            late, stream = _time(block, x, late, time_state, stream)
            late = _channel(block, x, late, channel_state)
        _settle(x, late)
        return _logits(self.rwkv.head, self.rwkv.ln_out(x))


def _time(
    block: Block, x: Tensor, late: Late | None, state: tuple[Tensor, ...], stream: Tensor | None
) -> tuple[Late, Tensor | None]:
    """The time mix of one block; x [B, D] and the state change in place."""
    mixer: Any = block.att
    if hasattr(mixer, "step_"):
        return mixer.step_(x, late, block.ln1, state), stream
    _settle(x, late)
    y, new, stream = mixer(block.ln1(x).unsqueeze(1), state, stream, None)
    for old, fresh in zip(state, new, strict=True):
        _overwrite(old, fresh)
    return Late(y[:, 0]), stream


def _channel(block: Block, x: Tensor, late: Late, state: Tensor) -> Late:
    """The channel mix of one block; x [B, D] and the state change in place."""
    mixer: Any = block.ffn
    if hasattr(mixer, "step_"):
        late = mixer.step_(x, late, block.ln2, state)
        return late
    _settle(x, late)
    y, new = mixer(block.ln2(x).unsqueeze(1), state, None)
    _overwrite(state, new)
    return Late(y[:, 0])


def _logits(head: nn.Module, x: Tensor) -> Tensor:
    """[B, D] -> [B, V]."""
    if type(head) is nn.Linear and head.bias is None:
        kind = _autocast_dtype(x.device) or head.weight.dtype
        return products_step(x.to(kind).unsqueeze(0), (Product(0, head.weight),))[0]
    logits: Tensor = head(x)
    return logits


def _settle(x: Tensor, late: Late | None) -> None:
    """Adds to the residual what a mixer left to be added."""
    if late is not None:
        x += late.value if late.gate is None else torch.sigmoid(late.gate) * late.value


def _overwrite(old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise ValueError(
            f"a recurrence's state grew from {list(old.shape)} to {list(new.shape)} in one step; "
            "a state must keep its shape, whatever was read"
        )
    old.copy_(new)


def tensors(state: State) -> Iterator[Tensor]:
    """Every tensor of a trunk's state."""
    for time_state, channel_state in state:
        yield from time_state
        yield channel_state


def _copy(layer: LayerState) -> LayerState:
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in layer[0]), layer[1].clone()


class Decoder:
    """Greedy decoding of one batch size from fixed buffers.

    token: [B], the next ids to be read, which each step replaces by the most likely ones; logits [B, V] of
    the last step; state: per layer, updated in place. `mode` says what runs, "graph", or "eager" and why;
    `kernels.chosen` tells it as "decode".
    """

    @torch.inference_mode()
    def __init__(
        self, rwkv: LanguageModel, state: State, *, graph: bool = True, overlap: bool = True
    ) -> None:
        """state: a prefilled state, read for its shapes and copied; graph: capture where a GPU is.

        overlap: let the steps' kernels start while the one before ends (`kernels.step.overlapped`).
        """
        first = next(tensors(state))
        self.device = first.device
        self.state = [_copy(layer) for layer in state]
        self.token = torch.zeros(first.shape[0], dtype=torch.long, device=self.device)
        self.logits = torch.empty(0, device=self.device)
        self._model = OneToken(rwkv)
        self._cast_to = _autocast_dtype(self.device)
        self._places = _places(rwkv)
        self._cast = _casts(self._model, self._cast_to)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.mode = "eager: on the CPU" if self.device.type != "cuda" else "eager: asked for"
        if graph and self.device.type == "cuda":
            with overlapped(self.device) if overlap else nullcontext():
                self._capture()
        _LOG.info("decoding %d samples a step: %s", len(self.token), self.mode)

    def fits(self, rwkv: LanguageModel, state: State) -> bool:
        """Whether this decoder serves that model and state, under the autocast in force."""
        mine, theirs = list(tensors(self.state)), list(tensors(state))
        return (
            self._model.rwkv is rwkv
            and self._cast_to == _autocast_dtype(theirs[0].device)
            and [(t.shape, t.dtype, t.device) for t in mine] == [(t.shape, t.dtype, t.device) for t in theirs]
            and self._places == _places(rwkv)
        )

    @torch.inference_mode()
    def load(self, token: Tensor, state: State) -> None:
        """Begins after a prefill: its state, and the first token [B] chosen. Reads the weights anew."""
        kernels.note("decode", self.mode)
        if self._cast:
            weights = dict(self._model.named_parameters())
            torch._foreach_copy_(list(self._cast.values()), [weights[name] for name in self._cast])
        for mine, theirs in zip(tensors(self.state), tensors(state), strict=True):
            mine.copy_(theirs)
        self.token.copy_(token)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Reads `token`, writes the next one there and returns it: the buffer itself, so copy to keep."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        return self.token

    def _step(self) -> None:
        # Cached casts would be made inside one capture and read by the next, after their memory is gone.
        enabled = self._cast_to is not None
        with torch.autocast(self.device.type, self._cast_to, enabled=enabled, cache_enabled=False):
            if self._cast:
                self.logits = torch.func.functional_call(self._model, self._cast, (self.token, self.state))
            else:
                self.logits = self._model(self.token, self.state)
        self.token.copy_(self.logits.argmax(dim=-1))

    def _capture(self) -> None:
        """Captures one step; a model that cannot be captured (it waits for the device) runs eagerly."""
        side = turns.side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with turns.capturing(graph):
                self._step()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            self.mode = f"eager: the step cannot be captured ({reason})"
            _LOG.warning("decoding is not captured in a CUDA graph: %s", reason)
            return
        self._graph, self.mode = graph, "graph"


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast multiplies in on this device; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _places(rwkv: LanguageModel) -> list[int]:
    """Where the weights lie: a graph reads those places, whatever the parameters become."""
    return [p.data_ptr() for p in rwkv.parameters()]


def _casts(model: OneToken, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies in `dtype` of what a step multiplies by: Linear weights and a mixer's named `matrices`."""
    if dtype is None:
        return {}
    found = {}
    for prefix, module in model.named_modules():
        names = ("weight",) if isinstance(module, nn.Linear) else getattr(module, "matrices", ())
        for name in names:
            weight = getattr(module, name)
            if weight.dtype != dtype:
                found[f"{prefix}.{name}"] = weight.detach().to(dtype)
    return found
