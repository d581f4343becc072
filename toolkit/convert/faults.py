"""Keys that do not fit, told by group with the likely cause."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
_SHOWN = 6

FOREIGN = (
    (r"\batt\.(x_r|r_k|k_k|w0|a0)$", "RWKV-7, which this version does not offer (RWKV-4, 5.2 and 6 are)"),
    (r"\btiny_att\.", "VisualRWKV v5.2 to v5.4, hybrids with attention layers, which are not offered"),
    (r"\bcross_blocks\.|\bblocks\.\d+\.cross\.|\bln3\.", "VisualRWKV v6.22 or v6.23, with cross-attention"),
    (r"^state_encoder\.|\bmem_|\btime_mem", "VisualRWKV v6.21, with an image state encoder"),
    (r"^vtc\.", "VisualRWKV v7.03 or v7.04, with a token compressor"),
    (r"^vrwkv\.|\bffn_v\.", "VisualRWKV v7.10, with an RWKV-7 image encoder"),
    (r"_featurizer\.", "VisualRWKV-HD, UHD or a later version with three encoders"),
    (r"^(clip|sam|dino)(_projector)?\.", "VisualRWKV v5.4, with three encoders"),
    (r"^align\.", "an early VisualRWKV v5.1 with contrastive alignment"),
    (r"^adapter\.|\bllm_proj\.", "VisualRWKV v4, whose query transformer is not offered"),
    (r"\btime_state$", "a state-tuned file: its start values are no weights of the released layout"),
    (r"\bffnPre\.", "a model with a channel mix for its first time mix (pre_ffn)"),
    (r"lora_|\.lora\b", "a low-rank adapter; merge it into its base model first"),
    (r"exp_avg|optimizer", "a trainer's own state, not the weights alone"),
)
"""Names that only other models have -> which model."""


def cause_of(names: Iterable[str]) -> str:
    """The model that names give away, or nothing."""
    listed = list(names)
    for pattern, cause in FOREIGN:
        if any(re.search(pattern, name) for name in listed):
            return cause
    return ""


@dataclass(frozen=True)
class Faults:
    """How the tensors of a file differ from those a model needs."""

    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    shapes: tuple[str, ...]
    layers_gone: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus or self.shapes)

    def message(self, path: object, what: str) -> str:
        """One message: the groups, then the likely cause."""
        groups = {"missing": self.missing, "not known": self.surplus, "of another shape": self.shapes}
        lines = [f"{path}: does not fit {what}"]
        lines += [f"  {label} ({len(n)}): {few(grouped(n))}" for label, n in groups.items() if n]
        return "\n".join([*lines, f"  likely cause: {self.cause()}"])

    def cause(self) -> str:
        known = cause_of(self.surplus)
        if known:
            return known
        if self.layers_gone:
            gone = ", ".join(map(str, self.layers_gone[:_SHOWN]))
            return f"a cut or sharded file: nothing of layer {gone} is in it"
        if self.shapes and not self.missing and not self.surplus:
            return "another size: parts of two models, or a changed width"
        ends = [n for n in self.missing if "blocks." not in n]
        if self.missing and not self.surplus and ends:
            return f"one part of a checkpoint (no {ends[0]}), or a file not written to its end"
        return "another version of the model than the rest of its names say"


def compare(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Faults:
    """Faults of `found` against `wanted`, names of both without a part's prefix."""
    shapes = [
        f"{n} {list(found[n])} for {list(wanted[n])}" for n in wanted if n in found and found[n] != wanted[n]
    ]
    have, need = {_layer(n) for n in found}, {_layer(n) for n in wanted}
    return Faults(
        tuple(n for n in wanted if n not in found),
        tuple(n for n in found if n not in wanted),
        tuple(shapes),
        tuple(sorted(n for n in need - have if n is not None)),
    )


def _layer(name: str) -> int | None:
    match = re.match(r"(?:.*\.)?(?:blocks|layers?|resblocks)\.(\d{1,6})\.", name)
    return int(match[1]) if match else None


def grouped(names: Collection[str]) -> list[str]:
    """Names that differ in their layer alone as one: blocks.0-23.att.time_maa_g."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = _layer(name)
        stem = (
            name
            if number is None
            else re.sub(rf"(blocks|layers?|resblocks)\.{number}\.", r"\1.*.", name, count=1)
        )
        groups.setdefault(stem, []).extend([] if number is None else [number])
    return [
        stem.replace(".*.", f".{ranges(numbers)}.", 1) if numbers else stem
        for stem, numbers in groups.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def few(names: list[str]) -> str:
    """The first of them; what a file puts into its names cannot reach the terminal as control characters."""
    shown = ", ".join("".join(c if c.isprintable() else "?" for c in n[:100]) for n in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more groups" if len(names) > _SHOWN else "")
