"""Launches that remember what was compiled: nothing that Triton tells apart may be taken for the same."""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from kernels.gpu import launch
from kernels.gpu.launch import Kernel, cdiv, described, power_of_two

INTS = (
    0,
    1,
    2,
    8,
    15,
    16,
    17,
    32,
    -1,
    -16,
    2**31 - 1,
    2**31,
    2**40,
    2**40 + 1,
    -(2**31),
    -(2**31) - 16,
    2**63,
)


def arguments() -> list[Any]:
    floats = [torch.zeros(64, dtype=kind) for kind in (torch.float32, torch.bfloat16, torch.float16)]
    whole = [torch.zeros(64, dtype=kind) for kind in (torch.int32, torch.int64, torch.bool, torch.uint8)]
    apart = [x[1:] for x in (*floats, *whole)]
    return [*INTS, None, True, False, 0.0, 1.0, 0.5, *floats, *whole, *apart]


@pytest.mark.parametrize("special", [True, False])
def test_what_triton_tells_apart_is_told_apart(special: bool) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton looks at its arguments elsewhere")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))

    def compiled_for(value: Any) -> Any:
        return jit.native_specialize_impl(backend, value, False, special, True)

    found = [
        (described(value, "special" if special else ""), compiled_for(value), value) for value in arguments()
    ]
    for (mine, theirs, one), (mine_too, theirs_too, other) in itertools.combinations(found, 2):
        if theirs != theirs_too:
            assert mine != mine_too, f"{one!r} and {other!r} compile apart"
    # And the description is of use: values that compile alike are mostly taken for the same.
    assert described(3, "special") == described(77, "special")
    assert described(1, "") == described(16, "") != described(2**40, "")


