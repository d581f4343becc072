"""Asking a model: from the state, in batches, in several turns, from a file; always the same numbers."""

from __future__ import annotations

import gc
import json
import weakref
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.tokens import trim_answer
from tests.asking import QUESTIONS, TOKENIZER, answerer, ids_of, picture, whole
from tests.helpers import make_batch
from toolkit import Sampling, continuation, register
from toolkit.continuation import Writer, greedy, until
from toolkit.memory import FORMAT
from toolkit.sampling import Picker
from toolkit.session import Answerer
from toolkit.stream import ends
from toolkit.trunk import State

register.discover()
STEPS = 12
DRAWN = Sampling(max_new_tokens=STEPS, temperature=1.3, top_p=0.97, top_k=20, repetition_penalty=1.1, seed=3)
END = TOKENIZER.end_id


class Spy(Answerer):
    """Remembers the logits that later turns began with, and the ids they read."""

    read: list[tuple[Tensor, list[int]]]

    def read_on(self, state: State, ids: list[int]) -> tuple[Tensor, State]:  # type: ignore[override]
        logits, after = super().read_on(state, ids)
        self.__dict__.setdefault("read", []).append((logits, list(ids)))
        return logits, after


def written(model: Answerer, logits: Tensor, state: State) -> tuple[list[int], list[Tensor]]:
    """Greedy ids of STEPS tokens, end tokens included, and the logits after each but the last."""
    ids, seen = [], []
    with torch.inference_mode(), Writer(model.rwkv, logits, state, Picker(Sampling()), owner=model) as writer:
        for _ in range(STEPS):
            ids.append(int(writer.token))
            writer.step()
            assert writer._decoder is not None
            seen.append(writer._decoder.logits[0].clone())
    return ids, seen[:-1]


@pytest.mark.parametrize("prompt", sorted(register.components("prompt")))
@pytest.mark.parametrize("scan", sorted(register.components("scan")))
@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_every_token_and_turn_from_the_state_equals_one_pass_over_all(
    recurrence: str, scan: str, prompt: str
) -> None:
    model = answerer(recurrence, scan, prompt, of=Spy)
    image, question = picture(1), QUESTIONS[1]
    first = model.first_turn(question, image=True)
    with torch.inference_mode():
        logits, state = model.read_first([first], [(image, question)])
    ids, after = written(model, logits, state)
    wanted = whole(model, first, image, ids[:-1])
    found = torch.stack([logits[0], *after])
    torch.testing.assert_close(found, wanted[-STEPS:], rtol=0, atol=1e-4)

    chat = model.chat(image)
    answer = chat.ask(question, Sampling(max_new_tokens=STEPS))
    assert answer == trim_answer(TOKENIZER.decode(until(ids, END))) == chat.turns[-1].text
    chat.ask(QUESTIONS[0], Sampling(max_new_tokens=1))
    ((again, read),) = model.read  # type: ignore[attr-defined]
    told = next((ids[:n] for n in range(1, STEPS) if ends(TOKENIZER, ids[:n])), ids)
    closed = told if ends(TOKENIZER, told) else [*told, END]
    turn = ids_of(model, model.first_turn(QUESTIONS[0], image=False))
    assert read == [*closed[len(told) - 1 :], *turn]
    wanted = whole(model, first, image, [*closed, *turn])
    torch.testing.assert_close(again[0], wanted[-1], rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_200_tokens_from_the_state_equal_one_pass_for_every_scan_and_prompt(recurrence: str) -> None:
    """All scans and prompts in one batch of states; a pass over everything for each of them."""
    many, scans, prompts = 200, register.components("scan"), register.components("prompt")
    models = [answerer(recurrence, scan, prompt) for scan in sorted(scans) for prompt in sorted(prompts)]
    first = models[0]
    assert all(torch.equal(m.rwkv.head.weight, first.rwkv.head.weight) for m in models)
    turns = [model.first_turn(QUESTIONS[1], image=True) for model in models]
    read = [m.read_first([turn], [(picture(1), QUESTIONS[1])]) for m, turn in zip(models, turns, strict=True)]
    state = [
        (
            tuple(torch.cat(parts) for parts in zip(*(time for time, _ in layer), strict=True)),
            torch.cat([channel for _, channel in layer]),
        )
        for layer in zip(*(state for _, state in read), strict=True)
    ]
    seen = [torch.cat([logits for logits, _ in read])]
    ids = []
    drawn = Picker(Sampling(max_new_tokens=many, temperature=1.5, seed=1))  # greedy texts soon repeat
    with Writer(first.rwkv, seen[0], state, drawn, owner=first) as writer:
        for _ in range(many - 1):
            ids.append(writer.token)
            writer.step()
            assert writer._decoder is not None
            seen.append(writer._decoder.logits.clone())
    found, written = torch.stack(seen, dim=1), torch.stack(ids, dim=1)  # [B, 200, V], [B, 199]
    assert found.shape[:2] == (len(scans) * len(prompts), many)
    for model, turn, logits, later in zip(models, turns, found, written.tolist(), strict=True):
        wanted = whole(model, turn, picture(1), later)[-many:]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4, msg=f"{model.scan} {model.layout}")
    assert len(found[:, 0].unique(dim=0)) > len(scans)  # scans and prompts do differ


