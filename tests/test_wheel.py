"""The wheel holds what a checkout holds: it composes a recipe from an unrelated directory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("toolkit", "components", "kernels", "data", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", source)
    for name in ("README.md", "LICENSE"):
        (source / name).write_text((ROOT / name).read_text() if (ROOT / name).exists() else "")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    command = [*pip, "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_holds_code_recipes_and_configs_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"toolkit", "components", "kernels", "data"}
    ours = {p.relative_to(ROOT / "recipes").as_posix() for p in (ROOT / "recipes").rglob("*.yaml")}
    assert ours == {n.removeprefix("toolkit/recipes/") for n in names if n.startswith("toolkit/recipes/")}
    assert {"toolkit/conf/run.yaml", "toolkit/conf/scale/tiny.yaml"} <= set(names)


def test_composes_from_an_unrelated_directory(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    work = tmp_path / "work"
    work.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "toolkit.run", "recipe=ablation/scan_bi", "--cfg", "job"]
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "title: RWKV-5, bidirectional scan" in done.stdout
    assert list(work.iterdir()) == []
    command = [sys.executable, "-c", "import toolkit, data; print(toolkit.__file__, data.__file__)"]
    found = subprocess.run(
        command, env=env, cwd=work, capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(Path(path).is_relative_to(site) for path in found)
