"""Weights on disk as the toolkit reads them: a safetensors file, beside it config.json if converted.

A leaf like `contracts`, so that components read their own weights through it. torch is imported only
where tensors are made: a recipe's check reads headers and configs without it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
RAW = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
"""Endings of files that hold pickles, which only `toolkit.convert` reads."""

HEADER_LIMIT = 32 << 20
"""Bytes of header that are read: room for some 300,000 tensors."""

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Type in a safetensors header -> (torch's name, bytes)."""

DOWNLOADS = {
    "lm": "a released RWKV model, for example RWKV-x060-World-1B6-v2.1 (RWKV-6, repository "
    "BlinkDL/rwkv-6-world), RWKV-5-World-1B5-v2 (BlinkDL/rwkv-5-world) or RWKV-4-World "
    "(BlinkDL/rwkv-4-world), or a VisualRWKV checkpoint (howard-hou/visualrwkv-6, visualrwkv-5)",
    "proj": "a VisualRWKV checkpoint (howard-hou/visualrwkv-6, or visualrwkv-5, the file ending in _visual)",
}
"""Section of a recipe -> what to download for its weights, by name."""


TOWERS = {
    "ViT-L-14-336-quickgelu": " (the paper's tower: repository openai/clip-vit-large-patch14-336, file "
    "pytorch_model.bin or model.safetensors; VisualRWKV checkpoints hold it too)",
}
"""Model of an encoder -> where its weights are, for those that recipes here use."""


def tower_download(encoder: str, model: str) -> str:
    """What to download for a tower's weights, by name, without asking its library."""
    where = TOWERS.get(model, "")
    return f"the weights of {encoder}'s '{model}'{where}, or a CLIP, SigLIP or DINOv2 file of the hub"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; begin and end count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """(entries in the header's order, offset of the data). ValueError, naming the file, on any forgery.

    Every byte of the data belongs to exactly one tensor: offsets that overlap, leave a hole or pass the
    end of the file are refused, as is a header that claims more than HEADER_LIMIT.
    """
    try:
        return _read_header(path)
    except (OSError, LookupError, RecursionError, TypeError, ValueError) as error:
        said = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a whole safetensors file: {said[:200]}") from error


def _read_header(path: Path) -> tuple[dict[str, Entry], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", head)
        if length > HEADER_LIMIT or length > size - 8:
            raise ValueError(f"its header claims {length:,} bytes of {size:,}")
        listed = json.loads(file.read(length), object_pairs_hook=_once)
    if not isinstance(listed, dict):
        raise ValueError("its header lists no tensors")
    listed.pop("__metadata__", None)
    entries = {name: _entry(name, facts) for name, facts in listed.items()}
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            raise ValueError(f"{name!r} begins at byte {entry.begin:,} of the data, expected {reached:,}")
        reached = entry.end
    if reached != size - 8 - length:
        raise ValueError(f"its tensors take {reached:,} bytes, the file holds {size - 8 - length:,}")
    return entries, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return made


def _entry(name: str, facts: Any) -> Entry:
    dtype, shape, (begin, end) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has the type {str(dtype)[:20]!r}, which weights do not have")
    numbers = (*shape, begin, end)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{name!r} has a size or offset that is no count")
    if end - begin != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError(f"{name!r} of shape {list(shape)} does not take {end - begin:,} bytes")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:  # beside a 0 nothing else bounds a size
        raise ValueError(f"{name!r} has sizes that no tensor has")
    return Entry(dtype, shape, begin, end)


class Weights(Mapping[str, "Tensor"]):
    """Tensors by name, mapped from the file: nothing is read until it is used, nothing is copied.

    Writing to a tensor changes this process's memory only, never the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self._start = read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __getitem__(self, name: str) -> Tensor:
        import torch

        entry = self.entries[name]
        dtype: torch.dtype = getattr(torch, DTYPES[entry.dtype][0])
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype, device="cpu")
        begin = self._start + entry.begin
        if begin % DTYPES[entry.dtype][1]:  # other writers need not align; arithmetic on such memory is slow
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.end - entry.begin, offset=begin)
            return raw.clone().view(dtype).view(entry.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def release(self, name: str) -> None:
        """Gives the pages of a tensor that was copied elsewhere back to the system."""
        entry, page = self.entries[name], mmap.PAGESIZE
        begin = -(-(self._start + entry.begin) // page) * page
        length = (self._start + entry.end) // page * page - begin
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)


def config_of(given: str) -> dict[str, Any]:
    """config.json beside the weights that a recipe names; empty if there is none that can be read."""
    path = Path(given).expanduser()
    file = (path if path.is_dir() else path.parent) / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("parts"), dict) else {}


def settings_of(given: str, part: str = "") -> dict[str, Any]:
    """Dotted recipe key -> value that the weights need, as config.json tells; empty without one.

    part: rwkv or proj, for what that one needs; empty for all.
    """
    try:
        parts = config_of(given).get("parts", {})
        return _settings({part: parts[part]} if part in parts else parts if not part else {})
    except (AttributeError, LookupError, TypeError):  # not what toolkit.convert writes
        return {}


def _settings(parts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "rwkv" in parts:
        sizes = parts["rwkv"]
        found |= {"recurrence": sizes["recurrence"]["name"]}
        found |= {"model.d_model": sizes["d_model"], "model.n_layer": sizes["n_layer"]}
        found |= {f"recurrence.{k}": v for k, v in sizes["recurrence"].items() if k != "name"}
    if "proj" in parts:
        found |= {"projector": parts["proj"]["name"], "model.d_model": parts["proj"]["d_out"]}
        found |= {f"projector.{k}": v for k, v in parts["proj"].items() if k == "form"}
    return found


def absent(given: str, *, key: str, download: str) -> str:
    """What is wrong with a path given for weights, and what to do; empty if nothing is.

    key: the recipe's; download: what to fetch, by name, for whoever has no such file.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return ""
        raw = next((p for p in sorted(path.iterdir()) if p.suffix in RAW), None)
        if raw is None:
            return f"{key}: the folder '{given}' holds no {WEIGHTS}; {how_to_get(key, download)}"
        path = raw
    if not path.is_file():
        return f"{key}: no file '{given}'; {how_to_get(key, download)}"
    if path.suffix != ".safetensors":
        return (
            f"{key}: '{path}' is not converted, and may hold code; run "
            f"`python -m toolkit.convert {path} --to {path.with_suffix('')}` and write "
            f"{key}={path.with_suffix('')}"
        )
    return ""


def how_to_get(key: str, download: str) -> str:
    return (
        f"download {download}; a .safetensors file can be given as it is, any other goes through "
        f"`python -m toolkit.convert FILE --to FOLDER`, then write {key}=FOLDER"
    )


def open_weights(given: str, *, key: str, download: str) -> Weights:
    """The weights that a recipe names under `key`: a converted folder or a .safetensors file."""
    wrong = absent(given, key=key, download=download)
    if wrong:
        raise ValueError(wrong)
    path = Path(given).expanduser()
    try:
        return Weights(path / WEIGHTS if path.is_dir() else path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def part(weights: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Name within a part -> name in the file: those under `prefix`, or all if the file has one part only.

    prefix: with its dot, `rwkv.`; a file of a language model alone may lack it.
    """
    inside = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
    parted = any(name.startswith(("rwkv.", "proj.", "vit.", "encoder.")) for name in weights)
    return inside if inside or parted else {name: name for name in weights}


def sync_folder(folder: Path) -> None:
    """Flushes the files of a folder to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
