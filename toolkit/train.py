"""Training stages: the only place that makes a Lightning Trainer, from explicit fields."""

from __future__ import annotations

import ctypes
import logging
import math
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import kernels
from data.cluster import gpu, place
from data.plan import divided
from toolkit import ranks
from toolkit.ddp import placed
from toolkit.lit import StageModule
from toolkit.model import VisualRWKV
from toolkit.progress import bar
from toolkit.schema import HardwareConf, LogConf, RunConf, StageConf
from toolkit.whole import WholeSteps

PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def device_of(hardware: HardwareConf) -> torch.device:
    """The device that `hardware.device` asks for, with several ranks this one's; it must be there."""
    available = torch.cuda.is_available()
    if hardware.device == "cuda" and not available:
        raise ValueError(
            "hardware.device=cuda, but torch sees no CUDA device here; write hardware.device=cpu"
        )
    if not available or hardware.device == "cpu":
        return torch.device("cpu")
    if ranks.world() == 1:
        return torch.device("cuda")
    device = torch.device("cuda", gpu(place(), torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def choose_kernels(hardware: HardwareConf, device: torch.device) -> None:
    """Sets the kernel backend of the run and forgets what ran before; one that cannot run is an error."""
    try:
        kernels.set_backend(hardware.backend, device)
    except ValueError as error:
        raise ValueError(f"hardware.backend={hardware.backend}: {error}") from error
    kernels.reset_chosen()


def prepare(hardware: HardwareConf, seed: int) -> None:
    """Seeds every generator, sets the CPU threads and keeps freed memory in the allocator.

    Convolutions of encoders that learn take their reproducible form on a GPU.
    """
    L.seed_everything(seed, workers=True, verbose=False)
    torch.backends.cudnn.deterministic = True
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    # A graph of small tensors is freed and allocated anew in each step; giving the memory back to the
    # system in between cost 15 to 30 % of a CPU step.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold = -1, -3
            libc.mallopt(trim_threshold, 1 << 30)
            libc.mallopt(mmap_threshold, 1 << 25)
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.WARNING)


def stage_steps(stage: StageConf, per_epoch: int | None, *, name: str) -> int:
    """Optimizer steps of a stage: `steps`, or those of `epochs` passes of so many steps, None if unknown."""
    if stage.steps and stage.epochs:
        raise ValueError(
            f"stages.{name}: steps={stage.steps} and epochs={stage.epochs:g} are both set; set one to 0"
        )
    if stage.epochs and per_epoch is None:
        raise ValueError(
            f"stages.{name}.epochs={stage.epochs:g}: nobody knows how many samples a stream has; write "
            f"stages.{name}.epochs=0 stages.{name}.steps=1000"
        )
    steps = stage.steps or math.ceil(stage.epochs * (per_epoch or 0))
    if not steps:
        raise ValueError(f"stages.{name}: steps and epochs are both 0; write stages.{name}.steps=1000")
    return steps


def micro_batch(stage: StageConf, hardware: HardwareConf, *, name: str) -> int:
    """Samples of a rank and forward pass; as many as make its share of the global batch are accumulated."""
    share = divided(stage.global_batch, ranks.world(), what=f"stages.{name}.global_batch", over="ranks")
    size = hardware.micro_batch or share
    if share % size:
        of = f"stages.{name}.global_batch={stage.global_batch}"
        if ranks.world() > 1:
            of = f"the {share} samples of a rank and step ({of} on {ranks.world()} ranks)"
        raise ValueError(f"hardware.micro_batch={size} does not divide {of}")
    return size


def loggers(folder: Path, log: LogConf, *, step: int = 0) -> list[Logger]:
    """metrics.csv and TensorBoard events in the run's folder, the latter without points from `step` on.

    A loss that is no number ends the run, once it stands there.
    """
    made: list[Logger] = []
    if log.csv:
        made.append(CSVLogger(folder, name="", version="", flush_logs_every_n_steps=log.every))
    if log.tensorboard:
        made.append(TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step or None))
    return [*made, Finite()]


class Finite(Logger):
    """Writes nothing: raises ValueError where a loss is no number, as no later step would mend it."""

    name = version = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise ValueError(
                f"the loss is {metrics['loss']} at step {(step or 0) + 1}: training has diverged; lower lr "
                "of the stage, or give it more warmup"
            )

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit_stage(
    model: VisualRWKV,
    loader: Iterable[Any],
    *,
    name: str,
    conf: RunConf,
    steps: int,
    first_step: int,
    accumulate: int,
    logger: list[Logger],
    folder: Path,
    callbacks: Sequence[L.Callback] = (),
    after: float = 0.0,
    start: int = 0,
) -> None:
    """Trains one stage up to `steps` optimizer steps; the loader yields micro batches for those not done.

    accumulate: micro batches of a step. after: what follows this stage, in its steps, for the time that
    progress tells. start: steps that were done before the run was stopped; `toolkit.saver.StepEnds` among
    the callbacks lets the Trainer count from there.
    """
    stage = conf.stages[name]
    module = StageModule(
        model,
        stage=stage,
        loss=conf.loss,
        steps=steps,
        first_step=first_step,
        accumulate=accumulate,
        start=start,
    )
    if accumulate * ranks.world() > 1:
        loader = WholeSteps(loader, accumulate, f"stage {name}", first_step + start)
    with warnings.catch_warnings():
        # Lightning's advice for other set-ups (more workers, log folder, frozen modules in eval mode).
        warnings.filterwarnings("ignore", module="lightning")
        trainer = L.Trainer(
            max_steps=steps,
            **placed(device_of(conf.hardware)),
            precision=PRECISION[conf.hardware.precision],
            accumulate_grad_batches=accumulate,
            gradient_clip_val=stage.grad_clip or None,
            logger=logger,
            log_every_n_steps=min(conf.log.every, steps),
            callbacks=[bar(name, after=after, start=start), *callbacks],
            default_root_dir=folder,
            enable_progress_bar=sys.stdout.isatty(),
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(module, loader)
        except SystemExit as end:
            # Lightning takes Ctrl-C for exit code 1 and ignores the next one.
            if isinstance(end.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from end
            raise
    if trainer.global_step != steps:
        raise RuntimeError(f"stage {name} stopped at step {trainer.global_step} of {steps}")
