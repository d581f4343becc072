"""From a run's directory, or converted weights, to a model that can be asked."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.tokens import Tokenizer, WorldTokenizer, load_tokenizer
from toolkit import checkpoint, register
from toolkit.build import build_model, from_dict
from toolkit.explain import closest, fail
from toolkit.naming import DERIVED
from toolkit.pretrained import checked_parts, load_language_model
from toolkit.rundir import run_id
from toolkit.runs import CONFIG, VOCABULARY, WEIGHTS, read_config
from toolkit.schema import ModelConf, PartConf, RunConf
from toolkit.session import Answerer
from toolkit.weights import WEIGHTS as FILE
from toolkit.weights import Weights, config_of

log = logging.getLogger("toolkit.generate")

PRECISIONS = ("fp32", "bf16")
CLIP = "ViT-L-14-336-quickgelu"
"""The tower of VisualRWKV v5.x and v6.0."""
CLASS_TOKEN = ("first", "last")
NO_LIMIT = 1 << 30  # a checkpoint does not tell the context it was trained with


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a VisualRWKV checkpoint does not tell of its training; empty where it was not said."""

    scan: str = ""
    layout: str = ""
    class_token: str = ""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "",
    plugins: Sequence[str] = (),
    scan: str = "",
    layout: str = "",
    class_token: str = "",
) -> Answerer:
    """The model of a finished run, or of a folder that `toolkit.convert` wrote, ready to be asked.

    device: auto, cpu or cuda. precision: fp32 or bf16; empty is the run's own. plugins: modules that
    register the run's own components; they are imported because you name them, never because a run does.
    scan, layout: names of the scan and the prompt that a converted VisualRWKV checkpoint was trained with.
    class_token: first (v5.0) or last (v5.1, v6.0), its place beside the patches in such a checkpoint.
    Raises ValueError for what is no finished run, with what to do.
    """
    folder, place = Path(path).expanduser(), device_of(device)
    if precision not in ("", *PRECISIONS):
        raise ValueError(f"precision={precision}: write precision=fp32 or precision=bf16")
    if (folder / CONFIG).exists():
        if scan or layout or class_token:
            raise ValueError(
                f"{folder}: the run's config says its scan and layout; leave out scan=, layout= and "
                "class_token="
            )
        return _run(folder, place, precision, plugins)
    if class_token not in ("", *CLASS_TOKEN):
        raise ValueError(f"class_token={class_token}: write class_token=first or class_token=last")
    return converted(folder, place, precision, Trained(scan, layout, class_token))


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
    learned = checkpoint.parts_of(weights)
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
    return Answerer(
        model.rwkv,
        tokenizer,
        prompt,
        model,
        name,
        bf16,
        conf.model.ctx_len,
        scan=conf.scan["name"],
        layout=conf.prompt["name"],
    )


def _without_start(conf: RunConf, learned: Sequence[str]) -> RunConf:
    """The same without the weights that training began with, for parts that the checkpoint holds."""
    sections: dict[str, Any] = {"rwkv": "lm", "proj": "proj"}
    begun = {
        section: dataclasses.replace(getattr(conf, section), weights="")
        for part, section in sections.items()
        if part in learned
    }
    return dataclasses.replace(conf, **begun)


def converted(folder: Path, device: torch.device, precision: str, trained: Trained) -> Answerer:
    """A VisualRWKV checkpoint or a language model from a folder that `toolkit.convert` wrote."""
    register.discover()
    told = config_of(str(folder)).get("parts", {})
    known = "rwkv" in told and (folder / FILE).is_file()  # a tower alone is no model
    parts = checked_parts(str(folder), Weights(folder / FILE)) if known else {}
    if "rwkv" not in parts:
        raise ValueError(
            f"{folder}: neither a run's directory nor a converted language model; "
            "`python -m toolkit.generate` lists the runs, "
            "`python -m toolkit.convert FILE --to FOLDER` makes the latter"
        )
    if {"proj", "vit"} <= set(parts):
        return _visual(folder, parts, device, precision, known_training(folder, parts, trained))
    if trained != Trained():
        raise ValueError(
            f"{folder}: a language model without vision parts has no scan, no layout and no class token"
        )
    rwkv, sizes = load_language_model(str(folder), dtype=_weight_type(precision, device), device=device)
    rwkv.requires_grad_(False)
    # All layouts ask text alone alike.
    return Answerer(rwkv, _tokenizer(sizes), _bound("prompt", "prefix"), None, f"model {folder.name}")


