"""What the kernel benchmark runs on: shapes, decay regimes, random inputs, byte and operation counts.

Shapes and floors count as `docs/kernels.md` does: every input read once, every output written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD = 64
HEADS = ((16, 512, 8), (8, 1024, 32), (8, 2048, 40), (1, 16384, 40), (8, 4096, 32))
CHANNELS = ((8, 1024, 2048), (8, 2048, 2560), (1, 16384, 2560), (8, 4096, 2048))
SHAPES = {"wkv4": CHANNELS, "wkv5": HEADS, "wkv6": HEADS}  # (B, T, C) or (B, T, H) with N = 64
TINY = {"wkv4": ((2, 20, 32),), "wkv5": ((2, 20, 2),), "wkv6": ((2, 20, 2),)}
LARGE = 3  # the last three shapes of an operator are the large ones
REGIMES = {  # decay = exp(-exp(x)), x uniform in the range
    "near_one": (-9.0, -7.0),
    "typical": (-6.0, -1.0),
    "strong": (0.0, 1.6),
    "extreme": (2.0, 4.0),
    "mixed": (-9.0, 4.0),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
L2_BYTES = 50 << 20
SPECIAL_RATE = 3.7e12
"""exp and division results a second: 16 a clock and multiprocessor x 132 x 1.755 GHz (datasheet)."""


@dataclass(frozen=True)
class Shape:
    """One case. width: C of RWKV-4, H of RWKV-5 and 6 with `head` channels each."""

    op: str
    batch: int
    steps: int
    width: int
    head: int = HEAD

    @property
    def sequence(self) -> tuple[int, ...]:
        tail = (self.width,) if self.op == "wkv4" else (self.width, self.head)
        return (self.batch, self.steps, *tail)

    @property
    def elements(self) -> int:
        """Elements of one sequence tensor."""
        return math.prod(self.sequence)

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of the recurrent state."""
        if self.op == "wkv4":
            return (self.batch, 3, self.width)
        return (self.batch, self.width, self.head, self.head)

    def __str__(self) -> str:
        return f"({self.batch}, {self.steps}, {self.width})"


def card(device: torch.device) -> str:
    """The name of what is measured."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run: copy bytes a second (read + write), matrix product flop/s."""

    bytes_per_s: float
    flop_per_s: float


def log_decay(x: Tensor) -> Tensor:
    """x of the regimes -> log w."""
    return -torch.exp(x)


def empty_wkv4_state(batch: int, width: int, device: torch.device) -> Tensor:
    """The state that None stands for: (0, 0, -1e38)."""
    state = torch.zeros(batch, 3, width, device=device)
    state[:, 2] = -1e38
    return state


def random_state(shape: Shape, device: torch.device) -> Tensor:
    """A state as after some tokens; RWKV-4's denominator is positive."""
    state = torch.randn(shape.state, device=device)
    if shape.op == "wkv4":
        state[:, 1] = state[:, 1].abs() + 0.5
    return state


def random_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, state: bool, seed: int = 0
) -> dict[str, Tensor]:
    """Leaves with gradients, typical decays, and the gradients that arrive: dy, with `state` dstate."""
    torch.manual_seed(seed)
    weight = shape.sequence[2:]
    names = "kv" if shape.op == "wkv4" else "rkv"
    made = {n: torch.randn(shape.sequence, device=device, dtype=dtype) for n in names}
    x = torch.empty(shape.sequence if shape.op == "wkv6" else weight, device=device).uniform_(-6, -1)
    made["log_w"] = log_decay(x).to(dtype)
    made["u"] = torch.randn(weight, device=device, dtype=dtype)
    if state:
        made["state"] = random_state(shape, device)
    for leaf in made.values():
        leaf.requires_grad_()
    made["dy"] = torch.randn(shape.sequence, device=device, dtype=dtype)
    if state:
        made["dstate"] = torch.randn(shape.state, device=device)
    return made


def n_sets(shape: Shape, dtype: torch.dtype) -> int:
    """How many input sets to rotate so that none is still in the L2 cache at its next turn."""
    one = 4 * shape.elements * dtype.itemsize
    return max(2, math.ceil(2 * L2_BYTES / one))


def moved(shape: Shape, dtype: torch.dtype, *, state: bool, backward: bool) -> int:
    """Fewest bytes through device memory; state: fp32, in and out, with gradients in and out."""
    tensors = {"wkv4": (3, 8), "wkv5": (4, 11), "wkv6": (5, 14)}[shape.op][backward]
    size = tensors * shape.elements * dtype.itemsize
    if state:
        size += (4 if backward else 2) * math.prod(shape.state) * 4
    return size


def floor_ms(shape: Shape, dtype: torch.dtype, top: Ceilings, *, state: bool, backward: bool) -> float:
    """The largest of bytes / bandwidth, operations / matrix rate, special functions / their rate."""
    seconds = [moved(shape, dtype, state=state, backward=backward) / top.bytes_per_s]
    if shape.op == "wkv4":
        seconds.append((14 if backward else 5) * shape.elements / SPECIAL_RATE)
    else:
        n, chunk = shape.head, 64
        flop = 4 * chunk * n + 4 * n * n + (10 * chunk * n + 10 * n * n if backward else 0)
        seconds.append(flop * shape.elements / n / top.flop_per_s)
    return 1e3 * max(seconds)


def budget_mib(shape: Shape, dtype: torch.dtype, *, state: bool, sequences: int = 0) -> float:
    """Allowed peak above the inputs: 1.2 x (inputs + outputs + gradients + a state per 64 steps) - inputs."""
    n_in = {"wkv4": 2, "wkv5": 3, "wkv6": 4}[shape.op]
    one = shape.elements * dtype.itemsize
    per_state = math.prod(shape.state) * 4
    held = (n_in + 1) * one + (2 * per_state if state else 0)  # the arriving gradient is held too
    made = (n_in + 1) * one + (2 if state else 1) * per_state
    chunks = math.ceil(shape.steps / 64) + sequences
    return (1.2 * (held + made + chunks * per_state) - held) / 2**20


def packed_lengths(*, tiny: bool) -> list[int]:
    """Sixteen lengths drawn once from 100 to 2,048 (tiny: four from 1 to 12)."""
    generator = torch.Generator().manual_seed(7)
    low, high, count = (1, 12, 4) if tiny else (100, 2048, 16)
    return torch.randint(low, high + 1, (count,), generator=generator).tolist()
