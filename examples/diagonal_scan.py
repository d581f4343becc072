"""A scan of one's own: `python -m toolkit.run plugins=[diagonal_scan] scan=diagonal`, from this folder."""

from toolkit import register


@register.scan("diagonal")
def diagonal(n_layer: int, height: int, width: int, *, reverse: bool = False) -> list[list[int]]:
    """Diagonals from the top left corner, the same in every layer."""
    order = sorted(range(height * width), key=lambda patch: (sum(divmod(patch, width)), patch))
    return [order[:: -1 if reverse else 1]] * n_layer
