"""Settings for the whole suite, made before torch is imported."""

from __future__ import annotations

import os
import signal

# Waiting threads must sleep: spinning ones slow a busy machine several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A test that wants a hub must fail at once, everywhere alike.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts what runs in the background deaf to Ctrl-C, and so would be the runs that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip, with a reason, where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))
