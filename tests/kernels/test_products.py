"""The products of one token: equal to products one by one, on every backend, whatever the batch."""

from __future__ import annotations

import pytest
import torch

from kernels.products import Product, products_step

from .test_step import TRITON, Target, close, given, gpu, targets

MANY = 65  # one more than the kernel takes: the matrix library's part
OUTS = (20, 33, 7, 64)
AFTER = ("", "relu2", "tanh", "")


def wanted(x64: torch.Tensor, one: Product, weight64: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In float64, rounded to the output's type before what follows, as it is where a layer follows."""
    y = x64[one.row] @ (weight64 if one.turned else weight64.t())
    y = y.to(dtype).double()
    return {"": y, "tanh": y.tanh(), "relu2": y.relu().square()}[one.then]


@targets
@pytest.mark.parametrize(("count", "turned"), [(0, True), (1, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize(("batch", "width"), [(1, 80), (3, 600), (9, 300), (17, 64), (40, 272), (MANY, 48)])
def test_each_product_is_its_own(batch: int, width: int, count: int, turned: bool, target: Target) -> None:
    torch.manual_seed(5)
    x, x64 = given(target, torch.randn(4, batch, width))
    scale = width**-0.5
    weights = [given(target, scale * torch.randn(out, width)) for out in OUTS[:count]]
    products = [Product((3 * i + 1) % 4, w, then=AFTER[i]) for i, (w, _) in enumerate(weights)]
    if turned:
        weights.append(given(target, scale * torch.randn(width, 21)))
        products.insert(count // 2, Product(2, weights[-1][0], turned=True, then="tanh"))
        weights.insert(count // 2, weights.pop())
    found = products_step(x, products, backend=target.backend)
    for y, one, (_, weight64) in zip(found, products, weights, strict=True):
        assert y.dtype == target.dtype
        # A sum that lies between two numbers of the type may be rounded either way.
        close(y, wanted(x64, one, weight64, target.dtype), 2 * target.near)


# In 16-bit types a sample alone and in a batch of four or more go different ways, each with its own order.
BATCHES = {torch.float32: ((3, 1), (5, 1), (7, 5)), None: ((3, 1), (7, 5))}


@pytest.mark.parametrize(
    ("target", "batch", "fewer"),
    [
        pytest.param(target, *sizes, marks=gpu, id=f"triton-{target.dtype}-{sizes}")
        for target in TRITON
        for sizes in BATCHES.get(target.dtype, BATCHES[None])
    ],
)
def test_the_bits_of_a_sample_do_not_depend_on_the_others(target: Target, batch: int, fewer: int) -> None:
    torch.manual_seed(6)
    x, _ = given(target, torch.randn(2, batch, 300))
    products = (
        Product(0, given(target, torch.randn(40, 300))[0], then="relu2"),
        Product(1, given(target, torch.randn(300, 24))[0], turned=True),
    )
    together = products_step(x, products, backend="triton")
    for i in range(batch):
        others = [(i + j) % batch for j in range(fewer)]
        again = products_step(x[:, others], products, backend="triton")
        assert all(torch.equal(a[0], b[i]) for a, b in zip(again, together, strict=True))


@targets
def test_matrices_of_another_type_are_cast(target: Target) -> None:
    torch.manual_seed(7)
    x, x64 = given(target, torch.randn(1, 2, 64))
    weight = torch.randn(16, 64, dtype=torch.float64)
    (y,) = products_step(x, (Product(0, weight.to(target.device)),), backend=target.backend)
    close(y, x64[0] @ weight.to(target.dtype).double().t(), target.near)


def test_the_sizes_above_go_every_way() -> None:
    gpu_products = pytest.importorskip("kernels.gpu.products", reason="Triton is not installed here")
    assert 3 <= gpu_products._ALONE < gpu_products.FEW < 9 and max(gpu_products._TILES) == gpu_products.MANY
    assert sorted(gpu_products._TILES) == [16, 32, 64] and gpu_products.MANY < MANY


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(2, 1, 8), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"expected floats \[M, B, D\]"):
        products_step(x[0], (Product(0, weight),))
    with pytest.raises(ValueError, match="5 products, 0 of them turned; give up to four and one"):
        products_step(x, 5 * (Product(0, weight),))
    with pytest.raises(ValueError, match=r"product 1 has a weight \[3, 8\]; expected \[8, D_out\]"):
        products_step(x, (Product(0, weight), Product(0, weight, turned=True)))
    with pytest.raises(ValueError, match="product 0 reads row 2 of 2"):
        products_step(x, (Product(2, weight),))
    with pytest.raises(ValueError, match="nothing called 'relu' follows; write tanh or relu2"):
        products_step(x, (Product(0, weight, then="relu"),))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, MANY])
def test_autocast_changes_no_types(batch: int) -> None:
    """Of what runs in float32 under autocast, the square for one, nothing may be among what follows."""
    x = torch.randn(1, batch, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        for then in AFTER:
            (y,) = products_step(x, (Product(0, weight, then=then),))
            assert y.dtype == torch.bfloat16