ASKED = [
    (picture(1), QUESTIONS[0]),
    (None, QUESTIONS[1]),
    (picture(2), QUESTIONS[1]),
    (picture(1), QUESTIONS[2]),
]


@pytest.mark.parametrize("options", [Sampling(max_new_tokens=STEPS), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_a_batch_equals_single_questions_and_streaming(recurrence: str, options: Sampling) -> None:
    model = answerer(recurrence)
    alone = [model.answer(image, question, options) for image, question in ASKED]
    assert model.answers(ASKED, options) == alone and len(set(alone)) > 1
    assert ["".join(model.stream(*one, options)) for one in ASKED] == alone
    assert model.answers([], options) == []


def test_a_seed_decides_the_text() -> None:
    model = answerer()
    texts = [model.answer(*ASKED[0], Sampling(max_new_tokens=20, temperature=2, seed=s)) for s in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    model = answerer()
    apart = [model.answer(*one, DRAWN) for one in (ASKED[0], ASKED[2])]
    pairs = list(zip_longest(model.stream(*ASKED[0], DRAWN), model.stream(*ASKED[2], DRAWN), fillvalue=""))
    assert ["".join(side) for side in zip(*pairs, strict=True)] == apart


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_a_saved_state_goes_on_as_if_unbroken(recurrence: str, tmp_path: Path) -> None:
    model = answerer(recurrence)
    chat = model.chat(picture(1))
    chat.ask(QUESTIONS[0], DRAWN)
    file = tmp_path / "new" / "state.safetensors"
    chat.save(file)
    again = answerer(recurrence).resume(file)  # a fresh process would build it so
    assert again.turns == chat.turns
    for question in QUESTIONS[1:]:
        expected = chat.fork().ask(question, DRAWN)
        assert model.resume(file).ask(question, DRAWN) == expected
        assert again.fork().ask(question, DRAWN) == expected
    assert chat.ask(QUESTIONS[1], DRAWN) == again.ask(QUESTIONS[1], DRAWN)
    assert chat.ask(QUESTIONS[2], DRAWN) == again.ask(QUESTIONS[2], DRAWN)


def test_an_image_in_front_is_read_once_for_many_questions(tmp_path: Path) -> None:
    model = answerer(prompt="prefix")
    seen = model.look(picture(1))
    seen.save(tmp_path / "s")
    for question in QUESTIONS:
        expected = model.answer(picture(1), question, DRAWN)
        assert seen.fork().ask(question, DRAWN) == expected
        assert model.resume(tmp_path / "s").ask(question, DRAWN) == expected
    with pytest.raises(ValueError, match="puts the question before the image"):
        answerer(prompt="sandwich").look(picture(1))


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    model = answerer()
    with pytest.raises(ValueError, match=r"has read nothing yet; ask a question first"):
        model.chat().save(file)
    chat = model.chat()
    chat.ask(QUESTIONS[0], DRAWN)
    chat.save(file)
    with pytest.raises(
        ValueError, match=r"s\.safetensors: is a state of run a, this is run b; load that model"
    ):
        answerer(name="run b").resume(file)
    with pytest.raises(ValueError, match="is a state of run a with other weights"):
        answerer(seed=1).resume(file)
    held = file.read_bytes()
    for data in (b"", held[:-5], b"x" * 100, held[:200]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"s\.safetensors: no saved state can be read from it"):
            model.resume(file)
    notes = {"model": "run a", "weights": model.weights_id, "turns": [], "unread": [], "looked": False}
    for facts in (
        "{",
        "[" * 100_000,
        "[]",
        *(
            json.dumps(notes | c)
            for c in ({"turns": [["x", "y"]]}, {"turns": [["x"]]}, {"turns": 3}, {"unread": ["x"]})
        ),
    ):
        save_file({"a": torch.zeros(1)}, file, metadata={"format": FORMAT, "facts": facts})
        with pytest.raises(ValueError, match=r"s\.safetensors: no saved state can be read from it"):
            model.resume(file)
    save_file({"a": torch.zeros(1)}, file, metadata={"format": FORMAT, "facts": json.dumps(notes)})
    with pytest.raises(ValueError, match="its tensors are not those of a state"):
        model.resume(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no saved state of a conversation"):
        model.resume(file)
    with pytest.raises(ValueError, match=r"nothere: no saved state can be read"):
        model.resume(tmp_path / "nothere")


def test_another_projector_makes_another_model() -> None:
    a, b = answerer(), answerer()
    assert a.vision is not None and a.weights_id == b.weights_id
    b = answerer()
    with torch.no_grad():
        next(iter(b.vision.proj.parameters())).add_(1)  # type: ignore[union-attr]
    assert a.weights_id != b.weights_id


def test_an_answer_ended_early_is_part_of_the_conversation() -> None:
    model = answerer(of=Spy)
    chat = model.chat(picture(1))
    stream = chat.stream(QUESTIONS[1], Sampling(max_new_tokens=40, temperature=2, seed=5))
    pieces = [next(stream), next(stream)]
    stream.close()  # type: ignore[attr-defined]
    assert chat.turns[-1].text == "".join(pieces).strip() and chat.unread[-1] == END
    chat.stream(QUESTIONS[0])  # never begun: an empty answer
    chat.ask(QUESTIONS[2], DRAWN)
    assert [turn.role for turn in chat.turns] == ["human", "gpt"] * 3 and chat.turns[3].text == ""
    turn = ids_of(model, model.first_turn(QUESTIONS[2], image=False))
    assert model.read[1][1] == [END, *turn]  # type: ignore[attr-defined]


def test_the_caller_keeps_its_own_modes_between_pieces() -> None:
    model = answerer(bf16=True)
    for _ in model.stream(*ASKED[0], DRAWN):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
    model.answers(ASKED, DRAWN)
    assert continuation._DECODERS[model].logits.dtype == torch.bfloat16
    assert model.logits(torch.ones(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_a_model_that_nobody_holds_is_freed_with_its_decoder() -> None:
    model = answerer()
    model.answer(*ASKED[0], DRAWN)
    assert model.vision is not None and model in continuation._DECODERS
    greedy(model.vision, make_batch(model.vision, [(1, 1, 1)]), max_new_tokens=3, end_id=-1)
    assert model.vision in continuation._DECODERS
    alive = weakref.ref(model.rwkv)
    del model
    gc.collect()
    assert alive() is None


def test_logits_of_text_alone() -> None:
    model = answerer()
    ids = torch.randint(0, TOKENIZER.size, (2, 9))
    with torch.no_grad():
        wanted = model.rwkv.head(model.rwkv(model.rwkv.emb(ids))[0])
    torch.testing.assert_close(model.logits(ids), wanted)
    torch.testing.assert_close(model.logits(ids.to(torch.uint8)), wanted)
    for bad in (ids[0], ids.float(), ids > 0, ids + TOKENIZER.size, -ids - 1, ids[:, :0]):
        with pytest.raises(ValueError, match=r"^ids "):
            model.logits(bad)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    model = answerer()
    bad = tmp_path / "a.png"
    bad.write_bytes(b"GIF89a")
    text = Answerer(model.rwkv, TOKENIZER, model.prompt, None, "text")
    wordless = Answerer(model.rwkv, None, model.prompt, None, "x")
    for asked, message in [
        (lambda: model.answer(picture(1), " "), "the question is empty"),
        (lambda: model.answer(None, "<image>\nis it red?"), "there is no image"),
        (lambda: model.answer(tmp_path / "b.png", QUESTIONS[0]), r"b\.png: no picture can be read"),
        (lambda: model.answer(bad, QUESTIONS[0]), r"a\.png: no JPEG, PNG or WebP"),
        (lambda: model.answer(None, "are there dragons?"), "model.vocab=world"),
        (lambda: text.answer(picture(1), QUESTIONS[0]), "text has no vision parts"),
        (
            lambda: wordless.answer(None, "hi"),
            r"only logits\(ids\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            asked()
    chat = model.chat(picture(1))
    assert chat.ask(f"<image>\n{QUESTIONS[0]}", DRAWN) == model.answer(picture(1), QUESTIONS[0], DRAWN)
    with pytest.raises(ValueError, match="a conversation has one image"):
        chat.ask("<image> is it red?")
    assert text.answer(None, QUESTIONS[0], DRAWN) == model.answer(None, QUESTIONS[0], DRAWN)


@pytest.mark.gpu
@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_the_same_text_on_a_gpu(recurrence: str) -> None:
    model = answerer(recurrence)
    expected = [model.answers(ASKED, options) for options in (Sampling(max_new_tokens=40), DRAWN)]
    assert model.vision is not None
    model.vision.cuda()
    for options, wanted in zip((Sampling(max_new_tokens=40), DRAWN), expected, strict=True):
        assert model.answers(ASKED, options) == wanted
        assert [model.answer(*one, options) for one in ASKED] == wanted
