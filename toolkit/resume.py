"""Where a stopped run goes on: its newest complete checkpoint, and what of it is put back where.

A checkpoint is a folder `checkpoints/step-00000400` of `toolkit.checkpoint`: the parts that learn, AdamW's
moments by parameter, the random generators, the place in the plan, and the files that grow while training.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from safetensors.torch import load_file
from torch import nn

from data.atomic import locked
from data.packing import Packed
from data.plan import Ints, Steps
from data.policy import OVERLONG, reported
from data.records import dump_json
from toolkit import checkpoint, ranks, train
from toolkit.rundir import NOT_IDENTITY, RunDir, run_id, versions
from toolkit.schema import RunConf
from toolkit.stages import Stage, Task
from toolkit.state import over_ranks, put_generators, put_moments

log = logging.getLogger("toolkit.train")

STATE = "state.safetensors"
"""Moments and random generators."""

GROWING = ("metrics.csv", "accuracy.jsonl", "left_out-*.jsonl")
"""Files of a run's directory that grow while training; a checkpoint holds them as they stood."""


@dataclass(frozen=True)
class Point:
    """A complete checkpoint. facts: what `Saver` wrote beside the tensors."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done, of all stages."""
        return int(self.facts["total"])


def newest(run: RunDir) -> Point | None:
    """The newest checkpoint of a run that is complete; those that are not are passed over with a warning."""

    def find() -> str:
        for folder in reversed(saved(run)):
            wrong = checkpoint.fault(folder)
            if not wrong:
                return str(folder)
            log.warning("%s is passed over: %s", folder, wrong)
        return ""

    found = ranks.shared(find)
    return Point(Path(found), ranks.shared(lambda: checkpoint.facts_of(Path(found)))) if found else None


def saved(run: RunDir) -> list[Path]:
    """Folders of the checkpoints of a run, by their steps."""
    return sorted(run.weights.parent.glob("step-*"))


def drop(run: RunDir) -> None:
    """Removes the checkpoints of a run that needs them no more, and drafts that killed processes left."""
    for folder in [*saved(run), *run.weights.parent.glob(".*.part")]:
        shutil.rmtree(folder, ignore_errors=True)


def continued(task: Task, stages: list[Stage], point: Point | None) -> list[Stage]:
    """The stages from where `point` stands, with its weights in the model and its files in the run's folder.

    Without a point, training begins anew, and what an earlier one left in the growing files goes away. Raises
    ValueError for a checkpoint of other settings, data or order.
    """
    if point is None:
        if ranks.main():
            task.run.waits.unlink(missing_ok=True)
        _put_files(task.run, None)
        return stages
    differing = list(differences(point.facts, task.conf, told_of(task, stages)))
    if differing:
        raise ValueError(
            f"{point.folder} cannot be gone on with: {'; '.join(differing)}; put that back, or remove "
            f"{point.folder.parent} to train from the beginning"
        )
    if ranks.main():
        checkpoint.load(point.folder, task.model)
    ranks.same([*task.model.parameters(), *task.model.buffers()])
    _put_files(task.run, point)
    before, now = point.facts["versions"]["torch"], versions()["torch"]
    if before != now:
        log.warning("%s was written with torch %s; with %s rounding may differ", point.folder, before, now)
    steps = stages[-1].first_step + stages[-1].steps
    log.info("goes on at step %s of %s (%s)", f"{point.step:,}", f"{steps:,}", point.folder)
    return [
        dataclasses.replace(stage, start=min(stage.steps, max(0, point.step - stage.first_step)))
        for stage in stages
    ]


def growing(run: RunDir) -> list[Path]:
    """The files of a run's directory that grow while training, as far as there are any."""
    return sorted(file for pattern in GROWING for file in run.path.glob(pattern))


def contents(run: RunDir, stages: Sequence[Stage]) -> dict[str, bytes]:
    """The growing files as they stand, with what every rank reports of samples left out; every rank asks."""
    found: dict[str, bytes] = {}
    for file in (run.path / "metrics.csv", run.curve):
        if ranks.main() and file.exists():
            found[file.name] = file.read_bytes()
    for report in dict.fromkeys(stage.feed.report for stage in stages):
        rows = {n: row for rank in ranks.gathered(_rows(report)) for n, row in rank}
        if rows:
            found[report.name] = b"".join(dump_json(row) + b"\n" for row in rows.values())
    return found


