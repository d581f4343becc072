"""Recipes and scales: each composes, says what it is, and is as small as its difference."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compositions import composed, one, rows
from toolkit import compose, recipes
from toolkit.explain import BadRecipe
from toolkit.layers import scales
from toolkit.lines import line_of, load
from toolkit.report_collect import row_parts

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(
    p.relative_to(ROOT / "recipes").with_suffix("").as_posix() for p in (ROOT / "recipes").rglob("*.yaml")
)


@pytest.mark.parametrize(("recipe", "scale"), list(itertools.product(RECIPES, scales())))
def test_composes_at_every_scale(recipe: str, scale: str) -> None:
    # One seed and one rate, and where scales differ in numbers only, one row: the others repeat the rest.
    table = "MULTIRUN" in (ROOT / f"recipes/{recipe}.yaml").read_text()
    words = [f"recipe={recipe}", f"scale={scale}", *["seed=0", "stages.tune.lr=1e-4"] * table]
    jobs = compose.understand(words).jobs
    for job in jobs[:1] if scale in ("quick", "paper_3b", "paper_7b") else jobs:
        config = compose.compose(job, complete=False)
        assert config["stages"]["tune"]["train"] == ["proj", "rwkv"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_header_says_what_and_how(recipe: str) -> None:
    lines = recipes.header(ROOT / f"recipes/{recipe}.yaml")
    command = "python -m toolkit.run" + ("" if recipe == "quickstart" else f" recipe={recipe}")
    assert lines and len(lines[0]) > 20 and lines[-1] == command


def _leaves(value: Any, head: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*head, key))]
    return [head]


FILES = [*(ROOT / "recipes").rglob("*.yaml"), *recipes.SCALES.glob("*.yaml")]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_no_value_equals_its_default(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving any value out changes the result, so nothing is written for nothing."""
    shutil.copytree(recipes.CONF, tmp_path / "conf")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.setattr(recipes, "CONF", tmp_path / "conf")
    monkeypatch.setattr(recipes, "SCALES", tmp_path / "conf/scale")
    monkeypatch.setattr(recipes, "folders", lambda: [tmp_path / "recipes"])
    scale = file.parent.name == "scale"
    name = file.stem if scale else file.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    words = [f"{'scale' if scale else 'recipe'}={name}"]
    if "MULTIRUN" in file.read_text():
        words.append("seed=0")
    copy = tmp_path / ("conf/scale" if scale else "recipes") / f"{name}.yaml"
    whole = composed(*words)
    values = {
        k: v.plain() for k, v in load(file).value.items() if k not in ("defaults", "hydra", "title", "report")
    }
    for leaf in _leaves(values):
        _write_without(file, leaf, copy)
        assert _or_refused(words) != whole, ".".join(leaf)


def _or_refused(words: list[str]) -> Any:
    try:
        return composed(*words)
    except BadRecipe as error:
        return error


def _write_without(file: Path, leaf: tuple[str, ...], copy: Path) -> None:
    content = load(file).plain()
    *above, last = leaf
    node = content
    for part in above:
        node = node[part]
    del node[last]
    copy.write_text("# @package _global_\n" + yaml.safe_dump(content))


def test_recipe_beats_scale_in_values_and_in_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(
        "# R.\ndefaults:\n  - override /encoder: lite0\nmodel: {n_layer: 5}\nstages: {tune: {lr: 7e-5}}\n"
    )
    monkeypatch.setenv("TOOLKIT_RECIPES", str(tmp_path))
    config = one("recipe=r", "scale=paper_1b6")
    assert config["encoder"]["name"] == "lite0" and config["data"]["name"] == "llava"
    assert config["model"]["n_layer"] == 5 and config["model"]["d_model"] == 2048
    assert config["stages"]["tune"]["lr"] == 7e-5 and config["stages"]["tune"]["epochs"] == 2


def test_a_child_beats_its_base_and_the_command_line_beats_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.yaml").write_text(
        "# B.\ndefaults:\n  - override /scan: bi\n  - override /prompt: suffix\nseed: 1\n"
    )
    (tmp_path / "c.yaml").write_text("# C.\ndefaults:\n  - /recipe/b\n  - override /scan: snake\nseed: 2\n")
    monkeypatch.setenv("TOOLKIT_RECIPES", str(tmp_path))
    child = one("recipe=c")
    assert (child["scan"]["name"], child["prompt"]["name"], child["seed"]) == ("snake", "suffix", 2)
    told = one("recipe=c", "scan=uni", "seed=3", "encoder=blank", "scale=paper_3b")
    assert (told["scan"]["name"], told["seed"], told["encoder"]["name"]) == ("uni", 3, "blank")


