"""Sampling against a plain reference, its seeds, and what it refuses."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from toolkit.sampling import Picker, Sampling, drawn, kept, penalised, uniforms

V = 11


def plain(
    logits: list[float], seen: set[int], *, penalty: float, temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """Token -> probability, in loops: penalty, temperature, top-k, top-p, each renormalised."""
    scores = [(v / penalty if v > 0 else v * penalty) if i in seen else v for i, v in enumerate(logits)]
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: top_k or None]
    weights = {i: math.exp((scores[i] - max(scores)) / temperature) for i in ranked}
    total, reached, found = sum(weights.values()), 0.0, {}
    for i in ranked:
        if top_p < 1 and reached >= top_p:
            break
        found[i] = weights[i] / total
        reached += found[i]
    total = sum(found.values())
    return {i: p / total for i, p in found.items()}


OPTIONS = list(itertools.product((1.0, 1.7, 0.6), (0.3, 1.0, 2.5), (0, 1, 4, 50), (1.0, 0.9, 0.35, 1e-6)))


@pytest.mark.parametrize(("penalty", "temperature", "top_k", "top_p"), OPTIONS)
def test_all_options_together_equal_plain_loops(
    penalty: float, temperature: float, top_k: int, top_p: float
) -> None:
    draw = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(3, V, generator=draw, dtype=torch.float64)
    seen = torch.rand(3, V, generator=draw) < 0.4
    before = logits.clone()
    probabilities, order = kept(penalised(logits, seen, penalty), temperature, top_k, top_p)
    assert torch.equal(logits, before)
    for row in range(3):
        ids = {i for i in range(V) if seen[row, i]}
        wanted = plain(
            logits[row].tolist(), ids, penalty=penalty, temperature=temperature, top_k=top_k, top_p=top_p
        )
        found = {int(i): float(p) for i, p in zip(order[row], probabilities[row], strict=True) if p > 0}
        assert list(found) == list(wanted)
        scale = sum(found.values())
        assert all(math.isclose(found[i] / scale, wanted[i], rel_tol=1e-9) for i in wanted)


def test_draws_come_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, math.log(2), -9e9, math.log(5)]]).repeat(8000, 1)
    probabilities, order = kept(logits, 1.0, 0, 1.0)
    grid = ((torch.arange(8000) + 0.5) / 8000).double().unsqueeze(1)
    counts = torch.bincount(drawn(probabilities, order, grid), minlength=4)
    assert counts.tolist() == [1000, 2000, 0, 5000]
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert drawn(probabilities[:2], order[:2], ends).tolist() == [0, 3]


def test_ties_are_cut_by_the_order_of_ids() -> None:
    probabilities, order = kept(torch.zeros(1, 5), 1.0, 2, 1.0)
    assert order[0, :2].tolist() == [0, 1] and (probabilities[0] > 0).tolist() == [True, True, *[False] * 3]


def chosen(options: Sampling, logits: torch.Tensor, steps: int) -> list[list[int]]:
    picker = Picker(options)
    return torch.stack([picker(logits) for _ in range(steps)], 1).tolist()


def test_a_small_temperature_or_one_token_is_greedy() -> None:
    logits = torch.randn(4, V)
    wanted = logits.argmax(-1).unsqueeze(1).repeat(1, 5).tolist()
    for options in (Sampling(), Sampling(temperature=1e-30), Sampling(temperature=1, top_k=1)):
        assert chosen(options, logits, 5) == wanted
    assert chosen(Sampling(temperature=1, top_p=1e-9), logits.bfloat16().float(), 5) == wanted


def test_a_row_is_chosen_as_if_it_were_alone_and_by_its_seed() -> None:
    logits = torch.randn(4, V)
    options = Sampling(temperature=1.5, top_k=9, top_p=0.95, repetition_penalty=1.3, seed=7)
    together = chosen(options, logits, 20)
    assert together == [chosen(options, logits[i : i + 1], 20)[0] for i in range(4)]
    assert together == chosen(options, logits, 20)
    assert together != chosen(Sampling(**{**vars(options), "seed": 8}), logits, 20)
    torch.manual_seed(0)
    assert torch.equal(uniforms(7, 40)[:13], uniforms(7, 13))
    assert torch.initial_seed() == 0


def test_numbers_are_drawn_as_an_answer_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, asked = torch.randn(2, V), []
    options = {"temperature": 1.5, "seed": 7}
    wanted = chosen(Sampling(max_new_tokens=600, **options), logits, 600)  # type: ignore[arg-type]

    def counted(seed: int, count: int) -> torch.Tensor:
        asked.append(count)
        return uniforms(seed, count)

    monkeypatch.setattr("toolkit.sampling.uniforms", counted)
    assert chosen(Sampling(max_new_tokens=1 << 16, **options), logits, 600) == wanted  # type: ignore[arg-type]
    assert asked == [256, 512, 1024]


def test_rounding_seldom_changes_what_is_drawn() -> None:
    draw = torch.Generator().manual_seed(3)
    logits = 0.3 * torch.randn(64, 65536, generator=draw)  # neighbours in rank differ by less than the noise
    noisy = logits + 1e-6 * torch.randn(logits.shape, generator=draw)
    uniform = torch.rand(64, 1, generator=draw, dtype=torch.float64)
    ids = [drawn(*kept(x, 1.0, 0, 1.0), uniform) for x in (logits, noisy)]
    assert int((ids[0] != ids[1]).sum()) <= 1


def test_the_penalty_keeps_a_greedy_answer_from_repeating() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.5]])
    assert chosen(Sampling(repetition_penalty=1.2), logits, 4) == [[0, 1, 0, 0]]
    assert chosen(Sampling(repetition_penalty=2.0, temperature=0), -logits, 3)[0][0] == 3
    assert penalised(torch.tensor([[2.0, -2.0]]), torch.tensor([[True, True]]), 2.0).tolist() == [[1.0, -4.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be a number, from 0 to 100; write temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0, "temperature": 1}, "top_p=0: must be a number, above 0 to 1; write top_p=1.0"),
        ({"top_p": 1.01, "temperature": 1}, "top_p=1.01"),
        ({"top_k": -1}, "top_k=-1: must be a whole number, at least 0"),
        ({"top_k": 1.5}, "top_k=1.5: must be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40: must be a number, from 0.01 to 100"),
        (
            {"max_new_tokens": 0},
            "must be a whole number, at least 1; write max_new_tokens=256",
        ),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": "warm"}, "temperature='warm'"),
        ({"top_p": 0.5}, "write temperature=1, or leave them out"),
        ({"top_k": 3}, "write temperature=1, or leave them out"),
    ],
)
def test_values_out_of_range_are_refused_with_what_to_write(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Sampling(**options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_the_reference_can_tell_options_apart() -> None:
    rng = random.Random(0)
    logits = [rng.gauss(0, 3) for _ in range(V)]
    whole = plain(logits, set(), penalty=1, temperature=1, top_k=0, top_p=1)
    assert len(whole) == V and abs(sum(whole.values()) - 1) < 1e-12
    assert len(plain(logits, set(), penalty=1, temperature=1, top_k=0, top_p=0.5)) < V
