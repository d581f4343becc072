"""The trunk: scans as fused gathers, state, the side stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import component, make_batch, small_model
from toolkit import register
from toolkit.contracts import NO_IMAGE
from toolkit.trunk import LanguageModel, ScanSteps

register.discover()
SCANS = sorted(register.components("scan"))


def written_out(model: LanguageModel, x: Tensor, table: list[list[int]], starts: list[int]) -> Tensor:
    """The definition: reorder the image before each block, restore it after, as the original does."""
    for layer, block in enumerate(model.blocks):
        order = torch.tensor(table[layer])
        moved = x.clone()
        for b, s in enumerate(starts):
            if s != NO_IMAGE:
                moved[b, s : s + len(order)] = x[b, s + order]
        moved, late, _, _ = block(moved)
        moved = moved + late
        x = moved.clone()
        for b, s in enumerate(starts):
            if s != NO_IMAGE:
                x[b, s + order] = moved[b, s : s + len(order)]
    return model.ln_out(x)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_fused_gathers_equal_reordering_around_each_block(scan: str, grid: tuple[int, int]) -> None:
    model = small_model(scan=scan, grid=grid, n_layer=5)
    table = [list(map(int, row)) for row in component("scan", scan)(5, *grid)]
    starts = [0, 4, NO_IMAGE, 7]
    x = torch.randn(4, 20, 32)
    fused, _ = model.rwkv(x, scan=ScanSteps(table), image_start=torch.tensor(starts))
    assert torch.equal(fused, written_out(model.rwkv, x, table, starts))


def test_uni_moves_nothing_and_bi_shares_one_step() -> None:
    assert set(ScanSteps(component("scan", "uni")(4, 3, 3)).use) == {None}
    bi = ScanSteps(component("scan", "bi")(4, 3, 3))
    assert bi.use == [None, 0, 0, 0, 0] and len(bi.steps) == 1


def test_gradient_through_the_reordering() -> None:
    steps = ScanSteps(component("scan", "2d")(4, 2, 3))
    model = small_model(n_layer=4, d_model=16).double().rwkv
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(
        lambda x: model(x, scan=steps, image_start=start)[0].sum(dim=-1), (x,), fast_mode=True
    )


class CountingMix(nn.Module):
    """Notes its input's order in the side stream in layer 0 and checks that the stream moves with x."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Tensor, state: object, stream: Tensor | None, lengths: object
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        if stream is None:
            assert self.layer == 0
            stream = x.clone()
        return torch.zeros_like(x), (stream,), stream


class Still(nn.Module):
    def forward(self, x: Tensor, state: object, lengths: object) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), x[:, -1]


class Counting:
    def time_mix(self, layer: int) -> nn.Module:
        return CountingMix(layer)

    def channel_mix(self, layer: int) -> nn.Module:
        return Still()


def test_side_stream_travels_and_is_reordered_with_x() -> None:
    model = LanguageModel(Counting(), d_model=8, n_layer=4, vocab_size=5)
    steps = ScanSteps(component("scan", "2d")(4, 2, 3))
    x = torch.randn(2, 9, 8)
    start = torch.tensor([1, 3])
    _, state = model(x, scan=steps, image_start=start)
    first = nn.functional.layer_norm(nn.functional.layer_norm(x, (8,)), (8,))
    table = component("scan", "2d")(4, 2, 3)
    for layer, ((stream,), _) in enumerate(state):
        expected = first.clone()
        for b, s in enumerate(start.tolist()):
            expected[b, s : s + 6] = first[b, s + torch.tensor(table[layer])]
        torch.testing.assert_close(stream, expected)


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_state_after_the_image_continues_the_sequence(recurrence: str) -> None:
    """Prefill with the scan, then token by token without it, equals one pass over everything."""
    model = small_model(recurrence=recurrence, scan="2d", n_layer=4).double()
    batch = make_batch(model, [(2, 6, 1), (0, 9, 1), (-1, 5, 1)], dtype=torch.float64)
    whole = model.logits(batch)
    cut = 4
    prompt = make_batch(model, [(2, 6, 1), (0, 9, 1), (-1, 5, 1)], dtype=torch.float64)
    prompt.lengths = batch.lengths - cut
    with torch.no_grad():
        hidden, state = model.prefill(prompt)
        rows = torch.arange(3)
        for step in range(cut):
            at = batch.lengths - cut + step
            token = batch.ids[rows, at]
            hidden, state = model.rwkv(model.rwkv.emb(token).unsqueeze(1), state=state)
            torch.testing.assert_close(model.rwkv.head(hidden[:, 0]), whole[rows, at], rtol=1e-9, atol=1e-9)
