"""Rows side by side: the numbers of a sweep in turn, failures that hide nothing, stopping, GPUs dealt out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compositions import registry
from toolkit import run, sweep_layout, sweep_process

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "encoder=patch",
    "encoder.patch=32",
    "data.limit=12",
    "stages.tune.steps=12",
    "stages.tune.warmup=0",
    "stages.tune.global_batch=8",
    "log.every=4",
    "eval.limit=20",
    "hardware.threads=1",
    "hardware.device=cpu",
]
TROUBLE = """\
import os, signal
from toolkit import register

@register.scan("crash")
def crash(n_layer: int, height: int, width: int) -> list[list[int]]:
    "Fails."
    raise RuntimeError("seeded crash")

@register.scan("killed")
def killed(n_layer: int, height: int, width: int) -> list[list[int]]:
    "Ends its process, as the system does when memory is short."
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a plug-in; the toolkit is found by the import path alone."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT), *sys.path])
    with registry():
        yield tmp_path
    sys.modules.pop("trouble", None)


def found(root: Path) -> dict[str, bytes]:
    """Name and bytes of the results of every finished run."""
    names = ("metrics.csv", "predictions/test.jsonl", "checkpoints/last/model.safetensors")
    return {
        f"{f.name}/{n}": (f / n).read_bytes()
        for f in root.glob("*-s0-*")
        if (f / "result.json").exists()
        for n in names
    }


