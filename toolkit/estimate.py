"""How long runs take: a few real steps measured before the first one counts, and what follows from that.

The arithmetic imports no torch: a sweep's parent process forecasts from what its workers measured.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from toolkit.contracts import Batch

QUESTION = 0.5
"""Time of one evaluated question, in training samples: no backward pass, but its answer token by token."""

PATIENCE = 2.0
"""Seconds that measuring may take; a step that would take longer is computed, not run."""

_MOST_COPIED = 1 << 26
"""Learning parameters up to which the optimizer's part is measured too, on a copy of them."""

QUEUE: list[Mapping[str, Any]] = []
"""Configs of the rows of a sweep that this process has still to begin."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of one run from its first training step on.

    step: of one optimizer step of the first stage. training: of all stages. evaluation: of the closing
    evaluation and the points while training. measured: False where a step was computed from the model's size.
    """

    step: float
    training: float
    evaluation: float
    measured: bool

    @property
    def total(self) -> float:
        return self.training + self.evaluation


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`, `5 days`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min" if rest and hours < 10 else f"{hours} h"
    return f"{round(hours / 24)} days"


def work(cfg: Mapping[str, Any]) -> float:
    """Size of a run next to others of a sweep: samples trained, times the matrices of the trunk."""
    samples = sum((s["steps"] or 1000 * s["epochs"]) * s["global_batch"] for s in cfg["stages"].values())
    return float(samples * cfg["model"]["n_layer"] * cfg["model"]["d_model"] ** 2)


def scaled(seconds: float, of: Mapping[str, Any], to: Mapping[str, Any]) -> float:
    """What run `to` takes if run `of` takes so many seconds."""
    return seconds * work(to) / max(1.0, work(of))


OVERLAP = 3.3
"""How much faster rows that share a GPU are done than in turn. scale=small on one H100: 30 rows of about 18 s
alone, 8 processes of 4 lanes under the Multi-Process Service, in 161 s."""


def span(running: Sequence[float], waiting: Sequence[float], workers: int, *, gpus: int = 0) -> float:
    """Seconds until all rows are done: those running need so long still, the others start in order.

    gpus: how many GPUs the rows share, if what they need was measured alone; 0: sharing is in it already.
    """
    free = [*sorted(running), *[0.0] * (workers - len(running))]
    heapq.heapify(free)
    for seconds in waiting:
        heapq.heapreplace(free, free[0] + seconds)
    shared = (sum(running) + sum(waiting)) / (OVERLAP * gpus) if gpus else 0.0
    return max(shared, max(free, default=0.0))


def forecast(
    step: float, samples: Sequence[int], questions: int, *, batch: int, measured: bool = True
) -> Forecast:
    """From the seconds of one step of `batch` samples: samples trained in each stage, questions asked."""
    each = step / batch
    return Forecast(step, each * sum(samples), QUESTION * each * questions, measured)


def told(found: Forecast, *, steps: int, questions: int, where: str, rows: int = 0, rest: float = 0.0) -> str:
    """The line that stands before a run's training; rows: how many others follow, rest: their seconds."""
    how = "of" if found.measured else "computed from the model's size as"
    each = f"{found.step:.2f} s" if found.step >= 0.1 else f"{1000 * found.step:.1f} ms"
    line = f"about {duration(found.total)} on {where}: {steps:,} steps {how} {each}"
    line += f", then {questions:,} questions"
    if rows:
        line += f"; about {duration(found.total + rest)} with the {rows} row{'s' * (rows > 1)} after it"
    return line


def measure(step: Callable[[], None], *, wait: Callable[[], None], patience: float = PATIENCE) -> float:
    """Seconds of `step`, called once to warm up and then up to five times within half of `patience`.

    wait: until the device is done. A first call that takes all of `patience` is itself the answer.
    """
    began = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - began
    if first > patience:
        return first
    times: list[float] = []
    while len(times) < 5 and (not times or sum(times) < patience / 2):
        began = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def training_step(
    model: nn.Module,
    loss_of: Callable[[Batch], torch.Tensor],
    batch_of: Callable[[int], Batch],
    size: int,
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    accumulate: int,
) -> tuple[float, bool]:
    """(seconds of an optimizer step, whether it was measured); model and generators stay as they are.

    loss_of: forward pass and loss of a batch. batch_of: a batch of so many samples on the device. size: of
    a micro batch; accumulate: micro batches in a step. On a CPU fewer samples are tried first, and more only
    while they are quick; where a single one would take all patience, the time is computed.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(1)
    device = batch.ids.device
    if device.type == "cpu" and (seconds := _computed(model, batch)) > PATIENCE:
        return seconds * size * accumulate, False

    def wait() -> None:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    def timed(samples: int) -> float:
        batch = batch_of(samples)

        def micro() -> None:
            for parameter in learning:
                parameter.grad = None
            loss_of(batch).backward()

        return measure(micro, wait=wait)

    with unchanged(model):
        samples = size if device.type == "cuda" else 1
        seconds = timed(samples)
        while samples < size and seconds < PATIENCE / 16:
            samples = min(4 * samples, size)
            seconds = timed(samples)
        seconds *= accumulate * size / samples
        if sum(p.numel() for p in learning) <= _MOST_COPIED:
            seconds += measure(_stepped(learning, optimizer), wait=wait)
    return seconds, True


def _stepped(
    learning: Sequence[nn.Parameter], optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Callable[[], None]:
    """An optimizer step on copies of the parameters, with the gradients that these have now."""
    from torch import nn

    copies = [nn.Parameter(p.detach().clone()) for p in learning]
    for copied, parameter in zip(copies, learning, strict=True):
        copied.grad = parameter.grad
    made = optimizer(copies)

    def step() -> None:
        made.step()

    return step


def _computed(model: nn.Module, batch: Batch) -> float:
    """Seconds of a batch by its arithmetic, at a matrix product's speed.

    6 operations for each token and parameter that learns, 2 for one that does not (a frozen encoder that
    runs in each step, whose image tokens are taken to be as many as the sequence has).
    """
    import torch

    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in model.parameters()) - learning if batch.pixels is not None else 0
    with torch.no_grad():
        a = torch.ones(512, 512)
        a @ a
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        speed = 4 * 2 * 512**3 / (time.perf_counter() - began)
    return (6.0 * learning + 2.0 * others) * batch.ids.numel() / speed


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Steps tried inside leave no trace: gradients, buffers, modes and random generators are put back.

    Parameters are the caller's to leave alone.
    """
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
