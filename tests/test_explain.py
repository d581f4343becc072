"""Seeded mistakes: each is caught before torch, told where, with the right suggestion first and a fix."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compositions import composed
from toolkit.explain import BadRecipe, Problem, closest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Slip:
    """A mistake. file: content of recipes/bad.yaml after its comment line, or words of a command line."""

    name: str
    place: str
    key: str
    first: str = ""
    fragments: tuple[str, ...] = ()
    file: str = ""
    words: str = ""
    multirun: bool = False
    complete: bool = False


L = "command line"


def line(number: int) -> str:
    return f"recipes/bad.yaml:{number}"


SLIPS = [
    # Files: keys, values, defaults lists.
    Slip("top-level key", line(2), "modle", "model", ("no such key",), file="modle: {n_layer: 3}"),
    Slip("nested key", line(3), "model.n_layr", "model.n_layer", file="model:\n  n_layr: 3"),
    Slip(
        "parameter",
        line(4),
        "scan.colums",
        "scan.columns",
        file="defaults:\n  - override /scan: 2d\nscan: {colums: false}",
    ),
    Slip(
        "stage parameter",
        line(3),
        "stages.tune.stpes",
        "stages.tune.steps",
        file="stages:\n  tune: {stpes: 3}",
    ),
    Slip(
        "stage name", line(3), "stages.tuen", "tune", ("no such stage",), file="stages:\n  tuen: {steps: 3}"
    ),
    Slip("wrong level", line(2), "lr", "stages.tune.lr", file="lr: 1e-3"),
    Slip("wrong group", line(2), "scan.head_size", "recurrence.head_size", file="scan: {head_size: 32}"),
    Slip(
        "other component's parameter",
        line(2),
        "prompt.alternate",
        "scan=hilbert (which has it)",
        file="prompt: {alternate: true}",
    ),
    Slip(
        "word for int",
        line(2),
        "model.d_model",
        "",
        ("takes int", "'wide' (str)", "d_model: 64"),
        file="model: {d_model: wide}",
    ),
    Slip(
        "word for bool",
        line(2),
        "scan.columns",
        "",
        ("takes bool", "'perhaps'"),
        file="scan: {columns: perhaps}",
    ),
    Slip(
        "scalar for list",
        line(2),
        "stages.tune.train",
        "",
        ("takes list[str]",),
        file="stages: {tune: {train: proj}}",
    ),
    Slip("null", line(2), "model.d_model", "", ("nothing (null)",), file="model: {d_model: null}"),
    Slip(
        "scalar for a group", line(2), "model", "", ("holds settings", "set model.d_model"), file="model: 64"
    ),
    Slip(
        "below its range",
        line(2),
        "model.n_layer",
        "",
        ("given 0, must be at least 1",),
        file="model: {n_layer: 0}",
    ),
    Slip(
        "above its range",
        line(2),
        "stages.tune.beta2",
        "",
        ("must be from 0 to 1",),
        file="stages: {tune: {beta2: 1.5}}",
    ),
    Slip(
        "choice",
        line(2),
        "model.vocab",
        "world",
        ("one of dataset, world", "vocab: world"),
        file="model: {vocab: wrld}",
    ),
    Slip("choice of a component", line(2), "prompt.form", "", ("one of v6, v5",), file="prompt: {form: v7}"),
    Slip(
        "name by hand",
        line(2),
        "scan.name",
        "",
        ("`- override /scan: bi` under defaults",),
        file="scan: {name: bi}",
    ),
    Slip(
        "component as a value",
        line(2),
        "scan",
        "",
        ("choose it with `- override /scan: bi`",),
        file="scan: bi",
    ),
    Slip(
        "unknown component",
        line(3),
        "scan",
        "spiral",
        ("no scan named 'spirel'",),
        file="defaults:\n  - override /scan: spirel",
    ),
    Slip(
        "option of another kind",
        line(3),
        "scan",
        "override /prompt: prefix",
        file="defaults:\n  - override /scan: prefix",
    ),
    Slip(
        "unknown group",
        line(3),
        "defaults",
        "override /recurrence",
        file="defaults:\n  - override /recurence: rwkv6",
    ),
    Slip(
        "override without its word",
        line(3),
        "defaults",
        "",
        ("`- override /scan: bi`",),
        file="defaults:\n  - scan: bi",
    ),
    Slip("unknown base", line(3), "recipe", "ablation/base", file="defaults:\n  - /recipe/ablation/bsae"),
    Slip(
        "base without its root",
        line(3),
        "defaults",
        "/recipe/ablation/base",
        file="defaults:\n  - ablation/base",
    ),
    Slip("base above", line(3), "defaults", "/recipe/ablation/base", file="defaults:\n  - ../ablation/base"),
    Slip(
        "base after an override",
        line(4),
        "defaults",
        "",
        ("put it first",),
        file="defaults:\n  - override /scan: bi\n  - /recipe/quickstart",
    ),
    Slip(
        "itself as base",
        line(3),
        "defaults",
        "",
        ("includes itself",),
        file="defaults:\n  - /recipe/bad\nseed: 1",
    ),
    Slip(
        "nothing changed",
        line(2),
        "",
        "",
        ("changes nothing of its base 'ablation/base'",),
        file="defaults:\n  - /recipe/ablation/base\ntitle: new",
    ),
    Slip("duplicate key", line(3), "seed", "", ("given twice, first in line 2",), file="seed: 1\nseed: 2"),
    Slip("syntax", line(3), "", "", ("not valid YAML", "title: a"), file="model: {n_layer: 2\ntitle: a"),
    Slip("tab", line(3), "", "", ("indent with spaces",), file="model:\n\tn_layer: 2"),
    Slip("no mapping", line(2), "", "", ("a mapping of keys to values",), file="- scan\n- bi"),
    Slip("python tag", line(2), "", "", ("runs Python",), file="title: !!python/object/apply:os.getcwd []"),
    Slip(
        "target", line(2), "scan._target_", "", ("name no Python code",), file="scan: {_target_: os.system}"
    ),
    Slip(
        "interpolation",
        line(2),
        "title",
        "",
        ("interpolation '${oc.env:HOME}'",),
        file="title: ${oc.env:HOME}",
    ),
    Slip(
        "interpolation in a list",
        line(2),
        "stages.tune.train",
        "",
        ("interpolation",),
        file="stages: {tune: {train: ['${seed}']}}",
    ),
    Slip(
        "hydra's own keys",
        line(2),
        "hydra.callbacks",
        "",
        ("no such key in Hydra",),
        file="hydra: {callbacks: {a: {_target_: os.system}}}",
    ),
    Slip(
        "sweeper key",
        line(2),
        "hydra.sweeper.prams",
        "hydra.sweeper.params",
        file="hydra: {sweeper: {prams: {scan: 'uni,bi'}}}",
    ),
    Slip(
        "sweep over an unknown name",
        line(3),
        "scan",
        "uni",
        file="hydra:\n  sweeper: {params: {scan: 'unii,bi'}}\n  mode: MULTIRUN",
    ),
    Slip(
        "sweep over an unknown key",
        line(2),
        "scna",
        "scan",
        file="hydra: {mode: MULTIRUN, sweeper: {params: {scna: 'uni,bi'}}}",
    ),
    Slip(
        "missing file",
        line(4),
        "data.train",
        "",
        ("is not an existing file",),
        file="defaults:\n  - override /data: llava\ndata: {train: nowhere.json, images: .}",
    ),
    Slip(
        "nested node",
        line(4),
        "encoder.members.name",
        "lite0",
        file="defaults:\n  - override /encoder: fused\nencoder: {members: [{name: lite_0}]}",
    ),
    Slip(
        "nested parameter",
        line(4),
        "encoder.members.strid",
        "encoder.members.stride",
        file="defaults:\n  - override /encoder: fused\nencoder: {members: [{name: lite0, strid: 8}]}",
    ),
    Slip(
        "nested without a name",
        line(4),
        "encoder.members",
        "",
        ("each item is one encoder with a name",),
        file="defaults:\n  - override /encoder: fused\nencoder: {members: [{stride: 8}]}",
    ),
    # Settings that do not go together.
    Slip(
        "head size",
        line(2),
        "recurrence.head_size",
        "",
        ("does not divide model.d_model=64",),
        file="recurrence: {head_size: 48}",
    ),
    Slip(
        "2d without a grid",
        line(2),
        "projector.tokens",
        "",
        ("leaves no grid", "scan=bi"),
        file="projector: {tokens: 1}",
    ),
    Slip(
        "tokens not square",
        line(2),
        "projector.tokens",
        "",
        ("not a square", "projector.tokens=9"),
        file="projector: {tokens: 10}",
    ),
    Slip(
        "context below the image",
        line(3),
        "model.ctx_len",
        "",
        ("no room for text after 64",),
        file="projector: {tokens: 64}\nmodel: {ctx_len: 64}",
    ),
    Slip(
        "prefix of nothing",
        line(2),
        "stages.tune.train",
        "proj",
        ("begins no parameter's name",),
        file="stages: {tune: {train: [projector]}}",
    ),
    Slip(
        "layer that is not",
        line(2),
        "stages.tune.freeze",
        "",
        ("layers 0 to 3",),
        file="stages: {tune: {freeze: [rwkv.blocks.4]}}",
    ),
    Slip(
        "prompt of a stage", line(2), "stages.tune.prompt", "prefix", file="stages: {tune: {prompt: prefx}}"
    ),
    Slip("no length", line(2), "stages.tune.steps", "", ("both 0",), file="stages: {tune: {steps: 0}}"),
    # Command lines.
    Slip("group", L, "scna", "scan", ("fix: scan=2d",), words="scna=2d"),
    Slip("plus hides a typo", L, "stages.tune.stpes", "stages.tune.steps", words="+stages.tune.stpes=3"),
    Slip("plus and a new key", L, "recpie", "recipe", ("fix: recipe=x",), words="+recpie=x"),
    Slip("two pluses", L, "stages.tune.stpes", "stages.tune.steps", words="++stages.tune.stpes=3"),
    Slip("plus before a group", L, "scan", "", ("write scan=bi",), words="+scan=bi"),
    Slip("component", L, "scan", "2d", ("fix: scan=2d",), words="scan=3d"),
    Slip("another kind's name", L, "scan", "prompt=prefix", ("fix: prompt=prefix",), words="scan=prefix"),
    Slip(
        "recipe without its folder",
        L,
        "recipe",
        "ablation/scan_2d",
        ("fix: recipe=ablation/scan_2d",),
        words="recipe=scan_2d",
    ),
    Slip("recipe", L, "recipe", "ablation/scan_2d", words="recipe=ablation/scan_3d"),
    Slip("scale given as recipe", L, "recipe", "scale=paper_3b", words="recipe=paper_3b"),
    Slip("scale", L, "scale", "tiny", words="scale=tny"),
    Slip("no equals sign", L, "quikstart", "recipe=quickstart", ("write key=value",), words="quikstart"),
    Slip("type", L, "seed", "", ("takes int", "'abc' (str)"), words="seed=abc"),
    Slip("range", L, "stages.tune.lr", "", ("must be greater than 0",), words="stages.tune.lr=-1"),
    Slip("stage", L, "stages.tnue", "tune", words="stages.tnue.lr=1e-3"),
    Slip(
        "a new stage by one key",
        L,
        "stages.cool",
        "",
        ("a new stage goes into a recipe",),
        words="+stages.cool.steps=5",
    ),
    Slip(
        "required by a component",
        L,
        "encoder.members",
        "",
        ("required, and not given", "encoder.members=VALUE"),
        words="encoder=fused",
    ),
    Slip("removing nothing", L, "stages.algin", "~stages.align", words="~stages.algin scale=paper_3b"),
    Slip("removing a group", L, "scan", "", ("needs one of each group",), words="~scan"),
    Slip(
        "hydra's keys",
        L,
        "hydra.sweper.params.scan",
        "hydra.sweeper.params",
        words="hydra.sweper.params.scan=uni",
    ),
    Slip(
        "hydra's code",
        L,
        "hydra.launcher._target_",
        "",
        ("not a setting of Hydra",),
        words="hydra.launcher._target_=os.system",
    ),
    Slip("sweep without -m", L, "scan", "", ("names 2 values", "add -m"), words="scan=uni,bi"),
    Slip("a typo among swept values", L, "scan", "spiral", words="scan=uni,spirel", multirun=True),
    Slip(
        "a swept value out of range",
        L,
        "model.n_layer",
        "",
        ("given 0",),
        words="model.n_layer=2,0",
        multirun=True,
    ),
    Slip("a value twice", L, "seed", "", ("names '1' twice",), words="seed=1,2,1", multirun=True),
    Slip("glob", L, "recipe", "", ("would run no job",), words="recipe=glob(ablation/*)", multirun=True),
    Slip("interval", L, "seed", "", ("is an interval",), words="seed=interval(0,3)", multirun=True),
    Slip(
        "table as a row",
        L,
        "recipe",
        "",
        ("is a table", "run it alone"),
        words="recipe=ablation/scan,ablation/base",
        multirun=True,
    ),
    Slip("plug-ins as text", L, "plugins", "", ("plugins=[mine]",), words="plugins=mine"),
    Slip(
        "micro batch and batch",
        L,
        "hardware.micro_batch",
        "",
        ("36 does not divide stages.tune.global_batch=48", "hardware.micro_batch=24"),
        words="hardware.micro_batch=36",
    ),
    Slip(
        "required paths",
        "toolkit/conf/scale/paper_3b.yaml",
        "",
        "",
        ("data.images: required", "data.train=PATH", "data.align"),
        words="scale=paper_3b",
        complete=True,
    ),
]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda s: s.name)
def test_a_mistake_is_told(slip: Slip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    words = slip.words.split()
    if slip.file:
        (tmp_path / "recipes/bad.yaml").write_text(f"# A recipe with a mistake.\n{slip.file}\n")
        words = ["recipe=bad"]
    with pytest.raises(BadRecipe) as error:
        composed(*words, multirun=slip.multirun, complete=slip.complete)
    problem, text = error.value.problems[0], error.value.message()
    if not slip.complete:
        assert (problem.place, problem.key) == (slip.place, slip.key), text
    assert next(iter(problem.matches), "") == slip.first or not slip.first, text
    assert all(fragment in text for fragment in slip.fragments), text
    assert problem.fix and len(text.splitlines()) <= 12
    assert "Traceback" not in text


def test_at_least_forty_mistakes_and_all_differ() -> None:
    assert len({slip.name for slip in SLIPS}) == len(SLIPS) >= 40


def test_several_problems_come_together(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe) as error:
        composed("seed=a", "model.n_layer=0", "titel=x", "scan.colums=1", "loss.l3=1", "eval.bacth=2")
    assert len(error.value.problems) == 6
    text = error.value.message()
    assert len(text.splitlines()) <= 12 and text.endswith("... and 3 more; fix these first")


def test_close_matches_prefer_the_whole_then_the_last_part() -> None:
    assert closest("scan_2d", ["ablation/scan_2d", "ablation/scan_bi", "quickstart"])[0] == "ablation/scan_2d"
    assert closest("zzz", ["scan", "prompt"]) == []


def test_a_problem_prints_in_at_most_three_lines() -> None:
    text = str(Problem("r.yaml:3", "scan", "no such", ("a", "b", "c", "d"), "write a"))
    assert text == "r.yaml:3: scan: no such\n  did you mean: a, b, c\n  fix: write a"


_PROBE = """
import sys
from toolkit.{module} import main
code = main(sys.argv[1:])
names = ("torch", "lightning", "webdataset", "timm", "open_clip", "numpy", "PIL")
heavy = [name for name in names if name in sys.modules]
print("HEAVY", heavy)
sys.exit(code)
"""


def _probe(module: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, "-c", _PROBE.format(module=module), *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "words", "code"),
    [
        ("run", ["--help"], 0),
        ("run", ["--cfg", "job"], 0),
        ("run", ["recipe=ablation/scan_3d"], 2),
        ("run", ["scan.colums=1"], 2),
        ("listing", [], 0),
    ],
)
def test_answers_without_heavy_imports(module: str, words: list[str], code: int) -> None:
    done = _probe(module, *words)
    assert done.returncode == code, done.stderr
    assert "HEAVY []" in done.stdout


def test_trace_shows_the_traceback_on_request() -> None:
    assert "Traceback" not in _probe("run", "seed=a").stderr
    done = _probe("run", "seed=a", env={"TOOLKIT_TRACE": "1"})
    assert "Traceback" in done.stderr and "BadRecipe" in done.stderr