def _weight_type(precision: str, device: torch.device) -> torch.dtype | None:
    """Type of a converted language model's weights; None is the file's own, which GPUs compute in."""
    if precision == "bf16":
        return torch.bfloat16
    return None if device.type == "cuda" and not precision else torch.float32


def known_training(folder: Path, parts: Mapping[str, Any], said: Trained) -> Trained:
    """How a checkpoint was trained: v6.0's way is known, of v5.x the user must say it. ValueError if not."""
    six = parts["rwkv"]["version"] == "6"
    scan, layout, place = said.scan, said.layout, said.class_token
    if not (scan and layout) and not six:
        raise ValueError(
            f"{folder}: a VisualRWKV v5 checkpoint does not tell how it was trained; write scan= "
            f"({', '.join(sorted(register.components('scan')))}) and layout= "
            f"({', '.join(sorted(register.components('prompt')))})"
        )
    if not (scan and layout):
        unsaid = " ".join(["scan=bi"] * (not scan) + ["layout=sandwich"] * (not layout))
        scan, layout = scan or "bi", layout or "sandwich"
        log.warning("%s: asked with %s, as v6.0 was trained", folder, unsaid)
    # v5.0 has one scan only; from v5.1 on the class token is last, and v5.1 stores its scans' orders.
    v50 = not six and scan == "uni" and not any(n in Weights(folder / FILE) for n in DERIVED)
    if v50 and not place:
        raise ValueError(
            f"{folder}: v5.0 and v5.1 with scan=uni have the same tensors; write class_token=first for "
            "v5.0, class_token=last for v5.1"
        )
    return Trained(scan, layout, place or "last")


def _visual(
    folder: Path, parts: Mapping[str, Any], device: torch.device, precision: str, trained: Trained
) -> Answerer:
    """VisualRWKV with its CLIP tower, which stays float32: it is small, and runs once per picture."""
    sizes, weights = parts["rwkv"], PartConf(str(folder))
    # Paper: v5.x and v6.0 differ in what their sandwich repeats.
    form = {"form": "v5"} if trained.layout == "sandwich" and sizes["version"] != "6" else {}
    conf = RunConf(
        model=ModelConf(sizes["d_model"], sizes["n_layer"], ctx_len=NO_LIMIT, vocab="world"),
        lm=weights,
        proj=weights,
        encoder={"name": "open_clip", "model": CLIP, "weights": str(folder)},
        projector={k: v for k, v in parts["proj"].items() if k in ("name", "form")},
        scan={"name": trained.scan},
        prompt={"name": trained.layout, **form},
        recurrence=sizes["recurrence"],
    )
    for kind in ("scan", "prompt"):
        _bound(kind, getattr(conf, kind)["name"])
    weight_type = _weight_type(precision, device)
    model = build_model(conf, vocab_size=sizes["vocab_size"], device=device, lm_dtype=weight_type).to(device)
    model.extra_first = trained.class_token == "first"
    model.eval().requires_grad_(False)
    prompt = register.bind("prompt", conf.prompt)
    name = f"model {folder.name} with scan={trained.scan} layout={trained.layout}"
    name += " class_token=first" if model.extra_first else ""
    return Answerer(
        model.rwkv,
        _tokenizer(sizes),
        prompt,
        model,
        name,
        scan=trained.scan,
        layout=trained.layout,
    )


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
