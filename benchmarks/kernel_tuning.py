"""Makes a peer's Triton autotuning affordable: candidates compile in parallel, winners are kept.

fla-core times some 250 candidates on first use, again for every new combination of argument types. Here its
own tuner runs once per kernel (candidates compiled by a thread pool, each timed for 20 ms); the winner
serves all argument types and is written down, so that a later run on the same card does not tune.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_inputs import card

WINNERS: dict[str, dict[str, Any]] = {}
THREADS = 12
FILE = "fla_tuned.json"


def load(folders: Iterable[Path], device: torch.device) -> None:
    """Reads the winners of earlier runs on such a card, if there are any; later folders go before."""
    for folder in folders:
        WINNERS.update(_written(folder).get(card(device), {}))


def save(folder: Path, device: torch.device) -> None:
    """Writes all winners known now; those of other cards stay."""
    kept = _written(folder) | {card(device): dict(sorted(WINNERS.items()))}
    (folder / FILE).write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def _written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / FILE).read_text()) if (folder / FILE).exists() else {}
    return found


def install() -> None:
    """Puts the two changes into Triton's autotuner, for this process."""
    import triton
    from triton.runtime.autotuner import Autotuner, OutOfResources

    original = Autotuner.run

    def quick(call: Any, quantiles: Any) -> Any:
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        prefix, key = _keys(self, args, kwargs)
        if len(self.configs) < 2 or key in self.cache:
            return original(self, *args, **kwargs)
        name = json.dumps([self.base_fn.__name__, *prefix], default=str)
        if name in WINNERS:
            self.cache[key] = triton.Config(**WINNERS[name])
            try:
                return original(self, *args, **kwargs)
            except OutOfResources:  # wider types need more shared memory
                return _first_that_fits(self, original, key, args, kwargs)
        _compile_all(self, args, kwargs)
        result = original(self, *args, **kwargs)
        best = self.cache[key]
        WINNERS[name] = {"kwargs": best.kwargs, "num_warps": best.num_warps, "num_stages": best.num_stages}
        return result

    Autotuner.do_bench = staticmethod(quick)
    Autotuner.run = run


def _keys(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...]]:
    """What the tuner tells cases apart by: its named arguments, and those with all argument types."""
    given = {**dict(zip(tuner.arg_names, args, strict=False)), **kwargs}
    given = {name: value for name, value in given.items() if name in tuner.arg_names}
    prefix = [given[name] for name in tuner.keys if name in given]
    types = [str(value.dtype) for value in given.values() if hasattr(value, "dtype")]
    return prefix, (*prefix, *types)


def _compile_all(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compiles all candidates in a thread pool; the tuner then finds them compiled."""
    try:
        from triton import AsyncCompileMode
    except ImportError:
        from triton.runtime._async_compile import AsyncCompileMode
    plain = {name: value for name, value in kwargs.items() if name != "warmup"}
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    try:
        with ThreadPoolExecutor(THREADS) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in tuner.prune_configs(kwargs):
                tuner.fn.warmup(*args, **plain, **config.all_kwargs())
    except Exception as error:  # only speed is lost: the tuner compiles them one by one
        print(f"parallel compilation of {tuner.base_fn.__name__} failed: {error!r}"[:200], flush=True)


def _first_that_fits(
    tuner: Any, original: Any, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The first candidate, smallest first, that the device has resources for."""
    from triton.runtime.autotuner import OutOfResources

    for config in sorted(tuner.configs, key=lambda c: (c.num_stages, *c.kwargs.values())):
        tuner.cache[key] = config
        try:
            return original(tuner, *args, **kwargs)
        except OutOfResources:
            continue
    raise RuntimeError(f"no candidate of {tuner.base_fn.__name__} fits this device")
