"""A training stage as one CUDA graph: data, schedule and losses lie on the GPU, a step is one launch.

A small model's step is hundreds of kernels of a few microseconds each; launching them one by one takes
the CPU longer than the GPU computes. The graph holds the whole step: gather of the batch, forward and
backward pass, clipping, optimizer. The same step runs uncaptured on any device, which the tests use.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from data.plan import Steps as Plan
from toolkit import estimate, progress, ranks, resident, turns
from toolkit.curve import Probe
from toolkit.lit import parameter_groups, rate_factor
from toolkit.loss import lm_loss
from toolkit.model import VisualRWKV
from toolkit.schema import HardwareConf, LossConf, StageConf

if TYPE_CHECKING:
    from toolkit.saver import StepEnds

log = logging.getLogger("toolkit.train")

_WARM_UP = 3  # steps before a capture: kernels compile and libraries choose their algorithms in them
_AHEAD = 256  # steps that may wait on the device before the host does


class Capture(RuntimeError):
    """A step could not be captured; the message says why."""


def obstacle(
    hardware: HardwareConf, stage: StageConf, features: object, device: torch.device, *, order: str = ""
) -> str:
    """Why a stage does not train as a CUDA graph; "" if it can. ValueError if `always` was asked for.

    features: the table of a frozen encoder's features, None if they are computed in each step. order: what
    in the order of the samples stands against it.
    """
    if hardware.graph == "never":
        return "asked for"
    why = ""
    if device.type != "cuda":
        why = "on the CPU"
    elif ranks.world() > 1:
        why = f"gradients are summed over {ranks.world()} ranks"
    elif hardware.micro_batch not in (0, stage.global_batch):
        why = f"gradients of hardware.micro_batch={hardware.micro_batch} are accumulated"
    elif order:
        why = order
    elif features is None:
        why = "features of pictures are computed in each step"
    return refused(hardware, why) if why else ""


def refused(hardware: HardwareConf, why: str) -> str:
    """The reason, told once; an error where a graph was demanded."""
    if hardware.graph == "always":
        raise ValueError(f"hardware.graph=always, but a step cannot be a CUDA graph: {why}; write auto")
    if why != "on the CPU":
        log.warning("training steps are no CUDA graph: %s", why)
    return why


class Steps:
    """The steps of one stage, from tensors that lie on the model's device.

    at: [1] the step to come, read and raised by each; losses: [steps], written by each. A captured step
    reads all of it at its place, so nothing here may be replaced by another tensor.
    """

    def __init__(
        self,
        model: VisualRWKV,
        data: resident.Resident,
        plan: Plan,
        *,
        stage: StageConf,
        loss: LossConf,
        steps: int,
        bf16: bool,
    ) -> None:
        self.model, self.data, self.stage, self.loss, self.bf16 = model, data, stage, loss, bf16
        self.device = data.ids.device
        planned = [plan.step(t) for t in range(steps)]
        self.items = torch.tensor([items.tolist() for items, _ in planned], device=self.device)  # [steps, B]
        self.weights = torch.tensor([w.tolist() for _, w in planned], device=self.device)  # [steps, B]
        factor = rate_factor(stage, steps)
        self.rates = [stage.lr * factor(t) for t in range(steps)]
        self._rates = torch.tensor(self.rates, dtype=torch.float32, device=self.device)
        self._rate = torch.zeros((), device=self.device)
        self.losses = torch.zeros(steps, device=self.device)
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, stage.weight_decay),
            lr=stage.lr,
            betas=(stage.beta1, stage.beta2),
            eps=stage.eps,
            fused=True,
            capturable=True,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        # The warm-up before a capture would bring a warning that nothing was captured.
        setattr(self.optimizer, "_warned_capturable_if_run_uncaptured", True)  # noqa: B010
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def learning(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        """The next step: a replay if one was captured."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        batch = self.data.batch(
            self.items.index_select(0, self.at)[0], self.weights.index_select(0, self.at)[0]
        )
        self._rate.copy_(self._rates.index_select(0, self.at)[0])
        with self._cast():
            loss = lm_loss(self.model(batch, l2=self.loss.l2), reduction=self.loss.reduction)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.stage.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.learning, self.stage.grad_clip)
        self.optimizer.step()
        self.losses.index_copy_(0, self.at, loss.detach().to(self.losses.dtype).view(1))
        self.at += 1

    def _cast(self) -> AbstractContextManager[Any]:
        # Casts that autocast caches would be made inside the capture and read after their memory is gone.
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def capture(self, stream: torch.cuda.Stream | None = None) -> float:
        """Captures the step and returns the seconds of a replay; the model is left as it was.

        stream: what it is captured on; steps that are to run at the same time need one each.
        Raises Capture where the step waits for the device or does not fit into its memory.
        """
        before = [p.detach().clone() for p in self.learning]
        graph = torch.cuda.CUDAGraph()
        try:
            with estimate.unchanged(self.model):
                self._warm_up()
                with turns.capturing(graph, stream):
                    self._step()
                self._graph = graph
                seconds = estimate.measure(self._first_step, wait=self._wait, patience=0.2)
        except RuntimeError as error:
            self._graph = None
            raise Capture(str(error).strip().splitlines()[0]) from error
        finally:
            self._begin(before)
        return seconds

    def _first_step(self) -> None:
        self.at.zero_()
        self.step()

    def _warm_up(self) -> None:
        side = turns.side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._first_step()
        torch.cuda.current_stream(self.device).wait_stream(side)

    def _begin(self, parameters: Sequence[Tensor]) -> None:
        """Puts parameters, optimizer and counters back to where training begins, in their places."""
        with torch.no_grad():
            for parameter, value in zip(self.learning, parameters, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
            self.losses.zero_()
            self.at.zero_()
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def run(
        self,
        name: str,
        *,
        first_step: int,
        logger: Sequence[Logger],
        every: int,
        probes: Sequence[Probe] = (),
        after: float = 0.0,
        start: int = 0,
        ends: StepEnds | None = None,
    ) -> None:
        """The steps from `start` on, with losses written every `every` steps and points where probes want.

        after: what follows this stage, in its steps, for the time that progress tells. ends: what saves the
        state of the run, told of steps that are done and written. The optimizer's own state is in its place.
        """
        steps = len(self.losses)
        began = spoke = time.monotonic()
        self.at.fill_(start)
        written = start
        for done in range(start + 1, steps + 1):
            self.step()
            due = [p for p in probes if (first_step + done) % p.every == 0]
            marked = ends is not None and ends.due(done)
            if done % _AHEAD and not due and not marked and done != steps:
                continue
            with turns.waiting():
                self._wait()
            for probe in due:
                probe.visit(done, self.model)
            now = time.monotonic()
            if now - spoke >= progress.INTERVAL or done == steps:
                spoke = now
                loss = float(self.losses[done - 1])
                progress.say(name, done, steps, loss, now - began, after=after, start=start)
                written = self._write(logger, written, done, first_step, every)
            if ends is not None and ends.wanted(done):
                written = self._write(logger, written, done, first_step, every)
                ends.reached(done, self.optimizer)

    def _write(self, logger: Sequence[Logger], start: int, stop: int, first_step: int, every: int) -> int:
        """Logs the steps start, ..., stop - 1 that are due, as a Trainer does; returns stop."""
        losses = self.losses[start:stop].tolist()
        for t, loss in enumerate(losses, start):
            if (t + 1) % every == 0:
                values = {"loss": loss, "lr": self.rates[t]}
                with warnings.catch_warnings():  # that the run's folder is not empty
                    warnings.filterwarnings("ignore", module="lightning")
                    for one in logger:
                        one.log_metrics(values, step=first_step + t)
        for one in logger:
            one.save()
        return stop
