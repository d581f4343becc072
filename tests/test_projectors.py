"""Every registered projector: shapes, formulas, checkpoint keys, and the pooling they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from components.projectors.pool import pool, pooled_grid
from toolkit import register
from toolkit.contracts import ImageFeatures

# One or more recipes per registered projector, with the exact names and shapes of its tensors
# for d_in = 6, d_out = 4 (those of released checkpoints below `proj.`, except mlp's).
RECIPES: list[tuple[str, dict[str, Any], dict[str, list[int]]]] = [
    ("linear", {}, {"weight": [4, 6]}),
    ("mlp", {}, {"fc1.weight": [4, 6], "fc1.bias": [4], "fc2.weight": [4, 4], "fc2.bias": [4]}),
    ("gated", {"form": "hd"}, {"proj.weight": [4, 6], "gate.weight": [4, 4], "o_proj.weight": [4, 4]}),
    (
        "gated",
        {"form": "v7"},
        {"gate.weight": [6, 6], "o_proj.weight": [4, 6], "ln_v.weight": [4], "ln_v.bias": [4]},
    ),
]
CASES = [pytest.param(*r, id="-".join([r[0], *r[1].values()])) for r in RECIPES]


def build(
    name: str, recipe: dict[str, Any], grid: tuple[int, int] = (4, 4), d_in: int = 6, d_out: int = 4
) -> Any:
    torch.manual_seed(0)
    return register.bind("projector", {"name": name, **recipe})(d_in, d_out, grid)


def features(grid: tuple[int, int] = (4, 4), extra: int = 1, width: int = 6) -> ImageFeatures:
    torch.manual_seed(1)
    return ImageFeatures(torch.randn(2, grid[0] * grid[1], width), torch.randn(2, extra, width), grid)


def by_formula(
    name: str, recipe: dict[str, Any], w: dict[str, torch.Tensor], f: torch.Tensor
) -> torch.Tensor:
    if name == "linear":
        return f @ w["weight"].T
    if name == "mlp":
        return F.gelu(f @ w["fc1.weight"].T + w["fc1.bias"]) @ w["fc2.weight"].T + w["fc2.bias"]
    if recipe["form"] == "hd":
        p = f @ w["proj.weight"].T
        return (torch.sigmoid(p @ w["gate.weight"].T) * p) @ w["o_proj.weight"].T
    y = (torch.sigmoid(f @ w["gate.weight"].T) * f) @ w["o_proj.weight"].T
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return y * w["ln_v.weight"] + w["ln_v.bias"]


def test_every_projector_is_tested() -> None:
    assert {name for name, _, _ in RECIPES} == set(register.components("projector"))


@pytest.mark.parametrize(("name", "recipe", "shapes"), CASES)
def test_formula_and_keys(name: str, recipe: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    projector = build(name, recipe)
    state = projector.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == shapes
    for tensor in state.values():  # away from the initial ones and zeros of a norm
        tensor.add_(0.1 * torch.randn_like(tensor))
    given = features()
    found = projector(given)
    assert found.grid == projector.grid == (4, 4)
    torch.testing.assert_close(found.patches, by_formula(name, recipe, state, given.patches))
    torch.testing.assert_close(found.extra, by_formula(name, recipe, state, given.extra))


@pytest.mark.parametrize(("name", "recipe", "shapes"), CASES)
def test_pools_before_projecting(name: str, recipe: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    projector = build(name, {**recipe, "tokens": 4})
    given = features()
    found = projector(given)
    assert found.grid == projector.grid == (2, 2)
    for row in range(2):
        for column in range(2):
            cells = [4 * (2 * row + dy) + 2 * column + dx for dy in range(2) for dx in range(2)]
            mean = given.patches[:, cells].mean(1)
            expected = by_formula(name, recipe, projector.state_dict(), mean)
            torch.testing.assert_close(found.patches[:, 2 * row + column], expected)
    torch.testing.assert_close(found.extra, by_formula(name, recipe, projector.state_dict(), given.extra))


@pytest.mark.parametrize(("name", "recipe", "shapes"), CASES)
def test_class_token_alone(name: str, recipe: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    projector = build(name, {**recipe, "tokens": 0})
    found = projector(features())
    assert projector.grid == found.grid == (0, 0)
    assert found.patches.shape == (2, 0, 4) and found.extra.shape == (2, 1, 4)
    with pytest.raises(ValueError, match=r"projector\.tokens: 0 .*class token"):
        projector(features(extra=0))


@pytest.mark.parametrize(("name", "recipe", "shapes"), CASES)
def test_no_extra_tokens_learning_and_meta(
    name: str, recipe: dict[str, Any], shapes: dict[str, list[int]]
) -> None:
    projector = build(name, recipe)
    found = projector(features(extra=0))
    assert found.extra.shape == (2, 0, 4)
    (found.patches * torch.randn_like(found.patches)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
    with torch.device("meta"):
        ghost = build(name, recipe, d_in=1024, d_out=2048)
    assert all(p.is_meta for p in ghost.parameters())


def test_linear_starts_as_the_framework_does() -> None:
    torch.manual_seed(0)
    reference = torch.nn.Linear(6, 4, bias=False)
    assert torch.equal(build("linear", {}).weight, reference.weight)


@pytest.mark.parametrize(("tokens", "total"), [
    (-1, 577), (576, 577), (144, 145), (64, 65), (36, 37), (16, 17), (9, 10), (4, 5), (1, 2), (0, 1),
])  # fmt: skip
def test_the_papers_token_counts(tokens: int, total: int) -> None:
    """Table 9 of the paper: 24 x 24 patches pooled, and the class token after them."""
    projector = build("linear", {"tokens": tokens}, grid=(24, 24))
    found = projector(features((24, 24)))
    assert found.patches.shape[1] + found.extra.shape[1] == total
    assert found.patches.shape[1] == projector.grid[0] * projector.grid[1]


@pytest.mark.parametrize("tokens", [2, 25, 100, 625, 900])
def test_counts_that_do_not_divide(tokens: int) -> None:
    with pytest.raises(
        ValueError, match=rf"projector\.tokens: {tokens} .*24 x 24 .*1, 4, 9, 16, 36, 64, 144, 576"
    ):
        build("linear", {"tokens": tokens}, grid=(24, 24))


def test_pooling_an_oblong_grid() -> None:
    assert pooled_grid((4, 8), 16) == (4, 4)
    with pytest.raises(ValueError, match="use 1, 4, 16"):
        pooled_grid((4, 8), 9)
    given = features((4, 8))
    found = pool(given, (2, 2)).patches
    maps = given.patches.transpose(1, 2).reshape(2, 6, 4, 8)
    torch.testing.assert_close(found[:, 1], maps[:, :, :2, 4:].mean((2, 3)))
    assert pool(given, (4, 8)) is given


def test_another_grid_than_built_for() -> None:
    with pytest.raises(ValueError, match="built for a 4 x 4 grid, got features on 2 x 2"):
        build("linear", {})(features((2, 2)))