def test_a_recipe_may_choose_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.yaml").write_text("# S.\ndefaults:\n  - override /scale: small\n")
    monkeypatch.setenv("TOOLKIT_RECIPES", str(tmp_path))
    assert one("recipe=s")["data"]["grid"] == 5
    assert one("recipe=s", "scale=tiny")["data"]["grid"] == 4


@pytest.mark.parametrize(
    ("table", "key", "expected"),
    [
        ("ablation/scan", "scan.name", ["uni", "bi", "2d"]),
        ("ablation/scan_rwkv6", "scan.name", ["uni", "bi", "2d"]),
        ("ablation/prompt", "prompt.name", ["prefix", "suffix", "sandwich"]),
        ("ablation/recurrence", "recurrence.name", ["rwkv4", "rwkv5", "rwkv6"]),
    ],
)
def test_a_table_is_its_row_recipes(table: str, key: str, expected: list[str]) -> None:
    assert rows(f"recipe={table}", "seed=0", key=key) == expected
    for config, row in zip(composed(f"recipe={table}", "seed=0"), expected, strict=True):
        alone = one(f"recipe={table}_{row}")
        for part in (config, alone):
            part.pop("title")
            part.pop("report")
        assert config == alone


def test_a_tables_own_axis_is_set_by_hydras_name_too() -> None:
    words = ["recipe=ablation/scan", "seed=0"]
    asked = [job.overrides for job in compose.understand([*words, "scan=uni,2d"]).jobs]
    for axis in ("hydra.sweeper.params.scan=uni,2d", "hydra.sweeper.params.scan='uni,2d'"):
        found = compose.understand([*words, axis]).jobs
        assert [sorted(job.overrides) for job in found] == [sorted(one) for one in asked]


def test_seeds_multiply_a_table_and_the_command_line_narrows_it() -> None:
    assert rows("recipe=ablation/scan", "seed=4,7", "scan=uni,bi", key="scan.name") == ["uni", "bi"] * 2
    assert rows("recipe=ablation/scan", "seed=4,7", "scan=uni,bi", key="seed") == [4, 4, 7, 7]
    assert rows("recipe=ablation/scan", "scan=uni", "seed=3", key="scan.name") == ["uni"]
    assert rows("scan=uni,snake", "seed=range(0,2)", key="scan.name", multirun=True) == [
        "uni",
        "uni",
        "snake",
        "snake",
    ]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("quickstart", ("rwkv6", "sandwich", "2d")),
        ("ablation/base", ("rwkv5", "prefix", "uni")),
        ("ablation/scan_2d", ("rwkv5", "prefix", "2d")),
        ("ablation/scan_rwkv6_bi", ("rwkv6", "sandwich", "bi")),
        ("ablation/prompt_sandwich", ("rwkv5", "sandwich", "uni")),
        ("ablation/recurrence_rwkv4", ("rwkv4", "prefix", "uni")),
    ],
)
def test_rows_are_the_papers(recipe: str, expected: tuple[str, str, str]) -> None:
    config = one(f"recipe={recipe}")
    assert tuple(config[kind]["name"] for kind in ("recurrence", "prompt", "scan")) == expected


@pytest.mark.parametrize(
    ("scale", "size", "rate"),
    [
        ("paper_1b6", (24, 2048), (6e-5, 1.5e-5)),
        ("paper_3b", (32, 2560), (5e-5, 1.25e-5)),
        ("paper_7b", (32, 4096), (4e-5, 1e-5)),
    ],
)
def test_paper_scales_are_table_6(scale: str, size: tuple[int, int], rate: tuple[float, float]) -> None:
    config = one(f"scale={scale}")
    assert (config["model"]["n_layer"], config["model"]["d_model"]) == size
    align, tune = config["stages"]["align"], config["stages"]["tune"]
    assert list(config["stages"]) == ["align", "tune"]
    assert (align["train"], align["prompt"], align["epochs"], align["global_batch"]) == (
        ["proj"],
        "prefix",
        1,
        256,
    )
    assert (align["lr"], align["lr_final"]) == (1e-3, 1e-5)
    assert (tune["lr"], tune["lr_final"], tune["epochs"], tune["global_batch"]) == (*rate, 2, 128)
    for stage in (align, tune):
        assert (stage["steps"], stage["warmup"], stage["weight_decay"]) == (0, 0, 0)
        assert (stage["beta1"], stage["beta2"], stage["eps"], stage["grad_clip"]) == (0.9, 0.99, 1e-8, 1.0)
    assert tune["freeze"] == ["rwkv.emb"] and config["model"]["overlong"] == "cut"
    assert config["encoder"]["model"].startswith("ViT-L-14-336") and config["encoder"]["class_token"]


