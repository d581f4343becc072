"""The matrix products of one token, several in one launch.

    products_step(x, (Product(0, key), Product(1, receptance)))

At one token a product is bound by reading its matrix. What the layers multiply at the same time runs as one
kernel, which reads all those matrices at once, with what follows each product (tanh, squared ReLU) in it
(kernels/gpu/products.py). On a CPU the matrix library runs one product after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import pick, register

AFTER = ("", "tanh", "relu2")


class Product(NamedTuple):
    """One product: x[row] times a matrix, and what follows.

    weight: [D_out, D_in], as a Linear holds it; `turned`: [D_in, D_out]. then: "", "tanh", or "relu2" (the
    square of ReLU).
    """

    row: int
    weight: Tensor
    turned: bool = False
    then: str = ""

    @property
    def width(self) -> int:
        """D_out."""
        return self.weight.shape[1 if self.turned else 0]


def products_step(
    x: Tensor, products: Sequence[Product], *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """x [M, B, D_in]; up to four products and one turned one -> [B, D_out] of each, in x's dtype.

    Sums are float32; a product is rounded to x's dtype before what follows it. No gradients. Raises
    ValueError for shapes that do not fit, and for more products.
    """
    _check(x, products)
    unfit = "float64 runs on the torch backend" if x.dtype == torch.float64 else ""
    found: tuple[Tensor, ...] = pick("products_step", backend, x.device, unfit)(x, products)
    return found


def _check(x: Tensor, products: Sequence[Product]) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"products_step: x is {x.dtype} of shape {list(x.shape)}; expected floats [M, B, D]")
    turned = sum(one.turned for one in products)
    if not products or turned > 1 or len(products) - turned > 4:
        raise ValueError(
            f"products_step: {len(products)} products, {turned} of them turned; give up to four and one"
        )
    for i, one in enumerate(products):
        axis = 0 if one.turned else 1
        if one.weight.dim() != 2 or one.weight.shape[axis] != x.shape[2]:
            wanted = f"[{x.shape[2]}, D_out]" if one.turned else f"[D_out, {x.shape[2]}]"
            raise ValueError(
                f"products_step: product {i} has a weight {list(one.weight.shape)}; expected {wanted}"
            )
        if not 0 <= one.row < x.shape[0]:
            raise ValueError(f"products_step: product {i} reads row {one.row} of {x.shape[0]}")
        if one.then not in AFTER:
            raise ValueError(f"products_step: nothing called {one.then!r} follows; write tanh or relu2")


def plain(x: Tensor, products: Sequence[Product]) -> tuple[Tensor, ...]:
    """One product after the other, by the matrix library."""
    found = []
    for row, weight, turned, then in products:
        y = x[row] @ weight.to(x.dtype) if turned else F.linear(x[row], weight.to(x.dtype))
        if then == "tanh":
            y = torch.tanh(y)
        elif then == "relu2":
            y = torch.relu_(y)
            y = y * y  # not square(), which autocast computes and returns in float32
        found.append(y)
    return tuple(found)


register("products_step", reference=plain, torch=plain, triton="kernels.gpu.products:products_step")
