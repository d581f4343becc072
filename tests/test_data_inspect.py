"""`python -m toolkit.data inspect`: what it prints, the picture it draws, and that recipes take the data."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data.reader import ShardReader
from tests.compositions import composed
from tests.data.helpers import picture, shard_folder
from toolkit import data, data_inspect, recipes, register, run
from toolkit.data_samples import Rendering, described

SMALL = ["data=scenes", "data.train_pictures=40", "data.test_pictures=12"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def test_prints_sizes_hashes_answers_and_floors_of_every_split(capsys):
    assert data.main(["inspect", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split(",")[0] for line in lines if not line.startswith(" ")]
    assert heads == ["train: 40 records", "val: 12 records", "test: 12 records", "test_large: 12 records"]
    assert sum(line.startswith("  manifest hash ") and len(line.split()[-1]) == 64 for line in lines) == 4
    (count, *_) = [line for line in lines if line.startswith("  count ")]
    assert count.split()[1] == "80" and "33.3%" in count and "1 3" in count
    assert sum(line.startswith("  ray_column ") for line in lines) == 4
    assert sum(line.startswith("  all ") for line in lines) == 4


def test_measures_each_type_against_training():
    def made(kind: str, *pairs: tuple[str, str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(kind=kind, question=q, gold=a) for q, a in pairs]

    train = made("x", ("q", "a"), ("q", "a"), ("q", "b")) + made("y", ("p", "c"))
    test = made("x", ("q", "a"), ("q", "b"), ("q", "b"), ("q", "d")) + made("y", ("p", "c"))
    x, y, total = data_inspect.measure(train, test)
    assert (x.kind, x.n, x.texts, dict(x.answers)) == ("x", 4, 1, {"a": 1, "b": 2, "d": 1})
    assert (x.chance, x.majority, x.blind) == (0.375, 0.5, 0.25)
    assert (y.chance, y.majority, y.blind) == (1, 1, 1)
    assert (total.kind, total.n, total.blind) == ("all", 5, 0.4)


def test_draws_samples_of_every_split(tmp_path, capsys):
    file = tmp_path / "sheets" / "x.png"
    assert data.main(["inspect", *SMALL, "--plot", str(file)]) == 0
    assert capsys.readouterr().out.endswith(f"{file}\n")
    pixels = Image.open(file).convert("RGB")
    assert pixels.width > 1000 and pixels.height > 1000
    colors = {color for _, color in pixels.getcolors(1 << 24)}
    assert {(214, 39, 40), (44, 160, 44), (31, 96, 200), (240, 196, 25)} <= colors


def test_any_source_can_be_inspected(tmp_path, capsys, monkeypatch):
    """Records without pictures, without types and without a test split."""
    folder = shard_folder(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    words = ["inspect", "data=shards", f"data.train={folder}", "eval.split=train", "--plot"]
    assert data.main(words) == 0
    assert Path("shards.png").stat().st_size > 1000
    assert "train: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=scnes"], "did you mean: scenes"),
        (["data=scenes", "data.grid=1"], "must be from 2 to 12"),
        (["data=scenes", "data.large_grid=3"], "command line: data.large_grid=3 must be larger"),
        (["recipe=ablation/scan", "data=scenes"], "its rows share one data source"),
        (["--plot", "data=scenes"], "'data=scenes' is no picture file"),
    ],
)
def test_refuses_with_a_sentence(words, message, capsys):
    assert data.main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("source", ["scenes", "sort_of_clevr"])
def test_every_recipe_takes_the_data(source):
    recipes.mount()
    for name in recipes.names():
        for config in composed(f"recipe={name}", f"data={source}"):
            assert config["data"]["name"] == source


def test_check_builds_the_quick_start_with_scenes(capsys):
    assert run.main(["recipe=quickstart", "data=scenes", "encoder=conv", "--check"]) == 0
    assert "16 tokens" in capsys.readouterr().out


def test_help_needs_no_torch():
    import subprocess

    code = "import sys, toolkit.data; print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prints_samples_as_the_model_reads_them(tmp_path, capsys):
    folder = shard_folder(tmp_path / "s")
    assert data.main(["inspect", str(folder), "prompt=prefix", "--samples", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  train sample 00000000, png 8 x 6, " + f"{len(picture(0)):,} bytes")
    assert lines[at + 1].strip() == "prompt=prefix: 13 text + 16 image = 29 of 64 positions, 3 learned"
    assert lines[at + 2].strip() == r"User: ⟨image⟩\nq0\n\nAssistant:[[ a0\n\n]]"
    assert sum(line.startswith("  train sample ") for line in lines) == 3
    assert data.main(["inspect", str(folder), "--samples", "0"]) == 0
    assert "train sample" not in capsys.readouterr().out


def test_says_which_samples_are_too_long_and_what_has_no_form(tmp_path):
    def rendering(n_image: int) -> Rendering:
        return Rendering(register.bind("prompt", {"name": "prefix"}), "prefix", n_image, 20)

    example = ShardReader(shard_folder(tmp_path / "s", 3)).example(0)
    assert rendering(16).count(example) == "13 text + 16 image = 29 of 20 positions (too long), 3 learned"
    assert rendering(0).count(example) == "13 text + the image's positions, 3 learned"
    text_only = ShardReader(tmp_path / "s").example(3)
    assert "image" not in rendering(16).count(text_only).replace("positions", "")
    broken = replace(example, turns=example.turns[:0])
    assert "\n" not in described(rendering(16), broken) and described(rendering(16), broken)


def test_the_sheet_shows_the_prompt(tmp_path):
    from toolkit import data_plot

    example = ShardReader(shard_folder(tmp_path / "s", 3)).example(0)
    prompt = Rendering(register.bind("prompt", {"name": "prefix"}), "prefix", 16, 64)
    assert data_plot._prompt(prompt, example) == [
        "13 text + 16 image = 29 of 64 positions, 3 learned",
        r"User: ⟨image⟩\nq0\n\nAssistant:[[ a0\n\n]]",
    ]