def test_a_stage_comes_by_recipe_and_goes_by_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(one("scale=paper_3b", "~stages.align")["stages"]) == ["tune"]
    (tmp_path / "n.yaml").write_text("# N.\nstages: {cool: {steps: 5}}\n")
    monkeypatch.setenv("TOOLKIT_RECIPES", str(tmp_path))
    stages = one("recipe=n")["stages"]
    assert list(stages) == ["tune", "cool"] and stages["cool"]["steps"] == 5
    assert stages["cool"]["train"] == ["proj", "rwkv"]


def test_a_table_takes_seeds_rates_and_data_from_its_scale() -> None:
    """Two seeds on a CPU; five at each of two rates on a GPU; the paper's sizes as the paper ran them."""
    for scale, seeds, rates, data in (
        ("tiny", [0, 1], [1e-3], "scenes"),
        ("small", [0, 1, 2, 3, 4], [5e-4, 1e-3], "scenes"),
        ("paper_1b6", [0], [6e-5], "llava"),
    ):
        made = composed("recipe=ablation/scan", "scan=bi", f"scale={scale}")
        ran = {(c["scan"]["name"], c["seed"], c["stages"]["tune"]["lr"]) for c in made}
        assert ran == set(itertools.product(["bi"], seeds, rates)), scale
        assert len(made) == len(ran) and {c["data"]["name"] for c in made} == {data}
    small = one("recipe=ablation/scan", "scan=bi", "seed=0", "stages.tune.lr=1e-3", "scale=small")
    assert small["report"]["best"] == "stages.tune.lr" and small["eval"]["choose"] == "val"
    assert one("recipe=quickstart")["data"]["name"] == one("recipe=blind")["data"]["name"] == "easy_vqa"
    assert one("recipe=quickstart", "scale=tiny")["data"]["name"] == "scenes"


@pytest.mark.parametrize(
    ("table", "arms"),
    [
        ("tokens", [(-1,), (4,), (1,)]),
        ("prompt_tokens", itertools.product(["prefix", "suffix", "sandwich"], [-1, 4])),
        ("scan_tokens", itertools.product(["uni", "bi", "2d"], [-1, 4])),
        ("prompt_scan", itertools.product(["prefix", "suffix", "sandwich"], ["uni", "bi", "2d"])),
        ("scan_orders", [(s,) for s in ("uni", "2d", "spiral", "snake", "zigzag", "hilbert")]),
    ],
)
def test_tables_the_paper_never_ran(table: str, arms: Any) -> None:
    made = composed(f"recipe=ablation/{table}", "seed=2")
    keys = made[0]["report"]["rows"]
    assert [row_parts(config, keys) for config in made] == [tuple(map(str, arm)) for arm in arms]
    published = made[0]["report"]["published"]
    assert set(published) <= {", ".join(row_parts(config, keys)) for config in made}


def test_a_scales_values_go_with_the_component_it_chose() -> None:
    """Another data set or encoder takes nothing over, and may be given values of its own."""
    other = one("recipe=ablation/scan_2d", "scale=small", "data=easy_vqa", "data.limit=7", "encoder=lite0")
    assert other["data"] == {"name": "easy_vqa", "limit": 7, "short_answer": False}
    assert other["encoder"]["stride"] == 16 and other["model"]["n_layer"] == 4
    same = one("recipe=ablation/scan_2d", "scale=small", "data=scenes", "data.seed=1")
    assert (same["data"]["grid"], same["data"]["seed"]) == (5, 1)


def test_the_root_file_holds_no_values() -> None:
    assert set(load(recipes.CONF / "run.yaml").value) == {"defaults", "hydra"}


def test_line_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("# R.\nmodel:\n  d_model: 8\n  n_layer: 2\nstages: {tune: {lr: 1e-3}}\n")
    assert line_of(file, "model.n_layer") == 4
    assert line_of(file, "stages.tune.lr") == 5
    assert line_of(file, "model.lr") is None


def test_composing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed("recipe=ablation/scan")
    assert list(tmp_path.iterdir()) == []
