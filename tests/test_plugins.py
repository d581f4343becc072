"""Components from outside: a module in the working directory, with recipes of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compositions import one, registry
from toolkit import register
from toolkit.explain import BadRecipe

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the examples as working directory; modules imported from it are forgotten after."""
    import sys

    folder = tmp_path / "project"
    shutil.copytree(EXAMPLES, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    before = set(sys.modules)
    with registry():
        yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_example_is_short_and_touches_no_toolkit_file() -> None:
    assert len((EXAMPLES / "diagonal_scan.py").read_text().splitlines()) <= 15


def test_a_plugin_and_a_recipe_beside_it(elsewhere: Path) -> None:
    config = one("plugins=[diagonal_scan]", "recipe=diagonal")
    assert config["scan"] == {"name": "diagonal", "reverse": True}
    assert config["plugins"] == ["diagonal_scan"]
    order = register.bind("scan", config["scan"])(1, 2, 3)[0]
    assert order == [5, 4, 2, 3, 1, 0]


def test_without_the_plugin_the_message_names_the_flag(elsewhere: Path) -> None:
    with pytest.raises(BadRecipe) as error:
        one("recipe=diagonal")
    text = error.value.message()
    assert (
        "recipes/diagonal.yaml:5: scan: no scan named 'diagonal'" in text and "plugins=[its_module]" in text
    )


def test_a_plugin_that_fails_is_named_with_its_last_line(elsewhere: Path) -> None:
    (elsewhere / "broken_plugin.py").write_text("x = 1\nimport no_such_thing_at_all\n")
    with pytest.raises(BadRecipe) as error:
        one("plugins=[broken_plugin]")
    text = error.value.message()
    assert "plug-in 'broken_plugin' failed to import" in text
    assert "broken_plugin.py:2: ModuleNotFoundError: No module named 'no_such_thing_at_all'" in text


def test_a_plugin_that_is_not_there(elsewhere: Path) -> None:
    with pytest.raises(BadRecipe, match="no module 'diagonal_scna' on the import path"):
        one("plugins=[diagonal_scna]")


def test_a_recipe_cannot_import(elsewhere: Path) -> None:
    (elsewhere / "recipes/evil.yaml").write_text("# Evil.\nplugins: [diagonal_scan]\n")
    with pytest.raises(BadRecipe) as error:
        one("recipe=evil")
    text = error.value.message()
    assert "recipes/evil.yaml:2: plugins: a recipe cannot import code" in text
    assert "plugins=[diagonal_scan] on the command line" in text


def test_recipe_folders_from_the_environment(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/mine.yaml").write_text("# Mine.\ntitle: mine\n")
    monkeypatch.setenv("TOOLKIT_RECIPES", str(tmp_path / "more"))
    assert one("recipe=mine")["title"] == "mine"


def test_a_name_in_two_folders_is_refused(elsewhere: Path) -> None:
    (elsewhere / "recipes/quickstart.yaml").write_text("# Mine.\ntitle: mine\n")
    with pytest.raises(BadRecipe, match="stands in two folders"):
        one("recipe=quickstart")


def test_an_entry_point_is_found(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("diagonal", "diagonal_scan", register.ENTRY_POINTS)
    monkeypatch.setattr(register, "entry_points", lambda group: [point])
    assert one("scan=diagonal")["scan"]["name"] == "diagonal"