def test_side_by_side_gives_the_bits_of_one_after_the_other(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    words = [*TINY, "-m", "plugins=[trouble]", f"paths.cache={elsewhere / 'cache'}"]
    both = ["scan=uni,crash,2d,killed", "paths.runs=parallel", "hardware.parallel=2"]
    assert run.main([*words, *both]) == 1
    error = capsys.readouterr().err
    assert "2 of 4 rows done, 2 failed:" in error, error[-3000:]
    told = dict(line.strip().split(": ", 1) for line in error.splitlines()[-2:])
    assert told["scan=crash"].startswith("RuntimeError: seeded crash (trouble.py:")
    assert told["scan=killed"].startswith("its process ended: killed by signal 9 (out of memory?); log: ")
    log = Path(told["scan=crash"].rpartition("; log: ")[2]).read_text()
    assert "Traceback" in log and "seeded crash" in log and "accuracy" not in log
    # How long it takes is told before anything is trained.
    lines = error.splitlines()
    first = next(i for i, line in enumerate(lines) if " for 4 rows, 2 at a time on " in line)
    assert lines[first].startswith("about ") and not any("tune 12/12" in line for line in lines[:first])
    assert run.main([*words, "scan=uni,2d", "paths.runs=turn"]) == 0
    turn = found(elsewhere / "turn")
    assert len(turn) == 6 and turn == found(elsewhere / "parallel")
    # What is done is not started again.
    capsys.readouterr()
    assert run.main([*words, "scan=uni,2d", "paths.runs=parallel", "hardware.parallel=2"]) == 0
    assert capsys.readouterr().err.splitlines() == ["2 of 2 rows are done already", "2 of 2 rows done"]


WORKER = """\
import json, os, signal, sys, time
from pathlib import Path
from toolkit.stopping import end_with_parent, stop
end_with_parent()
signal.signal(signal.SIGTERM, stop)
events = os.fdopen(int(sys.argv[1]), "w")
for line in sys.stdin:
    row = json.loads(line)
    seed = row["cfg"]["seed"]
    print("seed", seed, flush=True)
    facts = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "hardware": row["cfg"]["hardware"]}
    Path(f"started-{seed}").write_text(json.dumps(facts))
    if seed:
        try:
            time.sleep(60)
        except SystemExit as end:
            Path(f"stopped-{seed}").write_text(str(end.code))
            time.sleep(0.5)  # as one that saves
            print("saved", seed, flush=True)
            raise
    print(json.dumps({"event": "done", "seconds": 1.0}), file=events, flush=True)
"""
PARENT = """\
import sys
from toolkit import run, sweep_process
sweep_process.COMMAND = (sys.executable, "worker.py")
sys.exit(run.main(sys.argv[1:]))
"""


def started(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """A sweep whose workers only sleep, except for seed 0."""
    (folder / "worker.py").write_text(WORKER)
    (folder / "parent.py").write_text(PARENT)
    return subprocess.Popen(
        [sys.executable, "parent.py", "-m", "paths.runs=runs", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(*files: Path) -> None:
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until, files
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "code", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "asked to stop")]
)
def test_stopping_stops_every_worker(tmp_path: Path, sent: signal.Signals, code: int, how: str) -> None:
    sweep = started(tmp_path, "seed=0,1,2,3", "hardware.parallel=2")
    wait_for(tmp_path / "started-1", tmp_path / "started-2")
    sweep.send_signal(sent)
    _, error = sweep.communicate(timeout=60)
    assert sweep.returncode == code
    assert f"{how}: 1 of 4 rows are done; the same command goes on with the rest" in error
    assert (tmp_path / "stopped-1").read_text() == (tmp_path / "stopped-2").read_text() == "75"
    assert not (tmp_path / "started-3").exists()
    assert "[seed=0] seed 0" in error
    assert "[seed=1] saved 1" in error and "[seed=2] saved 2" in error
    assert {log.read_text().split()[-1] for log in tmp_path.glob("runs/*-s[12]-*/log.txt")} == {"1", "2"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_a_killed_sweep_leaves_no_worker(tmp_path: Path) -> None:
    sweep = started(tmp_path, "seed=1,2", "hardware.parallel=2")
    wait_for(tmp_path / "started-1", tmp_path / "started-2")
    sweep.kill()
    sweep.communicate(timeout=60)
    wait_for(tmp_path / "stopped-1", tmp_path / "stopped-2")


def test_gpus_are_dealt_round_and_threads_divided(tmp_path: Path) -> None:
    sweep = started(tmp_path, "seed=1,2,3,4", "hardware.parallel=4", CUDA_VISIBLE_DEVICES="3,7")
    files = [tmp_path / f"started-{seed}" for seed in (1, 2, 3, 4)]
    wait_for(*files)
    sweep.terminate()
    sweep.communicate(timeout=60)
    facts = [json.loads(file.read_text()) for file in files]
    assert sorted(f["gpu"] for f in facts) == ["3", "3", "7", "7"]
    cores = len(os.sched_getaffinity(0))
    limit = int(os.environ.get("OMP_NUM_THREADS", cores))
    assert {f["hardware"]["threads"] for f in facts} == {max(1, min(cores // 4, limit))}


def hardware(**values: object) -> dict[str, object]:
    return {"device": "auto", "threads": 0, "parallel": 0, "lanes": 1, **values}


def test_how_many_rows_a_machine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(sweep_layout, "free_memory", lambda: 8 << 30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    layout = sweep_layout.layout
    assert layout(hardware(), 40).workers == 5  # memory for so many
    assert layout(hardware(parallel=8), 40).workers == 8
    assert (layout(hardware(), 2).workers, layout(hardware(), 2).threads) == (2, 6)
    assert layout(hardware(threads=3), 2).threads == 3
    assert str(layout(hardware(parallel=4), 9)) == "12 CPU cores, 3 threads each"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert layout(hardware(parallel=4), 9).threads == 2
    assert layout(hardware(parallel=4, lanes=4), 9) == layout(hardware(parallel=4), 9)  # no GPU to share
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert layout(hardware(), 40).workers == 8 and layout(hardware(device="cpu"), 40).workers == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert layout(hardware(), 40).workers == 12 and "2 GPUs" in str(layout(hardware(), 40))
    lanes = layout(hardware(lanes=8, parallel=16, threads=1), 40)
    assert (lanes.workers, lanes.lanes) == (16, 8) and str(lanes) == "2 GPUs, 2 processes, 1 thread each"
    assert layout(hardware(lanes=8), 40).workers == 16  # as many on each GPU, however few the cores are
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert layout(hardware(lanes=8, parallel=16), 40).threads == 6  # of a process


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA X (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: NVIDIA X'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert sweep_layout.visible_gpus() == ("0", "1")
    tool.write_text("#!/bin/sh\necho 'GPU 0: no driver'\nexit 9\n")
    assert sweep_layout.visible_gpus() == ()


def test_settings_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-m", "hardware.parallel=1,2"]) == 2
    assert "hardware.parallel: differs between the rows of one sweep" in capsys.readouterr().err
    assert run.main(["-m", "hardware.lanes=1,2", "hardware.parallel=2"]) == 2
    assert "fix: give it once: hardware.lanes=4" in capsys.readouterr().err
    assert run.main(["-m", "seed=0,1", "hardware.lanes=4"]) == 2
    assert "fix: hardware.parallel=0, or hardware.lanes=1" in capsys.readouterr().err
    assert (
        run.main(["-m", "seed=0,1", "hardware.parallel=0", "hardware.lanes=4", "hardware.graph=never"]) == 2
    )
    assert "fix: hardware.graph=auto, or hardware.lanes=1" in capsys.readouterr().err
    assert run.main(["-m", "seed=0,1", "hardware.parallel=2", "hydra/launcher=basic"]) == 2
    assert "both say how rows are started" in capsys.readouterr().err


def test_lines_arrive_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.stdout.write('one\\ntw'); sys.stdout.flush(); sys.stdin.readline(); print('o')"
    monkeypatch.setattr(sweep_process, "COMMAND", (sys.executable, "-c", script))
    (worker,) = sweep_process.start(gpu="", sharing=1)
    seen: list[str] = []
    while "one" not in seen:
        seen += worker.lines(worker.output)[0]
    assert seen == ["one"]
    worker.send({})
    ended = False
    while not ended:
        lines, ended = worker.lines(worker.output)
        seen += lines
    assert seen == ["one", "two"] and worker.end() == "exit code 0"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_single_run_that_is_stopped_says_so(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """While it trains, where the Trainer would turn Ctrl-C into exit code 1."""
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    words = [
        *TINY,
        "stages.tune.steps=100000",
        "log.tensorboard=false",
        "hardware.workers=2",
        "paths.runs=runs",
        "paths.cache=cache",
    ]
    single = subprocess.Popen(
        [sys.executable, "-m", "toolkit.run", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.csv")):
        assert time.monotonic() < until and single.poll() is None, single.communicate()
        time.sleep(0.1)
    os.killpg(single.pid, sent)  # as terminals and SLURM do: the loader's workers hear it too
    _, error = single.communicate(timeout=60)
    assert single.returncode == code, error[-2000:]
    (status,) = tmp_path.glob("runs/*/status.json")
    told = json.loads(status.read_text())
    assert told["state"] == "stopped" and told["step"] > 0
    assert f"stopped after step {told['step']:,}; the same command goes on from there" in error
    assert (status.parent / f"checkpoints/step-{told['step']:08d}/manifest.json").exists()


def test_only_processes_with_lanes_set_queues_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    assert name not in sweep_process.environment("", lanes=1)
    assert [sweep_process.environment("", lanes=n)[name] for n in (2, 4, 8, 16)] == ["8", "8", "16", "32"]
    monkeypatch.setenv(name, "5")
    assert sweep_process.environment("", lanes=8)[name] == "5"
