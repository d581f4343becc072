"""What the tests of recipes share: composing a command line in this process, and a clean registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.config_store import ConfigStore

from toolkit import compose, register


def composed(*words: str, multirun: bool = False, complete: bool = False) -> list[dict[str, Any]]:
    """The configs of every row that a command line asks for."""
    request = compose.understand(words, multirun=multirun)
    return [compose.compose(job, complete=complete) for job in request.jobs]


def one(*words: str) -> dict[str, Any]:
    """The config of a command line that asks for a single run."""
    (config,) = composed(*words)
    return config


def rows(*words: str, key: str, multirun: bool = False) -> list[Any]:
    """One value of every row, `key` dotted."""
    found = []
    for config in composed(*words, multirun=multirun):
        for part in key.split("."):
            config = config[part]
        found.append(config)
    return found


@contextmanager
def registry(kinds: Sequence[str] = register.KINDS) -> Iterator[None]:
    """Forgets what is registered inside the block."""
    # What we ship registers once per process, at first import: it must be there before the snapshot.
    register.discover()
    before = {kind: dict(register.components(kind)) for kind in kinds}
    store = {kind: dict(ConfigStore.instance().repo.get(kind, {})) for kind in kinds}
    try:
        yield
    finally:
        for kind in kinds:
            register._TABLE[kind].clear()
            register._TABLE[kind].update(before[kind])
            ConfigStore.instance().repo[kind] = store[kind]
