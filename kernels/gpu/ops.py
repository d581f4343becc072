"""One way to make an operator of a pair of launches: a torch custom operator, and a direct call beside it.

The custom operator (with its shape formula and its backward pass, an operator too) is what torch.compile
traces. Run eagerly it costs 0.1 to 0.3 ms of the host's time forward and backward, several times the launches
themselves, so eager calls go through a plain autograd function around the same launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Function = Callable[..., Any]


class Launch(NamedTuple):
    """What runs, the same for shapes alone, and its schema: "(Tensor x, ...) -> Tensor"."""

    run: Function
    fake: Function
    schema: str


def operator(
    name: str,
    forward: Launch,
    backward: Launch,
    *,
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Function,
) -> Function:
    """Registers visualrwkv::<name> and visualrwkv::<name>_backward; returns what calls the operator.

    keep(ctx, inputs, output) saves for the backward pass. gradients(ctx, run, *grads) returns one gradient
    per input; `run` is the backward launch, and the gradients of a list of outputs come as one list.
    """
    op = _register(name, forward)
    back = _register(f"{name}_backward", backward)

    def traced_gradients(ctx: Any, *grads: Any) -> Any:
        return gradients(ctx, back, *grads)

    op.register_autograd(traced_gradients, setup_context=keep)
    listed = forward.schema.endswith("[]")

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward.run(*inputs)
            keep(ctx, inputs, output)
            return tuple(output) if listed else output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return (
                gradients(ctx, backward.run, list(grads)) if listed else gradients(ctx, backward.run, *grads)
            )

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if not torch.is_grad_enabled():
            return forward.run(*inputs)
        output = Eager.apply(*inputs)
        return list(output) if listed else output

    return call


def _register(name: str, launch: Launch) -> Any:
    op = torch.library.custom_op(f"visualrwkv::{name}", launch.run, mutates_args=(), schema=launch.schema)
    op.register_fake(launch.fake)
    return op
