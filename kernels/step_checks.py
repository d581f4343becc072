"""What the single steps of `kernels.step` refuse: kernels read what the other shapes promise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .checks import check_state, check_weight


def check_step(
    op: str,
    x: Tensor,
    u: Tensor,
    weight: tuple[int, ...],
    state: Tensor,
    square: tuple[int, ...],
    rows: Sequence[Tensor | None],
) -> None:
    """The state can be overwritten where it lies; all per-token tensors have one shape."""
    if any(row is not None and row.shape != x.shape for row in rows):
        shapes = [list(row.shape) for row in rows if row is not None]
        raise ValueError(f"{op}: per-token tensors of shapes {shapes}; all must be {list(x.shape)}")
    check_weight(op, "u", u, weight, "H, N" if len(weight) == 2 else "D", x)
    check_state(op, state, square, "B, H, N, N" if len(weight) == 2 else "B, 3, D", x)
    if not state.is_contiguous():
        raise ValueError(
            f"{op}: state is not contiguous, and it is updated in place; pass a contiguous tensor"
        )


def check_token(op: str, name: str, x: Tensor, axes: str) -> None:
    """One token of floats, [B, D] or [B, H, N]."""
    if x.dim() != axes.count(",") + 1 or not x.is_floating_point():
        raise ValueError(f"{op}: {name} is {x.dtype} of shape {list(x.shape)}; expected floats [{axes}]")


def check_decay(
    op: str, log_w: Tensor | None, base: Tensor | None, x: Tensor, shape: tuple[int, ...]
) -> None:
    """The decay and its parameter, as far as they are given, have u's shape: kernels read so many numbers."""
    for name, one in (("log_w", log_w), ("base", base)):
        if one is not None:
            check_weight(op, name, one, shape, "H, N" if len(shape) == 2 else "D", x)


def check_shares(op: str, mixes: Sequence[Tensor], width: int) -> None:
    """Shares of D elements each, in any shape."""
    if any(mix.numel() != width for mix in mixes):
        found = [list(mix.shape) for mix in mixes]
        raise ValueError(f"{op}: mixes have shapes {found}; expected D = {width} elements each")


def check_rows(op: str, **rows: Tensor) -> None:
    """Tensors that are overwritten: [B,D], contiguous, of one shape."""
    shapes = {tuple(row.shape) for row in rows.values()}
    if len(shapes) > 1 or any(row.dim() != 2 or not row.is_contiguous() for row in rows.values()):
        found = ", ".join(f"{name} {list(row.shape)}" for name, row in rows.items())
        raise ValueError(f"{op}: {found}; both must be contiguous [B, D]")


def check_low_rank(op: str, low: Tensor, weight: Tensor, batch: int, width: int) -> None:
    """low [B, R], weight [R, D]."""
    rank = low.shape[-1]
    if (list(low.shape), list(weight.shape)) != ([batch, rank], [rank, width]):
        raise ValueError(
            f"{op}: log_w is a product of {list(low.shape)} and {list(weight.shape)}; "
            f"expected [{batch}, R] and [R, {width}]"
        )
