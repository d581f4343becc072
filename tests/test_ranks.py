"""One run on two processes, as torchrun and srun start them: the same numbers, one run directory, one end."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.cluster import Place
from data.plan import Plan
from data.reader import ShardReader
from tests.data.faulty import flip
from toolkit import data, ddp, graphs, left_out, rank_group, ranks, run, train
from toolkit.schema import HardwareConf, StageConf

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["data=shards", "encoder=conv", "hardware.device=cpu", "hardware.threads=1", "eval.limit=7"]
SMALL += ["eval.every=0", "log.every=1", "log.tensorboard=false", "stages.tune.warmup=0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 questions about 20 pictures, in shards."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(folder / "cache"))
        small = ["data=scenes", "data.train_pictures=20", "data.test_pictures=4", "data.types=[at]"]
        assert data.main(["inspect", *small, "--samples", "0"]) == 0
    (found,) = (folder / "cache").glob("scenes-*")
    return found


def damaged(whole: Path, out: Path, record: int) -> Path:
    folder = shutil.copytree(whole, out)
    shard, span = ShardReader(folder / "train").place(record, image=True)
    flip(folder / "train" / shard, span.offset + span.size // 2)
    return folder


def command(folder: Path, out: Path, *words: str) -> list[str]:
    paths = [f"paths.runs={out}", f"paths.cache={out / 'cache'}"]
    return [*SMALL, *paths, *(f"data.{split}={folder / split}" for split in ("train", "test", "val")), *words]


def free_port() -> str:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return str(opened.getsockname()[1])


def by_torchrun(*words: str) -> list[subprocess.Popen[str]]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return [start(*launcher, "-m", "toolkit.run", *words, environ={})]


def by_srun(*words: str) -> list[subprocess.Popen[str]]:
    """Two processes with the variables that srun sets; nothing but they themselves ends them."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
    job |= {"MASTER_PORT": free_port()}
    places = [{**job, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(2)]
    return [start(*words, environ=place) for place in places]


def start(*words: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    whole = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environ}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=whole, **pipes)


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """(exit codes, what they said); a process that hangs fails the test."""
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def only(out: Path, pattern: str) -> Path:
    (found,) = out.glob(f"*-s0-*/{pattern}")
    return found


