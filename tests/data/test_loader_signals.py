"""Workers of a loader: what is sent to all processes of a run leaves them alone, the trainer ends them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.dataset import Examples
from data.loader import train_loader
from data.plan import Plan
from data.reader import ShardReader
from data.stream import stream_loader
from data.streamed import Streamed
from data.tokens import WorldTokenizer
from tests.data.helpers import mean_color, plain_prompt, shard_folder

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"prompt": plain_prompt, "n_image": 4, "ctx_len": 256, "transform": mean_color}


def planned(folder: Path) -> Iterator[Any]:
    reader = ShardReader(folder)
    examples = Examples(reader, tokenizer=WorldTokenizer(), **OPTIONS)
    plan = Plan(len(examples), 4, 0, reader.manifest_hash)
    return iter(train_loader(examples, plan, start_step=0, end_step=1000, workers=2))


def streamed(folder: Path) -> Iterator[Any]:
    source = Streamed((f"{folder}/*.tar",), shuffle=4)
    options = {**OPTIONS, "tokenizer": WorldTokenizer()}
    return iter(stream_loader(source, options, start_step=0, end_step=1000, global_batch=4, workers=2))


LOADERS = pytest.mark.parametrize("made", [planned, streamed])


@LOADERS
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_workers_tell_the_trainer_from_others(tmp_path: Path, made: Any) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    batches = made(shard_folder(tmp_path / "shards"))
    for _ in range(2):  # one of each worker, which has begun by then
        next(batches)
    workers = [child for child in multiprocessing.active_children() if child.pid not in before]
    assert len(workers) == 2
    for name in ("TERM", "INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(w.pid) for w in workers)], check=True)
        for _ in range(5):
            next(batches)
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


FAILS = """\
import sys
from pathlib import Path
from tests.data import test_loader_signals as here

batches = getattr(here, sys.argv[1])(Path(sys.argv[2]))
next(batches)
raise RuntimeError("seeded crash")
"""


@LOADERS
def test_a_process_that_fails_ends_though_its_loader_is_still_there(tmp_path: Path, made: Any) -> None:
    words = [sys.executable, "-c", FAILS, made.__name__, str(shard_folder(tmp_path / "shards"))]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "seeded crash" in done.stderr
