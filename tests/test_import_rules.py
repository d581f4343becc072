"""Who may import whom, what may be imported at a module's top, and what may never be called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("toolkit", "components", "kernels", "data")
FILES = sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py"))
LEAVES = {"toolkit.contracts", "toolkit.parameters", "toolkit.register", "toolkit.weights", "toolkit.naming"}
UNPICKLERS = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
HEAVY = {"torch", "torchvision", "timm", "open_clip", "lightning", "webdataset", "PIL", "numpy", "triton"}
CATALOGUES = [
    *(ROOT / "components").glob("*/__init__.py"),
    ROOT / "components/__init__.py",
    ROOT / "components/scans.py",
    ROOT / "components/prompts.py",
    ROOT / "data/sources/__init__.py",
]
BEFORE_TORCH = [
    *("__init__", "contracts", "parameters", "register", "schema", "recipes", "lines", "explain"),
    *("layers", "specs", "values", "check", "rules", "compose", "run", "listing", "weights", "naming"),
]
LIGHT = [*CATALOGUES, *(ROOT / f"toolkit/{name}.py" for name in BEFORE_TORCH)]


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _walk(node: ast.AST, *, top_only: bool) -> Iterator[ast.AST]:
    """Nodes that run; `top_only` leaves out function bodies. Typing-only imports never run."""
    for child in ast.iter_child_nodes(node):
        if _typing_only(child) or (top_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
            continue
        yield child
        yield from _walk(child, top_only=top_only)


def imported(source: str, *, top_only: bool = False) -> set[str]:
    """Dotted names of the modules that a source imports; `from toolkit import x` counts as toolkit.x."""
    found: set[str] = set()
    for node in _walk(ast.parse(source), top_only=top_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module in PACKAGES
            found |= {f"{node.module}.{a.name}" for a in node.names} if inside else {node.module}
    return found


def _unpickling(node: ast.AST) -> list[str]:
    """Uses of modules that rebuild objects from bytes; naming the error torch.load raises is none."""
    if isinstance(node, ast.Import):
        names = [a.asname or a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        return [name for name in names if name != "pickle"]
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
        return [a.name for a in node.names if a.name != "UnpicklingError"]
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
        return [node.attr] if node.attr != "UnpicklingError" else []
    return []


def forbidden(source: str) -> list[str]:
    """Calls that run text or bytes as code, or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        found += _unpickling(node)
        if not isinstance(node, ast.Call):
            continue
        called, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append(called)
        if called.endswith("utils.instantiate") or called == "instantiate":
            found.append(called)
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(called)
        if words.get("shell", "False") != "False":
            found.append(f"{called}(shell=True)")
        if called == "torch.load" and words.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
    return found


def allowed(module: str, name: str) -> bool:
    """Whether one of our modules may import another."""
    package, target = module.split(".")[0], name.split(".")[0]
    if target not in PACKAGES:
        return True
    if package == "kernels":
        return target == "kernels"
    if module in LEAVES:
        return name in LEAVES
    if package in ("components", "data"):
        return target in (package, "kernels") or any(
            name == leaf or name.startswith(f"{leaf}.") for leaf in LEAVES
        )
    return target != "components" or module == "toolkit.register"


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_follow_the_layers(file: Path) -> None:
    refused = [n for n in imported(file.read_text()) if not allowed(_name(file), n)]
    assert refused == []


@pytest.mark.parametrize("file", LIGHT, ids=_name)
def test_nothing_heavy_at_the_top_of_what_runs_before_validation(file: Path) -> None:
    names = {name.split(".")[0] for name in imported(file.read_text(), top_only=True)}
    assert not names & HEAVY


def test_pickles_are_read_in_two_places() -> None:
    """In the converter's child process, and where the bytes are known by their hash."""
    found = {_name(file) for file in FILES if "torch.load(" in file.read_text()}
    assert found == {"toolkit.convert.source", "components.encoders.lite0_tower"}


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_nothing_runs_text_as_code(file: Path) -> None:
    assert forbidden(file.read_text()) == []


def test_recipes_and_examples_are_not_packages() -> None:
    assert not list((ROOT / "recipes").rglob("*.py")) and not list((ROOT / "examples").rglob("__init__.py"))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("eval('1')", 1),
        ("import pickle; pickle.loads(b)", 1),
        ("import pickle as p", 1),
        ("import pickle; pickle.UnpicklingError", 0),
        ("from pickle import loads", 1),
        ("from pickle import UnpicklingError", 0),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=True)", 0),
        ("subprocess.run('ls', shell=True)", 1),
        ("hydra.utils.instantiate(cfg)", 1),
        ("yaml.load(text)", 1),
        ("yaml.safe_load(text); model.eval(); re.compile('a')", 0),
    ],
)
def test_the_rules_can_fail(source: str, count: int) -> None:
    assert len(forbidden(source)) == count


def test_the_layers_can_fail() -> None:
    assert imported("if TYPE_CHECKING:\n    import torch\nfrom toolkit import register") == {
        "toolkit.register"
    }
    assert imported("def f():\n    import torch", top_only=True) == set()
    assert not allowed("kernels.scan", "toolkit.register")
    assert not allowed("components.scans", "toolkit.model")
    assert not allowed("toolkit.model", "components.scans")
    assert not allowed("toolkit.register", "toolkit.schema")
    assert allowed("data.tokens", "toolkit.contracts")
