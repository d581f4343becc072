"""Launches kernels through Triton and by what was remembered, on the driver of driver.c: it must be the same.

    LD_LIBRARY_PATH=FOLDER_OF_THE_DRIVER python -m tests.kernels.launched

For an H100, compiled as on a machine that has one; nothing runs, and numbers that come out mean nothing.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import torch
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

library = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
PACKED = torch.tensor([0, 50, 130], dtype=torch.int32)
# Steps, numbers by which a tensor misses its alignment, ends; the longest is cut into segments.
CASES = ((130, 0, None), (130, 1, None), (77, 0, None), (1100, 0, None), (130, 0, PACKED))
BYTES = {"i1": 1, "u1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u64": 8, "fp32": 4}


class Driver(nvidia.CudaDriver):
    """Triton's own, but for what it asks torch."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 77
        self.get_device_capability = lambda device=0: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def expect(*sizes: int) -> None:
    library.expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def kept() -> tuple[bytes, list[int]]:
    """The bytes of the last launch's parameters, and what else it was.

    Grid, threads, shared memory, stream, attributes, function, number of the launch.
    """
    parameters, shape = (ctypes.c_ubyte * 4096)(), (ctypes.c_ulong * 9)()
    length = library.kept(parameters, shape)
    return bytes(parameters[:length]), list(shape)


def main() -> None:
    driver.set_active(Driver())
    from kernels import dispatch
    from kernels.gpu import launch, one_token

    dispatch._no_triton = lambda device: ""
    remembered, seen = launch.Kernel._launch, Counter[str]()

    def both(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **named: Any) -> None:
        expect()
        compiled = kernel.fn[grid](*arguments, **named)
        kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
        expect(*(8 if kind[0] == "*" else BYTES[kind] for kind in kinds), 8, 8)  # and two scratch places
        kernel.fn[grid](*arguments, **named)
        wanted, shape = kept()
        remembered(kernel, grid, *arguments, **named)  # the first may compile
        before = kept()[1][-1]
        remembered(kernel, grid, *arguments, **named)
        found, found_shape = kept()
        assert found_shape.pop() == before + 1 and found_shape == shape[:-1], (kernel.fn, shape, found_shape)
        assert found == wanted, (kernel.fn, arguments)
        seen[kernel.fn.__name__] += 1

    launch.Kernel._launch = both  # type: ignore[method-assign]
    recurrences()
    for one_token.early in (False, True):
        one_product_each()
    print(dict(sorted(seen.items())))


def recurrences() -> None:
    import kernels

    def given(*shape: int, apart: int = 0) -> torch.Tensor:
        flat = torch.randn(torch.Size(shape).numel() + apart).bfloat16()
        return flat[apart:].view(shape).requires_grad_()

    for steps, apart, ends in CASES:
        r, k, v, w = (given(1, steps, 2, 64, apart=apart) for _ in range(4))
        y, state = kernels.wkv6(r, k, v, w, given(2, 64), cu_seqlens=ends, backend="triton")
        (y.sum() + state.sum()).backward()


def one_product_each() -> None:
    from kernels.products import Product, products_step

    for batch in (1, 2, 9, 33):
        x = torch.zeros(2, batch, 64, dtype=torch.bfloat16)
        weight = torch.zeros(32, 64, dtype=torch.bfloat16)
        turned = Product(1, torch.zeros(64, 16, dtype=torch.bfloat16), turned=True)
        products_step(x, (Product(0, weight, then="relu2"), turned), backend="triton")


if __name__ == "__main__":
    main()
