"""From a run's directory, or converted weights, to a model that can be asked."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.tokens import Tokenizer, WorldTokenizer, load_tokenizer
from toolkit import checkpoint, register
from toolkit.build import build_model, from_dict
from toolkit.explain import closest, fail
from toolkit.pretrained import load_language_model
from toolkit.rundir import run_id
from toolkit.runs import CONFIG, VOCABULARY, WEIGHTS, read_config
from toolkit.schema import ModelConf, PartConf, RunConf
from toolkit.session import Answerer
from toolkit.weights import config_of

log = logging.getLogger("toolkit.generate")

PRECISIONS = ("fp32", "bf16")
CLIP = "ViT-L-14-336-quickgelu"
"""The tower of VisualRWKV v5.x and v6.0."""
NO_LIMIT = 1 << 30  # a checkpoint does not tell the context it was trained with


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "",
    plugins: Sequence[str] = (),
    scan: str = "",
    layout: str = "",
) -> Answerer:
    """The model of a finished run, or of a folder that `toolkit.convert` wrote, ready to be asked.

    device: auto, cpu or cuda. precision: fp32 or bf16; empty is the run's own. plugins: modules that
    register the run's own components; they are imported because you name them, never because a run does.
    scan, layout: names of the scan and the prompt that a converted VisualRWKV checkpoint was trained with.
    Raises ValueError for what is no finished run, with what to do.
    """
    folder, place = Path(path).expanduser(), device_of(device)
    if precision not in ("", *PRECISIONS):
        raise ValueError(f"precision={precision}: write precision=fp32 or precision=bf16")
    if (folder / CONFIG).exists():
        if scan or layout:
            raise ValueError(
                f"{folder}: the run's config says its scan and layout; leave out scan= and layout="
            )
        return _run(folder, place, precision, plugins)
    return converted(folder, place, precision, scan, layout)


def device_of(name: str) -> torch.device:
    """The device of that name; asking for an absent one is an error."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name}: write device=auto, device=cpu or device=cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device=cuda, but torch sees no CUDA device here; write device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _run(folder: Path, device: torch.device, precision: str, plugins: Sequence[str]) -> Answerer:
    register.discover(plugins)
    cfg = read_config(folder, plugins)
    weights = folder / WEIGHTS
    if not (weights / checkpoint.FACTS).exists():
        raise ValueError(f"{folder}: holds no {WEIGHTS}, its training has not ended; run it again to go on")
    learned = json.loads((weights / checkpoint.FACTS).read_text(encoding="utf-8"))["parts"]
    try:
        conf = _without_start(from_dict(cfg), learned)
    except KeyError as error:
        what, fix = "no such key in a run's config", "load it with the version that wrote it"
        raise fail(str(folder / CONFIG), str(error.args[0]), what, fix=fix) from error
    tokenizer = load_tokenizer(folder / VOCABULARY)
    model = build_model(conf, vocab_size=tokenizer.size)
    checkpoint.load(weights, model)
    model.to(device).eval().requires_grad_(False)
    bf16 = (precision or conf.hardware.precision) == "bf16"
    prompt = register.bind("prompt", conf.prompt)
    name = f"run {run_id(cfg)}"
    return Answerer(model.rwkv, tokenizer, prompt, model, name, bf16, conf.model.ctx_len)


def _without_start(conf: RunConf, learned: Sequence[str]) -> RunConf:
    """The same without the weights that training began with, for parts that the checkpoint holds."""
    sections: dict[str, Any] = {"rwkv": "lm", "proj": "proj"}
    begun = {
        section: dataclasses.replace(getattr(conf, section), weights="")
        for part, section in sections.items()
        if part in learned
    }
    return dataclasses.replace(conf, **begun)


def converted(folder: Path, device: torch.device, precision: str, scan: str, layout: str) -> Answerer:
    """A VisualRWKV checkpoint or a language model from a folder that `toolkit.convert` wrote."""
    register.discover()
    parts = config_of(str(folder)).get("parts", {})
    if "rwkv" not in parts:
        raise ValueError(
            f"{folder}: neither a run's directory nor a converted language model; "
            "`python -m toolkit.generate` lists the runs, "
            "`python -m toolkit.convert FILE --to FOLDER` makes the latter"
        )
    if {"proj", "vit"} <= set(parts):
        return _visual(folder, parts, device, precision, scan, layout)
    if scan or layout:
        raise ValueError(f"{folder}: a language model without vision parts has no scan and no layout")
    dtype = None if device.type == "cuda" and not precision else torch.float32
    dtype = torch.bfloat16 if precision == "bf16" else dtype
    rwkv, sizes = load_language_model(str(folder), dtype=dtype, device=device)
    rwkv.requires_grad_(False)
    # All layouts ask text alone alike.
    return Answerer(rwkv, _tokenizer(sizes), _bound("prompt", "prefix"), None, f"model {folder.name}")


def _visual(
    folder: Path, parts: Mapping[str, Any], device: torch.device, precision: str, scan: str, layout: str
) -> Answerer:
    """VisualRWKV with its CLIP tower. The file does not tell scan and layout: v6.0's are known."""
    sizes, weights = parts["rwkv"], PartConf(str(folder))
    if not (scan and layout) and sizes["version"] != "6":
        raise ValueError(
            f"{folder}: a VisualRWKV v5 checkpoint does not tell how it was trained; write scan= "
            f"({', '.join(sorted(register.components('scan')))}) and layout= "
            f"({', '.join(sorted(register.components('prompt')))})"
        )
    if not (scan and layout):
        scan, layout = scan or "bi", layout or "sandwich"
        log.warning("%s: asked with scan=%s layout=%s, as v6.0 was trained", folder, scan, layout)
    # Paper: v5.x and v6.0 differ in what their sandwich repeats.
    form = {"form": "v5"} if layout == "sandwich" and sizes["version"] != "6" else {}
    conf = RunConf(
        model=ModelConf(sizes["d_model"], sizes["n_layer"], ctx_len=NO_LIMIT, vocab="world"),
        lm=weights,
        proj=weights,
        encoder={"name": "open_clip", "model": CLIP, "weights": str(folder)},
        projector={k: v for k, v in parts["proj"].items() if k in ("name", "form")},
        scan={"name": scan},
        prompt={"name": layout, **form},
        recurrence=sizes["recurrence"],
    )
    for kind in ("scan", "prompt"):
        _bound(kind, getattr(conf, kind)["name"])
    model = build_model(conf, vocab_size=sizes["vocab_size"], device=device).to(device)
    model.eval().requires_grad_(False)
    prompt = register.bind("prompt", conf.prompt)
    name = f"model {folder.name} with scan={scan} layout={layout}"
    return Answerer(model.rwkv, _tokenizer(sizes), prompt, model, name, precision == "bf16")


def _bound(kind: str, name: str) -> Any:
    """A component by name, with its own defaults. BadRecipe for an unknown one."""
    known = register.components(kind)
    if name not in known:
        key = "layout" if kind == "prompt" else kind
        fix = f"{key}= one of {', '.join(sorted(known))}"
        raise fail("command line", key, f"no {kind} named {name!r}", matches=closest(name, known), fix=fix)
    return register.bind(kind, {"name": name})


def _tokenizer(sizes: Mapping[str, Any]) -> Tokenizer | None:
    return WorldTokenizer() if sizes["vocabulary"] == "world" else None
