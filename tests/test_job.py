"""A whole run on the CPU in seconds: files written, nothing trained twice, stages, sweeps, reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from toolkit import report, run

TINY = [
    "scale=quick",
    "encoder=patch",
    "encoder.patch=32",
    "data.limit=12",
    "stages.tune.steps=3",
    "stages.tune.warmup=0",
    "stages.tune.global_batch=8",
    "log.every=1",
    "eval.limit=20",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    return tmp_path_factory.mktemp("cache")


def launch(tmp_path: Path, cache: Path, *arguments: str) -> int:
    return run.main([*TINY, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={cache}", *arguments])


def only(folder: Path, pattern: str = "*-s*") -> Path:
    (found,) = folder.glob(pattern)
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_writes_what_it_promises(tmp_path: Path, cache: Path) -> None:
    assert launch(tmp_path, cache, "hardware.device=cpu") == 0
    folder = only(tmp_path / "runs")
    assert folder.name.startswith("rwkv6-2d-sandwich-s0-")
    result = read(folder / "result.json")
    for key in ("accuracy", "n", "majority", "blind", "seconds", "recipe", "seed", "versions", "by_kind"):
        assert key in result, key
    assert result["recipe"] == "quickstart" and result["n"] == 20 and result["steps"] == 3
    assert 0 <= result["blind"] <= 1 and result["device"] == "cpu"
    ran = dict(result["kernels"])  # every operator of training and of decoding
    assert ran.pop("decode") == "eager: on the CPU"
    assert set(ran) >= {"wkv6", "mix6", "head_norm", "linear_cross_entropy", "wkv6_step"}
    assert set(ran.values()) == {"torch"}
    assert result["learning"] == ["encoder", "proj", "rwkv"]
    status = read(folder / "status.json")
    assert status["state"] == "done" and status["versions"]["torch"] == torch.__version__.split("+")[0]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(float(r["step"])) for r in rows] == [0, 1, 2]
    assert all(float(r["loss"]) > 0 and float(r["lr"]) > 0 for r in rows)
    assert list((folder / "tensorboard").glob("events*"))
    predictions = [
        json.loads(line) for line in (folder / "predictions" / "test.jsonl").read_text().splitlines()
    ]
    assert len(predictions) == 20 and sum(p["correct"] for p in predictions) == round(20 * result["accuracy"])
    weights = load_file(folder / "checkpoints" / "last" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"encoder", "proj", "rwkv"}
    assert "stages:" in (folder / "config.yaml").read_text()
    vocabulary = read(folder / "vocabulary.json")
    assert vocabulary


def test_kernels_that_cannot_run_are_refused_before_the_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    nowhere = tmp_path / "cache"
    assert launch(tmp_path, nowhere, "hardware.device=cpu", "hardware.backend=triton") == 1
    error = capsys.readouterr().err
    assert "hardware.backend=triton: kernel backend 'triton' cannot run: " in error
    assert "write 'auto' or 'torch'" in error and not nowhere.exists()


def test_the_same_command_trains_nothing_twice_and_the_same_seed_gives_the_same_numbers(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch(tmp_path, cache) == 0
    folder = only(tmp_path / "runs")
    first = read(folder / "result.json")
    import toolkit.job

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(toolkit.job, "execute", never)
        assert launch(tmp_path, cache, "title=another name", "hardware.threads=1") == 0
    # Only the result is lost: the weights are used, not trained again, and it tells the same of the training.
    (folder / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(toolkit.job, "fit_stage", never)
        assert launch(tmp_path, cache) == 0
    again = read(folder / "result.json")
    assert again["accuracy"] == first["accuracy"] and again["kernels"] == first["kernels"]
    assert again["train_seconds"] > 0 and again["seconds"] >= again["train_seconds"]
    # A fresh directory: the same losses to the last digit.
    assert launch(tmp_path / "again", cache) == 0
    again = only(tmp_path / "again" / "runs")
    assert again.name == folder.name
    assert (again / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
    assert (again / "predictions" / "test.jsonl").read_text() == (
        folder / "predictions" / "test.jsonl"
    ).read_text()
    assert launch(tmp_path, cache, "seed=1") == 0
    other = only(tmp_path / "runs", "*-s1-*")
    assert (other / "metrics.csv").read_text() != (folder / "metrics.csv").read_text()


def test_points_while_training_change_nothing_and_are_kept(tmp_path: Path, cache: Path) -> None:
    assert launch(tmp_path, cache, "features.cache=off") == 0
    plain = only(tmp_path / "runs")
    words = ["eval.every=1", "eval.every_limit=8", "hardware.micro_batch=4", "features.cache=off"]
    assert launch(tmp_path / "probed", cache, *words) == 0
    assert launch(tmp_path / "halves", cache, "hardware.micro_batch=4", "features.cache=off") == 0
    probed, halves = only(tmp_path / "probed/runs"), only(tmp_path / "halves/runs")
    assert probed.name != plain.name == halves.name
    assert (probed / "metrics.csv").read_text() == (halves / "metrics.csv").read_text()
    result, same = read(probed / "result.json"), read(halves / "result.json")
    assert result["by_kind"] == same["by_kind"] and same["curve"] == []
    # The closing evaluation is the last point, so it is not asked twice.
    assert [(p["step"], p["n"]) for p in result["curve"]] == [(1, 8), (2, 8)]
    lines = [json.loads(line) for line in (probed / "accuracy.jsonl").read_text().splitlines()]
    assert lines == result["curve"] and sum(v["n"] for v in lines[0]["by_kind"].values()) == 8
    assert result["floors"].keys() == result["by_kind"].keys() and result["image_tokens"] == 4


TWO_STAGES = """\
# Two stages: the projector alone, then all but the embedding.
defaults:
  - /recipe/quickstart
