"""Files that are no weights: damaged, forged, with code in them, or asking for too much."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.converting import GOLDEN, here
from tests.test_recurrences import language_model
from toolkit.convert.__main__ import main
from toolkit.convert.convert import convert

__all__ = ["here"]  # fixtures of another file


class Marker:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def hostile(kind: str, path: Path, marker: Path) -> None:
    import pickle

    import numpy as np

    code = Marker(marker)
    if kind == "zip":
        torch.save({"emb.weight": torch.zeros(2), "x": code}, path)
    elif kind == "legacy":
        torch.save({"x": code}, path, _use_new_zipfile_serialization=False)
    elif kind == "trainer":
        torch.save({"state_dict": {"emb.weight": torch.zeros(2)}, "hyper_parameters": code}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(code))
    elif kind == "numpy":
        with path.open("wb") as file:
            np.save(file, np.array([code], dtype=object), allow_pickle=True)


HOSTILE = [("zip", ".pth"), ("legacy", ".pt"), ("trainer", ".ckpt"), ("pickle", ".bin"), ("numpy", ".npy")]


@pytest.mark.parametrize(("kind", "suffix"), HOSTILE)
def test_code_in_a_file_never_runs(
    kind: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, with its child process."""
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "marker"
    hostile(kind, path, marker)
    assert main([str(path), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and "Traceback" not in said, said
    assert "refused" in said or "NumPy" in said or "not a whole" in said, said
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    if kind in ("zip", "trainer"):  # the test itself can fail: the code would have run
        torch.load(path, weights_only=False)
        assert marker.exists()


def forge(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FORGED: dict[str, tuple[Any, int, int | None, str]] = {
    "past the end": ({"a": tensor([4], 0, 16)}, 8, None, "take 16 bytes, the file holds 8"),
    "overlap": ({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}, 24, None, "'b' begins at byte 8"),
    "hole": ({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, 12, None, "'b' begins at byte 8"),
    "surplus data": ({"a": tensor([1], 0, 4)}, 8, None, "take 4 bytes, the file holds 8"),
    "huge header": (b"{}", 0, 8 << 30, "its header claims"),
    "header over the limit": (b"{" + b" " * (33 << 20), 0, None, "its header claims"),
    "shape overflow": ({"a": tensor([1 << 40, 1 << 40], 0, 4)}, 4, None, "does not take 4 bytes"),
    "shape overflow beside 0": ({"a": tensor([0, 1 << 70], 0, 0)}, 0, None, "sizes that no tensor has"),
    "negative": ({"a": tensor([-1, -1], 0, 4)}, 4, None, "no count"),
    "negative offset": ({"a": tensor([1], -4, 0)}, 0, None, "no count"),
    "no number": ({"a": tensor([True], 0, 4)}, 4, None, "no count"),
    "type": ({"a": tensor([1], 0, 4, "OBJ")}, 4, None, "type 'OBJ'"),
    "type no text": ({"a": tensor([1], 0, 4, ["F32"])}, 4, None, "not a whole safetensors file"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}',
        0,
        None,
        "names a tensor twice",
    ),
    "deep": (b'{"a":' + b"[" * 100_000, 0, None, "not a whole safetensors file"),
    "no list": (b'{"a":{}}', 0, None, "not a whole safetensors file"),
    "text cut": (b'{"a":{"dtype"', 0, None, "not a whole safetensors file"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_safetensors(kind: str, tmp_path: Path) -> None:
    header, data, length, said = FORGED[kind]
    path = forge(tmp_path / "forged.safetensors", header, b"\0" * data, length=length)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        convert(path, tmp_path / "out")
    assert str(error.value).startswith(f"{path}: ") and not (tmp_path / "out").exists()


def test_names_in_a_file_do_not_reach_the_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None
) -> None:
    path, name = tmp_path / "a.pth", "\x1b]0;title\x07"
    torch.save({"emb.weight": torch.zeros(2, 2), name: 1}, path)
    assert main([str(path), "--to", str(tmp_path / "out"), "--as-is"]) == 0
    torch.save({"emb.weight": torch.zeros(2, 2), name: torch.zeros(2).to_sparse()}, path)
    assert main([str(path), "--to", str(tmp_path / "other")]) == 2
    said = "".join(capsys.readouterr())
    assert said.count("?]0;title?") == 2 and "\x1b" not in said


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    for words in (["--to", "b", "--lm-only"], ["--to-pth", "b", "--as-is"]):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "a.pth"), *words])


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_cut_files(suffix: str, keep: float, tmp_path: Path, here: None) -> None:
    path = tmp_path / f"cut{suffix}"
    state = language_model("rwkv6").state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"^{path}: not a whole"):
        convert(path, tmp_path / "out")


def test_archives_that_torch_never_writes(tmp_path: Path, here: None) -> None:
    import zipfile

    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
        with zipfile.ZipFile(tmp_path / "program.pt", "w") as program:
            program.writestr("archive/code/__torch__.py", "")
    torch.save({"a": torch.zeros(1).expand(1 << 30)}, tmp_path / "swollen.pth")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"_strategy": "cpu fp32", "emb.weight": torch.zeros(2)}, tmp_path / "strategy.pth")
    said = {
        "packed.pth": "never does",
        "program.pt": "TorchScript",
        "swollen.pth": "claim 4,294,967,296 bytes",
        "sparse.pth": "only plain ones",
        "list.pth": "holds a list",
        "strategy.pth": "give the original",
    }
    for name, words in said.items():
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: .*{words}"):
            convert(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"GGUF\x03\0\0\0", "GGUF"),
    (b"", "holds no weights"),
    (b"hello", "holds no weights"),
])  # fmt: skip
def test_files_that_are_no_weights(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: .*{said}"):
        convert(path, tmp_path / "out")


def test_the_child_is_stopped_after_its_time(tmp_path: Path) -> None:
    torch.save(language_model("rwkv4").state_dict(), tmp_path / "slow.pth")
    with pytest.raises(ValueError, match=r"slow\.pth: not converted within 1 s; --time-limit"):
        convert(tmp_path / "slow.pth", tmp_path / "out", seconds=1)
    assert [p.name for p in tmp_path.iterdir()] == ["slow.pth"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_file_that_asks_for_memory_it_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "swollen.pth"
    torch.save({"a": torch.zeros(1_000_003)}, path, _use_new_zipfile_serialization=False)
    sizes = [b"J" + n.to_bytes(4, "little") for n in (1_000_003, (1 << 31) - 1)]  # 4 MB say they are 8 GiB
    path.write_bytes(path.read_bytes().replace(*sizes))
    with pytest.raises(ValueError, match=f"^{path}: needs more memory than a file of its size"):
        convert(path, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_the_childs_limits(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "small").write_bytes(b"0" * 1000)
    script = (
        "import sys, resource; from pathlib import Path; from toolkit.convert import child\n"
        "child.limit(Path(sys.argv[1]), 7)\n"
        "print(resource.getrlimit(resource.RLIMIT_CPU)[0], resource.getrlimit(resource.RLIMIT_CORE)[0])\n"
        "for act in (lambda: bytearray(5 << 30), lambda: open(sys.argv[2], 'wb').write(bytes(80 << 20))):\n"
        "    try: act(); print('went through')\n"
        "    except (MemoryError, OSError) as error: print(type(error).__name__)\n"
    )
    script = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + script
    command = [sys.executable, "-c", script, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=GOLDEN.parent.parent)
    assert done.stdout.split() == ["7", "0", "MemoryError", "OSError"]
