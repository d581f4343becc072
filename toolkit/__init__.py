"""Declarative VisualRWKV research: compose encoders, projectors, scans, prompts and recurrences by recipe.

import toolkit
model = toolkit.load("runs/...")
print(model.answer("cat.jpg", "What is on the sofa?"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import register
from toolkit.sampling import Sampling

if TYPE_CHECKING:
    from toolkit.session import Answerer

__all__ = ["Sampling", "load", "register"]
__version__ = "0.1.0"


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "",
    plugins: Sequence[str] = (),
    scan: str = "",
    layout: str = "",
    class_token: str = "",
) -> Answerer:
    """The model of a finished run, or of a converted checkpoint, ready to be asked.

    path: a run's directory, or a folder that `python -m toolkit.convert` wrote. device: auto, cpu or cuda.
    precision: fp32 or bf16; empty is the run's own. plugins: modules that register the run's own
    components, imported because you name them. scan, layout: names of the scan and prompt that a converted
    VisualRWKV checkpoint was trained with, which it does not tell; v6.0's are the default. class_token:
    first (v5.0) or last (v5.1, v6.0), its place beside the patches in such a checkpoint. Raises ValueError
    that says what to do.
    """
    from toolkit import loading

    return loading.load(
        path,
        device=device,
        precision=precision,
        plugins=plugins,
        scan=scan,
        layout=layout,
        class_token=class_token,
    )
