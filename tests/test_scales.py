"""The paper's sizes: they compose, build on the meta device and print their parameter counts."""

from __future__ import annotations

import pytest

from toolkit import run

CLIP_L = 303_505_408
"""ViT-L/14 at 336 px without the norm after its last block, which the model does not read."""


def rwkv6_parameters(d: int, n_layer: int, shift_rank: int, decay_rank: int) -> int:
    """Counted from the tables of the RWKV-6 layout: vectors, low-rank maps, matrices."""
    d_ffn = d * 7 // 2
    time_mix = (6 + 1 + 1 + 2) * d + 2 * 5 * shift_rank * d + 2 * decay_rank * d + 5 * d * d
    channel_mix = 2 * d + 2 * d * d_ffn + d * d
    return n_layer * (time_mix + channel_mix + 4 * d) + 2 * 2 * d + 2 * 65536 * d


@pytest.mark.parametrize(
    ("scale", "d", "n_layer", "ranks", "billions"),
    [
        ("paper_1b6", 2048, 24, (32, 64), 1.9),
        ("paper_3b", 2560, 32, (32, 64), 3.4),
        ("paper_7b", 4096, 32, (64, 128), 7.9),
    ],
)
def test_sizes_of_the_paper(
    scale: str,
    d: int,
    n_layer: int,
    ranks: tuple[int, int],
    billions: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The paper gives 1.9B, 3.4B and 7.9B in all for its 1.6B, 3B and 7B models."""
    assert run.main([f"scale={scale}", "--check"]) == 0
    text = capsys.readouterr().out
    numbers = {line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith("  ")}
    rwkv, proj = rwkv6_parameters(d, n_layer, *ranks), 1024 * d
    assert numbers["encoder"] == f"{CLIP_L:,}"
    assert numbers["rwkv"] == f"{rwkv:,}" and numbers["proj"] == f"{proj:,}"
    assert numbers["total"] == f"{CLIP_L + proj + rwkv:,}"
    assert (CLIP_L + proj + rwkv) / 1e9 == pytest.approx(billions, abs=0.05)
    assert numbers["image"] == "577"
    assert numbers["align"] == f"{proj:,}" and numbers["tune"] == f"{proj + rwkv - 65536 * d:,}"


@pytest.mark.parametrize("recipe", ["ablation/scan", "ablation/prompt", "ablation/recurrence"])
def test_every_row_of_a_table_builds_at_the_papers_size(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([f"recipe={recipe}", "scale=paper_1b6", "--check"]) == 0
    assert capsys.readouterr().out.count("577 tokens") == 3
