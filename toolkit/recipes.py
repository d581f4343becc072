"""Finds recipes and scales and mounts them as Hydra's groups: a path is a name on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from toolkit.explain import closest, fail

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf"
SCALES = CONF / "scale"

CHOSEN: ContextVar[Mapping[str, str]] = ContextVar("CHOSEN", default={})  # noqa: B039
"""Kind -> component of the run that is being composed."""


def suited(values: Mapping[str, Any], own: Mapping[str, str], chosen: Mapping[str, str]) -> dict[str, Any]:
    """The values of a scale without those of components that it chose and that something else replaced.

    A scale's grid of 5 x 5 is one of its own data set; `data=easy_vqa` drops it with that data set.
    """
    gone = {kind for kind, option in own.items() if chosen.get(kind, option) != option}
    return {key: value for key, value in values.items() if key not in gone}


def folders() -> list[Path]:
    """Recipe folders: ours (checkout or wheel), `./recipes`, then those of TOOLKIT_RECIPES (`:` between)."""
    ours = _HERE / "recipes" if (_HERE / "recipes").is_dir() else _HERE.parent / "recipes"
    named = [Path(part) for part in os.environ.get("TOOLKIT_RECIPES", "").split(os.pathsep) if part]
    for folder in named:
        if not folder.is_dir():
            raise fail("TOOLKIT_RECIPES", "", f"no folder {str(folder)!r}", fix="name folders that exist")
    found = [ours, Path("recipes"), *named]
    return list(dict.fromkeys(folder.resolve() for folder in found if folder.is_dir()))


def names() -> dict[str, list[Path]]:
    """Every recipe name and the files that carry it (more than one: ambiguous)."""
    found: dict[str, list[Path]] = {}
    for folder in folders():
        for file in sorted(folder.rglob("*.yaml")):
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    return found


def path_of(name: str, *, place: str, fix: str) -> Path:
    """The file of a recipe. Raises BadRecipe for an unknown or an ambiguous name."""
    found = names()
    files = found.get(name.removesuffix(".yaml"), [])
    if len(files) == 1:
        return files[0]
    if files:
        raise fail(
            place, "recipe", f"{name!r} stands in two folders: {files[0]} and {files[1]}", fix="rename one"
        )
    near = closest(name, found)
    raise fail(
        place,
        "recipe",
        f"no recipe {name!r}",
        matches=near,
        fix=fix.format(near[0] if near else "quickstart") + "; `python -m toolkit.listing recipe` lists all",
    )


def header(path: Path) -> list[str]:
    """The comment lines a recipe or scale file opens with, without `#` and without `@package`."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# ").rstrip())
    return lines


class RecipeSource(ConfigSource):
    """`recipes://FOLDER`: FOLDER/a/b.yaml is option `a/b` of group `recipe`, package `_global_`."""

    group = "recipe"

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def _place(self, config_path: str) -> Path | None:
        """The path under the folder that a config path names, None outside the group."""
        head, _, rest = config_path.strip("/").partition("/")
        return Path(self.path) / rest if head == self.group else None

    def _file(self, config_path: str) -> Path | None:
        return self._place(self._normalize_file_name(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if file is None or not file.is_file():
            raise ConfigLoadError(f"no {self.group} {config_path!r} in {self.path}")
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.load(file),
            header={"package": "_global_"},
        )

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        place = self._place(config_path)
        return config_path == "" or (place is not None and place.is_dir())

    def is_config(self, config_path: str) -> bool:
        file = self._file(config_path)
        return file is not None and file.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [self.group] if results_filter in (None, ObjectType.GROUP) else []
        return sorted(set(self._children(config_path, results_filter)))

    def _children(self, config_path: str, results_filter: ObjectType | None) -> Iterator[str]:
        place = self._place(config_path)
        for child in place.iterdir() if place is not None and place.is_dir() else ():
            if child.is_dir() and results_filter in (None, ObjectType.GROUP):
                yield child.name
            if child.suffix == ".yaml" and results_filter in (None, ObjectType.CONFIG):
                yield child.stem


class ScaleSource(RecipeSource):
    """`scales://FOLDER`: the group `scale`, each file without values that do not suit CHOSEN."""

    group = "scale"

    @staticmethod
    def scheme() -> str:
        return "scales"

    def load_config(self, config_path: str) -> ConfigResult:
        found = super().load_config(config_path)
        values: Any = OmegaConf.to_container(found.config)
        entries = [entry for entry in values.get("defaults", ()) if isinstance(entry, dict)]
        own = {key.rpartition("/")[2]: str(option) for entry in entries for key, option in entry.items()}
        found.config = OmegaConf.create(suited(values, own, CHOSEN.get()))
        return found


class RecipePath(SearchPathPlugin):
    """Puts our scales and every recipe folder on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("scales", f"{ScaleSource.scheme()}://{SCALES}")
        for folder in folders():
            search_path.append("recipes", f"{RecipeSource.scheme()}://{folder}")


@cache
def mount() -> None:
    """Makes Hydra know recipe folders; once per process."""
    for plugin in (RecipeSource, ScaleSource, RecipePath):
        Plugins.instance().register(plugin)
