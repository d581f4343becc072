"""The catalogue: registered, light to import, and the `shards` source."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data import sources
from tests.data.helpers import shard_folder
from toolkit import register

NAMES = {"easy_vqa", "llava", "shards", "scenes", "sort_of_clevr"}


def test_sources_are_registered():
    assert set(register.components("data")) >= NAMES
    assert register.components("data")["llava"].parameters["images"].required


def test_the_catalogue_imports_nothing_heavy():
    code = (
        "import sys, data.sources; heavy = "
        "{'torch', 'numpy', 'PIL', 'safetensors', 'webdataset', 'easy_vqa'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_implementing_modules_do_not_hide_the_factories(tmp_path):
    """A submodule of the same name would replace the function in the package."""

    assert all(callable(getattr(sources, name)) for name in NAMES)


def test_shards_gives_folders_as_they_are(tmp_path):
    folder = shard_folder(tmp_path / "s")
    bound = register.bind("data", {"name": "shards", "train": str(folder)})
    assert bound(tmp_path / "cache") == {"train": folder}
    with pytest.raises(ValueError, match=r"is no shard folder: it has no manifest.json"):
        sources.shards(tmp_path / "cache", train=str(folder), test=str(tmp_path))
