"""Mistakes in recipe files: keys, values, defaults lists."""

from __future__ import annotations

from dataclasses import dataclass


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


IN_FILES = [
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
        ("must be from 0 to below 1",),
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
]
