"""A run that is stopped goes on where it stood: to the bit, from the newest complete checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import toolkit
import toolkit.checkpoint
import toolkit.rundir
from data.tokens import WorldTokenizer
from tests.helpers import component
from tests.test_ranks import by_srun, ended
from toolkit import checkpoint, graphs, resume, run
from toolkit.lit import StageModule
from toolkit.trunk import LanguageModel

WORDS = [
    "scale=quick",
    "encoder=patch",
    "encoder.patch=32",
    "data.limit=12",
    "stages.tune.steps=7",
    "stages.tune.warmup=2",
    "stages.tune.global_batch=8",
    "log.every=2",
    "log.tensorboard=false",
    "eval.limit=20",
    "hardware.threads=1",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launch(tmp_path: Path, cache: Path) -> Callable[..., Path]:
    """Runs a command with runs below a folder of tmp_path; the run's directory."""

    def start(folder: str, *words: str) -> Path:
        paths = [f"paths.runs={tmp_path / folder}", f"paths.cache={cache}"]
        assert run.main([*WORDS, *paths, *words]) == 0
        return only(tmp_path / folder)

    return start


def only(folder: Path) -> Path:
    (found,) = folder.glob("*-s0-*")
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def asked_at(monkeypatch: pytest.MonkeyPatch, *steps: int, sent: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the middle of these steps, counted from 1 over all stages, each once."""
    left, train = set(steps), StageModule.training_step

    def training_step(module: StageModule, batch: Any, index: int) -> Tensor:
        step = module.first_step + module.global_step + 1
        if step in left:
            left.remove(step)
            signal.raise_signal(sent)
        return train(module, batch, index)

    monkeypatch.setattr(StageModule, "training_step", training_step)


def outcome(folder: Path) -> dict[str, Any]:
    """All that two equal runs have in common: weights, rows, points, answers, what the result tells."""
    result = read(folder / "result.json")
    for clock in ("seconds", "train_seconds", "eval_seconds", "feature_seconds", "data_wait", "resumed_from"):
        result.pop(clock)
    for point in result["curve"]:
        point.pop("seconds")
    files = ["metrics.csv", "predictions/test.jsonl", "checkpoints/last/model.safetensors"]
    found = {name: (folder / name).read_bytes() for name in files}
    reports = {file.name: file.read_text() for file in folder.glob("left_out-*.jsonl")}
    return {**found, "result": result, "reports": reports}


TWO_STAGES = """\
# Two stages, the first of two steps.
defaults:
  - /recipe/quickstart
stages:
  align: {order: -1, train: [proj], freeze: [encoder], steps: 2, global_batch: 4, prompt: prefix}
"""


@pytest.mark.parametrize(
    ("words", "stops"),
    [
        (["hardware.micro_batch=4", "eval.every=2", "eval.every_limit=8"], [2, 5]),
        (["hardware.workers=2", "stages.tune.bucket=2", "recurrence=rwkv5"], [4]),
        (["recipe=two_stages", "log.every=1"], [2, 3, 8]),
        # Cut so short that samples are left out, in epochs of 12 samples.
        (["prompt=prefix", "model.ctx_len=20", "model.overlong=cut", "eval.limit=1"], [4]),
    ],
    ids=["accumulated", "workers", "stages", "left-out"],
)
def test_a_stopped_run_ends_with_the_bits_of_an_unbroken_one(
    launch: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    stops: list[int],
) -> None:
    (tmp_path / "two_stages.yaml").write_text(TWO_STAGES)
    monkeypatch.setenv("TOOLKIT_RECIPES", str(tmp_path))
    whole = launch("whole", *words)
    asked_at(monkeypatch, *stops)
    for step in stops:
        with pytest.raises(SystemExit) as end:
            launch("stopped", *words)
        assert end.value.code == 75
        status = read(only(tmp_path / "stopped") / "status.json")
        assert (status["state"], status["step"]) == ("stopped", step)
    # What was written after the last checkpoint does not count.
    folder = only(tmp_path / "stopped")
    with (folder / "metrics.csv").open("a") as file:
        file.write("9.9,0.1,98\n")
    (folder / "checkpoints" / ".step-00000009.1-ab.part").mkdir()
    assert launch("stopped", *words) == folder
    assert outcome(folder) == outcome(whole)
    assert read(folder / "result.json")["resumed_from"] == stops
    status = read(folder / "status.json")
    assert (status["state"], status["step"]) == ("done", read(folder / "result.json")["steps"])
    assert read(whole / "result.json")["resumed_from"] == []
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["last"]


def test_a_run_that_broke_down_goes_on_from_its_last_checkpoint(
    launch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and points of the steps after it are dropped, for they come again."""
    words = ["checkpoint.every=3", "eval.every=1", "eval.every_limit=4", "log.every=1"]
    whole, train = launch("whole", *words), StageModule.training_step

    def breaks(module: StageModule, batch: Any, index: int) -> Tensor:
        if module.global_step == 5:
            raise RuntimeError("seeded crash")
        return train(module, batch, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="seeded crash"):
        patch.setattr(StageModule, "training_step", breaks)
        launch("broken", *words)
    folder = only(tmp_path / "broken")
    assert len((folder / "accuracy.jsonl").read_text().splitlines()) == 5
    launch("broken", *words)
    assert outcome(folder) == outcome(whole)
    assert read(folder / "result.json")["resumed_from"] == [3]


def test_captured_steps_go_on_to_the_bit(
    launch: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a CUDA graph, uncaptured on the CPU; saved every second step, the last one kept."""
    monkeypatch.setattr(graphs, "obstacle", lambda *arguments, **options: "")
    monkeypatch.setattr(graphs.Steps, "capture", lambda steps: 0.01)
    words = ["encoder=lite0", "log.every=1", "eval.every=3", "eval.every_limit=4"]
    words += ["checkpoint.every=2", "checkpoint.keep=1"]
    one_by_one = [word for word in WORDS if not word.startswith("encoder")]
    monkeypatch.setattr(sys.modules[__name__], "WORDS", one_by_one)
    whole = launch("whole", *words)
    step = graphs.Steps._step

    def stopped(steps: graphs.Steps) -> None:
        step(steps)
        if int(steps.at) == 4:
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(graphs.Steps, "_step", stopped)
        with pytest.raises(SystemExit) as end:
            launch("stopped", *words)
    folder = only(Path(whole).parent.parent / "stopped")
    assert end.value.code == 75
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    launch("stopped", *words)
    assert outcome(folder) == outcome(whole)
    assert read(folder / "result.json")["resumed_from"] == [4]
    assert read(folder / "result.json")["training"] == {"tune": "graph"}


def test_checkpoints_by_steps_and_by_the_clock(
    launch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[str, list[str]]] = []
    write = checkpoint.write

    def watched(folder: Path, *parts: Any, **files: Any) -> None:
        write(folder, *parts, **files)
        saved.append((folder.name, sorted(f.name for f in folder.parent.glob("step-*"))))

    monkeypatch.setattr(checkpoint, "write", watched)
    launch("none")
    assert saved == [("last", [])]  # a short run costs nothing
    saved.clear()
    launch("steps", "checkpoint.every=2", "checkpoint.keep=2")
    names = [f"step-{step:08d}" for step in (2, 4, 6)]
    assert (
        saved
        == [
            (names[0], names[:1]),
            (names[1], names[:2]),
            (names[2], names),  # the oldest goes once the newest is there
            ("last", names[1:]),
        ]
    )
    saved.clear()
    launch("clock", "checkpoint.minutes=1e-9", "stages.tune.steps=3")
    assert [name for name, _ in saved] == ["step-00000001", "step-00000002", "last"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: Permission denied")],
    ids=["full", "denied"],
)
def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_keeps_the_one_before(
    launch: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    words = ["checkpoint.every=2"]

    def full(tensors: Any, file: Path) -> None:
        if "step-00000004" in str(file) and file.name == resume.STATE:
            raise error
        save_file(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(toolkit.checkpoint, "save_file", full)
        paths = [f"paths.runs={tmp_path / 'full'}", f"paths.cache={tmp_path / 'cache'}"]
        assert run.main([*WORDS, *paths, *words]) == 1
    told = capsys.readouterr().err
    assert str(error.args[-1]) in told and "step-00000004 cannot be written" in told
    assert "it goes on from step 2" in told
    folder = only(tmp_path / "full")
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-00000002"]
    assert read(folder / "status.json")["state"] == "failed"
    launch("full", *words)
    assert outcome(folder) == outcome(launch("whole", *words))


def test_a_run_whose_data_changed_says_what_to_do(
    launch: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        launch("stopped")
    monkeypatch.setattr(resume, "told_of", lambda *of: {"data": {"train": "other"}, "plans": {}})
    with pytest.raises(AssertionError):
        launch("stopped")
    told = capsys.readouterr().err
    assert "step-00000003 cannot be gone on with: the data of split 'test' was" in told
    assert "put that back, or remove" in told and "to train from the beginning" in told


STOPPER = """\
import os, signal, sys
from toolkit import run
from toolkit.lit import StageModule

train = StageModule.training_step


def training_step(module, batch, index):
    if os.environ["SLURM_PROCID"] == "1" and module.global_step == 3:
        signal.raise_signal(signal.SIGUSR1)
    return train(module, batch, index)


StageModule.training_step = training_step
sys.exit(run.main(sys.argv[1:]))
"""


def test_frozen_parts_with_random_weights_are_kept(launch: Callable[..., Path]) -> None:
    """What no file holds must be in the checkpoint: building the model again draws other numbers."""
    run_dir = launch("frozen", "stages.tune.train=[proj]", "eval.limit=1")
    assert read(run_dir / "checkpoints" / "last" / "checkpoint.json")["parts"] == ["encoder", "proj", "rwkv"]
    first, second = (toolkit.load(run_dir, device="cpu").weights_id for _ in range(2))
    assert first == second


def test_other_weights_of_a_frozen_part_are_refused(
    launch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run names them by path: what lies there may have been written anew since."""
    file = tmp_path / "lm.safetensors"

    def written(seed: int) -> None:
        torch.manual_seed(seed)
        mixers = component("recurrence", "rwkv4")(16, 2)
        state = LanguageModel(mixers, d_model=16, n_layer=2, vocab_size=WorldTokenizer.size).state_dict()
        save_file({name: torch.randn_like(tensor) for name, tensor in state.items()}, file)

    words = [f"lm.weights={file}", "model.vocab=world", "recurrence=rwkv4", "model.d_model=16"]
    words += ["model.n_layer=2", "scan=bi", "stages.tune.train=[proj]", "eval.limit=1"]
    written(0)
    asked_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        launch("runs", *words)
    written(1)
    with pytest.raises(AssertionError):  # the exit code
        launch("runs", *words)
    run_dir = only(tmp_path / "runs")
    said = read(run_dir / "status.json")["error"]
    assert "beside a frozen rwkv whose weights (lm.weights) were others" in said
    written(0)
    launch("runs", *words)
    assert toolkit.load(run_dir, device="cpu").name
    written(1)
    with pytest.raises(ValueError, match=r"frozen rwkv whose weights \(lm\.weights\) were others"):
        toolkit.load(run_dir, device="cpu")


def test_two_ranks_stop_at_one_step_and_one_goes_on(
    launch: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """The signal reaches one of them only, in the middle of its fourth step."""
    whole = launch("whole", "log.every=1")
    (tmp_path / "stopper.py").write_text(STOPPER)
    paths = [f"paths.runs={tmp_path / 'two'}", f"paths.cache={cache}", "hardware.device=cpu"]
    codes, outputs = ended(by_srun(str(tmp_path / "stopper.py"), *WORDS, *paths, "log.every=1"))
    assert codes == [75, 75], outputs
    folder = only(tmp_path / "two")
    assert read(folder / "status.json")["state"] == "stopped" and read(folder / "status.json")["step"] == 4
    launch("two", "log.every=1")
    assert read(folder / "result.json")["resumed_from"] == [4]
    found, wanted = (np.loadtxt(f / "metrics.csv", delimiter=",", skiprows=1) for f in (folder, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
