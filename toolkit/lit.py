"""The Lightning side of one training stage: step, optimizer, schedule. The model knows nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from toolkit import ranks
from toolkit.contracts import Batch
from toolkit.loss import lm_loss
from toolkit.model import VisualRWKV, answer_rows, asked_for, image_rows
from toolkit.schema import LossConf, StageConf


class StageModule(L.LightningModule):
    """One stage: AdamW on what learns, warm-up and cosine per optimizer step.

    first_step: optimizer steps of earlier stages, so that the log counts through. start: steps of this one
    that were done before, so that the rate goes on where it was. accumulate: micro batches of a step. The
    loss that is logged and the gradient are those of the whole step (`Batch.whole`), the same for any micro
    batch and number of ranks up to rounding.
    """

    def __init__(
        self,
        model: VisualRWKV,
        *,
        stage: StageConf,
        loss: LossConf,
        steps: int,
        first_step: int,
        start: int = 0,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.loss = loss
        self.steps = steps
        self.first_step = first_step
        self.start = start
        self.accumulate = accumulate
        self._so_far: list[Tensor] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        answers = self.model(batch, l2=self.loss.l2)
        loss = lm_loss(answers, reduction=self.loss.reduction, whole=batch.whole)
        self._so_far.append(loss.detach())
        if (index + 1) % self.accumulate == 0:
            done = self.first_step + self.global_step
            self.log("loss", ranks.summed(torch.stack(self._so_far).sum()), prog_bar=True)
            self.log_dict({"lr": self._rate(), "step": float(done)})
            self._so_far.clear()
        # Lightning takes the mean over micro batches and DDP that over ranks; the parts are to be summed.
        parts = self.accumulate * ranks.world()
        return loss * parts if parts > 1 else loss

    def _rate(self) -> float:
        optimizer: Any = self.optimizers()
        return float(optimizer.param_groups[0]["lr"])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return to_device(batch, device)

    def configure_optimizers(self) -> Any:
        optimizer = adamw(parameter_groups(self.model, self.stage.weight_decay), stage=self.stage)
        factor = rate_factor(self.stage, self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(self.start + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adamw(parameters: Any, *, stage: StageConf) -> torch.optim.AdamW:
    """The optimizer of a stage over parameters or groups of them."""
    betas = (stage.beta1, stage.beta2)
    return torch.optim.AdamW(parameters, lr=stage.lr, betas=betas, eps=stage.eps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Learning parameters in two groups: decay on tensors with two or more non-singleton axes.

    Paper: in the original's trainer a group with decay > 0 keeps its first learning rate for ever
    (the scheduler writes either the rate or the decay); here every group follows the schedule.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.squeeze().dim() >= 2]
    vectors = [p for p in learning if p.squeeze().dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def rate_factor(stage: StageConf, steps: int) -> Callable[[int], float]:
    """Factor on `lr` at each optimizer step: linear warm-up, then cosine from lr to lr_final."""
    low = stage.lr_final / stage.lr

    def factor(step: int) -> float:
        if step < stage.warmup:
            return (step + 1) / (stage.warmup + 1)
        progress = min(1.0, (step - stage.warmup) / max(1, steps - stage.warmup))
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; what depends on their values is looked up before."""
    if batch.labels.device.type == "cpu" and device.type != "cpu":
        batch = replace(batch, answers=answer_rows(asked_for(batch)), images=image_rows(batch))
    return batch.mapped(lambda tensor: tensor.to(device, non_blocking=True))
