"""How long steps wait for their batch: rows, curves, the summary in a result."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tests.test_job import TINY
from toolkit import run, waits
from toolkit.waits import Waits, summary


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Loader:
    """Batches that take so many seconds each."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return len(self.seconds)

    def __iter__(self) -> Iterator[int]:
        for number, seconds in enumerate(self.seconds):
            self.clock.now += seconds
            yield number


def trained(watch: Waits, loader: Any, clock: Clock, *, work: float, micro: int = 1, pause: float = 0) -> Any:
    """Runs the hooks as a Trainer does: a step of `micro` batches, `work` seconds for each of them.

    pause: seconds after each step, as an evaluation takes them.
    """
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[])
    watch.on_train_start(trainer, None)  # type: ignore[arg-type]
    for number, _ in enumerate(watch.timed(loader), 1):
        clock.now += work
        trainer.global_step = number // micro
        watch.on_train_batch_end(trainer, None, None, None, number)  # type: ignore[arg-type]
        clock.now += pause if number % micro == 0 else 0
    watch.on_train_end(trainer, None)  # type: ignore[arg-type]
    return trainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(waits, "perf_counter", made)
    return made


def rows(file: Path) -> list[tuple[float, ...]]:
    return [tuple(map(float, row.values())) for row in csv.DictReader(file.open())]


def test_a_row_for_each_step_with_the_waits_of_its_micro_batches(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "waits.csv"
    loader = Loader(clock, [0.5, 0.25, 0.0, 1.0])
    watch = Waits(file, first_step=10, every=50)
    assert len(watch.timed(loader)) == 4
    trained(watch, loader, clock, work=2.0, micro=2, pause=7.0)  # an evaluation is in no step
    assert rows(file) == [(10, 750, 4750), (11, 1000, 5000)]
    assert file.read_text().splitlines()[0] == "step,data_wait_ms,step_ms"


def test_rows_are_written_every_so_many_steps_and_at_an_error(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "waits.csv"
    watch = Waits(file, first_step=0, every=2)
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[])
    seen = []
    for number, _ in enumerate(watch.timed(Loader(clock, [0.1] * 3)), 1):
        trainer.global_step = number
        watch.on_train_batch_end(trainer, None, None, None, number)  # type: ignore[arg-type]
        seen.append(len(rows(file)) if file.exists() else 0)
    assert seen == [0, 2, 2]
    watch.on_exception(trainer, None, KeyboardInterrupt())  # type: ignore[arg-type]
    assert len(rows(file)) == 3


def test_only_the_first_rank_writes(tmp_path: Path, clock: Clock) -> None:
    watch = Waits(tmp_path / "waits.csv", first_step=0, every=1)
    trainer: Any = SimpleNamespace(global_step=1, is_global_zero=False, loggers=[])
    next(iter(watch.timed(Loader(clock, [0.1]))))
    watch.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert not (tmp_path / "waits.csv").exists()


def test_curves_go_to_tensorboard_and_not_to_metrics_csv(tmp_path: Path, clock: Clock) -> None:
    told: list[tuple[dict[str, float], int]] = []

    class Board(TensorBoardLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            told.append((dict(metrics), step or 0))

    class Metrics(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise AssertionError("equal runs are to have equal metrics.csv")

    watch = Waits(tmp_path / "waits.csv", first_step=5, every=20)
    loggers = [Board(tmp_path), Metrics(tmp_path)]
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, loggers=loggers)
    for number, _ in enumerate(watch.timed(Loader(clock, [k / 1000 for k in range(20)])), 1):
        trainer.global_step = number
        watch.on_train_batch_end(trainer, None, None, None, number)  # type: ignore[arg-type]
    ((values, step),) = told
    assert step == 24
    assert values == {"data_wait_ms": pytest.approx(9.5), "data_wait_p95_ms": pytest.approx(18.05)}


def test_the_summary_counts_a_repeated_step_at_its_last(tmp_path: Path) -> None:
    file = tmp_path / "waits.csv"
    file.write_text("step,data_wait_ms,step_ms\n0,1,100\n1,50,100\n1,3,100\n2,2,400\n")
    found = summary(file)
    assert found["steps"] == 3 and found["mean_ms"] == 2.0
    assert found["share"] == pytest.approx(6 / 600)
    assert found["p95_ms"] == pytest.approx(2.9) and found["p95_share"] == pytest.approx(0.029)


def test_without_a_row_every_value_is_zero(tmp_path: Path) -> None:
    assert set(summary(tmp_path / "none.csv").values()) == {0}


def test_a_run_keeps_a_row_for_each_step_and_tells_of_them_in_its_result(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    places = [f"paths.{name}={tmp_path / name}" for name in ("runs", "cache")]
    assert run.main([*TINY, "hardware.device=cpu", "hardware.micro_batch=4", "log.every=2", *places]) == 0
    (folder,) = (tmp_path / "runs").glob("*-s0-*")
    found = rows(folder / "waits.csv")
    assert [row[0] for row in found] == [0, 1, 2]
    assert all(0 < wait < step for _, wait, step in found)
    told = json.loads((folder / "result.json").read_text())["data_wait"]
    assert told == summary(folder / "waits.csv") and told["steps"] == 3 and told["share"] > 0
    assert "data_wait" not in (folder / "metrics.csv").read_text()