class Compiled:
    """What Triton returns; keeps how it was launched, and whether hooks would have been told."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log: list[Any], told: list[Any]) -> None:
        self.log, self.told = log, told

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def runner(*values: Any, stream: int) -> None:
            self.told.append(grid)
            self.run(*grid, stream, "function", "metadata", None, None, None, *values)

        return runner

    def run(self, *given: Any) -> None:
        x, y, z, stream, function, metadata, about, enter, leave, *values = given
        assert (function, metadata, about, enter, leave) == ("function", "metadata", None, None, None)
        self.log.append(((x, y, z), tuple(values), stream))


class Jit:
    """A kernel of x, n (not specialised), m and the constants A, B = 5."""

    def __init__(self) -> None:
        def parameter(name: str, **more: Any) -> SimpleNamespace:
            known = {"name": name, "default": None, "is_constexpr": False, "do_not_specialize": False}
            return SimpleNamespace(**{**known, **more})

        self.params = [
            parameter("x"),
            parameter("n", do_not_specialize=True),
            parameter("m"),
            parameter("A", is_constexpr=True),
            parameter("B", is_constexpr=True, default=5),
        ]
        self.compiled: list[Any] = []
        self.log: list[Any] = []
        self.told: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*values: Any, **named: Any) -> Compiled:
            self.compiled.append((grid, values, named))
            return Compiled(self.log, self.told)

        return first


@pytest.fixture
def jit(monkeypatch: pytest.MonkeyPatch) -> Jit:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 70 + device)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    return Jit()


def test_the_second_launch_takes_what_the_first_compiled(jit: Jit) -> None:
    kernel, x, y = Kernel(jit), torch.zeros(8), torch.zeros(8)
    kernel[(3,)](x, 100, 5, A=2, num_warps=4)
    assert jit.compiled == [((3,), (x, 100, 5), {"A": 2, "num_warps": 4})] and not jit.log
    kernel[(4, 2)](y, 101, 7, A=2, num_warps=4)
    kernel[(4, 2)](y, 101, 7, A=2, num_warps=4)
    assert len(jit.compiled) == 1
    assert jit.log == 2 * [((4, 2, 1), (y.data_ptr(), 101, 7, 2, 5), 70)]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_wants_to_be_told_of_launches_is(jit: Jit, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kernel, x = Kernel(jit), torch.zeros(8)
    for _ in range(2):
        kernel[(3,)](x, 7, 5, A=2)
    assert not jit.told and len(jit.log) == 1
    for hook in (SimpleNamespace(calls=[print]), print):  # a chain, and what older versions have
        monkeypatch.setattr(launch.knobs.runtime, name, hook)
        kernel[(3,)](x, 7, 5, A=2)
    assert jit.told == 2 * [(3, 1, 1)] and jit.log == 3 * jit.log[:1]


class Elsewhere(torch.Tensor):
    """On another device than its memory is."""

    def get_device(self) -> int:
        return 3


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(8).as_subclass(Elsewhere)},
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9)[1:]},
        {"x": None},
        {"n": 2**31},
        {"n": 7.0},
        {"m": 1},
        {"m": 16},
        {"m": 2**31},
        {"m": None},
        {"m": True},
        {"A": 3},
        {"B": 6},
        {"num_warps": 8},
    ],
    ids=lambda other: " ".join(f"{k}={'tensor' if torch.is_tensor(v) else v}" for k, v in other.items()),
)
def test_what_differs_is_compiled_again(jit: Jit, other: dict[str, Any]) -> None:
    kernel = Kernel(jit)
    usual = {"x": torch.zeros(8), "n": 7, "m": 5, "A": 2, "num_warps": 4}
    for given in (usual, {**usual, **other}, usual, {**usual, **other}):
        named = dict(given)
        kernel[(1,)](named.pop("x"), named.pop("n"), named.pop("m"), **named)
    assert len(jit.compiled) == len(jit.log) == 2


def test_another_device_compiles_its_own(jit: Jit) -> None:
    kernel, x = Kernel(jit), torch.zeros(8)
    kernel[(1,)](x, 7, 5, A=2)
    launch.driver.active.get_current_device = lambda: 1
    kernel[(1,)](x, 7, 5, A=2)
    kernel[(1,)](x, 7, 5, A=2)
    assert len(jit.compiled) == 2 and jit.log[-1][2] == 71


def test_many_lists_of_arguments_are_forgotten_and_nothing_is_compiled_again(
    jit: Jit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_MOST", 3)
    kernel, x = Kernel(jit), torch.zeros(8)
    for n in range(20):
        kernel[(1,)](x, n, 5, A=2)
    assert len(jit.compiled) == 1 and len(jit.log) == 19 and len(kernel._seen) <= 3


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here, which Triton needs too")
def test_a_remembered_launch_is_triton_s_to_the_byte(tmp_path: Path) -> None:
    """On a driver that only keeps what it is given, in a process of its own."""
    import triton.backends.nvidia

    (headers,) = (Path(place) / "include" for place in triton.backends.nvidia.__path__)
    source, library = Path(__file__).with_name("driver.c"), tmp_path / "libcuda.so.1"
    build = ["cc", "-shared", "-fPIC", f"-I{headers}", "-o", str(library), str(source)]
    subprocess.run([*build, f"-Wl,-soname,{library.name}"], check=True)
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    found = filter(None, (str(tmp_path), environment.get("LD_LIBRARY_PATH")))
    environment |= {"LD_LIBRARY_PATH": os.pathsep.join(found), "TRITON_CACHE_DIR": str(tmp_path / "compiled")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.launched"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seen = ast.literal_eval(done.stdout.splitlines()[-1])
    assert {n: seen[n] for n in ("walk", "backward", "local", "combine")} == {
        "walk": 10,
        "backward": 5,
        "local": 2,
        "combine": 2,
    }
    assert {"_products", "_products_of_many"} <= set(seen)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_sizes(n: int) -> None:
    assert cdiv(n, 8) == -(-n // 8)
    assert power_of_two(n) == next(2**i for i in range(12) if 2**i >= n)
