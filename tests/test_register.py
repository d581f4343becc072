"""Registering: the signature is the contract, and what breaks it says how to mend it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from tests.compositions import registry
from toolkit import register
from toolkit.register import Choices, Nested, Range

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _clean() -> Any:
    with registry():
        yield


def _scan(name: str = "t") -> Any:
    @register.scan(name)
    def scan(n_layer: int, height: int, width: int, *, twist: Annotated[int, Range(1)] = 2) -> Any:
        """Twists. And more."""
        return [[twist]] * n_layer

    return scan


def test_signature_becomes_the_schema() -> None:
    _scan()
    found = register.components("scan")["t"]
    assert found.summary == "Twists."
    assert found.parameters["twist"].type is int and found.parameters["twist"].constraints == (Range(1),)
    assert Path(found.file) == Path(__file__)


def test_bind_fills_the_recipe_part_only() -> None:
    _scan()
    assert register.bind("scan", {"name": "t", "twist": 5})(2, 1, 1) == [[5], [5]]


def test_bind_hands_nested_nodes_over_as_factories() -> None:
    @register.encoder("inner")
    def inner(*, n: int = 1) -> Any:
        """Inner."""
        return n

    @register.encoder("outer")
    def outer(*, members: Annotated[list[dict[str, Any]], Nested("encoder")]) -> Any:
        """Outer."""
        return [member() for member in members]  # type: ignore[operator]

    node = {"name": "outer", "members": [{"name": "inner", "n": 3}, {"name": "inner"}]}
    assert register.bind("encoder", node)() == [3, 1]


def test_literal_becomes_choices() -> None:
    assert register.split_annotation(Literal["a", "b"]) == (str, (Choices("a", "b"),))


def _wrong_wiring() -> Any:
    def scan(n_layer: int, width: int) -> Any:
        """Wrong."""

    return scan


def _no_docstring() -> Any:
    def scan(n_layer: int, height: int, width: int) -> Any: ...

    return scan


def _no_annotation() -> Any:
    def scan(n_layer: int, height: int, width: int, *, a=1) -> Any:  # type: ignore[no-untyped-def]
        """Wrong."""

    return scan


def _unholdable() -> Any:
    def scan(n_layer: int, height: int, width: int, *, a: set[int] = frozenset()) -> Any:  # type: ignore[assignment]
        """Wrong."""

    return scan


def _star() -> Any:
    def scan(n_layer: int, height: int, width: int, **rest: int) -> Any:
        """Wrong."""

    return scan


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (_wrong_wiring, "a scan takes ('n_layer', 'height', 'width')"),
        (_no_docstring, "docstring sentence is required"),
        (_no_annotation, "'a' needs a type annotation"),
        (_unholdable, "which a recipe cannot hold"),
        (_star, "*args and **kwargs are not allowed"),
    ],
)
def test_a_broken_contract_is_refused_with_its_place(make: Any, fragment: str) -> None:
    with pytest.raises(TypeError) as error:
        register.scan("broken")(make())
    assert fragment in str(error.value) and f"{Path(__file__).name}:" in str(error.value)
    assert "broken" not in register.components("scan")


def test_a_taken_name_names_both_places() -> None:
    _scan()

    def other(n_layer: int, height: int, width: int) -> Any:
        """Another of this name, in this same file."""

    with pytest.raises(
        KeyError, match=r"registered twice: .*test_register.py:\d+ and .*test_register.py:\d+"
    ):
        register.scan("t")(other)


def test_registering_the_same_function_again_is_no_error() -> None:
    _scan()
    _scan()


@pytest.mark.parametrize("package", ["data", "kernels", "components"])
@pytest.mark.parametrize("form", ["module", "package"])
def test_a_stranger_in_place_of_our_package_is_named(tmp_path: Path, package: str, form: str) -> None:
    where = tmp_path / f"{package}.py" if form == "module" else tmp_path / package / "__init__.py"
    where.parent.mkdir(exist_ok=True)
    where.write_text("raise SystemExit('imported the stranger')")
    code = "from toolkit import register\ntry: register.discover()\nexcept ImportError as e: print(e)"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert str(where) in done.stdout and str(ROOT / package) in done.stdout, done.stderr
    assert "imported the stranger" not in done.stderr