stages:
  align: {order: -1, train: [proj], freeze: [encoder], steps: 2, global_batch: 4, prompt: prefix}
  tune: {freeze: [rwkv.emb]}
"""


def test_two_stages_train_their_parts_and_count_steps_through(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "two_stages.yaml").write_text(TWO_STAGES)
    monkeypatch.setenv("TOOLKIT_RECIPES", str(tmp_path / "recipes"))
    with caplog.at_level("INFO", logger="toolkit.train"):
        assert launch(tmp_path, cache, "recipe=two_stages") == 0
    finished = [m for m in caplog.messages if m.startswith(("align 2/2", "tune 3/3"))]
    assert [m.split()[0] for m in finished] == ["align", "tune"]
    folder = only(tmp_path / "runs")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(float(r["step"])) for r in rows] == [0, 1, 2, 3, 4]
    assert read(folder / "result.json")["steps"] == 5
    weights = load_file(folder / "checkpoints" / "last" / "model.safetensors")
    # The embedding was never trained: it keeps the initial U(-1e-4, 1e-4).
    assert float(weights["rwkv.emb.weight"].abs().max()) <= 1e-4


@pytest.fixture
def llava(tmp_path: Path) -> list[str]:
    """A few LLaVA records: two rounds, one round, text only; and the words that name them."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    records: list[dict[str, Any]] = []
    for i in range(6):
        Image.new("RGB", (40 + i, 30), (40 * i, 0, 200)).save(tmp_path / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhich?"), ("gpt", f"number {i}"), ("human", "Sure?"), ("gpt", "yes")]
        picture: dict[str, Any] = {"image": f"{i}.png"}
        if i == 5:
            turns, picture = [("human", "What is 1 + 1?"), ("gpt", "2")], {}
        talk = [{"from": who, "value": text} for who, text in turns[: 4 if i % 2 else 2]]
        records.append({"id": str(i), "conversations": talk, **picture})
    (tmp_path / "all.json").write_text(json.dumps(records))
    return [
        "data=llava",
        f"data.images={tmp_path / 'images'}",
        f"data.train={tmp_path / 'all.json'}",
        f"data.test={tmp_path / 'all.json'}",
    ]


@pytest.mark.parametrize("encoder", ["conv", "fused", "lite0", "blank"])
def test_llava_data_with_the_world_vocabulary(tmp_path: Path, llava: list[str], encoder: str) -> None:
    """Pictures of several sizes, text-only samples, several rounds, several inputs per picture."""
    members = "[{name: patch, image_size: 32, patch: 8}, {name: conv, image_size: 64}]"
    fused = [f"encoder.members={members}"] if encoder == "fused" else []
    small = [word for word in TINY if not word.startswith(("encoder", "data", "eval"))]
    other = ["loss.l2=all", "loss.reduction=batch", "hardware.micro_batch=4", "model.vocab=world"]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    assert run.main([*small, *llava, f"encoder={encoder}", *fused, *other, *paths]) == 0
    folder = only(tmp_path / "runs")
    result = read(folder / "result.json")
    assert result["n"] == 6 and result["vocabulary"] == 65536
    rows = [json.loads(line) for line in (folder / "predictions" / "test.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in rows] == ["number 0", "yes", "number 2", "yes", "number 4", "2"]


def test_questions_that_cannot_be_scored_are_told_before_training(
    tmp_path: Path, llava: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = [word for word in TINY if not word.startswith(("data", "eval"))]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    words = [*small, *llava, *paths, "model.overlong=cut", "model.ctx_len=12", "prompt=prefix"]
    assert run.main([*words, "projector.tokens=1", "scan=uni"]) == 1
    assert "model.ctx_len=12; set model.ctx_len=" in capsys.readouterr().err
    folder = only(tmp_path / "runs")
    assert not (folder / "metrics.csv").exists() and not (folder / "checkpoints").exists()


def test_workers_read_what_one_process_reads(tmp_path: Path, llava: list[str]) -> None:
    small = [word for word in TINY if not word.startswith(("data", "eval"))]
    found = {}
    for workers in (0, 2):
        paths = [f"paths.runs={tmp_path / str(workers)}", f"paths.cache={tmp_path / 'cache'}"]
        assert run.main([*small, *llava, f"hardware.workers={workers}", *paths]) == 0
        found[workers] = (only(tmp_path / str(workers)) / "metrics.csv").read_text()
    assert found[0] == found[2]


def test_overlong_samples_are_refused_or_cut(
    tmp_path: Path,
    llava: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = [word for word in TINY if not word.startswith(("data", "eval"))]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    words = [*small, *llava, *paths, "model.ctx_len=22", "prompt=prefix"]
    assert run.main(words) == 1
    assert "model.ctx_len=22; set model.ctx_len=" in capsys.readouterr().err
    assert run.main([*words, "model.overlong=cut", "eval.split=train", "eval.limit=1"]) == 0
    folder = next(f for f in (tmp_path / "runs").glob("*-s0-*") if (f / "result.json").exists())
    assert read(folder / "result.json")["left_out"] == 0
    # So short that answers are cut off: those samples are left out, counted and told.
    short = [*words, "model.ctx_len=14", "model.overlong=cut", "eval.limit=1", "seed=5"]
    with caplog.at_level("WARNING", logger="toolkit.run"):
        assert run.main(short) == 0
    counted = read(only(tmp_path / "runs", "*-s5-*") / "result.json")["left_out"]
    assert counted > 0 and any(f"{counted} overlong samples" in m for m in caplog.messages)


def test_the_split_that_settings_are_chosen_by_is_scored_beside_the_test(tmp_path: Path) -> None:
    words = [
        *("scale=tiny", "data.train_pictures=24", "data.test_pictures=8", "stages.tune.steps=2"),
        *("stages.tune.warmup=0", "stages.tune.global_batch=8", "model.n_layer=2", "eval.every=0"),
        *(f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"),
    ]
    assert run.main([*words, "eval.choose=val"]) == 0
    told = read(only(tmp_path / "runs") / "result.json")
    assert set(told["data"]) == {"train", "test", "val"}
    assert told["choose"]["split"] == "val" and told["choose"]["n"] == told["n"] == 8 * 6
    assert run.main([*words, "eval.split=val", "seed=0"]) == 0
    same = [read(f)["accuracy"] for f in (tmp_path / "runs").glob("*/result.json") if "choose" not in read(f)]
    assert same == [told["choose"]["accuracy"]]


def test_a_learned_encoder_that_never_learns_is_refused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, cache, "stages.tune.freeze=[encoder]") == 1
    assert "encoder=patch has no pretrained weights and every stage freezes it" in capsys.readouterr().err
    assert read(only(tmp_path / "runs") / "status.json")["state"] == "failed"


def test_features_kept_of_a_learning_encoder_are_refused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, cache, "features.cache=disk") == 1
    assert "features.cache=disk keeps features of a frozen encoder" in capsys.readouterr().err


def test_frozen_features_from_cache_give_the_run_that_images_give(tmp_path: Path, cache: Path) -> None:
    losses = {}
    for kept in ("off", "memory", "disk"):
        words = [word for word in TINY if not word.startswith("encoder")]
        paths = [f"paths.runs={tmp_path / kept}", f"paths.cache={cache}"]
        assert run.main([*words, "encoder=lite0", f"features.cache={kept}", *paths]) == 0
        rows = csv.DictReader((only(tmp_path / kept) / "metrics.csv").open())
        losses[kept] = [float(r["loss"]) for r in rows]
    assert losses["memory"] == losses["disk"]
    assert losses["off"] == pytest.approx(losses["memory"], rel=1e-5)


def test_a_table_runs_its_rows_and_reports_them(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [*TINY, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={cache}"]
    assert run.main(["recipe=ablation/scan", *fixed, "scan=uni,2d"]) == 0
    out = tmp_path / "report"
    assert report.main(["ablation/scan", *fixed, "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "python -m toolkit.run" in text and "scan=bi" in text
    assert run.main(["recipe=ablation/scan", *fixed]) == 0
    assert report.main(["ablation/scan", *fixed, "--out", str(out)]) == 0
    text = (out / "ablation-scan.md").read_text()
    assert "Missing" not in text and "65.62" in text and "Table 4" in text
    rows = list(csv.DictReader((out / "ablation-scan.csv").open()))
    assert [r["row"] for r in rows] == ["uni", "bi", "2d"]
    assert [r["paper_VQA"] for r in rows] == ["51.03", "65.62", "66.04"]
    assert (out / "ablation-scan.png").stat().st_size > 10_000


def test_one_failing_row_hides_no_other(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import toolkit.job

    sane = toolkit.job.build_model

    def build(conf: Any, **sizes: Any) -> Any:
        if conf.scan["name"] == "bi":
            raise RuntimeError("seeded crash")
        return sane(conf, **sizes)

    monkeypatch.setattr(toolkit.job, "build_model", build)
    assert launch(tmp_path, cache, "-m", "scan=uni,bi,2d") == 1
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2
    error = capsys.readouterr().err
    assert "seeded crash" in error and "2 of 3" in error


def test_a_run_whose_loss_is_no_number_ends_there(tmp_path: Path, cache: Path) -> None:
    words = ["stages.tune.lr=1e30", "stages.tune.grad_clip=0", "stages.tune.steps=40", "hardware.device=cpu"]
    assert launch(tmp_path, cache, *words) == 1
    folder = only(tmp_path / "runs")
    assert "the loss is nan at step" in read(folder / "status.json")["error"]
    losses = [row["loss"] for row in csv.DictReader((folder / "metrics.csv").open())]
    assert losses[-1] == "nan" and "nan" not in losses[:-1] and len(losses) < 40


def test_the_report_of_a_recipe_that_is_no_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["quickstart"]) == 2
    assert "is no table" in capsys.readouterr().err
