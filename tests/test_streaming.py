"""A run whose training split is streamed: what it trains, what it tells of its data, what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from data.stream import GUARANTEES, Streamed
from tests.data.helpers import shard_folder
from tests.data.serving import served
from toolkit import register, run
from toolkit.data_inspect import main as inspect
from toolkit.feed import PLANNED
from toolkit.streaming import Streaming

from .test_job import only, read

SMALL = [
    "scale=quick",
    "data=stream",
    "encoder=patch",
    "encoder.patch=32",
    "model.vocab=world",
    "model.d_model=32",
    "model.n_layer=2",
    "stages.tune.steps=3",
    "stages.tune.warmup=0",
    "stages.tune.global_batch=8",
    "hardware.device=cpu",
    "log.every=1",
    "eval.limit=4",
    "data.shuffle=10",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars with an index and a manifest, of which a stream reads the tars alone."""
    out = shard_folder(tmp_path_factory.mktemp("tars") / "web", 40, shard_bytes=40_000)
    assert len(list(out.glob("*.tar"))) == 2
    return out


def launch(tmp_path: Path, folder: Path, *words: str, train: str = "") -> int:
    places = [f"data.train='{train or folder}/shard-{{000000..000001}}.tar'", f"data.test={folder}"]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    return run.main([*SMALL, *places, *paths, *words])


def losses(tmp_path: Path) -> list[str]:
    rows = csv.DictReader((only(tmp_path / "runs") / "metrics.csv").open())
    return [row["loss"] for row in rows]


def test_a_run_streams_and_says_what_that_means(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert launch(tmp_path, folder) == 0
    result = read(only(tmp_path / "runs") / "result.json")
    assert result["data_mode"] == {"tune": GUARANTEES} and result["steps"] == 3
    # Nobody went through the training split, so nothing is made up about it.
    assert result["blind"] is None and 0 < result["majority"] <= 1
    assert {kind["blind"] for kind in result["floors"].values()} == {None}
    assert result["data"]["train"] is None and len(result["data"]["test"]) == 64
    assert result["training"]["tune"].startswith("eager: ") and result["n"] == 4
    told = [m for m in caplog.messages if m.startswith("features are computed in each step: a stream's")]
    assert len(told) == 1 and any("question only unknown" in m for m in caplog.messages)


def test_a_run_by_plan_says_so_too(tmp_path: Path, folder: Path) -> None:
    words = [word for word in SMALL if not word.startswith("data")]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    assert run.main([*words, "data=shards", f"data.train={folder}", f"data.test={folder}", *paths]) == 0
    assert read(only(tmp_path / "runs") / "result.json")["data_mode"] == {"tune": PLANNED}


def test_tars_behind_a_url_train_as_local_ones(tmp_path: Path, folder: Path) -> None:
    assert launch(tmp_path / "here", folder, "hardware.workers=2") == 0
    with served(folder) as server:
        assert launch(tmp_path / "there", folder, "hardware.workers=2", train=server.url) == 0
    assert losses(tmp_path / "here") == losses(tmp_path / "there") and len(losses(tmp_path / "here")) == 3


def test_micro_batches_of_a_stream_make_its_step(tmp_path: Path, folder: Path) -> None:
    assert launch(tmp_path / "whole", folder) == 0
    assert launch(tmp_path / "parts", folder, "hardware.micro_batch=2") == 0
    whole, parts = ([float(x) for x in losses(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4) and len(set(whole)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_tar_stops_a_strict_run_and_not_a_tolerant_one(
    tmp_path: Path, folder: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    tar = damaged / "shard-000001.tar"
    with tarfile.open(tar) as members:
        inside = members.getmembers()[10].offset_data + 5  # what comes before it is read
    os.truncate(tar, inside)
    words = [f"hardware.workers={workers}", "data.resample=false", "data.shuffle=0", "stages.tune.steps=6"]
    assert launch(tmp_path, folder, *words, train=str(damaged)) == 1
    assert "shard-000001.tar: the rest of the shard is lost: " in capsys.readouterr().err
    assert launch(tmp_path, folder, *words, "faults=tolerant", "seed=1", train=str(damaged)) == 0
    (done,) = (path.parent for path in (tmp_path / "runs").glob("*/result.json"))
    rows = [json.loads(line) for line in (done / "left_out-train.jsonl").read_text().splitlines()]
    assert [Path(row["shard"]).name for row in rows] == ["shard-000001.tar"]
    assert read(done / "result.json")["reported"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.vocab=dataset", "split 'train' is streamed; write model.vocab=world"),
        ("features.cache=disk", "split 'train' is streamed; write features.cache=off"),
        ("stages.tune.bucket=2", "write stages.tune.bucket=0"),
        ("stages.tune.block=64", "write stages.tune.block=1"),
        ("stages.tune.tokens=512", "write stages.tune.tokens=0"),
        ("stages.tune.steps=0 stages.tune.epochs=2", "write stages.tune.epochs=0 stages.tune.steps=1000"),
        ("stages.tune.mix=[train:1,test:1]", "write stages.tune.mix=[] and join the tars of both by ::"),
        ("eval.split=train", "write python -m toolkit.data index TARS --out FOLDER, data.test=FOLDER"),
        ("data.text=xml", "write data.text=auto, json, txt or json:FIELD"),
        ("data.test=x.tar", "what is scored is read by an index, each sample once; write python -m"),
        ("data.test=nowhere", "data.test=nowhere is no folder"),
        ("data.train=nowhere/*.tar", "data.train: no file is called nowhere/*.tar"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(
    tmp_path: Path, folder: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, folder, *words.split(" ")) == 1
    assert message in capsys.readouterr().err


def test_inspect_says_how_to_see_the_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(["data=stream", f"data.train={folder}/*.tar", f"data.test={folder}"]) == 0
    shown = capsys.readouterr().out
    assert "train: 2 tars that are streamed" in shown and "python -m toolkit.data index TARS" in shown
    assert "test: 40 records" in shown


def test_the_factory_reads_patterns_and_their_text(folder: Path, tmp_path: Path) -> None:
    node = {"name": "stream", "train": f"{folder}/*0.tar::{folder}/*1.tar", "text": "json:caption"}
    (made,) = register.bind("data", node)(tmp_path).values()
    assert [Path(shard).name for shard in made.shards()] == ["shard-000000.tar", "shard-000001.tar"]
    assert made.layout == {"text": "json", "field": "caption", "ask": "Describe the image briefly."}


def test_the_place_in_a_stream_is_its_step(folder: Path, tmp_path: Path) -> None:
    source = Streamed((f"{folder}/*.tar",), seed=3)
    plan = Streaming(source, {}, 8, "strict", tmp_path / "report").plan
    assert plan.state(7)["step"] == 7 and plan.resume(plan.state(7)) == 7
    other = Streaming(source, {}, 4, "strict", tmp_path / "report").plan
    with pytest.raises(ValueError, match="stands in the data order"):
        other.resume(plan.state(7))
