"""The decoder: one token equals the whole forward, states in place, any recurrence, graph equals eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from tests.helpers import component, make_batch, randomise, small_model
from toolkit import continuation, register
from toolkit.continuation import greedy
from toolkit.contracts import Recurrence
from toolkit.decode import Decoder, tensors
from toolkit.lit import to_device
from toolkit.trunk import LanguageModel, State

register.discover()
RECURRENCES = sorted(register.components("recurrence"))
TEXTS = [(3, 5, 1), (0, 2, 1), (-1, 4, 1), (7, 1, 1)]
VOCAB = 23


def language_model(mixers: Recurrence, n_layer: int = 3, d_model: int = 32) -> LanguageModel:
    torch.manual_seed(3)
    model = LanguageModel(mixers, d_model=d_model, n_layer=n_layer, vocab_size=VOCAB)
    randomise(model)
    return model.eval()


def built_in(name: str) -> LanguageModel:
    return language_model(component("recurrence", name)(32, 3))


class Mean(nn.Module):
    """A time mix that only has `forward`: running mean of the stream, which the first layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        total, count = state or (x.new_zeros(x.shape[0], 32), x.new_zeros(x.shape[0], 1))
        stream = torch.tanh(x) if stream is None else stream
        sums = total.unsqueeze(1) + (self.inner(x) + stream).cumsum(1)
        counts = count.unsqueeze(1) + torch.ones_like(x[..., :1]).cumsum(1)
        return sums / counts, (sums[:, -1], counts[:, -1]), stream


class Gate(nn.Module):
    """A channel mix that only has `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        before = torch.zeros_like(x[:, :1]) if state is None else state.unsqueeze(1)
        return self.inner(x) * torch.cat((before, x[:, :-1]), 1), x[:, -1]


class Foreign:
    """A recurrence from outside, with a stream and without `step_`."""

    def time_mix(self, layer: int) -> nn.Module:
        return Mean()

    def channel_mix(self, layer: int) -> nn.Module:
        return Gate()


class Growing(Mean):
    """Keeps every token: no state of constant size."""

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        kept = x if state is None else torch.cat((state[0], x), 1)
        return x, (kept,), stream


def prefilled(model: LanguageModel, ids: Tensor) -> State:
    with torch.no_grad():
        state: State = model(model.emb(ids))[1]
        return state


def fed(decoder: Decoder, ids: Tensor, state: State) -> Tensor:
    """Logits [B, T, V] of the decoder reading given ids instead of its own."""
    decoder.load(ids[:, 0], state)
    found = []
    for t in range(ids.shape[1]):
        decoder.token.copy_(ids[:, t])
        decoder.step()
        found.append(decoder.logits.clone())
    return torch.stack(found, 1)


def models() -> list[Any]:
    return [*RECURRENCES, "foreign"]


def model_of(name: str) -> LanguageModel:
    return language_model(Foreign()) if name == "foreign" else built_in(name)


@pytest.mark.parametrize("name", models())
def test_steps_equal_the_whole_forward(name: str) -> None:
    model = model_of(name).double()
    ids = torch.randint(0, VOCAB, (3, 19))
    with torch.no_grad():
        whole, last = model(model.emb(ids))
        logits = model.head(whole)
    state = prefilled(model, ids[:, :8])
    before = [t.clone() for t in tensors(state)]
    decoder = Decoder(model, state)
    places = [t.data_ptr() for t in tensors(decoder.state)]
    with torch.inference_mode():
        found = fed(decoder, ids[:, 8:], state)
    torch.testing.assert_close(found, logits[:, 8:], rtol=1e-9, atol=1e-9)
    assert torch.equal(decoder.token, found[:, -1].argmax(-1))
    for mine, theirs in zip(tensors(decoder.state), tensors(last), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    assert [t.data_ptr() for t in tensors(decoder.state)] == places
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))


class Counted(TorchDispatchMode):
    """Counts what runs: operators, and the elements that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = sum(a.numel() for a in args if isinstance(a, Tensor))
        self.work.append((str(op), read))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_token_at_4096_is_the_work_of_one_at_64(name: str) -> None:
    model = built_in(name)
    found = []
    for position in (64, 4096):
        decoder = Decoder(model, prefilled(model, torch.randint(0, VOCAB, (1, position))))
        with Counted() as counted:
            decoder.step()
        found.append(counted.work)
    assert found[0] == found[1] and len(found[0]) > 20


@pytest.mark.parametrize("name", RECURRENCES)
def test_built_in_mixers_take_their_own_step(name: str) -> None:
    for block in built_in(name).blocks:
        assert hasattr(block.att, "step_") and hasattr(block.ffn, "step_")


def test_a_state_that_grows_is_refused() -> None:
    class Grows(Foreign):
        def time_mix(self, layer: int) -> nn.Module:
            return Growing()

    model = language_model(Grows())
    ids = torch.randint(0, VOCAB, (2, 4))
    decoder = Decoder(model, prefilled(model, ids))
    with pytest.raises(ValueError, match=r"state grew from \[2, 4, 32\] to \[2, 5, 32\] in one step"):
        decoder.step()


