"""Hostile files in one child process: each refused, memory stays small, nothing is unpacked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .faulty import bomb
from .helpers import picture
from .test_foreign import TEXT, deep, header, llava, tar

ROOT = Path(__file__).parents[2]

_CHILD = """
import json, resource, sys
from pathlib import Path
from data.foreign import index_shards, members
from data.images import decode
from data.sources.from_llava import Checks, convert

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10

folder, said = Path(sys.argv[1]), {}
decode((folder / "fine.png").read_bytes(), "x")
before = peak()
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for shard in sorted(folder.glob("*.tar")):
    try:
        said[shard.stem] = [f.cause for f in index_shards([shard], folder / "out", full=True)]
    except ValueError as error:
        said[shard.stem] = [str(error)]
for file in sorted(folder.glob("*.json")):
    checks = Checks(folder, 0, False, True, several=True)
    try:
        convert(file, folder / "out" / file.stem, checks)
        said[file.stem] = []
    except ValueError as error:
        said[file.stem] = [str(error)]
print(json.dumps({"said": said, "peak": peak() - before}))
"""

GOOD = [("0.png", picture(0)), ("0.json", llava(0))]


def sparse(path: Path) -> Path:
    """A member of 8 GiB that is really there, as a hole."""
    path.write_bytes(header("100000000000", "1.jpg"))
    with path.open("r+b") as file:
        file.truncate(512 + (8 << 30))
        file.seek(512 + (8 << 30))
        text = llava(1)
        file.write(header(f"{len(text):011o}", "1.json") + text + bytes(-len(text) % 512 + 1024))
    return path


def hostile(folder: Path) -> dict[str, str]:
    """Writes the files; name -> what must be said of it."""
    flat = b"\xff\xd8\xff\xe0" + b"\0" * 100
    tars = {
        "bomb_pixels": ([("1.png", bomb()), TEXT], "at most 64,000,000 are decoded"),
        "bomb_named_jpg": ([("1.jpg", bomb()), TEXT], "at most 64,000,000 are decoded"),
        "truncated": (
            [("1.jpg", picture(1, kind="JPEG", size=(300, 300))[:2000]), TEXT],
            "cannot be decoded",
        ),
        "no_jpeg": ([("1.jpg", flat), TEXT], "the picture"),
        "gif": ([("1.jpg", picture(1, kind="GIF")), TEXT], "no JPEG, PNG or WebP"),
        "ico": ([("1.png", picture(1, kind="ICO")), TEXT], "no JPEG, PNG or WebP"),
        "tiff": ([("1.webp", picture(1, kind="TIFF")), TEXT], "no JPEG, PNG or WebP"),
        "upwards": ([("../../1.png", picture(1)), TEXT], "leads out of the folder"),
        "absolute": ([("/tmp/1.png", picture(1)), TEXT], "leads out of the folder"),
        "twice": ([("1.png", picture(1)), ("1.png", picture(2)), TEXT], "comes twice"),
        "huge_json": ([("1.png", picture(1)), ("1.json", b"[" + b" " * (64 << 20))], "1,048,576 are read"),
        "deep_json": ([("1.png", picture(1)), ("1.json", deep(100_000))], "not valid JSON"),
        "nan": ([("1.png", picture(1)), ("1.json", llava(1, w=float("nan")))], "NaN is no JSON number"),
        "code": (
            [("1.pyd", b"import os"), ("1.png", picture(1)), ("1.pth", b"x")],
            "a picture without a text",
        ),
    }
    for name, (files, _) in tars.items():
        tar(folder / f"{name}.tar", [*GOOD, *files])
    (folder / "many.tar").write_bytes(header("0", "1.json") * 20_000 + bytes(1024))
    (folder / "declared.tar").write_bytes(header("100000000000") + bytes(1024))
    sparse(folder / "hole.tar")
    (folder / "fine.png").write_bytes(picture(1))
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "pixels.json").write_text(json.dumps([{**json.loads(llava(1)), "image": "bomb.png"}]))
    (folder / "bomb.png").write_bytes(bomb())
    more = {"many": "", "declared": "the file was cut in this member", "hole": "134,217,728 are read"}
    more |= {"deep": "not valid JSON", "pixels": "at most 64,000,000 are decoded"}
    return {name: cause for name, (_, cause) in tars.items()} | more


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_hostile_files_are_refused_in_little_memory(tmp_path):
    expected = hostile(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout)
    assert set(found["said"]) == set(expected)
    for name, cause in expected.items():
        assert found["said"][name], name
        assert any(cause in said for said in found["said"][name]), (name, found["said"][name][:3])
    assert len(found["said"]["many"]) <= 1_001
    assert found["peak"] <= 256
    assert not list((tmp_path / "out").rglob("manifest.json")) and not (tmp_path.parent / "1.png").exists()
