"""Opens a foreign weight file as tensors by name: what it is, is read from its bytes, not its ending."""

from __future__ import annotations

import ctypes
import mmap
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.convert.faults import few
from toolkit.weights import Weights

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which trainers keep the weights beside other things."""

PREFIXES = ("module.", "_forward_module.")
"""What wrappers of distributed training put before every name."""

SAFETENSORS, ZIP, LEGACY = "safetensors", "torch", "torch before 1.6"


def kind_of(path: Path) -> str:
    """SAFETENSORS, ZIP or LEGACY; ValueError, saying what the file is instead, for anything else."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the weight file in it")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] == b"PK\x03\x04":
        return ZIP
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return LEGACY
    if head[8:9] == b"{":
        return SAFETENSORS
    raise ValueError(f"{path}: {_other(head)}")


def _other(head: bytes) -> str:
    text = head.lstrip().lower()
    if head.startswith(b"\x93NUMPY"):
        return "is a NumPy array, which names no tensors (and may hold a pickle); give the original weights"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; download the file itself"
    if text.startswith((b"<!doctype", b"<html")):
        return "is a web page, not weights; download the file itself"
    if head.startswith(b"GGUF"):
        return "is a GGUF file of quantised weights; give the original .pth or .safetensors"
    return "holds no weights that are read here (.safetensors, or what torch.save writes)"


@dataclass
class Source:
    """Tensors of a foreign file, and what was taken off or left out on the way."""

    tensors: Mapping[str, Any]
    kind: str
    wrapper: str = ""
    prefix: str = ""
    left_out: list[str] = field(default_factory=list)
    mapped: bool = False

    def release(self, name: str, tensor: Any) -> None:
        """Gives the memory of a tensor back that was written: its pages can be read from the file again."""
        if isinstance(self.tensors, Weights):
            self.tensors.release(name)
            return
        if not self.mapped or not hasattr(mmap, "MADV_DONTNEED"):
            return
        storage, page = tensor.untyped_storage(), mmap.PAGESIZE
        begin = -(-storage.data_ptr() // page) * page
        length = (storage.data_ptr() + storage.nbytes()) // page * page - begin
        if length > 0:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def open_source(path: Path) -> Source:
    """The tensors of `path`. Unpickles: for the child process only, unless the file is SAFETENSORS."""
    kind = kind_of(path)
    if kind == SAFETENSORS:
        return _clean(path, Weights(path), Source({}, kind))
    return _clean(path, load_plain(path, kind), Source({}, kind, mapped=kind == ZIP))


def load_plain(path: Path, kind: str) -> Any:
    """What torch.save wrote, if it is tensors and plain containers; ValueError for anything else."""
    import torch

    if kind == ZIP:
        _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == ZIP)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and plain containers, perhaps code; refused "
            f"({_first_line(error)})"
        ) from error
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise MemoryError from error
        raise ValueError(f"{path}: not a whole weight file ({_first_line(error)})") from error


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a whole weight file ({error}); download it again") from error
    names = [info.filename for info in infos]
    if len(set(names)) != len(names) or any(info.compress_type for info in infos):
        raise ValueError(f"{path}: its archive is packed as torch.save never does; refused")
    if any("/code/" in name for name in names):
        raise ValueError(
            f"{path}: a TorchScript program, not plain weights (OpenAI's CLIP files are); give the same "
            "weights in open_clip's or the hub's naming"
        )


def _clean(path: Path, state: Any, source: Source) -> Source:
    """Takes wrappers and common prefixes off; ValueError for what are no tensors by name."""
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state, source.wrapper = state[wrapper], wrapper
            break
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    if "_strategy" in state:
        raise ValueError(
            f"{path}: was converted by the rwkv package for one strategy; give the original file"
        )
    if isinstance(state, Weights):
        tensors: Mapping[str, Any] = state
    else:
        tensors = _tensors(path, state, source)
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors, source.prefix = {n.removeprefix(prefix): t for n, t in tensors.items()}, prefix
    source.tensors = tensors
    return source


def _tensors(path: Path, state: Mapping[Any, Any], source: Source) -> dict[str, Any]:
    import torch

    from toolkit.convert.write import NAMES

    tensors: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            source.left_out.append(str(name)[:80])
            continue
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"{path}: a tensor is named {str(name)[:40]!r}, which is no name")
        if value.layout != torch.strided or value.dtype not in NAMES or value.device.type != "cpu":
            raise ValueError(
                f"{path}: {few([name])} is a {value.layout} tensor of {value.dtype}; only plain ones are read"
            )
        tensors[name] = value.detach()
    claimed, held = sum(t.numel() * t.element_size() for t in tensors.values()), path.stat().st_size
    if claimed > 2 * held:
        raise ValueError(f"{path}: its tensors claim {claimed:,} bytes, the file has {held:,}; refused")
    return tensors


def _first_line(error: Exception) -> str:
    """The line of a message that says what was met, or else the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])[:200]