@pytest.mark.parametrize("name", models())
def test_autocast_multiplies_in_its_type_and_reads_the_weights_anew(name: str) -> None:
    """Against the forward under the same autocast, before and after the weights change in place."""
    model = model_of(name)
    ids = torch.randint(0, VOCAB, (2, 12))
    decoder: Decoder | None = None
    for change in (0.0, 0.05):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(change)
        with torch.autocast("cpu", torch.bfloat16):  # one each: autocast keeps its casts until it ends
            state = prefilled(model, ids[:, :6])
            decoder = decoder or Decoder(model, state)
            assert decoder.fits(model, state)
            with torch.no_grad():
                wanted = model.head(model(model.emb(ids))[0])[:, 6:]
            with torch.inference_mode():
                found = fed(decoder, ids[:, 6:], state)
        assert found.dtype == wanted.dtype == torch.bfloat16
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert float(error) < 2e-2
    assert decoder is not None and not decoder.fits(model, state)  # outside, the precision is another one


def test_how_it_ran_is_recorded_for_a_kept_decoder_too() -> None:
    model = small_model()
    for _ in range(2):
        kernels.reset_chosen()
        greedy(model, make_batch(model, TEXTS), max_new_tokens=2, end_id=-1)
        assert kernels.chosen()["decode"] == "eager: on the CPU"


def test_a_decoder_is_kept_for_the_next_batch_of_its_size() -> None:
    model = small_model().double()
    four = make_batch(model, TEXTS, dtype=torch.float64)
    three = make_batch(model, TEXTS[:3], dtype=torch.float64)
    first = greedy(model, four, max_new_tokens=4, end_id=-1)
    kept = continuation._DECODERS[model]
    assert greedy(model, four, max_new_tokens=4, end_id=-1) == first
    assert continuation._DECODERS[model] is kept
    assert greedy(model, three, max_new_tokens=4, end_id=-1) == first[:3]
    assert continuation._DECODERS[model] is not kept


def test_moved_weights_make_a_new_decoder() -> None:
    model = built_in("rwkv6")
    state = prefilled(model, torch.randint(0, VOCAB, (2, 4)))
    decoder = Decoder(model, state)
    assert decoder.fits(model, state)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert not decoder.fits(model, state)


def test_long_answers_end_where_they_should() -> None:
    """The end is looked for every few tokens only; what was written after it is cut."""
    model = small_model(vocab=5).double()
    batch = make_batch(model, TEXTS, vocab=5, dtype=torch.float64)
    free = greedy(model, batch, max_new_tokens=40, end_id=-1)
    assert [len(row) for row in free] == [40] * len(TEXTS)
    for end in range(5):
        found = greedy(model, batch, max_new_tokens=40, end_id=end)
        assert found == [row[: row.index(end)] if end in row else row for row in free]


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", models())
def test_the_graph_equals_the_eager_step_at_any_position(name: str, bf16: bool) -> None:
    model = model_of(name).cuda()
    ids = torch.randint(0, VOCAB, (3, 9), device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        state = prefilled(model, ids)
        graph, eager = Decoder(model, state), Decoder(model, state, graph=False)
        assert (graph.mode, eager.mode) == ("graph", "eager: asked for")
        for _ in range(2):  # a second answer starts from its own prefill
            graph.load(ids[:, 0], state)
            eager.load(ids[:, 0], state)
            for _ in range(150):
                assert torch.equal(graph.step(), eager.step())
                assert torch.equal(graph.logits, eager.logits)


@pytest.mark.gpu
@pytest.mark.parametrize("name", models())
def test_steps_on_the_gpu_equal_the_cpu(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(0, VOCAB, (3, 19))
    with torch.no_grad():
        wanted = model.head(model(model.emb(ids))[0])[:, 8:]
    model, ids = model.cuda(), ids.cuda()
    state = prefilled(model, ids[:, :8])
    with torch.inference_mode():
        found = fed(Decoder(model, state), ids[:, 8:], state)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", RECURRENCES)
def test_weights_in_bf16_step_as_the_forward(name: str, device: str) -> None:
    """As converted weights are kept on a GPU: everything in bfloat16, without autocast."""
    model = model_of(name).bfloat16().to(device)
    ids = torch.randint(0, VOCAB, (3, 19), device=device)
    with torch.no_grad():
        wanted = model.head(model(model.emb(ids))[0])[:, 8:].float()
    state = prefilled(model, ids[:, :8])
    decoder = Decoder(model, state)
    assert decoder.mode == ("graph" if device == "cuda" else "eager: on the CPU")
    with torch.inference_mode():
        found = fed(decoder, ids[:, 8:], state)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < 3e-2


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_eagerly_and_says_so() -> None:
    class Waits(Mean):
        def forward(self, x: Tensor, *rest: Any) -> Any:
            y, state, stream = super().forward(x, *rest)
            return y + float(y.sum()) * 0, state, stream  # reads a number on the host

    class Waiting(Foreign):
        def time_mix(self, layer: int) -> nn.Module:
            return Waits()

    model = language_model(Waiting()).cuda()
    ids = torch.randint(0, VOCAB, (2, 4), device="cuda")
    state = prefilled(model, ids)
    decoder = Decoder(model, state)
    assert decoder.mode.startswith("eager: the step cannot be captured (")
    decoder.load(ids[:, 0], state)
    again = Decoder(model, state, graph=False)
    again.load(ids[:, 0], state)
    assert torch.equal(decoder.step(), again.step())


@pytest.mark.gpu
def test_answers_on_the_gpu_equal_the_cpu() -> None:
    model = small_model()
    batch = make_batch(model, TEXTS)
    wanted = greedy(model, batch, max_new_tokens=20, end_id=-1)
    model.cuda()
    kernels.reset_chosen()
    assert greedy(model, to_device(batch, torch.device("cuda")), max_new_tokens=20, end_id=-1) == wanted
    assert kernels.chosen()["decode"] == "graph"
