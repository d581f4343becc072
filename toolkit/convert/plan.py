"""What a foreign file is, and under which names its tensors are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.convert import language, vision
from toolkit.convert.faults import Shape, cause_of, few, grouped
from toolkit.naming import DERIVED

RWKV, VISUALRWKV, VISUAL, TOWER = "RWKV", "VisualRWKV", "VisualRWKV without its language model", "tower"


@dataclass
class Plan:
    """names: name in the folder -> name in the file, in the file's order."""

    layout: str
    names: dict[str, str]
    parts: dict[str, dict[str, Any]]
    left_out: list[str] = field(default_factory=list)


def understand(path: object, shapes: Mapping[str, Shape]) -> Plan:
    """The plan for a file with these tensors; ValueError, naming it, if it is nothing that is known."""
    if not shapes:
        raise ValueError(f"{path}: holds no tensors")
    if language.is_language_model(shapes):
        return Plan(RWKV, {f"rwkv.{n}": n for n in shapes}, {"rwkv": language.check(path, shapes)})
    heads = {name.split(".")[0] for name in shapes}
    if "rwkv" in heads or {"proj", "vit"} <= heads:
        return _visualrwkv(path, shapes)
    facts, taken = vision.tower(path, shapes)
    kept = {f"vit.{n}": n for n in shapes if n in taken}
    return Plan(TOWER, kept, {"vit": facts}, [n for n in shapes if n not in taken])


def _visualrwkv(path: object, shapes: Mapping[str, Shape]) -> Plan:
    parts: dict[str, dict[str, Any]] = {}
    inside = {head: _under(shapes, f"{head}.") for head in ("rwkv", "proj", "vit")}
    strange = [n for n in shapes if n.split(".")[0] not in inside and n not in DERIVED]
    if strange:
        cause = cause_of(strange) or "another version; v5.0, v5.1 and v6.0 hold rwkv.*, proj.* and vit.*"
        raise ValueError(
            f"{path}: holds parts that no VisualRWKV offered here has\n  not known ({len(strange)}): "
            f"{few(grouped(strange))}\n  likely cause: {cause}"
        )
    if inside["rwkv"]:
        if not language.is_language_model(inside["rwkv"]):
            raise ValueError(f"{path}: its rwkv.* are no language model: {few(grouped(inside['rwkv']))}")
        parts["rwkv"] = language.check(path, inside["rwkv"])
    if inside["proj"]:
        parts["proj"] = vision.projector(path, inside["proj"])
    if inside["vit"]:
        parts["vit"] = vision.tower(path, inside["vit"])[0]
    _check_widths(path, parts)
    layout = VISUALRWKV if "rwkv" in parts else VISUAL
    return Plan(layout, {n: n for n in shapes}, parts)


def _check_widths(path: object, parts: Mapping[str, dict[str, Any]]) -> None:
    proj = parts.get("proj")
    if proj and "rwkv" in parts and proj["d_out"] != parts["rwkv"]["d_model"]:
        raise ValueError(
            f"{path}: its projector ends in {proj['d_out']} channels and its language model has width "
            f"{parts['rwkv']['d_model']}; parts of two sizes"
        )
    if proj and "vit" in parts and proj["d_in"] != parts["vit"]["width"]:
        raise ValueError(
            f"{path}: its projector takes {proj['d_in']} channels and its tower gives "
            f"{parts['vit']['width']}; parts of two versions"
        )


def _under(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}


def told(plan: Plan) -> str:
    """What was found, in one line."""
    said = []
    if "rwkv" in plan.parts:
        facts = plan.parts["rwkv"]
        options = [f"{k} {v}" for k, v in facts["recurrence"].items() if k != "name"]
        vocabulary = f"{facts['vocab_size']:,} tokens ({facts['vocabulary']})"
        said.append(", ".join([language.title(facts), *options, vocabulary]).replace("_", " "))
    if "proj" in plan.parts:
        said.append("projector {name} {d_in} to {d_out}".format(**plan.parts["proj"]))
    if "vit" in plan.parts:
        facts = plan.parts["vit"]
        said.append(f"{facts['layout']} tower, {facts['n_layer']} layers, width {facts['width']}")
    return "; ".join(said)