def losses(out: Path) -> list[float]:
    with only(out, "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_two_ranks_train_as_one_does(whole: Path, tmp_path: Path) -> None:
    # 7 steps an epoch, the last with two slots of weight 0; three micro batches of one sample on each of two
    # ranks. The last one of rank 0 in the second step has no picture, so it gives the encoder no gradient.
    reader = ShardReader(whole / "train")
    last = order(reader, 6).rank_part(1, 0, 2)[0][-1]
    folder = damaged(whole, tmp_path / "data", int(reader.examples.record[last]))
    words = ["faults=tolerant", "loss.reduction=batch", "stages.tune.global_batch=6", "stages.tune.steps=8"]
    words += ["eval.every=6"]
    processes = by_torchrun(*command(folder, tmp_path / "two", *words, "hardware.micro_batch=1"))
    assert run.main(command(folder, tmp_path / "one", *words)) == 0
    codes, said = ended(processes)
    assert codes == [0], said[0]
    one, two = tmp_path / "one", tmp_path / "two"
    assert len(losses(one)) == 8 and losses(two) == pytest.approx(losses(one), rel=1e-4)
    weights = "checkpoints/last/model.safetensors"
    expected, found = load_file(only(one, weights)), load_file(only(two, weights))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert only(two, "predictions/test.jsonl").read_text() == only(one, "predictions/test.jsonl").read_text()
    results = [read(only(out, "result.json")) for out in (one, two)]
    assert [r["ranks"] for r in results] == [
        {"world": 1, "launcher": "none"},
        {"world": 2, "launcher": "torchrun"},
    ]
    for key in ("accuracy", "n", "reported", "left_out", "steps"):
        assert results[0][key] == results[1][key], key
    assert [p["step"] for p in results[1]["curve"]] == [6] and results[1]["n"] == 7
    reports = [only(out, "left_out-*").read_text().splitlines() for out in (one, two)]
    rows = [sorted(map(json.loads, lines), key=str) for lines in reports]
    assert len(rows[0]) == 2 and rows[0] == rows[1]
    assert "epoch 1: 40 samples planned = 38 trained + 2 reported" in said[0]
    assert said[0].count("run directory") == 1  # only one of them tells
    files = [[f.relative_to(out) for f in out.glob("*-s0-*/**/*") if f.is_file()] for out in (one, two)]
    assert sorted(files[0]) == sorted(files[1])


def order(reader: ShardReader, batch: int) -> Plan:
    """The order that a run with seed 0 takes."""
    return Plan(len(reader.examples.record), batch, 0, reader.manifest_hash, block=1, window=8)


def first_met_by_rank_1(folder: Path, step: int, batch: int) -> int:
    """A record that is first read at a step, by the second of two ranks."""
    reader = ShardReader(folder / "train")
    record, plan = reader.examples.record, order(reader, batch)
    seen = {int(record[j]) for t in range(step) for j in plan.step(t)[0]}
    seen |= {int(record[j]) for j in plan.rank_part(step, 0, 2)[0]}
    return next(i for j in plan.rank_part(step, 1, 2)[0] if (i := int(record[j])) not in seen)


def test_a_fault_on_one_rank_ends_both_and_one_process_can_go_on(whole: Path, tmp_path: Path) -> None:
    bad = first_met_by_rank_1(whole, step=3, batch=4)
    folder = damaged(whole, tmp_path / "data", bad)
    words = [
        "loss.reduction=sample",
        "stages.tune.global_batch=4",
        "stages.tune.steps=6",
        "checkpoint.every=2",
    ]
    processes = by_srun("-m", "toolkit.run", *command(folder, tmp_path / "two", *words))
    codes, said = ended(processes)
    assert codes == [1, 1], said
    cause = f"rank 1, stage tune, step 3: DamagedSample: shard-000000.tar: key {bad:08}: member {bad:08}.png"
    assert cause in said[0] and cause in said[1]
    status = read(only(tmp_path / "two", "status.json"))
    assert status["state"] == "failed" and status["error"].startswith(cause)
    # What they trained until then is kept: one process goes on as if it had trained all of it.
    assert len(losses(tmp_path / "two")) == 3
    shutil.copytree(whole / "train", folder / "train", dirs_exist_ok=True)
    for out in ("two", "one"):
        assert run.main(command(folder, tmp_path / out, *words)) == 0
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert read(only(tmp_path / "two", "result.json"))["resumed_from"] == [2]


HANGS = """
import sys, time
from toolkit import rank_group, ranks
rank_group._GRACE = 1.0
with ranks.joined(cuda=False, last_words=lambda text: open(sys.argv[1], "w").write(text)):
    told = ranks.shared(lambda: {"rank": ranks.rank()})
    assert told == {"rank": 0} and ranks.numbers(ranks.rank(), 7) == [[0, 7], [1, 7]]
    assert ranks.gathered("x" * ranks.rank()) == ["", "x"] and ranks.anyone(ranks.rank() == 1)
    assert ranks.in_turn(ranks.rank) == ranks.rank()
    ranks.doing("stage tune, step 17")
    if ranks.rank():
        raise OSError("no such place")
    time.sleep(300)
"""


def test_a_rank_that_hangs_is_ended_when_another_fails(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    words = tmp_path / "words"
    codes, said = ended(by_srun(str(script), str(words)))
    cause = "rank 1, stage tune, step 17: OSError: no such place"
    assert codes == [1, 1] and words.read_text() == cause and f"rank 0 is ended: {cause}" in said[0]


BUSY = """
import threading
from toolkit import rank_group, ranks
rank_group._EVERY = 0.0  # the thread that watches is in the store's code nearly all the time
try:
    with ranks.joined(cuda=False):
        ranks.barrier()
        if ranks.rank():
            raise OSError("no such place")
        ranks.barrier()
finally:
    print("threads:", *(thread.name for thread in threading.enumerate()))
"""


def test_processes_end_with_their_exit_code_whatever_the_watch_is_at(tmp_path: Path) -> None:
    """Python aborts a process that ends while a thread of it comes back from C++ code."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    codes, said = ended(by_srun(str(script)))
    assert codes == [1, 1], said
    assert "rank 1: OSError: no such place" in said[0]
    for text in said:  # the abort is a matter of luck, the thread is not
        (names,) = [line.split()[1:] for line in text.splitlines() if line.startswith("threads:")]
        assert "MainThread" in names and "ranks" not in names


KILLED = """
import os, signal, sys
import torch, torch.distributed as dist
from toolkit import frame, rank_group, ranks
rank_group._DEAD, rank_group._SILENT, rank_group._GRACE = 1.0, 4.0, 1.0
signal_number, collective = int(sys.argv[1]), sys.argv[2] == "collective"
with ranks.joined(cuda=False, last_words=lambda text: print("last words:", text)):
    ranks.barrier()
    if ranks.rank():
        os.kill(os.getpid(), signal_number)
    try:
        dist.all_reduce(torch.ones(1)) if collective else ranks.barrier()
    except BaseException as raised:
        found = ranks.cause(raised)
        print("cause:", found)
        raise found from raised
"""


@pytest.mark.parametrize(
    ("name", "where", "told"),
    [
        ("SIGKILL", "collective", "rank 1: ended without a word: it was killed"),
        ("SIGKILL", "barrier", "rank 1: gave no sign of life for 4 s"),
        ("SIGSTOP", "collective", "rank 1: gave no sign of life for 4 s"),
        ("SIGSTOP", "barrier", "rank 1: gave no sign of life for 4 s"),
    ],
)
def test_a_rank_that_is_killed_or_stopped_ends_the_others(
    tmp_path: Path, name: str, where: str, told: str
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    first, second = by_srun(str(script), str(int(getattr(signal, name))), where)
    try:
        said = first.communicate(timeout=60)[0]
    finally:
        first.kill()
        second.kill()
        second.communicate()
    assert first.returncode == 1 and told in said, said


def test_a_job_that_was_suspended_goes_on() -> None:
    silence = rank_group.Silence(3, now=0.0)
    assert silence.look({1: 1, 2: 1}, 3.0) == []
    assert silence.look({1: 1, 2: 1}, 3.0 + 2 * rank_group._SILENT) == []  # all of them were
    late = 3.0 + 2 * rank_group._SILENT
    found = [silence.look({1: 1, 2: n}, late + 5 * n) for n in range(2, 70)]
    assert found[0] == [] and found[-1] == [1]


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were rank 1 of 2."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)


def test_a_step_is_shared_or_refused(of_two: None) -> None:
    assert train.micro_batch(StageConf(global_batch=64), HardwareConf(), name="tune") == 32
    assert train.micro_batch(StageConf(global_batch=64), HardwareConf(micro_batch=16), name="tune") == 16
    with pytest.raises(
        ValueError, match=r"stages\.tune\.global_batch=9 cannot be shared equally over 2 ranks"
    ):
        train.micro_batch(StageConf(global_batch=9), HardwareConf(), name="tune")
    with pytest.raises(ValueError, match=r"micro_batch=64 does not divide the 32 samples of a rank and step"):
        train.micro_batch(StageConf(global_batch=64), HardwareConf(micro_batch=64), name="tune")


def test_several_ranks_train_eagerly(of_two: None) -> None:
    gpu = torch.device("cuda")
    why = graphs.obstacle(HardwareConf(), StageConf(), object(), gpu)
    assert why == "gradients are summed over 2 ranks"
    with pytest.raises(
        ValueError, match=r"hardware\.graph=always.*gradients are summed over 2 ranks; write auto"
    ):
        graphs.obstacle(HardwareConf(graph="always"), StageConf(), object(), gpu)


def test_lightning_sees_one_device_a_process(of_two: None) -> None:
    asked = ddp.placed(torch.device("cuda", 1))
    (place,) = asked.pop("plugins")
    strategy = asked.pop("strategy")
    assert isinstance(asked.pop("accelerator"), ddp.Gpu)
    assert asked == {"devices": [1], "num_nodes": 2}
    assert (place.global_rank(), place.world_size(), place.local_rank(), place.node_rank()) == (1, 2, 0, 1)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}


def test_a_part_of_a_report_has_a_name_of_its_own(of_two: None) -> None:
    assert left_out.part(Path("r/left_out-train.jsonl")) == Path("r/left_out-train.rank1.jsonl")


@pytest.mark.parametrize("words", [["recipe=ablation/scan"], ["-m", "seed=0,1"]])
def test_a_sweep_is_no_work_for_ranks(
    of_two: None, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(words) == 2
    told = capsys.readouterr().err
    assert "torchrun started 2 processes for one run" in told and "hardware.parallel=0" in told


def test_one_process_needs_no_group() -> None:
    with ranks.joined(cuda=False) as place:
        assert place == Place() and ranks.world() == 1 and ranks.main()
        ranks.barrier()
        assert ranks.shared(lambda: 3) == 3 and ranks.numbers(1, 2) == [[1, 2]] and not ranks.anyone(False)
        assert ranks.gathered("a") == ["a"] and ranks.in_turn(lambda: 4) == 4