def _rows(report: Path) -> list[tuple[int | str, dict[str, Any]]]:
    if not report.exists():
        return []
    with locked(report.with_name(f".{report.name}.lock"), "adding to the report"):
        return list(reported(report).items())


def _put_files(run: RunDir, point: Point | None) -> None:
    """Growing files as a checkpoint holds them, or none; drafts that killed processes left go away."""
    if ranks.main():
        for file in growing(run):
            file.unlink()
        for draft in run.weights.parent.glob(".*.part"):
            shutil.rmtree(draft, ignore_errors=True)
        for pattern in GROWING if point else ():
            assert point is not None
            for file in point.folder.glob(pattern):
                shutil.copyfile(file, run.path / file.name)
    ranks.barrier()


def told_of(task: Task, stages: list[Stage]) -> dict[str, Any]:
    """What a checkpoint tells of the data: hash of each split, length and order of each stage.

    A stage whose data is streamed has no order to compare.
    """
    return {
        "data": task.corpus.hashes,
        "plans": {
            stage.name: [stage.steps, str(getattr(stage.plan, "identity", "streamed"))] for stage in stages
        },
    }


def differences(facts: Mapping[str, Any], conf: RunConf, told: Mapping[str, Any]) -> Iterator[str]:
    """What a checkpoint has otherwise than this run, in words that name the keys."""
    asked = dataclasses.asdict(conf)
    if facts["run"] != run_id(asked):
        before, now = _flat(_identity(facts["asked"])), _flat(_identity(asked))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                yield f"{key} was {before.get(key)} and is {now.get(key)}"
    for split in sorted({*facts["data"], *told["data"]}):
        before, now = facts["data"].get(split), told["data"].get(split)
        if before != now:
            yield f"the data of split {split!r} was {before} and is {now}"
    for name, order in told["plans"].items():
        before = facts["plans"].get(name)
        if before != order:
            yield f"steps and order of the samples of stages.{name} were {before} and are {order}"


def _identity(asked: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in asked.items() if key not in NOT_IDENTITY}
    return {**kept, "hardware": {"precision": asked["hardware"]["precision"]}}


def _flat(tree: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{head}{key}.")
        else:
            found[f"{head}{key}"] = value
    return found


def loggers(task: Task, point: Point | None) -> list[Logger]:
    """The run's loggers, metrics.csv growing on and TensorBoard without the points after the checkpoint."""
    made = train.loggers(task.run.path, task.conf.log, step=point.step if point else 0)
    for logger in made if point else ():
        if isinstance(logger, CSVLogger):
            _keep_rows(logger)
    return made


def _keep_rows(logger: CSVLogger) -> None:
    """Lightning's logger deletes the file that it finds when it begins."""
    file = Path(logger.log_dir) / "metrics.csv"
    rows = file.read_bytes() if file.exists() else b""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        writer: Any = logger.experiment
    if rows:
        file.write_bytes(rows)
        writer.metrics_keys = rows.decode().splitlines()[0].split(",")


def left_out(stages: Sequence[Stage], point: Point | None) -> int:
    """Overlong samples served with weight 0 before the run was stopped, by its plan and its report.

    The counts of a process that was stopped would hold those that its loader had read ahead; for a stream,
    which has no plan to look into, they are taken.
    """
    if point is None:
        return 0
    return int(point.facts["streamed_out"]) + ranks.shared(lambda: sum(map(_left_out, stages)))


def planned(stage: Stage) -> bool:
    """Whether the samples of every step are known, not streamed."""
    return isinstance(stage.plan, Steps | Packed)


def _left_out(stage: Stage) -> int:
    overlong = [j for j, row in reported(stage.feed.report).items() if row["cause"] == OVERLONG]
    if not (overlong and planned(stage)):
        return 0
    return sum(int(np.isin(_items(stage.plan, t), overlong).sum()) for t in range(stage.start))


def _items(plan: Steps | Packed, t: int) -> Ints:
    if isinstance(plan, Packed):
        return np.concatenate([items for items, _ in plan.step(t)])
    return plan.step(t)[0]


def put(point: Point, stage: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts random generators back, and moments if the checkpoint stands in this stage and not at its begin.

    The weights are in the model already.
    """
    state = over_ranks(load_file(point.folder / STATE) if ranks.main() else {})
    if point.facts["stage"] == stage:
        put_moments(model, optimizer, state)
    put_generators(state, point.facts["python"])
